"""GLUE: files written here in their published formats, and their errors."""

import logging
import os
from pathlib import Path

import pytest

from effnn.base import InvalidInput, NotAvailable
from effnn.data import text
from effnn.data.text import glue
from effnn.data.text.task import Split

SST2 = [(f"it 's a \"charming journey number {i}", str(i % 2)) for i in range(60)]


def _write(folder: Path, name: str, header: str | None, rows: list[tuple[str, ...]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = ([header] if header else []) + ["\t".join(row) for row in rows]
    (folder / name).write_bytes(("\n".join(lines) + "\n").encode())
    return folder


def _sst2(folder: Path, train: list[tuple[str, ...]] = SST2) -> Path:
    _write(folder, "train.tsv", "sentence\tlabel", train)
    _write(folder, "test.tsv", "index\tsentence", [("0", "no label")])
    return _write(folder, "dev.tsv", "sentence\tlabel", [("fine", "1"), ("poor", "0"), ("odd\x85end\x0b", "0")])


def test_sst2_folder(tmp_path):
    task = text.load("sst2", source=_sst2(tmp_path))
    assert task.labels == ("negative", "positive") and task.train.texts_b is None
    assert task.dev.texts == ["fine", "poor", "odd\x85end\x0b"] and task.dev.label == [1, 0, 0]
    both = sorted(zip(task.train.texts + task.validation.texts, task.train.label + task.validation.label, strict=True))
    assert both == sorted((sentence, int(label)) for sentence, label in SST2)
    assert str(tmp_path) in task.source
    again = text.load("sst2", source=str(_sst2(tmp_path / "copy")))
    assert again.fingerprint == task.fingerprint
    assert text.load("sst2", source=tmp_path, seed=1).validation.texts != task.validation.texts


def test_equal_texts_stay_on_one_side(tmp_path):
    task = text.load("sst2", source=_sst2(tmp_path, [row for row in SST2 for _ in range(4)]))
    assert not set(task.train.texts) & set(task.validation.texts)


@pytest.mark.parametrize(
    ("name", "header", "row", "expected"),
    [
        ("cola", None, ("gj04", "1", "", "The book {}."), ("The book {}.", None, 1)),
        ("mrpc", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", ("0", "1", "2", "A {}", 'B "{}'), ("A {}", 'B "{}', 0)),
        (
            "qqp",
            "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
            ("0", "1", "2", "Why {}?", "How {}?", "1"),
            ("Why {}?", "How {}?", 1),
        ),
        (
            "stsb",
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            ("0", "g", "f", "y", "1", "s", "s", "A {}", "B {}", "3.800"),
            ("A {}", "B {}", 3.8),
        ),
        ("qnli", "index\tquestion\tsentence\tlabel", ("0", "Q {}", "S {}", "not_entailment"), ("Q {}", "S {}", 1)),
        ("rte", "index\tsentence1\tsentence2\tlabel", ("0", "P {}", "H {}", "entailment"), ("P {}", "H {}", 0)),
    ],
)
def test_published_columns(tmp_path, name, header, row, expected):
    rows = [tuple(cell.format(i) for cell in row) for i in range(60)]
    _write(tmp_path, "train.tsv", header, rows)
    _write(tmp_path, "dev.tsv", header, rows[:3])
    task = text.load(name, source=tmp_path)
    first, second, label = expected
    assert task.dev.texts == [first.format(i) for i in range(3)]
    assert task.dev.texts_b == (None if second is None else [second.format(i) for i in range(3)])
    assert task.dev.label == [label] * 3
    assert task.regression == (name == "stsb")


def test_mnli_has_two_dev_sets_of_other_width(tmp_path):
    columns = "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    columns += "sentence2_parse\tsentence1\tsentence2\tlabel1\t"
    row = ("0", "1", "1c", "g", "b", "b", "p", "p", "A {}", "B {}", "neutral")
    rows = [tuple(cell.format(i) for cell in row) for i in range(60)]
    _write(tmp_path, "train.tsv", columns + "gold_label", [(*r, "contradiction") for r in rows])
    four = "label2\tlabel3\tlabel4\tlabel5\tgold_label"
    _write(tmp_path, "dev_matched.tsv", columns + four, [(*r, "x", "x", "x", "x", "entailment") for r in rows[:2]])
    _write(tmp_path, "dev_mismatched.tsv", columns + four, [(*r, "x", "x", "x", "x", "neutral") for r in rows[:3]])
    matched, mismatched = (text.load(name, source=tmp_path) for name in ("mnli", "mnli_mismatched"))
    assert matched.dev.label == [0, 0] and mismatched.dev.label == [1, 1, 1]
    assert set(matched.train.label) == {2} and matched.train.texts == mismatched.train.texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"sentence\tlabel\ngood\t1\nbad\n", r"dev\.tsv, line 3: 1 columns where 2"),
        (b"sentence\tlabel\ngood\t1\textra\n", r"dev\.tsv, line 2: 3 columns where 2"),
        (b"sentence\tlabel\ngood\t1\nbad\t2\n", r"dev\.tsv, line 3: label '2' is not one of 0, 1"),
        (b"sentence\tlabel\ngood\t1\nb\xe9d\t0\n", r"dev\.tsv, line 3: not UTF-8"),
        (b"sentence\tlabel\n\n", r"dev\.tsv, line 2: 1 columns"),
        (b"text\tlabel\ngood\t1\n", r"dev\.tsv, line 1: the header lacks 'sentence'; it holds 'text', 'label'"),
        (b"sentence\tlabel\n", r"dev\.tsv: no rows"),
        (b"", r"dev\.tsv: no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path, content, message):
    (_sst2(tmp_path) / "dev.tsv").write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        text.load("sst2", source=tmp_path)


def test_windows_line_ends_and_a_byte_order_mark(tmp_path):
    (_sst2(tmp_path) / "dev.tsv").write_bytes(b"\xef\xbb\xbfsentence\tlabel\r\ngood\t1\r\nbad\t0\r\n")
    assert text.load("sst2", source=tmp_path).dev == Split(["good", "bad"], [1, 0])


@pytest.mark.parametrize("score", ["5.1", "-1", "nan", "high", ""])
def test_scores_out_of_range(tmp_path, score):
    header = "index\tsentence1\tsentence2\tscore"
    path = _write(tmp_path, "dev.tsv", header, [("0", "a", "b", "2.5"), ("1", "a", "b", score)]) / "dev.tsv"
    with pytest.raises(InvalidInput, match=r"line 3: score .* is not a number from 0 to 5"):
        glue.read_tsv(path, glue.FORMATS["stsb"])


def test_the_known_short_rows_of_qqp_are_skipped_and_told(tmp_path, caplog):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    good = ("0", "1", "2", "a", "b", "1")
    path = _write(tmp_path, "train.tsv", header, [good, ("1", "2", "cut"), good]) / "train.tsv"
    with caplog.at_level(logging.WARNING):
        assert len(glue.read_tsv(path, glue.FORMATS["qqp"])) == 2
    assert "lines [3]" in caplog.text
    _write(tmp_path, "train.tsv", header, [("1", "cut")] * 20)
    with pytest.raises(InvalidInput, match="line 12: 2 columns where 6"):
        glue.read_tsv(path, glue.FORMATS["qqp"])


def test_missing_files_and_wrong_names(tmp_path):
    with pytest.raises(NotAvailable, match=r"nowhere.*train\.tsv and dev\.tsv.*laptop profile"):
        text.load("sst2", source=tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match="unknown text task 'sst'.*docstrings, movie_sentences, sst2"):
        text.load("sst")
    with pytest.raises(InvalidInput, match="not built in"):
        text.load("sst2")
    with pytest.raises(InvalidInput, match="source is 'builtin'"):
        text.load("docstrings", source=tmp_path)


@pytest.fixture(scope="module")
def sst2_folder() -> str:
    folder = os.environ.get("EFFNN_SST2")
    if not folder:
        pytest.skip("set EFFNN_SST2 to a folder of the published SST-2 TSV files to run this")
    return folder


def test_the_published_sst2(sst2_folder):
    task = text.load("sst2", source=sst2_folder)
    assert len(task.train) + len(task.validation) == 67349 and len(task.dev) == 872
    assert task.dev.label.count(1) == 444
    assert 1500 < len(task.validation) < 2500
