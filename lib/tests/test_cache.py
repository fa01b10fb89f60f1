"""The cache: equal keys are served, anything else is made again, and nothing half-written is ever stored."""

import importlib.util
import logging
import os
import time

import pytest
import torch

from effnn import cache, paths


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "thing"


class Counted:
    """A computation that counts its calls."""

    def __init__(self, value):
        self.value, self.calls = value, 0

    def __call__(self):
        self.calls += 1
        return self.value


def module(path, text):
    """A module from a file that was written an hour before this process started."""
    path.write_text(text)
    early = time.time() - 3600
    os.utime(path, (early, early))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_an_equal_key_is_served_from_the_disk(folder):
    compute = Counted({"weight": torch.arange(3.0), "curve": (0.5, 0.75)})
    first = cache.remember("thing", {"a": 1, "b": "x"}, compute, [])
    second = cache.remember("thing", {"b": "x", "a": 1}, compute, [])
    assert compute.calls == 1
    assert torch.equal(first["weight"], second["weight"]) and second["curve"] == (0.5, 0.75)
    assert [path.suffix for path in folder.iterdir()] == [".joblib"]
    assert cache.entry("thing", {"a": 1, "b": "x"}, []).exists()


@pytest.mark.parametrize("other", [{"a": 2}, {"a": 1, "b": None}, {"a": 1.5}, {"a": torch.tensor(1)}, {}])
def test_another_key_is_made_anew(other):
    assert cache.remember("thing", {"a": 1}, Counted("first"), []) == "first"
    assert cache.remember("thing", other, Counted("second"), []) == "second"
    assert cache.remember("elsewhere", {"a": 1}, Counted("third"), []) == "third"


def test_changed_code_is_made_anew(tmp_path):
    one = module(tmp_path / "mine.py", "def f():\n    return 1\n")
    assert cache.remember("thing", {}, one.f, [one]) == 1
    other = module(tmp_path / "mine.py", "def f():\n    return 2\n")
    assert cache.remember("thing", {}, other.f, [other]) == 2
    assert cache.remember("thing", {}, other.f, [other.f]) == 2  # a function, too, counts as code


def test_code_that_was_edited_while_the_process_runs_is_not_filed_under_the_new_text(tmp_path, folder, caplog):
    mine = module(tmp_path / "mine.py", "def f():\n    return 1\n")
    (tmp_path / "mine.py").write_text("def f():\n    return 2\n")
    soon = time.time() + 1
    os.utime(tmp_path / "mine.py", (soon, soon))
    assert cache.remember("thing", {}, mine.f, [mine]) == 1
    assert not folder.exists() or not list(folder.iterdir())
    assert "mine.py was edited" in caplog.text


def test_a_damaged_entry_is_made_again(folder, caplog):
    cache.remember("thing", {}, Counted(torch.ones(1000)), [])
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    compute = Counted(torch.zeros(2))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(cache.remember("thing", {}, compute, []), torch.zeros(2))
    assert "damaged" in caplog.text
    assert torch.equal(cache.remember("thing", {}, compute, []), torch.zeros(2)) and compute.calls == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_computation_that_fails_stores_nothing(folder, error):
    def fails():
        raise error("no")

    with pytest.raises(error):
        cache.remember("thing", {}, fails, [])
    assert not folder.exists() or not list(folder.iterdir())
    assert cache.remember("thing", {}, Counted(7), []) == 7


def test_a_value_that_cannot_be_stored_leaves_no_file(folder):
    with pytest.raises(Exception, match="pickle"):
        cache.remember("thing", {}, Counted(lambda: None), [])
    assert not list(folder.iterdir())
