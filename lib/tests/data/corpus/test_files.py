"""A corpus by path: which text is for which split."""

import gzip
import json

import numpy as np
import pytest
from helpers.corpora import characters, parquet, prose, texts, written

from effnn import paths
from effnn.base import InvalidInput, NotAvailable
from effnn.data import corpus
from effnn.data.corpus import coders
from effnn.data.corpus.documents import SPLITS


def test_a_file_is_cut_in_three_and_nothing_is_lost(tmp_path):
    text = prose(1000)
    found = characters(written(tmp_path / "a.txt", text))
    assert "".join(texts(found).values()) == text
    assert [len(getattr(found, split)) / len(text) for split in SPLITS] == pytest.approx([0.9, 0.05, 0.05], abs=0.005)
    assert all(part.endswith(".\n") for part in texts(found).values())
    assert found.name == "text" and str(tmp_path / "a.txt") in found.source and "90/5/5" in found.source
    for split in SPLITS:
        ids = getattr(found, split)
        assert (ids.ndim, ids.dtype) == (1, np.dtype("<u2")) and isinstance(ids, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            ids[0] = 1


@pytest.mark.parametrize("text", ["é中𝄞" * n for n in (1, 2, 3, 5, 40, 3000)] + ["𝄞" * 5, "a\n", "aaa", "a\n\n\n"])
def test_no_character_is_cut_in_two(tmp_path, text):
    assert "".join(texts(characters(written(tmp_path / "a.txt", text))).values()) == text


def test_line_ends_and_byte_order_marks_make_no_difference(tmp_path):
    text = prose(200)
    for name, raw in (("crlf", text.replace("\n", "\r\n")), ("cr", text.replace("\n", "\r")), ("bom", "\ufeff" + text)):
        found = texts(characters(written(tmp_path / f"{name}.txt", raw)))
        assert "".join(found.values()) == text, name


def test_files_named_for_splits_are_these_splits(tmp_path):
    wanted = dict(zip(SPLITS, (prose(50, 1), prose(9, 2), prose(7, 3)), strict=True))
    for names in (("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"), ("Train.txt", "dev.txt", "test.raw")):
        folder = tmp_path / names[0]
        for name, text in zip(names, wanted.values(), strict=True):
            written(folder / "inner" / name, text)
        written(folder / "latest.txt", "neither")  # the word test is not in it
        written(folder / ".hidden.train.txt", "neither")
        (folder / "train.txt.raw").mkdir()  # a folder is no file
        found = characters(folder)
        assert texts(found) == wanted and "split by file names" in found.source


def test_several_train_files_are_separate_documents(tmp_path):
    for name, text in (("train-1", "abc"), ("train-2", "bcd"), ("valid", "d"), ("test", "a")):
        written(tmp_path / f"{name}.txt", text)
    assert texts(characters(tmp_path)) == {"train": "abc\n\nbcd", "validation": "d", "test": "a"}
    found = corpus.load("text", tmp_path, "bpe", vocab_size=300)
    assert texts(found)["train"] == f"abc{coders.END_OF_TEXT}bcd"
    assert found.train.tolist() == [*found.encode("abc"), 0, *found.encode("bcd")]


def test_a_missing_split_comes_from_the_end_of_train(tmp_path):
    train, test = prose(400), prose(5, 1)
    written(tmp_path / "train.txt", train)
    written(tmp_path / "test.txt", test)
    found = characters(tmp_path)
    parts = texts(found)
    assert parts["train"] + parts["validation"] == train and parts["test"] == test
    assert len(parts["validation"]) / len(train) == pytest.approx(0.05, abs=0.01)
    assert "validation from the end of train" in found.source


def test_without_train_text_only_a_given_tokenizer_will_do(tmp_path):
    written(tmp_path / "held" / "valid.txt", prose(5))
    written(tmp_path / "held" / "test.txt", prose(6))
    for kind in ("bpe", "character"):
        with pytest.raises(InvalidInput, match="holds no train text to make a tokenizer of"):
            corpus.load("text", tmp_path / "held", kind)
    trained = characters(written(tmp_path / "a.txt", prose(50)))
    found = corpus.load("text", tmp_path / "held", trained.tokenizer)
    assert texts(found) == {"train": "", "validation": prose(5), "test": prose(6)}
    assert found.train.dtype == found.test.dtype and not found.train.flags.writeable


def test_other_folders_are_split_by_whole_files(tmp_path):
    contents = {f"{'sub/' if i % 2 else ''}part{i}.txt": prose(10, i).rstrip() for i in range(40)}
    for name, text in contents.items():
        written(tmp_path / "a" / name, text)
        written(tmp_path / "b" / name, text)
    written(tmp_path / "a" / "notes.md", "not read")
    found = characters(tmp_path / "a")
    whose = {split: set(text.split("\n\n")) for split, text in texts(found).items()}
    assert set.union(*whose.values()) == set(contents.values())
    assert [len(whose[split]) for split in SPLITS] == [36, 2, 2]
    assert "whole files" in found.source
    assert characters(tmp_path / "b").fingerprint == found.fingerprint


def test_of_three_files_each_split_gets_one_and_two_are_cut(tmp_path):
    for i in range(3):
        written(tmp_path / "three" / f"{i}.txt", prose(20, i))
    assert sorted(texts(characters(tmp_path / "three")).values()) == sorted(prose(20, i) for i in range(3))
    for i in range(2):
        written(tmp_path / "two" / f"{i}.txt", prose(200, i))
    parts = texts(characters(tmp_path / "two"))
    pieces = [text.split("\n\n\n") for text in parts.values()]
    assert ["\n".join(piece[i].rstrip("\n") for piece in pieces) for i in range(2)] == [
        prose(200, i).rstrip("\n") for i in range(2)
    ]


def test_text_that_cannot_be_read_is_named(tmp_path):
    good = prose(3000)
    bad = tmp_path / "bad.txt"
    for offset in (10, 70_000, 1 << 16, len(good) - 3):  # in each block, and in the part for test
        raw = bytearray(good.encode())
        raw[offset] = 0xFF
        bad.write_bytes(raw)
        with pytest.raises(InvalidInput, match=rf"bad\.txt: byte {offset} is not UTF-8"):
            characters(bad)
    bad.write_bytes(good.encode() + "é".encode()[:1])
    with pytest.raises(InvalidInput, match=f"byte {len(good)} is not UTF-8"):
        characters(bad)
    assert not [path for path in paths.CACHE.rglob("*") if path.is_file()]

    written(tmp_path / "empty.txt", "")
    for source in (tmp_path / "empty.txt", tmp_path):
        with pytest.raises(InvalidInput, match=r"empty\.txt is empty"):
            characters(source)
    with pytest.raises(NotAvailable, match="nowhere, which does not exist"):
        characters(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(InvalidInput, match=r"none holds no text: expected files that end in \.txt"):
        characters(tmp_path / "none")
    written(tmp_path / "both" / "train_test.txt", "x")
    with pytest.raises(InvalidInput, match="the name says train and test"):
        characters(tmp_path / "both")


def test_rows_are_documents_and_go_by_their_hash(tmp_path):
    rows = [line for line in prose(400).split("\n") if line]
    lines = "".join(json.dumps({"text": row, "id": 3}) + "\n" for row in rows)
    found = characters(written(tmp_path / "a.jsonl", lines))
    parts = {split: text.split("\n\n") for split, text in texts(found).items()}
    assert sorted(sum(parts.values(), [])) == sorted(rows)
    assert len(parts["train"]) / len(rows) == pytest.approx(0.9, abs=0.04)
    assert parts["train"] == [row for row in rows if row in set(parts["train"])]
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(lines.encode()))
    assert characters(tmp_path / "a.json.gz").fingerprint == found.fingerprint
    parquet(tmp_path / "a.parquet", rows)
    assert characters(tmp_path / "a.parquet").fingerprint == found.fingerprint
