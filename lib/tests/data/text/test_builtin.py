"""The built-in text task: neutral prose, whole files, and no shared runs of words."""

import re
from collections import Counter
from pathlib import Path

import pytest
from helpers.texts import varied_package

from effnn.data import docstrings, splits, text
from effnn.data.text import builtin

PROSE = (
    "The quick reader follows the winding river past seven quiet towns and then returns home before the long evening "
    "rain begins to fall on the old stone bridge"
)


def test_names_code_and_numbers_are_neutral():
    cleaned = builtin.neutralize(
        "See `numpy.ndarray`, ``x = 1``, :func:`plot`, DataFrame, my_name, os.path and call(it) at https://a.org/b_c; "
        "Pandas needs np 1.23, e.g. here."
    )
    assert cleaned.count(builtin.NEUTRAL) >= 3
    for leak in (
        "numpy",
        "ndarray",
        "plot",
        "DataFrame",
        "my_name",
        "os.path",
        "call",
        "a.org",
        "Pandas",
        " np ",
        "1",
        "2",
    ):
        assert leak not in cleaned
    assert "e.g." in cleaned and "0.00" in cleaned


def test_runs_leave_out_what_is_not_prose():
    docstring = (
        "First sentence.\n\nSecond paragraph.\n\nParameters\n----------\nx : int, optional\n    Its meaning.\n\n"
        ">>> doctest(1)\n1\n\nBefore a block::\n\n    code here\n\n.. note::\n    hidden body\n\nLast words."
    )
    runs = builtin.prose_runs(docstring)
    assert runs == ["First sentence. Second paragraph.", "Its meaning.", "Before a block::", "Last words."]


def _package(folder: Path, name: str, files: int) -> Path:
    for i in range(files):
        file = folder / name / ("inner" if i % 2 else "") / f"module{i}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        body = "".join(
            f'def f{j}():\n    """{PROSE} {name[::-1]} {"abcdefghij"[i % 10]}{"klmnopqrst"[j]}."""\n\n\n'
            for j in range(6)
        )
        file.write_text(body, encoding="utf-8")
    return folder / name


def test_collecting_reads_files_without_importing(tmp_path):
    folder = _package(tmp_path, "first", 3)
    (folder / "boom.py").write_text(f'"""{PROSE} boom."""\nraise SystemExit("imported")\n')
    (folder / "broken.py").write_text("def (:\n")
    (folder / "tests").mkdir()
    (folder / "tests" / "other.py").write_text(f'"""{PROSE} unwanted."""\n')
    (folder / "test_it.py").write_text(f'"""{PROSE} unwanted."""\n')
    rows = builtin.collect({"first": folder})
    assert len(rows) == 3 * 6 + 1
    assert not any("unwanted" in row.text for row in rows)
    assert {row.file for row in rows} >= {"first/boom.py", "first/inner/module1.py"}
    assert rows == builtin.collect({"first": folder})


def test_collecting_finds_definitions_wherever_they_stand(tmp_path):
    parts = [f'"""{PROSE} {word}."""' for word in ("alpha", "beta", "gamma", "delta")]
    (tmp_path / "m.py").write_text(
        f"try:\n    class A:\n        {parts[0]}\n        async def f():\n            {parts[1]}\n"
        f"except E:\n    def g():\n        {parts[2]}\nelse:\n    def h():\n        {parts[3]}\n"
    )
    assert len(builtin.collect({"x": tmp_path})) == 4


def test_a_text_occurs_once_and_never_under_two_labels(tmp_path):
    for name, body in (("one", f'"""{PROSE} twin."""'), ("two", f'"""{PROSE} twin."""')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text(body)
        (tmp_path / name / "b.py").write_text(f'"""{PROSE} {name}."""')
        (tmp_path / name / "c.py").write_text(f'"""{PROSE} {name}."""')
    rows = builtin.collect({"one": tmp_path / "one", "two": tmp_path / "two"})
    assert [(row.label, row.file) for row in rows] == [(0, "one/b.py"), (1, "two/b.py")]


def test_no_file_is_in_two_splits_and_shares_are_kept(tmp_path):
    folders = {name: _package(tmp_path, name, 60) for name in ("one", "two")}
    rows = builtin.collect(folders)
    place = splits.split_files(Counter(row.file for row in rows), builtin.HELD_OUT)
    assert place == splits.split_files(Counter(row.file for row in reversed(rows)), builtin.HELD_OUT)
    counts = Counter((row.label, place[row.file]) for row in rows)
    for label in (0, 1):
        total = sum(counts[label, split] for split in ("train", "validation", "dev"))
        assert abs(counts[label, "dev"] / total - builtin.HELD_OUT["dev"]) < 0.05
        assert abs(counts[label, "validation"] / total - builtin.HELD_OUT["validation"]) < 0.05


def _runs(texts: list[str], length: int) -> set[tuple[str, ...]]:
    words = [re.findall(r"[a-z0-9_]+", text.lower()) for text in texts]
    return {tuple(row[i : i + length]) for row in words for i in range(len(row) - length + 1)}


def test_no_run_of_words_stands_in_two_splits(tmp_path, monkeypatch):
    folders = {name: varied_package(tmp_path, name, 40) for name in builtin.LABELS}
    rows = builtin.collect(folders)
    place = splits.split_files(Counter(row.file for row in rows), builtin.HELD_OUT)
    apart = {s: [row.text for row in rows if place[row.file] == s] for s in ("train", "validation", "dev")}
    assert _runs(apart["dev"], 12) & _runs(apart["train"], 12)  # whole files alone do not keep them apart

    monkeypatch.setattr(docstrings, "locate", lambda _: folders)
    task = text.load("docstrings")
    for one, two in (("train", "dev"), ("train", "validation"), ("validation", "dev")):
        first, second = task.splits()[one].texts, task.splits()[two].texts
        assert not _runs(first, 12) & _runs(second, 12)
        assert not _runs(first, builtin.SHARED_RUN) & _runs(second, builtin.SHARED_RUN)
    # What repeats nothing is kept, and all of train: of the eight texts of a file, three are pasted.
    assert task.train.texts == apart["train"]
    for name in ("validation", "dev"):
        assert len(task.splits()[name]) == len(apart[name]) * 5 / 8
        assert set(task.splits()[name].label) == {0, 1, 2, 3}


def test_a_run_held_out_twice_stays_in_validation(monkeypatch):
    parts = {f"p/{split}.py": split for split in ("dev", "train", "validation")}
    monkeypatch.setattr(builtin, "split_files", lambda *_: parts)
    rows = [builtin.Row(PROSE + f" {end}", 0, file) for end, file in zip("abc", parts, strict=True)]
    assert {name: len(part) for name, part in builtin.split_rows(rows[::2]).items()} == {
        "train": 0,
        "validation": 1,
        "dev": 0,
    }
    assert [len(part) for part in builtin.split_rows(rows).values()] == [1, 0, 0]


def test_built_in_task_is_made_once_and_cached(tmp_path, monkeypatch):
    folders = {name: varied_package(tmp_path / "packages", name, 30) for name in builtin.LABELS}
    monkeypatch.setattr(docstrings, "locate", lambda _: folders)
    task = text.load("docstrings")
    assert task.labels == builtin.LABELS and task.num_labels == 4 and not task.regression
    assert {len(set(split.label)) for split in task.splits().values()} == {4}
    monkeypatch.setattr(builtin, "collect", lambda _: pytest.fail("read again"))
    assert text.load("docstrings").fingerprint == task.fingerprint
