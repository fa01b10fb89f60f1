"""The cache: equal keys are served, anything else is made again, and nothing half-written is ever stored."""

import functools
import importlib.util
import logging
import os
import time
from importlib.metadata import version

import pytest
import torch

from effnn import cache, paths
from effnn.base import InvalidInput, imports


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
    first = cache.remember("thing", {"a": 1, "b": "x"}, compute)
    second = cache.remember("thing", {"b": "x", "a": 1}, compute)
    assert compute.calls == 1
    assert torch.equal(first["weight"], second["weight"]) and second["curve"] == (0.5, 0.75)
    assert [path.suffix for path in folder.iterdir()] == [".joblib"]
    assert cache.entry("thing", {"a": 1, "b": "x"}, compute).exists()


@pytest.mark.parametrize("other", [{"a": 2}, {"a": 1, "b": None}, {"a": 1.5}, {"a": torch.tensor(1)}, {}])
def test_another_key_is_made_anew(other):
    assert cache.remember("thing", {"a": 1}, Counted("first")) == "first"
    assert cache.remember("thing", other, Counted("second")) == "second"
    assert cache.remember("elsewhere", {"a": 1}, Counted("third")) == "third"


def test_another_version_of_a_library_is_made_anew(monkeypatch):
    assert cache.remember("thing", {}, Counted("first")) == "first"
    monkeypatch.setattr(cache.metadata, "version", lambda name: "0.0" if name == "transformers" else version(name))
    assert cache.remember("thing", {}, Counted("second")) == "second"


START = "def f():\n    return 1\n\n\ndef never_called():\n    from effnn.near import nearer\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for effnn's package: start goes through near/nearer and near/far, and not through near/beside."""
    for name, text in {
        "__init__.py": "",
        "start.py": START,
        "near/__init__.py": "",
        "near/nearer.py": "def g():\n    from . import far\n",
        "near/far.py": "VALUE = 1  # a number\n",
        "near/beside.py": "",
    }.items():
        path = tmp_path / "effnn" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(imports, "PACKAGE", tmp_path / "effnn")
    return tmp_path / "effnn"


def edited(path, text):
    """A module's text, changed an hour before this process started."""
    path.write_text(text)
    early = time.time() - 3600
    os.utime(path, (early, early))


def test_an_edit_three_modules_away_is_made_anew(package):
    for path in package.rglob("*.py"):
        edited(path, path.read_text())
    f = module(package / "start.py", (package / "start.py").read_text()).f
    assert cache.remember("thing", {}, f) == 1
    assert cache.entry("thing", {}, f).exists()
    edited(package / "near/far.py", '"""What it is."""\n\nVALUE = 1\n')  # only words
    edited(package / "near/beside.py", "VALUE = 3\n")  # imported by nobody
    assert cache.entry("thing", {}, f).exists()
    edited(package / "near/far.py", "VALUE = 2\n")
    assert not cache.entry("thing", {}, f).exists()
    assert cache.remember("thing", {}, f) == 1 and cache.entry("thing", {}, f).exists()
    edited(package / "near/nearer.py", "def g():\n    pass\n")  # far is not reached any more
    assert not cache.entry("thing", {}, f).exists()


def test_code_is_found_behind_lambdas_partials_methods_and_objects(package):
    made = module(
        package / "start.py",
        START
        + "\n\nclass C:\n    def __call__(self):\n        pass\n\n    def m(self):\n        pass\n\n\nL = lambda: 1\n",
    )
    found = [imports.files_behind(f) for f in (made.L, functools.partial(made.f), made.C().m, made.C())]
    assert all(files == found[0] for files in found)
    names = {path.relative_to(package).as_posix() for path in found[0]}
    assert names == {"__init__.py", "start.py", "near/__init__.py", "near/nearer.py", "near/far.py"}


def test_a_function_without_a_file_is_refused():
    place = {}
    exec("def typed():\n    return 1", place)
    with pytest.raises(InvalidInput, match="'typed' is not defined in a file.*put it into a module"):
        cache.remember("thing", {}, place["typed"])


def test_changed_code_is_made_anew(tmp_path):
    one = module(tmp_path / "mine.py", "def f():\n    return 1\n")
    assert cache.remember("thing", {}, one.f) == 1
    other = module(tmp_path / "mine.py", "def f():\n    return 200\n")
    assert cache.remember("thing", {}, other.f) == 200


def test_code_that_was_edited_while_the_process_runs_is_not_filed_under_the_new_text(tmp_path, folder, caplog):
    mine = module(tmp_path / "mine.py", "def f():\n    return 1\n")
    (tmp_path / "mine.py").write_text("def f():\n    return 2\n")
    soon = time.time() + 1
    os.utime(tmp_path / "mine.py", (soon, soon))
    assert cache.remember("thing", {}, mine.f) == 1
    assert not folder.exists() or not list(folder.iterdir())
    assert "mine.py was edited" in caplog.text


def test_partial_work_of_edited_code_stays_with_the_process_that_did_it(tmp_path, monkeypatch):
    """A checkpoint that a later process would go on from must not stand under the key of the new text."""
    mine = module(tmp_path / "mine.py", "def f():\n    return 1\n")
    soon = time.time() + 1
    os.utime(tmp_path / "mine.py", (soon, soon))
    here = cache.entry("thing", {}, mine.f)
    assert here == cache.entry("thing", {}, mine.f)
    monkeypatch.setattr(cache, "_STARTED", soon + 1)  # the next process
    assert cache.entry("thing", {}, mine.f) != here


def test_functions_handed_to_a_partial_and_modules_imported_by_a_literal_name_count(package):
    (package / "near/beside.py").write_text(
        "import importlib\n\n\ndef b():\n    importlib.import_module('effnn.near.far')\n"
    )
    (package / "table.csv").write_text("1")
    start = module(package / "start.py", START)
    beside = module(package / "near/beside.py", (package / "near/beside.py").read_text())
    for given in (functools.partial(start.f, beside.b), functools.partial(start.f, key=functools.partial(beside.b))):
        names = {path.relative_to(package).as_posix() for path in imports.files_behind(given)}
        assert {"near/beside.py", "near/far.py", "table.csv"} <= names
    assert "near/beside.py" not in {path.name for path in imports.files_behind(functools.partial(start.f, 1, a="b"))}


def test_a_damaged_entry_is_made_again(folder, caplog):
    cache.remember("thing", {}, Counted(torch.ones(1000)))
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    compute = Counted(torch.zeros(2))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(cache.remember("thing", {}, compute), torch.zeros(2))
    assert "damaged" in caplog.text
    assert torch.equal(cache.remember("thing", {}, compute), torch.zeros(2)) and compute.calls == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_computation_that_fails_stores_nothing(folder, error):
    def fails():
        raise error("no")

    with pytest.raises(error):
        cache.remember("thing", {}, fails)
    assert not folder.exists() or not list(folder.iterdir())
    assert cache.remember("thing", {}, Counted(7)) == 7


def test_a_value_that_cannot_be_stored_leaves_no_file(folder):
    with pytest.raises(Exception, match="pickle"):
        cache.remember("thing", {}, Counted(lambda: None))
    assert not list(folder.iterdir())
