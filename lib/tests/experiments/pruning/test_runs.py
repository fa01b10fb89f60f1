"""The sweep: which jobs, choices on validation, one reading of dev, times in turn, and the cache; texts and images."""

import dataclasses

import pytest
import torch

from effnn import ltp, paths
from effnn.base import InvalidInput
from effnn.data import digits
from effnn.experiments.pruning import competitors, figures, runs
from effnn.experiments.shared import training
from effnn.experiments.shared.classifier import train_classifier
from effnn.experiments.shared.models import VIT, ClassifierConfig

SWEEP = runs.Sweep(rows=64, batch=16, trials=2, retrain_budgets=(0.6,), retrain_epochs=1)


def test_jobs_cover_every_checkpoint_and_draws_only_at_the_extra_budgets():
    configs = [ClassifierConfig(family=f, seed=s) for f in ("bert", "electra") for s in (0, 1, 2)]
    listed = runs.jobs(configs, [0.4, 0.6], [0.2, 0.4], [7, 8])
    assert len(listed) == len(set(listed)) == 2 * 6 + 1 * 2 * 2
    assert {(b, s) for c, b, s in listed if c == configs[1]} == {(0.4, 7), (0.6, 7)}
    assert {(b, s) for c, b, s in listed if c == configs[3]} == {(0.4, 7), (0.6, 7), (0.2, 7), (0.2, 8)}


def test_other_tasks_may_not_replace_the_built_in_results():
    runs.check_profile("laptop", "docstrings"), runs.check_profile("sst2", "sst2")
    with pytest.raises(InvalidInput, match="PROFILE=sst2"):
        runs.check_profile("laptop", "sst2")


@pytest.fixture
def reads(monkeypatch):
    """Rows of the splits that a model was evaluated on, in order; and the recipes of what was retrained."""
    seen, evaluate, fit = [], runs.evaluate, competitors.fit

    def watched(model, batches):
        seen.append(sum(len(batch["labels"]) for batch in batches))
        return evaluate(model, batches)

    def trained(model, rows, validation, recipe, **options):
        seen.append(recipe)
        return fit(model, rows, validation, recipe, **options)

    monkeypatch.setattr(runs, "evaluate", watched)
    monkeypatch.setattr(competitors, "fit", trained)
    return seen


def test_choices_are_made_on_validation_and_dev_is_read_once_a_row(start, reads):
    task, config, trained = start
    frame = runs.run_sweep(task, [(config, 0.6, 0)], SWEEP)
    assert sorted(frame.method) == ["magnitude", "random", "rearrange", "retrain", "search", "tune"]
    dev, validation = len(task.dev), len(task.validation)
    recipes = [item for item in reads if isinstance(item, training.Recipe)]
    assert [recipe.learning_rate for recipe in recipes] == list(runs.RETRAIN_RATES[:2])
    read = [item for item in reads if item not in recipes]
    assert read[:2] == [validation, validation] and read[2:] == [dev] * 6
    row = frame.set_index("method")
    assert (frame.mac_ratio <= 0.6).all() and (frame.dense_accuracy == trained.accuracy).all()
    assert row.mac_ratio["retrain"] == row.mac_ratio["rearrange"]
    assert row.loc["retrain", ["seconds", "prune_seconds"]].min() > 0 and row.load["retrain"] >= 0
    # the same numbers, one by one
    tries = [runs.prune_checkpoint(task, config, 0.6, 0, SWEEP, trial) for trial in (0, 1)]
    rows = trained.encode(task.validation)
    scores = [runs._accuracy(ltp.shrink(trained.model, one.stages["tune"]), rows) for one in tries]
    assert row.trial["tune"] == scores.index(max(scores))
    found = runs.chosen(frame, task, config, 0.6, 0, SWEEP)
    assert torch.equal(found.stages["tune"].filters, tries[int(row.trial["tune"])].stages["tune"].filters)


def test_pruning_and_retraining_are_timed_in_turn_and_the_training_is_the_same(start, monkeypatch):
    task, config, trained = start
    sweep = dataclasses.replace(SWEEP, trials=1, retrain_epochs=3)
    order, prune, run_epoch = [], ltp.prune, training.run_epoch
    monkeypatch.setattr(ltp, "prune", lambda *a, **k: (order.append("prune"), torch.rand(1), prune(*a, **k))[-1])
    monkeypatch.setattr(training, "run_epoch", lambda *a, **k: (order.append("epoch"), run_epoch(*a, **k))[-1])
    row = runs.run_sweep(task, [(config, 0.6, 0)], sweep).set_index("method").loc["retrain"]
    assert order == ["prune", *["prune", "epoch"] * 3]  # the first is the pruning itself
    masks = runs.prune_checkpoint(task, config, 0.6, 0, sweep).stages["rearrange"]
    recipe = dataclasses.replace(config.recipe(), epochs=3, learning_rate=runs.RETRAIN_RATES[0])
    alone, rows = ltp.shrink(trained.model, masks), trained.encode(task.train)
    training.fit(alone, rows, trained.encode(task.validation), recipe)
    dev = trained.encode(task.dev).batches(training.EVALUATION_BATCH)
    assert training.evaluate(alone, dev).loss == row.loss


def test_what_the_sweep_pruned_is_not_pruned_again(start, monkeypatch):
    task, config, _ = start
    frame = runs.run_sweep(task, [(config, 0.6, 0)], SWEEP)
    monkeypatch.setattr(ltp, "prune", None)
    for trial in (0, 1):
        later = frame.assign(trial=trial)
        assert runs.chosen(later, task, config, 0.6, 0, SWEEP).report["rows"] == 64
    assert runs.run_sweep(task, [(config, 0.6, 0)], SWEEP).equals(frame)


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    return digits.load(), dataclasses.replace(VIT, epochs=6, layers=2, hidden=32, ffn=64, learning_rate=3e-3)


def test_images_go_through_the_same_sweep(images):
    task, config = images
    sweep = dataclasses.replace(SWEEP, rows=128, batch=32, retrain_epochs=6)
    listed = runs.jobs([config], [0.4, 0.6], [], [0])
    frame = runs.run_sweep(task, listed, sweep)
    at = {budget: set(group.method) for budget, group in frame.groupby("budget")}
    assert at[0.6] - at[0.4] == {"retrain"} and at[0.4] == {*runs.STAGES, "magnitude", "random"}
    assert (frame.mac_ratio <= frame.budget).all() and (frame.family == "vit").all()
    assert frame[frame.method == "tune"].trial.isin([0, 1]).all()
    retrained = frame[frame.method == "retrain"]
    assert (retrained.accuracy > 0.3).all()
    figures.draw_tradeoff(frame, {"logistic regression": 0.95}, title="ViT")
    assert runs.run_sweep(task, listed, sweep).equals(frame)


def test_the_try_that_is_best_on_validation_is_taken(images, monkeypatch):
    read, (task, config) = [], images
    trained = train_classifier(task, config)

    def accuracy(model, batches):
        read.append(sum(len(batch["labels"]) for batch in batches))
        return training.Accuracy(0.0, 0.9 if len(read) == 2 else 0.5, read[-1])

    monkeypatch.setattr(runs, "evaluate", accuracy)
    rows = runs._rows(task, trained, 0.5, 0, dataclasses.replace(SWEEP, rows=128, batch=32))
    assert next(row["trial"] for row in rows if row["method"] == "tune") == 1
    assert read == [297, 297] + [500] * 5
    assert ltp.Shape.of(trained.model).layers == 2


def test_numbers_of_tries_have_an_end():
    with pytest.raises(InvalidInput, match="1 to 3"):
        runs.Sweep(trials=4)
