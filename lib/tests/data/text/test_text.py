"""Text loaders: the built-in docstring task, GLUE files (written here in their published formats), the hub, batches."""

import logging
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from effnn import paths
from effnn.base import InvalidInput, NotAvailable
from effnn.data import hub, text
from effnn.data.text import docstrings, glue
from effnn.data.text.task import Split, TextTask

PROSE = (
    "The quick reader follows the winding river past seven quiet towns and then returns home before the long evening "
    "rain begins to fall on the old stone bridge"
)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")


# Docstrings


def test_names_code_and_numbers_are_neutral():
    cleaned = docstrings.neutralize(
        "See `numpy.ndarray`, ``x = 1``, :func:`plot`, DataFrame, my_name, os.path and call(it) at https://a.org/b_c; "
        "Pandas needs np 1.23, e.g. here."
    )
    assert cleaned.count(docstrings.NEUTRAL) >= 3
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
    runs = docstrings.prose_runs(docstring)
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
    rows = docstrings.collect({"first": folder})
    assert len(rows) == 3 * 6 + 1
    assert not any("unwanted" in row.text for row in rows)
    assert {row.file for row in rows} >= {"first/boom.py", "first/inner/module1.py"}
    assert rows == docstrings.collect({"first": folder})


def test_collecting_finds_definitions_wherever_they_stand(tmp_path):
    parts = [f'"""{PROSE} {word}."""' for word in ("alpha", "beta", "gamma", "delta")]
    (tmp_path / "m.py").write_text(
        f"try:\n    class A:\n        {parts[0]}\n        async def f():\n            {parts[1]}\n"
        f"except E:\n    def g():\n        {parts[2]}\nelse:\n    def h():\n        {parts[3]}\n"
    )
    assert len(docstrings.collect({"x": tmp_path})) == 4


def test_a_text_occurs_once_and_never_under_two_labels(tmp_path):
    for name, body in (("one", f'"""{PROSE} twin."""'), ("two", f'"""{PROSE} twin."""')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text(body)
        (tmp_path / name / "b.py").write_text(f'"""{PROSE} {name}."""')
        (tmp_path / name / "c.py").write_text(f'"""{PROSE} {name}."""')
    rows = docstrings.collect({"one": tmp_path / "one", "two": tmp_path / "two"})
    assert [(row.label, row.file) for row in rows] == [(0, "one/b.py"), (1, "two/b.py")]


def test_no_file_is_in_two_splits_and_shares_are_kept(tmp_path):
    folders = {name: _package(tmp_path, name, 60) for name in ("one", "two")}
    rows = docstrings.collect(folders)
    place = docstrings.split_files(rows)
    assert place == docstrings.split_files(list(reversed(rows)))
    counts = Counter((row.label, place[row.file]) for row in rows)
    for label in (0, 1):
        total = sum(counts[label, split] for split in ("train", "validation", "dev"))
        assert abs(counts[label, "dev"] / total - docstrings.DEV_SHARE) < 0.05
        assert abs(counts[label, "validation"] / total - docstrings.VALIDATION_SHARE) < 0.05


def _words(draw: random.Random, count: int = 24) -> list[str]:
    return ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(4, 9))) for _ in range(count)]


def _varied_package(folder: Path, name: str, files: int) -> Path:
    """Files of texts that have nothing in common, and in each a pasted sentence, a text pasted with one word changed,
    and one pasted with other punctuation and case."""
    draw, pasted = random.Random(name), random.Random(f"pasted {name}")
    sentence, text_of_20, other = _words(pasted, 14), _words(pasted, docstrings.MIN_WORDS), _words(pasted)
    for i in range(files):
        changed = [*text_of_20]
        changed[10] = _words(draw, 1)[0]
        shouted = [word.upper() if draw.random() < 0.5 else f"({word})," for word in other]
        bodies = [*(_words(draw) for _ in range(5)), _words(draw, 9) + sentence + _words(draw, 9), changed, shouted]
        file = folder / name / f"module{i}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        functions = (f'def f{j}():\n    """{" ".join(body)}."""\n' for j, body in enumerate(bodies))
        file.write_text("\n\n".join(functions), encoding="utf-8")
    return folder / name


def _runs(texts: list[str], length: int) -> set[tuple[str, ...]]:
    words = [re.findall(r"[a-z0-9_]+", text.lower()) for text in texts]
    return {tuple(row[i : i + length]) for row in words for i in range(len(row) - length + 1)}


def test_no_run_of_words_stands_in_two_splits(tmp_path, monkeypatch):
    folders = {name: _varied_package(tmp_path, name, 40) for name in docstrings.LABELS}
    rows = docstrings.collect(folders)
    place = docstrings.split_files(rows)
    apart = {s: [row.text for row in rows if place[row.file] == s] for s in ("train", "validation", "dev")}
    assert _runs(apart["dev"], 12) & _runs(apart["train"], 12)  # whole files alone do not keep them apart

    monkeypatch.setattr(docstrings, "locate", lambda: folders)
    task = text.load("docstrings")
    for one, two in (("train", "dev"), ("train", "validation"), ("validation", "dev")):
        first, second = task.splits()[one].texts, task.splits()[two].texts
        assert not _runs(first, 12) & _runs(second, 12)
        assert not _runs(first, docstrings.SHARED_RUN) & _runs(second, docstrings.SHARED_RUN)
    # What repeats nothing is kept, and all of train: of the eight texts of a file, three are pasted.
    assert task.train.texts == apart["train"]
    for name in ("validation", "dev"):
        assert len(task.splits()[name]) == len(apart[name]) * 5 / 8
        assert set(task.splits()[name].label) == {0, 1, 2, 3}


def test_a_run_held_out_twice_stays_in_validation(monkeypatch):
    parts = {f"p/{split}.py": split for split in ("dev", "train", "validation")}
    monkeypatch.setattr(docstrings, "split_files", lambda rows: parts)
    rows = [docstrings.Row(PROSE + f" {end}", 0, file) for end, file in zip("abc", parts, strict=True)]
    assert {name: len(part) for name, part in docstrings.split_rows(rows[::2]).items()} == {
        "train": 0,
        "validation": 1,
        "dev": 0,
    }
    assert [len(part) for part in docstrings.split_rows(rows).values()] == [1, 0, 0]


def test_the_installed_packages_are_found_without_importing_them():
    program = (
        "import sys; from effnn.data import docstrings; print(len(docstrings.locate()), "
        "[m for m in docstrings.PACKAGES if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(paths.LIB)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout.split() == ["4", "[]"], done.stderr


def test_built_in_task_is_made_once_and_cached(tmp_path, monkeypatch):
    folders = {name: _varied_package(tmp_path / "packages", name, 30) for name in docstrings.LABELS}
    monkeypatch.setattr(docstrings, "locate", lambda: folders)
    task = text.load("docstrings")
    assert task.labels == docstrings.LABELS and task.num_labels == 4 and not task.regression
    assert {len(set(split.label)) for split in task.splits().values()} == {4}
    monkeypatch.setattr(docstrings, "collect", lambda _: pytest.fail("read again"))
    assert text.load("docstrings").fingerprint == task.fingerprint


# Tasks


def _task(rows: int = 40, pairs: bool = False, labels: tuple[str, ...] = ("no", "yes")) -> TextTask:
    def split(start: int, count: int) -> Split:
        words = [
            f"{'good' if i % 2 else 'bad'} thing number{i} " + "very " * (i % 7) for i in range(start, start + count)
        ]
        label = (
            [i % 2 for i in range(start, start + count)]
            if labels
            else [float(i % 6) for i in range(start, start + count)]
        )
        return Split(words, label, [f"second {i}" for i in range(count)] if pairs else None)

    return TextTask("toy", labels, split(0, rows), split(1000, 10), split(2000, 12), "here")


def test_fingerprint_depends_on_rows_and_not_on_the_source():
    from dataclasses import replace

    task = _task()
    assert task.fingerprint == replace(task, source="elsewhere").fingerprint == _task().fingerprint
    changed = replace(task, dev=Split(task.dev.texts, [1 - task.dev.label[0], *task.dev.label[1:]]))
    assert changed.fingerprint != task.fingerprint
    assert replace(task, train=task.train.take([1, 0, *range(2, 40)])).fingerprint != task.fingerprint


def test_subset_is_reproducible_and_small():
    small = _task().subset(train=8, dev=5, seed=3)
    assert (len(small.train), len(small.validation), len(small.dev)) == (8, 10, 5)
    assert small.fingerprint == _task().subset(train=8, dev=5, seed=3).fingerprint
    assert small.train.texts != _task().subset(train=8, dev=5, seed=4).train.texts


def test_unequal_columns_and_empty_splits_are_refused():
    with pytest.raises(InvalidInput, match="one label"):
        Split(["a", "b"], [1])
    with pytest.raises(InvalidInput, match="dev split"):
        TextTask("toy", ("a",), Split(["x"], [0]), Split(["x"], [0]), Split([], []), "here")


def test_majority():
    assert _task().majority() == 0.5 and _task().classification
    assert not _task(labels=()).classification
    with pytest.raises(InvalidInput, match="regression"):
        _task(labels=()).majority()


# GLUE

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
    assert task.labels == ("negative", "positive") and not task.pairs
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
    with pytest.raises(InvalidInput, match="unknown text task 'sst'.*docstrings, sst2"):
        text.load("sst")
    with pytest.raises(InvalidInput, match="not built in"):
        text.load("sst2")
    with pytest.raises(InvalidInput, match="source is 'builtin'"):
        text.load("docstrings", source=tmp_path)


# Hub


def test_loading_downloads_nothing_and_names_the_set_the_place_and_the_ways_out(monkeypatch):
    monkeypatch.setattr(hub, "_download", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(NotAvailable) as caught:
        text.load("sst2", source="hub")
    message = str(caught.value)
    for part in ("nyu-mll/glue", "sst2", str(paths.CACHE), "make data", "local path", "laptop profile"):
        assert part in message
    assert "\n" not in message


def test_a_download_out_of_reach_names_the_set_the_place_and_the_ways_out():
    with pytest.raises(NotAvailable) as caught:
        hub.fetch("glue", "sst2")
    message = str(caught.value)
    for part in ("nyu-mll/glue", "sst2", str(paths.CACHE), "local path", "laptop profile"):
        assert part in message
    assert "\n" not in message


def _fake_hub(monkeypatch, rows: dict[str, int]) -> list[tuple]:
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name, config, revision):
        calls.append((name, config, revision))
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_dict(
                    {
                        "sentence": [f"s {i}" for i in range(n)],
                        "label": [i % 2 for i in range(n)],
                        "idx": list(range(n)),
                    }
                )
                for split, n in rows.items()
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_is_downloaded_once_and_read_from_parquet(monkeypatch):
    monkeypatch.setitem(hub.REPOSITORIES["glue"].rows, "sst2", {"train": 50, "validation": 4})
    calls = _fake_hub(monkeypatch, {"train": 50, "validation": 4, "test": 3})
    assert hub.fetch("glue", "sst2") == hub.fetch("glue", "sst2")
    task = text.load("sst2", source="hub")
    assert task.dev.texts == ["s 0", "s 1", "s 2", "s 3"] and len(task.train) + len(task.validation) == 50
    assert text.load("sst2", source="hub").fingerprint == task.fingerprint
    assert calls == [("nyu-mll/glue", "sst2", hub.REPOSITORIES["glue"].revision)]
    assert len(calls[0][2]) == 40


def test_hub_with_wrong_sizes_is_refused_and_leaves_nothing(monkeypatch):
    _fake_hub(monkeypatch, {"train": 50, "validation": 4})
    with pytest.raises(InvalidInput, match="train holds 50 rows, 67349 were expected"):
        hub.fetch("glue", "sst2")
    assert not list((paths.CACHE / "hub").glob("*")) if (paths.CACHE / "hub").exists() else True


# Batches


@pytest.fixture(scope="module")
def tokenizer():
    return text.train_wordpiece(_task(pairs=True).train.joined(), 200)


def test_batches_are_padded_to_their_longest_row(tokenizer):
    rows = text.encode(_task(), tokenizer, max_length=9).train
    for batch in text.loader(rows, batch_size=8, shuffle=True):
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1] <= 9
        assert torch.equal(batch["input_ids"] != tokenizer.pad_token_id, batch["attention_mask"].bool())
        assert batch["labels"].dtype == torch.long


def test_pairs_carry_token_types_and_scores_are_floats(tokenizer):
    batch = next(iter(text.loader(text.encode(_task(pairs=True, labels=()), tokenizer, 16).dev, 4)))
    assert set(batch["token_type_ids"].unique().tolist()) == {0, 1}
    assert batch["token_type_ids"].shape == batch["input_ids"].shape and batch["labels"].dtype == torch.float32


def _seen(batches) -> list[tuple]:
    return [tuple(map(tuple, batch["input_ids"].tolist())) for batch in batches]


def test_every_row_comes_once_in_an_order_of_seed_and_epoch(tokenizer):
    rows = text.encode(_task(), tokenizer, 32).train
    orders = [_seen(text.loader(rows, 8, shuffle=True, seed=s, epoch=e)) for s, e in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert orders[0] == orders[1] and len({str(order) for order in orders}) == 3
    for order in orders:
        assert sorted(tuple(t for t in row if t) for batch in order for row in batch) == sorted(
            tuple(row["input_ids"].tolist()) for row in rows
        )
    assert _seen(text.loader(rows, 8, shuffle=True)) == _seen(text.loader(rows, 8, shuffle=True))


def test_batches_leave_the_callers_generator_alone(tokenizer):
    before = torch.get_rng_state()
    list(text.loader(text.encode(_task(), tokenizer, 8).train, 8, shuffle=True))
    list(text.calibration_loader(_task(), tokenizer, rows=8))
    assert torch.equal(torch.get_rng_state(), before)


def test_bucketing_saves_padding_and_can_be_switched_off(tokenizer):
    rows = text.encode(_task(), tokenizer, 32).train
    sizes = {on: sum(batch["input_ids"].numel() for batch in text.loader(rows, 8, bucket=on)) for on in (True, False)}
    assert sizes[True] < sizes[False]
    plain = torch.cat([batch["labels"] for batch in text.loader(rows, 8, bucket=False)])
    assert plain.tolist() == _task().train.label


def test_calibration_draws_with_replacement_in_a_fixed_order(tokenizer):
    task = _task()
    batches = list(text.calibration_loader(task, tokenizer, rows=100, batch_size=32, seed=5, max_length=16))
    assert [len(batch["labels"]) for batch in batches] == [32, 32, 32, 4]
    again = text.calibration_loader(task, tokenizer, rows=100, batch_size=32, seed=5, max_length=16)
    assert _seen(again) == _seen(again) == _seen(batches)
    other = text.calibration_loader(task, tokenizer, rows=100, batch_size=32, seed=6, max_length=16)
    assert _seen(other) != _seen(batches)
    drawn = torch.randint(40, (100,), generator=torch.Generator().manual_seed(5))
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [task.train.label[i] for i in drawn]
    with pytest.raises(InvalidInput, match="rows=0"):
        text.calibration_loader(task, tokenizer, rows=0)


def test_encoding_refuses_what_cannot_work(tokenizer):
    with pytest.raises(InvalidInput, match="no room for text"):
        text.encode(_task(pairs=True), tokenizer, max_length=3)
    with pytest.raises(InvalidInput, match="batch size"):
        text.loader(text.encode(_task(), tokenizer, 8).dev, batch_size=0)


# Baseline


def test_bag_of_words_solves_a_planted_task_and_is_cached(monkeypatch):
    found = text.bag_of_words(_task())
    assert found.accuracy == found.validation_accuracy == 1.0
    monkeypatch.setattr("effnn.data.text.baseline.bag_of_words", lambda _: pytest.fail("fitted again"))
    assert text.bag_of_words(_task()) == found
    monkeypatch.undo()
    with pytest.raises(InvalidInput, match="regression"):
        text.bag_of_words(_task(labels=()))


# The real folder


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
