"""Files out of pinned packages: by hash or not at all, from a real pip, a folder of archives standing for its index."""

import csv
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile

import pytest

from effnn import paths
from effnn.base import InvalidInput, NotAvailable
from effnn.data import packages

WEIGHTS = b"weights" * 1000
TABLE = b"a,b\n1,2\n"
WHEEL, SOURCE = "tiny_model-1.0-py3-none-any.whl", "tiny-set-2.0.tar.gz"


def sha(content):
    return hashlib.sha256(content).hexdigest()


def wheel(weights=WEIGHTS):
    """A wheel as pip takes it, with a model in it."""
    info = "tiny_model-1.0.dist-info"
    parts = {
        "tiny_model/__init__.py": b"raise SystemExit('imported')",
        "tiny_model/model.bin": weights,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in parts.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return stream.getvalue()


def tarred(parts):
    """A tar.gz; a value that is a text makes a symbolic link to it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in parts.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def source():
    """A source archive whose table lies in an archive within it."""
    return tarred({
        "tiny-set-2.0/PKG-INFO": b"Metadata-Version: 2.1\nName: tiny-set\nVersion: 2.0\n",
        "tiny-set-2.0/setup.py": b"from setuptools import setup\nsetup(name='tiny-set', version='2.0')\n",
        "tiny-set-2.0/inner.tar.gz": tarred({"inner/table.csv": TABLE}),
    })  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A lock, a list and a cache of their own, and a folder that pip takes for its only index."""
    index = tmp_path / "index"
    index.mkdir()
    (index / WHEEL).write_bytes(wheel())
    (index / SOURCE).write_bytes(source())
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(paths, "PACKAGES", tmp_path / "data" / "packages.csv")
    monkeypatch.setattr(paths, "PACKAGES_LOCK", tmp_path / "data" / "packages.lock")
    lock({"tiny-model==1.0": sha(wheel()), "tiny-set==2.0": sha((index / SOURCE).read_bytes())})
    table([
        ("model", "tiny-model", "tiny_model/model.bin", "model.bin", len(WEIGHTS), sha(WEIGHTS)),
        ("set", "tiny-set", "tiny-set-2.0/inner.tar.gz!inner/table.csv", "table.csv", len(TABLE), sha(TABLE)),
    ])  # fmt: skip
    return tmp_path


def lock(lines):
    text = "".join(f"{name} --hash=sha256:{digest}\n" for name, digest in lines.items())
    paths.PACKAGES_LOCK.write_text(f"# a comment\n{text}")


def table(rows):
    with paths.PACKAGES.open("w", newline="") as file:
        csv.writer(file).writerows([("name", "package", "member", "file", "bytes", "sha256"), *rows])


def archive_in_place(content, name="by-hand.zip"):
    place = paths.CACHE / "packages" / "archives"
    place.mkdir(parents=True, exist_ok=True)
    (place / name).write_bytes(content)


def nothing_half(home):
    """Neither half files nor temporary ones are left."""
    left = [path.name for path in (home / "cache").rglob("*") if path.name.startswith(".tmp-")]
    assert not left and not (home / "cache" / "packages" / "model" / "model.bin").exists()


def test_files_are_fetched_once_and_nothing_is_installed_or_imported(home, monkeypatch):
    model, tables = packages.fetch()
    assert (model / "model.bin").read_bytes() == WEIGHTS and (tables / "table.csv").read_bytes() == TABLE
    assert packages.folder("model") == model and packages.names() == ["model", "set"]
    monkeypatch.setattr(subprocess, "Popen", None)  # with all in place no process starts, so no network is used
    assert packages.fetch() == [model, tables]
    assert "tiny_model" not in sys.modules


def test_an_interrupted_fetch_goes_on_with_what_is_there(home, monkeypatch):
    packages.fetch(["set"])
    (home / "index" / SOURCE).unlink()
    os.utime(packages.folder("set") / "table.csv", (1, 1))
    assert len(packages.fetch()) == 2
    (home / "index" / WHEEL).unlink()
    (packages.folder("model") / "model.bin").unlink()
    assert packages.fetch(["model"])  # out of the archive that is there already


def test_a_damaged_file_and_half_an_archive_are_made_again(home):
    packages.fetch()
    path = packages.folder("model") / "model.bin"
    path.write_bytes(WEIGHTS[:-7] + b"planted")
    with pytest.raises(NotAvailable, match="model is not on this machine, or damaged .model.bin in"):
        packages.folder("model")
    archive_in_place(wheel()[:500], WHEEL)
    packages.fetch()
    assert path.read_bytes() == WEIGHTS
    assert [one.name for one in (home / "cache" / "packages" / "archives").iterdir()].count(WHEEL) == 1


def test_an_archive_put_there_by_hand_counts_by_its_hash(home, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    archive_in_place(wheel())
    assert packages.fetch(["model"])


@pytest.mark.parametrize("planted", ["another file of that name", "the hash in the lock"])
def test_a_wrong_hash_is_refused_with_the_ways_out(home, planted):
    if planted == "the hash in the lock":
        lock({"tiny-model==1.0": "0" * 64})
    else:
        (home / "index" / WHEEL).write_bytes(wheel(b"other"))
    with pytest.raises(NotAvailable, match="tiny-model 1.0 was not fetched .*again when .* or put the archive"):
        packages.fetch(["model"])
    nothing_half(home)


def test_an_index_out_of_reach_is_one_sentence(home, monkeypatch):
    (home / "index" / WHEEL).unlink()
    with pytest.raises(NotAvailable) as caught:
        packages.fetch()
    text = str(caught.value)
    assert "No matching distribution found for tiny-model==1.0" in text and "\n" not in text
    assert str(home / "cache" / "packages" / "archives") in text
    nothing_half(home)


def test_files_and_folders_that_vanish_while_they_are_counted_do_not_matter(tmp_path):
    import threading

    def come_and_go():
        for number in range(300):
            inner = tmp_path / f"pip-{number % 3}" / "deep"
            inner.mkdir(parents=True)
            (inner / "part").write_bytes(b"12345")
            (inner / "part").unlink()
            inner.rmdir()
            inner.parent.rmdir()

    (tmp_path / "stays").write_bytes(b"123")
    other = threading.Thread(target=come_and_go)
    other.start()
    while other.is_alive():
        assert packages._bytes_in(tmp_path) in (3, 8)
    other.join()
    assert packages._bytes_in(tmp_path) == 3


def test_a_python_without_pip_is_named(home, monkeypatch):
    broken = home / "python"
    broken.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(NotAvailable, match="No module named pip"):
        packages.fetch(["model"])


MEMBERS = {
    "a link": (tarred({"a": "/etc/passwd"}), "a", "not a regular file"),
    "longer than listed": (tarred({"a": WEIGHTS + b"more"}), "a", "bytes, 7000 were expected"),
    "another content": (tarred({"a": WEIGHTS[::-1]}), "a", "has the sha256"),
    "missing": (tarred({"b": WEIGHTS}), "a", "cannot be read out of"),
    "no archive": (b"no archive at all", "a", "cannot be read out of"),
    "a folder": (tarred({"a/b": WEIGHTS}), "a", "cannot be read out of"),
}


@pytest.mark.parametrize("case", MEMBERS)
def test_only_a_regular_file_of_the_listed_size_and_hash_comes_out(home, case):
    content, member, message = MEMBERS[case]
    lock({"tiny-model==1.0": sha(content)})
    archive_in_place(content)
    table([("model", "tiny-model", member, "model.bin", len(WEIGHTS), sha(WEIGHTS))])
    with pytest.raises(NotAvailable, match=message):
        packages.fetch()
    nothing_half(home)


def test_a_zip_that_says_less_than_it_holds_stops_at_the_listed_size(home):
    """The size that the archive states is a statement only: what comes out is counted."""
    content = bytearray(wheel())
    stated = len(WEIGHTS).to_bytes(4, "little")
    smaller = (len(WEIGHTS) - 1).to_bytes(4, "little")
    content = bytes(content.replace(stated + stated, smaller + smaller))
    lock({"tiny-model==1.0": sha(content)})
    archive_in_place(content)
    table([("model", "tiny-model", "tiny_model/model.bin", "model.bin", len(WEIGHTS) - 1, sha(WEIGHTS[:-1]))])
    with pytest.raises(NotAvailable):
        packages.fetch()
    nothing_half(home)


@pytest.mark.parametrize("bad", ["../model.bin", "a/b", "..", ""])
def test_no_path_out_of_the_folder(home, bad):
    table([("model", "tiny-model", "tiny_model/model.bin", bad, 1, "0")])
    with pytest.raises(InvalidInput, match="not a plain file name"):
        packages.fetch()


def test_an_inner_archive_that_is_too_large_is_refused(home, monkeypatch):
    monkeypatch.setattr(packages, "INNER", 10)
    with pytest.raises(NotAvailable, match="at most 10 were expected"):
        packages.fetch(["set"])


def test_an_unknown_name_lists_those_there_are(home):
    with pytest.raises(InvalidInput, match="'modell': expected one of model, set"):
        packages.fetch(["modell"])


FULL = """
import resource
from effnn.base import CannotWrite
from effnn.data import packages
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
try:
    packages.fetch(["model"])
except CannotWrite as error:
    print(error)
"""


def test_a_full_disk_is_said_as_such(home):
    archive_in_place(wheel())
    env = os.environ | {"EFFNN_HOME": str(home), "EFFNN_CACHE": str(home / "cache")}
    done = subprocess.run([sys.executable, "-c", FULL], env=env, capture_output=True, text=True, timeout=200)
    assert "model.bin could not be written (File too large)" in done.stdout, done.stderr
    nothing_half(home)


def test_the_list_fits_the_lock():
    """Of every package that is listed an archive is pinned, and the files of a set have names of their own."""
    rows = packages.members()
    assert {row.package for row in rows} == set(packages.archives())
    assert len({(row.name, row.file) for row in rows}) == len(rows)
    assert all(len(row.sha256) == 64 and row.bytes > 0 for row in rows)
    assert not any(row.file.endswith((".bin", ".pt", ".pkl", ".py")) for row in rows)  # nothing that runs when loaded


def test_the_command_line(home, capsys):
    from effnn.data.__main__ import main

    assert main(["packages", "set"]) == 0 and "out of packages: set" in capsys.readouterr().out
    (home / "index" / WHEEL).unlink()
    assert main(["packages"]) == 1 and "tiny-model 1.0 was not fetched" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["packages", "modell"])
    assert "choose from model, set" in capsys.readouterr().err
