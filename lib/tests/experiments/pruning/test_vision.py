"""The digits and the vision sweep: splits, training, and the same comparison as on text."""

import pytest
import torch

from effnn import ltp, paths
from effnn.base import InvalidInput
from effnn.data import digits
from effnn.experiments.pruning import figures as pruning_figures
from effnn.experiments.pruning import runs as pruning
from effnn.experiments.pruning import vision

SWEEP = pruning.Sweep(rows=128, batch=32, trials=2, retrain_budgets=(0.6,))
CONFIG = vision.VisionConfig(epochs=6, layers=2, hidden=32, ffn=64, learning_rate=3e-3)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")


def test_the_splits_are_disjoint_even_and_always_the_same():
    task = digits.load()
    parts = (task.train, task.validation, task.dev)
    assert [len(part) for part in parts] == list(digits.SPLIT.values()) and sum(map(len, parts)) == 1797
    assert task.train.pixels.shape == (1000, 1, 8, 8) and task.train.pixels.dtype == torch.float32
    assert task.train.pixels.min() == -1 and task.train.pixels.max() == 1
    for part in parts:
        share = part.labels.bincount(minlength=10) / len(part)
        assert (share - 0.1).abs().max() < 0.01
    seen = [{row.numpy().tobytes() for row in part.pixels} for part in parts]
    assert not (seen[0] & seen[2] or seen[1] & seen[2])
    digits.load.cache_clear()
    assert digits.load().fingerprint == task.fingerprint and task.majority() < 0.12


def test_batches_hold_every_row_once_in_the_given_order():
    images = digits.Images(torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10))
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    batches = images.batches(4, order)
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), order)
    assert torch.equal(torch.cat([batch["pixel_values"].flatten() for batch in batches]), order.float())


def test_logistic_regression_on_pixels_is_a_strong_baseline():
    assert 0.9 < digits.pixel_baseline(digits.load()) < 1


def test_training_learns_repeats_and_comes_from_the_cache(monkeypatch):
    task = digits.load()
    first = vision.train_vit(task, CONFIG)
    assert first.dev.accuracy > 3 * task.majority() and not first.model.training
    again = vision.build_vit(CONFIG)
    torch.manual_seed(5)  # the caller's generator must not matter
    vision.fit(again, task.train, CONFIG.recipe())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), first.model.parameters(), strict=True))
    monkeypatch.setattr(vision, "fit", None)
    assert vision.train_vit(task, CONFIG).seconds == first.seconds


def test_the_sweep_compares_all_methods_within_the_budget():
    frame = vision.run_vision_sweep([CONFIG], [0.4, 0.6], 0, SWEEP)
    at = {budget: set(group.method) for budget, group in frame.groupby("budget")}
    assert at[0.6] - at[0.4] == {"retrain"} and at[0.4] == {*pruning.STAGES, "magnitude", "random"}
    assert (frame.mac_ratio <= frame.budget).all() and (frame.family == "vit").all()
    tuned = frame[frame.method == "tune"]
    assert (tuned.seconds > 0).all() and tuned.trial.isin([0, 1]).all()
    assert (frame[frame.method == "retrain"].accuracy > 0.3).all()
    pruning_figures.draw_tradeoff(frame, {"logistic regression": 0.95}, title="ViT")
    assert vision.run_vision_sweep([CONFIG], [0.4, 0.6], 0, SWEEP).equals(frame)


def test_the_try_that_is_best_on_validation_is_taken(monkeypatch):
    read = []

    def accuracy(model, images):
        read.append(len(images))
        score = 0.9 if len(read) == 2 else 0.5
        return vision.Accuracy(0.0, score, len(images))

    task, trained = digits.load(), vision.train_vit(digits.load(), CONFIG)
    monkeypatch.setattr(vision, "_accuracy", accuracy)
    rows = vision._rows(task, trained, 0.5, 0, SWEEP)
    assert next(row["trial"] for row in rows if row["method"] == "tune") == 1
    assert read == [297, 297] + [500] * 5
    assert ltp.Shape.of(trained.model).layers == 2


def test_wrong_configurations_are_refused():
    with pytest.raises(InvalidInput, match="cannot be divided"):
        vision.VisionConfig(hidden=30, heads=4)
    with pytest.raises(InvalidInput, match="epochs >= 1"):
        vision.VisionConfig(epochs=0)
