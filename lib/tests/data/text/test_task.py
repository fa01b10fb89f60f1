"""Text tasks: fingerprints, subsets, and what is refused."""

from dataclasses import replace

import pytest
from helpers.texts import toy_task

from effnn.base import InvalidInput
from effnn.data.text.task import Split, TextTask


def test_fingerprint_depends_on_rows_and_not_on_the_source():

    task = toy_task()
    assert task.fingerprint == replace(task, source="elsewhere").fingerprint == toy_task().fingerprint
    changed = replace(task, dev=Split(task.dev.texts, [1 - task.dev.label[0], *task.dev.label[1:]]))
    assert changed.fingerprint != task.fingerprint
    assert replace(task, train=task.train.take([1, 0, *range(2, 40)])).fingerprint != task.fingerprint


def test_subset_is_reproducible_and_small():
    small = toy_task().subset(train=8, dev=5, seed=3)
    assert (len(small.train), len(small.validation), len(small.dev)) == (8, 10, 5)
    assert small.fingerprint == toy_task().subset(train=8, dev=5, seed=3).fingerprint
    assert small.train.texts != toy_task().subset(train=8, dev=5, seed=4).train.texts


def test_unequal_columns_and_empty_splits_are_refused():
    with pytest.raises(InvalidInput, match="one label"):
        Split(["a", "b"], [1])
    with pytest.raises(InvalidInput, match="dev split"):
        TextTask("toy", ("a",), Split(["x"], [0]), Split(["x"], [0]), Split([], []), "here")


def test_majority():
    assert toy_task().majority() == 0.5 and not toy_task().regression
    assert toy_task(labels=()).regression
    with pytest.raises(InvalidInput, match="regression"):
        toy_task(labels=()).majority()
