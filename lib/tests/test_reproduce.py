"""The runner, on notebooks of a few lines made here: what it refuses, skips, survives and leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
from jupyter_client.kernelspec import find_kernel_specs

from effnn import paths, reproduce
from effnn.base import InvalidInput
from effnn.runner import declared, from_text, resolve

PARAMETERS = """\
profile: str = "smoke"  # size of the run
seed: int = 0  # of everything random
threads: int = 1  # of the kernel
rate: float = 0.1  # step size
quick: bool = False  # leave the slow part out
budgets: list = [0.5, 0.6]  # share of the MACs
sizes: tuple = (1, 2)  # of the layers
counts: dict[str, int] = {"a": 1}  # by name
source: str = "builtin"  # or a folder"""

# What a real notebook does through effnn.report: write results.json, last.
RESULT = """\
import json, os
from effnn import paths
folder = paths.results_of(profile, "{stem}")
folder.mkdir(parents=True, exist_ok=True)
values = dict(profile=profile, seed=seed, rate=rate, quick=quick, budgets=budgets, sizes=repr(sizes), counts=counts)
values["omp"] = os.environ.get("OMP_NUM_THREADS")
(folder / "results.json").write_text(json.dumps(values))"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A repository of its own, seen by this process and by those that it starts."""
    for name in ("notebooks/profiles", "data/cache", "results"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("EFFNN_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(reproduce.__file__).parents[1]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    for name in ("EFFNN_CACHE", "EFFNN_RESULTS"):
        monkeypatch.delenv(name, raising=False)
    places = {"HOME": "", "NOTEBOOKS": "notebooks", "PROFILES": "notebooks/profiles", "PUBLISHED": "data/published"}
    places |= {"CLAIMS": "data/claims.csv", "CACHE": "data/cache", "RESULTS": "results"}
    for name, place in places.items():
        monkeypatch.setattr(paths, name, tmp_path / place)
    return tmp_path


def make_notebook(home, stem, *cells, parameters=PARAMETERS, result=True):
    first = nbformat.v4.new_code_cell(parameters)
    first.metadata["tags"] = ["parameters"]
    cells = [*cells, *([RESULT.format(stem=stem)] if result else [])]
    # The kernel named here does not exist: a notebook made elsewhere must run in this interpreter all the same.
    kernel = {"kernelspec": {"name": "of-another-machine", "display_name": "x", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)], metadata=kernel)
    path = home / "notebooks" / f"{stem}.ipynb"
    nbformat.write(notebook, path)
    return path


def run(*arguments, profile="smoke"):
    return reproduce.main(["--profile", profile, "--no-report", *arguments])


def results(home, stem, profile="smoke"):
    top = "data/cache" if profile == "smoke" else "results"
    return json.loads((home / top / profile / stem / "results.json").read_text())


# --- parameters ------------------------------------------------------------------------------------------------------


def test_text_is_converted_to_the_declared_type(home):
    known = declared(make_notebook(home, "01_a"))
    settings = {
        "seed": "3",
        "rate": "1e-4",
        "quick": "true",
        "budgets": "[1, 0.25]",
        "sizes": "(3, 4)",
        "counts": "{'b': 2}",
        "source": "/data/a=b",
    }
    values = from_text("01_a", known, settings)
    assert values == {
        "seed": 3,
        "rate": 1e-4,
        "quick": True,
        "budgets": [1.0, 0.25],
        "sizes": (3, 4),
        "counts": {"b": 2},
        "source": "/data/a=b",
    }
    assert [type(value) for value in values.values()] == [int, float, bool, list, tuple, dict, str]
    assert isinstance(values["budgets"][0], float)


def test_values_that_yaml_reads_as_text_become_floats(home):
    known = declared(make_notebook(home, "01_a"))
    assert resolve("01_a", known, {"rate": "1e-4", "budgets": ["5e-1", 1]}, "laptop.yml") == {
        "rate": 1e-4,
        "budgets": [0.5, 1.0],
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", "1"),
        ("seed", 1.0),
        ("seed", True),
        ("rate", "fast"),
        ("rate", True),
        ("rate", float("nan")),
        ("quick", 1),
        ("quick", "true"),
        ("source", 3),
        ("budgets", 0.5),
        ("budgets", ["half"]),
        ("sizes", [1.5]),
        ("counts", {"a": "one"}),
        ("counts", ["a"]),
    ],
)
def test_a_value_of_another_type_is_refused_with_the_type_and_an_example(home, name, value):
    known = declared(make_notebook(home, "01_a"))
    with pytest.raises(InvalidInput, match=f"laptop.yml.*'{name}' must be .*for example"):
        resolve("01_a", known, {name: value}, "laptop.yml")


@pytest.mark.parametrize(
    ("name", "text"), [("seed", "1.5"), ("seed", "one"), ("quick", "perhaps"), ("budgets", "[1,"), ("sizes", "7")]
)
def test_text_of_another_type_is_refused(home, name, text):
    with pytest.raises(InvalidInput, match=f"'{name}' must be"):
        from_text("01_a", declared(make_notebook(home, "01_a")), {name: text})


@pytest.mark.parametrize(
    "line",
    [
        "x = 1",
        "x: int",
        "x: int | None = None",
        "x: 'int' = 1",
        "x: set = {1}",
        "x: int = 1.5",
        "x: float = 2 * 3.0",
        "x: str = 'a=b'",
        "x: tuple[float, ...] = (1.0,)",
        "import os",
    ],
)
def test_a_parameters_cell_that_cannot_be_checked_is_refused(home, line):
    with pytest.raises(InvalidInput, match="01_a.ipynb"):
        declared(make_notebook(home, "01_a", parameters=line + "\nseed: int = 0  # of all"))


def test_nothing_runs_when_a_name_is_unknown_and_the_valid_ones_are_named(home, capsys):
    make_notebook(home, "01_a")
    make_notebook(home, "02_b", parameters=PARAMETERS + "\nlayers: int = 2  # only here")
    assert run("--set", "layers=3") == 2
    message = capsys.readouterr().err
    assert "01_a has no parameter layers" in message and "seed" in message and "budgets" in message
    assert not list((home / "results").iterdir())


def test_profile_file_is_checked_before_anything_runs(home, capsys):
    make_notebook(home, "01_a")
    file = home / "notebooks/profiles/laptop.yml"
    for text, expected in [
        ("01_a: {sede: 1}", "01_a has no parameter sede"),
        ("01_a: {seed: one}", "'seed' must be int"),
        ("01_b: {seed: 1}", "'01_b', which does not exist"),
        ("01_a: {profile: study}", "profile must be 'laptop'"),
        ("01_a: 3", "'parameter: value'"),
        ("time_limit_minutes: soon", "positive number of minutes"),
        ("01_a: [", "not readable YAML"),
        ("{}", "no entry for 01_a"),
    ]:
        file.write_text(text)
        assert run(profile="laptop") == 2, text
        assert expected in capsys.readouterr().err
    assert run(profile="paper") == 2
    assert "smoke, laptop" in capsys.readouterr().err
    assert run("--notebook", "07") == 2
    assert "no notebook begins with '07'" in capsys.readouterr().err
    assert not list((home / "results").iterdir())


# --- running ---------------------------------------------------------------------------------------------------------


def test_values_arrive_typed_and_an_unchanged_notebook_is_skipped(home, capfd):
    make_notebook(home, "01_a")
    make_notebook(home, "02_not_in_the_profile")
    file = home / "notebooks/profiles/laptop.yml"
    file.write_text("time_limit_minutes: 5\n01_a:\n  rate: 1e-4\n  threads: 2\n")
    arguments = ["--set", "sizes=(3, 4)", "--set", "quick=yes"]
    assert run(*arguments, profile="laptop") == 0
    assert results(home, "01_a", "laptop-set") == {
        "profile": "laptop-set",
        "seed": 0,
        "rate": 1e-4,
        "quick": True,
        "budgets": [0.5, 0.6],
        "sizes": "(3, 4)",
        "counts": {"a": 1},
        "omp": "2",
    }
    printed = capfd.readouterr()
    assert "02_not_in_the_profile" not in printed.out and "TCP" not in printed.err
    folder = home / "results/laptop-set/01_a"
    assert sorted(path.name for path in folder.iterdir()) == ["01_a.ipynb", "results.json"]
    assert os.environ.get("OMP_NUM_THREADS") != "2"

    assert run(*arguments, profile="laptop") == 0
    assert "01_a: unchanged, skipped" in capfd.readouterr().out
    assert run("--force", "--set", "seed=1", profile="laptop") == 0
    assert "running with laptop-set (forced)" in capfd.readouterr().out
    assert results(home, "01_a", "laptop-set")["seed"] == 1
    assert not (home / "results/laptop").exists()  # what was --set is not what the profile says
    assert run(profile="laptop") == 0
    assert results(home, "01_a", "laptop")["profile"] == "laptop"


def test_what_makes_a_notebook_run_again(home):
    make_notebook(home, "01_a")
    assert run() == 0

    def why(**settings):
        return reproduce.plan("smoke", settings=settings)[0].why

    assert why() == ""
    assert why(seed="1") == "changed: the parameters"
    lock, study = home / "requirements.lock", home / "results/study/01_a/table.csv"
    for path in (lock, study):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        assert why() == f"changed: {path.relative_to(home)}"
        path.unlink()
    make_notebook(home, "01_a", "1 + 1")
    assert why() == "changed: the notebook"
    make_notebook(home, "01_a", "from effnn import cache")
    assert why().startswith("changed: the notebook, effnn/base")
    assert {"effnn/cache.py", "effnn/paths.py"} <= set(reproduce.plan("smoke")[0].dependencies)
    make_notebook(home, "01_a")
    assert why() == ""
    folder, mark = home / "data/cache/smoke/01_a", home / "data/cache/marks/smoke/01_a.json"
    for path, expected in [
        (folder / "01_a.ipynb", "its results are missing"),
        (folder / "results.json", "its results are missing"),
        (mark, "not run here before"),
    ]:
        content = path.read_text()
        path.unlink()
        assert why() == expected
        path.write_text(content)
    assert why() == ""
    (folder / "results.json").write_text("{}")
    assert why() == "its results were changed since"
    mark.write_text('{"dependencies"')
    assert why() == "not run here before"


def test_a_failing_notebook_does_not_stop_the_others(home, capfd):
    make_notebook(home, "01_fails", "raise ValueError('too few rows')", result=False)
    make_notebook(home, "02_dies", "import os; os._exit(3)", result=False)
    make_notebook(home, "03_works")
    make_notebook(home, "04_writes_nothing", result=False)
    assert run() == 1
    printed = capfd.readouterr().out
    assert "01_fails: failed" in printed and "ValueError: too few rows" in printed
    assert "02_dies: failed" in printed and "kernel died" in printed
    assert "04_writes_nothing: done" in printed and "wrote no results.json" in printed
    summary = printed.split("summary")[1].splitlines()
    assert [line.split()[:2] for line in summary if line] == [
        ["01_fails", "failed"],
        ["02_dies", "failed"],
        ["03_works", "done"],
        ["04_writes_nothing", "done"],
    ]
    assert results(home, "03_works")["profile"] == "smoke"
    assert not list((home / "data/cache/smoke/01_fails").iterdir())  # no half of a result
    assert "too few rows" in (home / "data/cache/failed/smoke/01_fails.ipynb").read_text()
    assert run() == 1
    printed = capfd.readouterr().out
    assert "03_works: unchanged" in printed and "01_fails: running" in printed and "04_writes_nothing: run" in printed


CHILD = """\
import pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stderr=subprocess.DEVNULL)
import os
import re
pathlib.Path("{pids}").write_text(f"{{os.getpid()}} {{child.pid}}")
import time; time.sleep(600)"""


def is_alive(pid):
    """Whether a process runs; a zombie that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


@needs_proc
def test_the_time_limit_ends_the_kernel_and_its_children(home, capfd):
    pids = home / "pids"
    make_notebook(home, "01_slow", CHILD.format(pids=pids), result=False)
    make_notebook(home, "02_next")
    assert run("--time-limit", "6") == 1
    printed = capfd.readouterr().out
    assert "01_slow: failed" in printed and "time limit of 6 s" in printed
    assert "02_next: done" in printed
    wait_until(lambda: not any(is_alive(pid) for pid in pids.read_text().split()))


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_runner_leaves_no_process_and_no_half_result_and_the_next_run_continues(home, number, capfd):
    pids = home / "pids"
    step = f"import pathlib; marker = pathlib.Path(r'{home}/data/cache/step'); first = not marker.exists()"
    make_notebook(home, "01_a")
    make_notebook(
        home, "02_slow", step, "marker.touch()\nif first:\n    " + CHILD.format(pids=pids).replace("\n", "\n    ")
    )
    command = [sys.executable, "-m", "effnn.reproduce", "--profile", "smoke", "--no-report"]
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=home)
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    runner.send_signal(number)
    printed = runner.communicate(timeout=60)[0]
    if number == signal.SIGKILL:
        assert runner.returncode == -number
    else:
        assert runner.returncode == 130 and "02_slow  interrupted" in printed
        assert "Traceback" not in printed and "Task" not in printed
    wait_until(lambda: not any(is_alive(pid) for pid in pids.read_text().split()))
    left = [path.name for path in (home / "data/cache/smoke/02_slow").iterdir()]
    assert not [name for name in left if not name.startswith(".tmp-")]

    assert run() == 0
    printed = capfd.readouterr().out
    assert "01_a: unchanged" in printed and "02_slow: done" in printed
    assert sorted(path.name for path in (home / "data/cache/smoke/02_slow").iterdir()) == [
        "02_slow.ipynb",
        "results.json",
    ]


@needs_proc
def test_an_interrupt_after_the_last_cell_is_not_lost(home, monkeypatch, capsys):
    make_notebook(home, "01_a")
    make_notebook(home, "02_b")
    whole = papermill.execute_notebook

    def and_then_ctrl_c(*arguments, **options):
        whole(*arguments, **options)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)

    monkeypatch.setattr(papermill, "execute_notebook", and_then_ctrl_c)
    assert run() == 130
    printed = capsys.readouterr().out
    assert re.search(r"01_a +interrupted", printed) and re.search(r"02_b +not reached", printed)
    monkeypatch.undo()


def test_an_interrupt_between_notebooks_is_no_traceback(home, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    make_notebook(home, "01_a")
    monkeypatch.setattr(reproduce, "run", interrupted)
    assert run() == 130
    assert "start it again" in capsys.readouterr().err


def test_a_result_file_that_was_altered_or_deleted_is_made_again(home):
    table = (
        "from effnn.report import ResultWriter\nimport pandas\n"
        "w = ResultWriter('01_a', profile)\nw.table('t', pandas.DataFrame({'x': [1]}))\nw.finish()"
    )
    make_notebook(home, "01_a", table, result=False)
    assert run() == 0 and reproduce.plan("smoke")[0].why == ""
    path = home / "data/cache/smoke/01_a/t.csv"
    written = path.read_bytes()
    for damage in (lambda: path.write_bytes(written + b"2\n"), path.unlink):
        damage()
        assert reproduce.plan("smoke")[0].why == "its results were changed since"
        assert run() == 0 and path.read_bytes() == written


def test_the_kernel_is_the_running_interpreter(home, monkeypatch):
    decoy = home / "jupyter/kernels/python3"
    decoy.mkdir(parents=True)
    (decoy / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    make_notebook(home, "01_a", f"import sys, pathlib; pathlib.Path(r'{home}/who').write_text(sys.executable)")
    monkeypatch.setenv("JUPYTER_PATH", str(home / "jupyter"))
    assert find_kernel_specs()["python3"] == str(decoy)
    assert run() == 0
    assert (home / "who").read_text() == sys.executable


def test_the_reports_are_rebuilt_and_their_failure_counts(home, monkeypatch):
    make_notebook(home, "01_a")
    import effnn.report.__main__ as report

    called = []
    monkeypatch.setattr(report, "main", lambda arguments: called.extend(arguments) or 0)
    assert reproduce.main(["--profile", "smoke"]) == 0
    assert called == ["claims", "html"]
    monkeypatch.setattr(report, "main", lambda arguments: 1)
    assert reproduce.main(["--profile", "smoke"]) == 1


# --- what a notebook depends on --------------------------------------------------------------------------------------


def test_library_files_are_followed_through_imports(tmp_path, monkeypatch):
    from effnn.base import imports

    for name, text in {
        "__init__.py": "",
        "a/__init__.py": "from effnn.a.one import f",
        "a/one.py": "from . import two\nfrom .three import g",
        "a/two.py": "import torch",
        "a/three.py": "def g():\n    from effnn import b",
        "a/four.py": "",
        "a/look.mplstyle": "",
        "b.py": "from effnn.base import nothing",
        "c.py": "",
    }.items():
        path = tmp_path / "effnn" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(imports, "PACKAGE", tmp_path / "effnn")
    found = imports.library_files(["from effnn import a", "x = 1", "no python at all"])
    names = [path.relative_to(tmp_path / "effnn").as_posix() for path in found]
    assert names == ["__init__.py", "a/__init__.py", "a/look.mplstyle", "a/one.py", "a/three.py", "a/two.py", "b.py"]


def test_data_given_by_path_is_an_input(home):
    from effnn.runner import dependencies_of

    notebook, folder = make_notebook(home, "01_a"), home / "SST-2"
    folder.mkdir()
    (folder / "train.tsv").write_text("a")
    before = dependencies_of(notebook, {"source": str(folder)}, "smoke")
    assert f"data at {folder}" in before
    (folder / "train.tsv").write_text("ab")
    after = dependencies_of(notebook, {"source": str(folder)}, "smoke")
    assert {name for name in before if before[name] != after[name]} == {f"data at {folder}"}


def test_data_under_the_home_folder_are_watched_too(home, monkeypatch):
    from effnn.runner import dependencies_of

    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    notebook = make_notebook(home, "01_a")
    (home / "SST-2").mkdir()
    (home / "SST-2/train.tsv").write_text("a")
    before = dependencies_of(notebook, {"source": "~/SST-2"}, "smoke")
    (home / "SST-2/train.tsv").write_text("ab")
    assert dependencies_of(notebook, {"source": "~/SST-2"}, "smoke") != before


def test_a_notebook_that_cannot_be_read_is_named(home, capsys):
    make_notebook(home, "01_a")
    (home / "notebooks/02_b.ipynb").write_text('{"cells": [')
    assert run() == 2
    assert "02_b.ipynb is not a readable notebook" in capsys.readouterr().err
