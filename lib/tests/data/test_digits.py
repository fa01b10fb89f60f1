"""The digits: splits, batches, and the baseline on pixels."""

import torch

from effnn.data import digits


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
    batches = images.take(order).batches(4)
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), order)
    assert torch.equal(torch.cat([batch["pixel_values"].flatten() for batch in batches]), order.float())


def test_shuffled_batches_depend_on_seed_and_epoch_alone():
    images = digits.load().validation
    orders = [
        torch.cat([batch["labels"] for batch in images.batches(50, shuffle=True, seed=seed, epoch=epoch)]).tolist()
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert orders[0] == orders[1] and len({str(order) for order in orders}) == 3
    assert all(sorted(order) == sorted(images.labels.tolist()) for order in orders)


def test_logistic_regression_on_pixels_is_a_strong_baseline():
    assert 0.9 < digits.pixel_baseline(digits.load()) < 1
