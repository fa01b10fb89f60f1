"""Small classifiers: a planted task is learned, runs repeat, resume after a kill, and come from the cache."""

import dataclasses
import os
from collections import OrderedDict

import pytest
import torch
import yaml
from helpers.planted import TINY, planted_task

from effnn import paths
from effnn.base import InvalidInput
from effnn.data import digits, text
from effnn.experiments.shared import classifier, models, training
from effnn.experiments.shared.classifier import evaluate, train_classifier
from effnn.experiments.shared.models import VIT, ClassifierConfig


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")


def _weights(trained: classifier.TrainedClassifier) -> OrderedDict:
    return trained.model.state_dict()


def _equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", models.TEXT_FAMILIES)
def test_every_family_learns_a_planted_task(family):
    trained = train_classifier(planted_task(), ClassifierConfig(**TINY, family=family))
    assert trained.accuracy > 0.9 and len(trained.accuracy_curve) == 3
    assert trained.dev.n == 60
    assert trained.model.config.model_type == family and trained.model.config.id2label == {0: "no", 1: "yes"}
    assert not trained.model.training
    dev = text.encode_split(planted_task().dev, trained.tokenizer, 16)
    again = evaluate(trained.model, text.loader(dev, 7))
    assert again.accuracy == trained.accuracy and again.loss == pytest.approx(trained.dev.loss, abs=1e-5)


@pytest.mark.parametrize("family", models.TEXT_FAMILIES)
def test_pairs_of_texts_work_in_every_family(family):
    trained = train_classifier(planted_task(60, pairs=True), ClassifierConfig(**(TINY | {"epochs": 1}), family=family))
    assert trained.dev.n == 60


def test_regression_reports_rank_correlation():
    trained = train_classifier(planted_task(labels=()), ClassifierConfig(**TINY))
    assert trained.accuracy > 0.6 and trained.model.config.num_labels == 1


def test_the_second_call_trains_nothing(monkeypatch):
    first = train_classifier(planted_task(60), ClassifierConfig(**TINY))
    monkeypatch.setattr(training, "run_epoch", lambda *_: pytest.fail("trained again"))
    second = train_classifier(planted_task(60), ClassifierConfig(**TINY))
    assert _equal(_weights(first), _weights(second))
    assert (first.accuracy_curve, first.dev, first.seconds) == (second.accuracy_curve, second.dev, second.seconds)
    assert [one.dev for one in classifier.train_classifiers(planted_task(60), [ClassifierConfig(**TINY)])] == [
        first.dev
    ]


def test_equal_seeds_give_equal_weights_and_others_do_not(tmp_path, monkeypatch):
    found = []
    for i, seed in enumerate((0, 0, 1)):
        monkeypatch.setattr(paths, "CACHE", tmp_path / str(i))
        torch.manual_seed(i)  # the caller's generator must not matter
        found.append(_weights(train_classifier(planted_task(60), ClassifierConfig(**TINY, seed=seed))))
    assert _equal(found[0], found[1])
    assert not _equal(found[0], found[2])


def test_training_leaves_the_callers_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train_classifier(planted_task(60), ClassifierConfig(**TINY))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("stop_in_epoch", [1, 2])
def test_a_stopped_run_goes_on_and_ends_with_the_same_weights(tmp_path, monkeypatch, stop_in_epoch):
    config = ClassifierConfig(**TINY)
    whole = train_classifier(planted_task(60), config)
    monkeypatch.setattr(paths, "CACHE", tmp_path / "other")
    epochs, run_epoch = [], training.run_epoch

    def stopped(model, optimizer, rows, recipe, epoch, bar):
        epochs.append(epoch)
        if epoch == stop_in_epoch and epochs.count(epoch) == 1:
            raise KeyboardInterrupt
        run_epoch(model, optimizer, rows, recipe, epoch, bar)

    monkeypatch.setattr(training, "run_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(planted_task(60), config)
    assert list((tmp_path / "other" / "classifier").glob("*.partial.pt"))
    resumed = train_classifier(planted_task(60), config)
    assert epochs == [*range(stop_in_epoch + 1), *range(stop_in_epoch, 3)]
    assert _equal(_weights(whole), _weights(resumed)) and whole.accuracy_curve == resumed.accuracy_curve
    assert not list((tmp_path / "other" / "classifier").glob("*.partial.pt"))


def test_a_damaged_epoch_is_not_used(tmp_path, monkeypatch):
    whole = train_classifier(planted_task(60), ClassifierConfig(**TINY))
    monkeypatch.setattr(paths, "CACHE", tmp_path / "other")
    run_epoch = training.run_epoch

    def stopped(*arguments):
        if arguments[4] == 1:
            raise KeyboardInterrupt
        run_epoch(*arguments)

    monkeypatch.setattr(training, "run_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_classifier(planted_task(60), ClassifierConfig(**TINY))
    monkeypatch.setattr(training, "run_epoch", run_epoch)
    (partial,) = (tmp_path / "other" / "classifier").glob("*.partial.pt")
    partial.write_bytes(partial.read_bytes()[:-100])
    assert _equal(_weights(train_classifier(planted_task(60), ClassifierConfig(**TINY))), _weights(whole))


def test_processes_train_what_is_missing(monkeypatch):
    configs = [ClassifierConfig(**(TINY | {"epochs": 1}), seed=seed) for seed in (0, 1)]
    monkeypatch.setenv("EFFNN_CACHE", str(paths.CACHE))  # the workers read the environment, not this test's patch
    found = classifier.train_classifiers(planted_task(60), configs, workers=2)
    assert [one.config.seed for one in found] == [0, 1]
    assert not _equal(_weights(found[0]), _weights(found[1]))


def test_fine_tuning_trains_the_given_model_under_its_hooks():
    task = planted_task()
    trained = train_classifier(task, ClassifierConfig(**(TINY | {"epochs": 1, "learning_rate": 1e-4})))
    rows, validation, dev = (trained.encode(split) for split in task.splits().values())
    before = evaluate(trained.model, text.loader(dev))
    calls = []
    hook = trained.model.bert.encoder.layer[0].output.dense.register_forward_pre_hook(lambda *_: calls.append(1))
    end = training.fit(trained.model, rows, validation, training.Recipe(2, 16, 5e-3))
    hook.remove()
    assert len(end.curve) == 2
    assert evaluate(trained.model, text.loader(dev)).loss < before.loss
    assert calls


def test_a_vit_learns_repeats_and_comes_from_the_cache(monkeypatch):
    task = digits.load()
    config = dataclasses.replace(VIT, epochs=6, layers=2, hidden=32, ffn=64, learning_rate=3e-3)
    first = train_classifier(task, config)
    assert first.dev.accuracy > 3 * task.majority() and not first.model.training
    again = models.build_model(task, config)
    torch.manual_seed(5)  # the caller's generator must not matter
    training.fit(again, task.train, task.validation, config.recipe())
    assert _equal(again.state_dict(), _weights(first))
    monkeypatch.setattr(classifier, "fit", None)
    assert train_classifier(task, config).seconds == first.seconds


def test_families_and_rows_that_do_not_go_together_are_refused():
    for task, family in ((planted_task(60), "vit"), (digits.load(), "bert")):
        with pytest.raises(InvalidInput, match=f"{family} does not take the rows of {task.name}"):
            train_classifier(task, ClassifierConfig(**TINY, family=family))


def test_schedule_rises_and_falls_to_zero():
    factors = [training.schedule(step, 20, 0.1) for step in range(20)]
    assert factors[:2] == [0.5, 1.0] and factors == factors[:2] + sorted(factors[2:], reverse=True)
    assert 0 < factors[-1] < 0.1 and max(factors) == 1.0
    assert training.schedule(0, 1, 0.0) == 1.0


def test_evaluation_weighs_rows_and_not_batches():
    class Echo(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, input_ids, attention_mask, labels):
            out = type("Out", (), {})()
            out.logits = torch.nn.functional.one_hot(input_ids[:, 1] % 2, 2) * 5.0 * self.scale
            out.loss = torch.nn.functional.cross_entropy(out.logits, labels)
            return out

    rows = text.EncodedSplit(
        [{"input_ids": torch.tensor([2, i, 3]), "labels": torch.tensor(int(i >= 5))} for i in range(10)], 0
    )
    scores = [evaluate(Echo(), text.loader(rows, size, bucket=False)) for size in (10, 3)]
    expected = sum(i % 2 == (i >= 5) for i in range(10)) / 10
    assert [score.accuracy for score in scores] == [expected, expected]
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-5) and scores[0].n == 10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"family": "gpt"}, "choose one of bert, roberta, distilbert, electra"),
        ({"hidden": 30, "heads": 4}, "cannot be divided"),
        ({"epochs": 0}, "epochs >= 1"),
        ({"learning_rate": -1.0}, "learning_rate > 0"),
        ({"family": "vit", "hidden": 30, "heads": 4}, "cannot be divided"),
        ({"family": "vit", "epochs": 0}, "epochs >= 1"),
    ],
)
def test_wrong_configurations_are_refused(wrong, message):
    with pytest.raises(InvalidInput, match=message):
        ClassifierConfig(**wrong)


def test_a_loss_that_is_not_a_number_stops_the_training():
    with pytest.raises(InvalidInput, match="smaller learning rate"):
        train_classifier(planted_task(60), ClassifierConfig(**(TINY | {"learning_rate": 1e30, "warmup": 0.0})))


@pytest.mark.slow
def test_sst2_from_scratch_reaches_three_quarters():
    folder = os.environ.get("EFFNN_SST2")
    if not folder:
        pytest.skip("set EFFNN_SST2 to a folder of the published SST-2 TSV files to run this")
    profile = yaml.safe_load((paths.PROFILES / "sst2.yml").read_text())["01_post_training_pruning"]
    names = ("layers", "hidden", "heads", "ffn", "epochs", "max_length")  # what the notebook trains
    configs = [models.SST2, ClassifierConfig(**{name: profile[name] for name in names})]
    for config in configs:
        assert train_classifier(text.load("sst2", source=folder), config).accuracy >= 0.75
