"""The Makefile, with a stand-in for Python that only notes what it is asked: no network, nothing installed."""

import os
import re
import shutil
import subprocess

import pytest

from effnn import paths

TARGETS = "env reproduce study test test-slow lint lab claims report bench data clean clean-cache".split()
TESTS = "-m pytest -n {} --dist loadscope"
NOTEBOOKS = "-m pytest -n {} --dist loadfile --nbval-lax --nbval-current-env notebooks/01_a.ipynb"
FILES = ("Makefile", "requirements.lock", "requirements-ccl.lock", "pyproject.toml")

# Says that it is Python 3.12, "makes" a .venv whose python is itself, and notes every other call; fails on request.
STAND_IN = """\
#!/bin/sh
case "$1 $2" in
  "-c "*) echo "${STAND_IN_VERSION:-3.12}"; exit 0;;
esac
echo "$*" >> "$STAND_IN_LOG"
case "$*" in
  "-m venv --clear .venv") rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python;;
esac
case "$*" in *"${STAND_IN_FAILS:-nothing fails}"*) exit 1;; esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def folder(tmp_path):
    """The files that `make env` goes by, in a folder of their own, and the stand-in."""
    work = tmp_path / "a clone"
    work.mkdir()
    for name in FILES:
        shutil.copy(paths.HOME / name, work)
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    return work


def make(folder, *arguments, check=True, **environment):
    """Run make; returns the finished process and the calls that the stand-in noted."""
    log = folder.parent / "log"
    log.write_text("")
    # What an outer make has put into the environment is not meant for this one.
    clean = {name: value for name, value in os.environ.items() if not re.match("MAKE|MFLAGS", name)}
    for name in ("NOTEBOOK", "PROFILE", "ARGS", "WORKERS", "KEY", "TORCH_INDEX"):
        clean.pop(name, None)
    clean |= {"PYTHON": str(folder.parent / "python"), "STAND_IN_LOG": str(log)} | environment
    done = subprocess.run(["make", *arguments], cwd=folder, env=clean, capture_output=True, text=True, timeout=60)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done, log.read_text().splitlines()


def out_of_date(folder):
    """Make the environment older than the locks."""
    os.utime(folder / ".venv/.complete", (1, 1))


def test_make_alone_prints_every_target_and_variable_and_does_nothing(folder):
    done, calls = make(folder)
    shown = re.findall(r"^  ([A-Za-z_-]+) ", done.stdout, flags=re.MULTILINE)
    assert set(TARGETS) <= set(shown)
    assert {"PYTHON", "NOTEBOOK", "PROFILE", "ARGS", "WORKERS", "KEY", "TORCH_INDEX"} <= set(shown)
    assert calls == []


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.10"])
def test_an_old_python_is_refused_with_the_way_out(folder, version):
    done, calls = make(folder, "test", check=False, STAND_IN_VERSION=version)
    assert done.returncode != 0 and calls == []
    assert f"needs Python 3.11 or newer, but '{folder.parent}/python' is {version}" in done.stderr
    assert "make env PYTHON=python3.12" in done.stderr
    done, calls = make(folder, "env", check=False, PYTHON="no-such-python")
    assert done.returncode != 0 and "'no-such-python' is not a Python that runs" in done.stderr


def test_env_installs_the_locks_once(folder):
    _, calls = make(folder, "env", TORCH_INDEX="https://example.invalid/cpu")
    assert calls[0] == "-m venv --clear .venv"
    assert "--no-deps" in calls[1] and "--extra-index-url https://example.invalid/cpu torch==2.13.0" in calls[1]
    assert calls[2] == "-m pip install -r requirements.lock"
    assert calls[-2:] == ["-m pip install --no-deps --no-build-isolation -e .", "-m effnn.data packages"]
    here = os.uname() if hasattr(os, "uname") else None
    on_linux = here is not None and (here.sysname, here.machine) == ("Linux", "x86_64")
    assert ("-m pip install -r requirements-ccl.lock" in calls) == on_linux
    _, calls = make(folder, "env")
    assert calls == []
    _, calls = make(folder, "lint", "-j4")
    assert [call for call in calls if "pip" in call or "venv" in call] == []
    out_of_date(folder)
    _, calls = make(folder, "env", TORCH_INDEX="")
    assert calls[0] == "-m pip install -r requirements.lock"  # an update in place, and no other index


def test_an_index_out_of_reach_does_not_stop_env(folder):
    done, calls = make(folder, "env", TORCH_INDEX="https://example.invalid/cpu", STAND_IN_FAILS="example.invalid")
    assert "pip's own index is asked next" in done.stdout and calls[-2].endswith("-e .")


def test_packages_out_of_reach_do_not_stop_env(folder):
    done, _ = make(folder, "env", STAND_IN_FAILS="effnn.data packages")
    assert "go on without" in done.stdout and make(folder, "env")[1] == []


def test_an_interrupted_or_moved_environment_is_made_anew(folder):
    done, _ = make(folder, "env", check=False, STAND_IN_FAILS="-r requirements.lock")
    assert done.returncode != 0
    _, calls = make(folder, "env")
    assert calls[0] == "-m venv --clear .venv"
    out_of_date(folder)
    make(folder, "env", check=False, STAND_IN_FAILS="-e .")  # an update that is interrupted counts as well
    _, calls = make(folder, "env")
    assert calls[0] == "-m venv --clear .venv"
    moved = folder.rename(folder.parent / "moved")
    _, calls = make(moved, "env")
    assert calls[0] == "-m venv --clear .venv"
    assert make(moved, "env")[1] == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["reproduce"], "-m effnn.reproduce --profile laptop"),
        (["reproduce", "NOTEBOOK=01", "PROFILE=smoke"], "-m effnn.reproduce --profile smoke --notebook 01"),
        (["reproduce", "ARGS=--set seed=1"], "-m effnn.reproduce --profile laptop --set seed=1"),
        (["study"], "-m effnn.reproduce --profile study"),
        (["bench", "KEY=ltp"], "-m effnn.experiments.bench ltp"),
        (["claims"], "-m effnn.report claims"),
        (["report"], "-m effnn.report html"),
        (["data"], "-m effnn.data download"),
        (["test-slow"], "-m pytest -m slow"),
    ],
)
def test_a_target_calls_its_program(folder, arguments, expected):
    assert make(folder, *arguments)[1][-1].strip() == expected


def test_test_is_lint_then_tests_then_notebooks(folder):
    _, calls = make(folder, "test")
    assert calls[-3:] == ["-m ruff check lib notebooks", "-m ruff format --check lib notebooks", TESTS.format(2)]
    (folder / "notebooks").mkdir()
    (folder / "notebooks/01_a.ipynb").touch()
    assert make(folder, "test")[1][-1] == NOTEBOOKS.format(2)
    done, calls = make(folder, "test", check=False, STAND_IN_FAILS="ruff check")
    assert done.returncode != 0 and TESTS.format(2) not in calls
    _, calls = make(folder, "test", "WORKERS=5")
    assert calls[-2:] == [TESTS.format(5), NOTEBOOKS.format(5)]


def test_clean_keeps_results_and_caches(folder):
    for name in ("results/laptop/01_a/results.json", "data/cache/x/y", "lib/a.py", "notebooks/01.ipynb"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for name in ("results/laptop/01_a/01_a.ipynb", "results/report.html", "lib/__pycache__/a.pyc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    make(folder, "clean")
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - set(FILES)
    assert left == {"results/laptop/01_a/results.json", "data/cache/x/y", "lib/a.py", "notebooks/01.ipynb"}
    make(folder, "clean-cache")
    assert not (folder / "data/cache").exists()
