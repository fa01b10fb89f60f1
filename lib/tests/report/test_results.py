"""Result files: what is written is read back, nothing half-written is taken, smoke stays out of results/."""

import json
import logging
import subprocess

import nbformat
import numpy as np
import pandas as pd
import pytest
from helpers.home import NOTEBOOK, make_home
from scipy import stats

from effnn import paths
from effnn.base import InvalidInput
from effnn.report import ResultWriter, load, new_figure, provenance, published
from effnn.report.values import interval


@pytest.fixture
def home(tmp_path, monkeypatch):
    return make_home(tmp_path / "home", monkeypatch)


def write(profile="laptop", **values):
    writer = ResultWriter(NOTEBOOK, profile, parameters={"threads": 1, "budgets": (0.5, np.float64(0.6))}, seeds=[0, 1])
    writer.fingerprint("docstrings", "ab" * 32)
    writer.table("accuracy", pd.DataFrame({"macs": [0.5, 0.6], "accuracy": [0.71, 0.75]}))
    figure, ax = new_figure()
    ax.plot([0, 1], [0, 1])
    writer.figure("curve", figure, caption="A curve", claims=["demo.loss"])
    for key, samples in values.items():
        writer.value(key.replace("_", ".", 1), samples=samples)
    return writer


def test_what_is_written_is_read_back(home):
    path = write(demo_loss=[0.4, 0.6, 0.5]).finish()
    assert path == paths.RESULTS / "laptop" / NOTEBOOK / "results.json"
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "accuracy.csv",
        "curve.png",
        "curve.svg",
        "results.json",
    ]
    results = load("laptop", NOTEBOOK)
    value = results.values["demo.loss"]
    low, high = stats.ttest_1samp([0.4, 0.6, 0.5], 0).confidence_interval(0.95)
    assert value.value == pytest.approx(0.5)
    assert value.interval == pytest.approx((low, high))
    assert results.table("accuracy").accuracy.tolist() == [0.71, 0.75]
    assert results.figures["curve"].claims == ("demo.loss",)
    origin = results.provenance
    assert origin["parameters"] == {"threads": 1, "budgets": [0.5, 0.6]}
    assert origin["seeds"] == [0, 1] and origin["threads"] == 1 and origin["cores"] >= 1
    assert origin["fingerprints"] == {"docstrings": "ab" * 32}
    assert {"python", "torch", "transformers", "numpy", "effnn"} <= origin["versions"].keys()
    assert origin["cpu"] and origin["platform"] and origin["duration_s"] >= 0 and "T" in origin["start"]


def test_a_notebook_hands_over_all_its_parameters(home):
    lines = ('profile: str = "smoke"  # size', "threads: int = 1  # of torch", "rates: list = [0.1]  # to try")
    cell = nbformat.v4.new_code_cell("\n".join(lines))
    cell.metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata=kernel)
    nbformat.write(notebook, paths.NOTEBOOKS / f"{NOTEBOOK}.ipynb")
    variables = {"profile": "laptop", "threads": 2, "rates": [0.2], "something_else": 7}  # as papermill set them
    writer = ResultWriter.from_notebook(NOTEBOOK, variables, seeds=range(3))
    assert writer.profile == "laptop" and writer.provenance()["seeds"] == [0, 1, 2]
    assert writer.provenance()["parameters"] == {"profile": "laptop", "threads": 2, "rates": [0.2]}
    del variables["rates"]
    with pytest.raises(InvalidInput, match="has not set rates"):
        ResultWriter.from_notebook(NOTEBOOK, variables)


def test_json_is_kept_beside_the_tables(home):
    writer = ResultWriter(NOTEBOOK, "laptop")
    writer.json("probe", {"cells": [1, 2]})
    with pytest.raises(InvalidInput, match="another name"):
        writer.json("results", {})
    writer.finish()
    assert json.loads((writer.folder / "probe.json").read_text()) == {"cells": [1, 2]}
    assert load("laptop", NOTEBOOK).tables == ()


def test_no_results_is_none_and_an_unknown_table_names_those_there_are(home):
    assert load("laptop", NOTEBOOK) is None
    write().finish()
    with pytest.raises(InvalidInput, match="there are: accuracy"):
        load("laptop", NOTEBOOK).table("nothing")


def test_interval_needs_three_samples_and_equal_samples_have_no_width():
    assert interval([1.0, 2.0]) is None
    assert interval([0.1, 0.1, 0.1]) == (0.1, 0.1)
    low, high = interval([1.0, 2.0, 3.0, 4.0])
    assert low < 2.5 < high and (low + high) / 2 == pytest.approx(2.5)


def test_interval_covers_the_mean_in_about_95_of_100_draws():
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(2000, 4))
    covered = np.mean([low <= 3.0 <= high for low, high in map(interval, draws.tolist())])
    assert 0.93 < covered < 0.97


def test_nothing_is_written_before_the_end_nor_after_a_failure(home):
    with pytest.raises(ZeroDivisionError), write(demo_loss=[1, 2, 3]):
        assert not (paths.RESULTS / "laptop").exists()
        raise ZeroDivisionError
    assert not (paths.RESULTS / "laptop").exists()
    with write(demo_loss=[1, 2, 3]):
        pass
    assert load("laptop", NOTEBOOK).values["demo.loss"].value == 2


def test_a_new_run_removes_what_only_the_former_had_and_leaves_other_files(home):
    folder = write().finish().parent
    (folder / "kept.txt").write_text("not ours")
    writer = ResultWriter(NOTEBOOK, "laptop")
    writer.table("other", pd.DataFrame({"a": [1]}))
    writer.finish()
    assert sorted(file.name for file in folder.iterdir()) == ["kept.txt", "other.csv", "results.json"]


def test_smoke_never_touches_results(home):
    path = write(profile="smoke", demo_loss=[1, 2, 3]).finish()
    assert paths.CACHE in path.parents
    assert list(paths.RESULTS.iterdir()) == []
    assert load("smoke", NOTEBOOK).values["demo.loss"].value == 2


def damage_truncate(folder):
    path = folder / "results.json"
    path.write_text(path.read_text()[:200])


def damage_empty(folder):
    (folder / "results.json").write_text("")


def damage_list(folder):
    (folder / "results.json").write_text("[]")


def damage_key(folder):
    record = json.loads((folder / "results.json").read_text())
    del record["provenance"]
    (folder / "results.json").write_text(json.dumps(record))


def damage_number(folder):
    record = json.loads((folder / "results.json").read_text())
    record["values"]["demo.loss"]["samples"][0] = "many"
    (folder / "results.json").write_text(json.dumps(record))


def damage_nan(folder):
    text = (folder / "results.json").read_text()
    record = json.loads(text)
    record["values"]["demo.loss"]["value"] = float("nan")
    (folder / "results.json").write_text(json.dumps(record))


def damage_table(folder):
    (folder / "accuracy.csv").write_text("macs,accuracy\n0.5,0.99\n")


def damage_figure(folder):
    (folder / "curve.svg").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_empty,
        damage_list,
        damage_key,
        damage_number,
        damage_nan,
        damage_table,
        damage_figure,
    ],
)
def test_damage_is_refused_naming_the_file_and_the_way_out(home, damage):
    folder = write(demo_loss=[1, 2, 3]).finish().parent
    damage(folder)
    with pytest.raises(InvalidInput, match=r"01_demo.*make reproduce NOTEBOOK=01"):
        load("laptop", NOTEBOOK)


def test_a_smoke_file_copied_into_results_is_refused(home):
    source = write(profile="smoke", demo_loss=[1, 2, 3]).finish().parent
    target = paths.RESULTS / "laptop"
    target.mkdir()
    source.rename(target / NOTEBOOK)
    with pytest.raises(InvalidInput, match="holds results of smoke/01_demo"):
        load("laptop", NOTEBOOK)


def test_other_line_ends_are_no_damage(home):
    folder = write(demo_loss=[1, 2, 3]).finish().parent
    table = folder / "accuracy.csv"
    table.write_bytes(table.read_bytes().replace(b"\n", b"\r\n"))
    assert load("laptop", NOTEBOOK).table("accuracy").macs.tolist() == [0.5, 0.6]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: w.value("demo.loss", float("nan")), "finite"),
        (lambda w: w.value("demo.loss", samples=[1.0, float("inf")]), "finite"),
        (lambda w: w.value("demo.loss"), "note"),
        (lambda w: w.value("demo.loss", 5.0, samples=[1.0, 2.0, 3.0]), "outside the range of its own samples"),
        (lambda w: w.value("demo.loss", "high"), "expected a number"),
        (lambda w: w.value("Demo Loss", 1.0), "lower-case"),
        (lambda w: w.table("../escape", pd.DataFrame()), "lower-case"),
        (lambda w: w.table("rows", [1, 2]), "DataFrame"),
        (lambda w: ResultWriter("notebook"), "file name"),
        (lambda w: ResultWriter(NOTEBOOK, "My Profile"), "profile"),
    ],
)
def test_wrong_arguments_say_what_was_expected(home, call, message):
    with pytest.raises(InvalidInput, match=message):
        call(ResultWriter(NOTEBOOK))


def test_data_that_changed_are_said(home, caplog):
    write().finish()
    writer = write()
    writer.fingerprint("docstrings", "cd" * 32)
    with caplog.at_level(logging.WARNING):
        writer.finish()
    assert "docstrings" in caplog.text and "not comparable" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        writer.finish()
    assert caplog.text == ""


def test_git_state(tmp_path):
    home = tmp_path / "repository"
    (home / "results").mkdir(parents=True)
    assert provenance.git_state(home) == ("unknown", None)

    def git(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=home, check=True, capture_output=True
        )

    git("init")
    for name in ("code.py", "results/value.json"):
        (home / name).write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    commit, dirty = provenance.git_state(home)
    assert len(commit) == 40 and dirty is False
    (home / "results/value.json").write_text("2")
    assert provenance.git_state(home) == (commit, False)  # results are what a run writes
    (home / "code.py").write_text("2")
    assert provenance.git_state(home) == (commit, True)
    assert provenance.git_state(home / "results") == ("unknown", None)  # inside, not the top: another's repository


def test_without_git_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_state(tmp_path) == ("unknown", None)
    assert provenance.gather("laptop")["git_commit"] == "unknown"


@pytest.mark.parametrize("name", sorted(path.stem for path in paths.PUBLISHED.glob("*.csv")))
def test_every_published_file_loads(name):
    frame = published.load(name)
    assert len(frame) and (frame.source != "").all()


def test_published_points():
    hours = published.points("talk", metric="end-to-end time", unit="hours")
    assert {"DynaBERT", "EBERT", "BMP"} <= set(hours.method) and hours.value.dtype == float
    assert len(published.points("talk", metric="end-to-end time", method=["EBERT", "BMP"])) == 2
    assert published.load("dqrm").x.dtype != float  # some rows name a category there
    assert published.points("dqrm", x_name="emb_bits").x.dtype.kind in "if"
    with pytest.raises(InvalidInput, match="choices"):
        published.points("talk", metric="no such metric")
    with pytest.raises(InvalidInput, match="no column 'colour'"):
        published.points("talk", colour="red")
    with pytest.raises(InvalidInput, match="talk"):
        published.load("nothing")


def test_published_rows_need_a_source_and_numbers(home):
    (paths.PUBLISHED / "a.csv").write_text("source,value\nTable 1,many\n")
    with pytest.raises(InvalidInput, match="row 2: value 'many'"):
        published.load("a")
    (paths.PUBLISHED / "b.csv").write_text("source,value\nTable 1,1\n,2\n")
    with pytest.raises(InvalidInput, match="row 3: no source"):
        published.load("b")
