"""The bag-of-words baseline."""

import pytest
from helpers.texts import toy_task

from effnn.base import InvalidInput
from effnn.data import text


def test_bag_of_words_solves_a_planted_task_and_is_cached(monkeypatch):
    found = text.bag_of_words(toy_task())
    assert found.accuracy == found.validation_accuracy == 1.0
    monkeypatch.setattr("effnn.data.text.baseline.bag_of_words", lambda _: pytest.fail("fitted again"))
    assert text.bag_of_words(toy_task()) == found
    monkeypatch.undo()
    with pytest.raises(InvalidInput, match="regression"):
        text.bag_of_words(toy_task(labels=()))
