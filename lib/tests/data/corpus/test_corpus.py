"""Language-model corpora: tokenizers, splits by path, token files, the hub (mocked), LAMBADA, built-in docstrings."""

import gzip
import json
import logging
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from effnn import paths
from effnn.base import EffnnError, InvalidInput, NotAvailable, atomic_folder, imports
from effnn.data import __main__ as cli
from effnn.data import corpus
from effnn.data.corpus import coders as tokens
from effnn.data.corpus import docstrings as corpus_docstrings
from effnn.data.corpus import documents as corpus_documents
from effnn.data.corpus import download as corpus_download
from effnn.data.corpus import files as corpus_files
from effnn.data.corpus import hub as corpus_hub
from effnn.data.corpus import rows as text_rows
from effnn.data.corpus import token_files
from effnn.data.corpus.documents import SPLITS, in_pieces, whole
from effnn.data.text import task as text_task


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")


def _prose(lines: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklm", k=draw.randint(2, 7))) for _ in range(80)]
    return "".join(f"{' '.join(draw.choices(words, k=9))}.\n" for _ in range(lines))


def _file(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def _texts(found: corpus.Corpus) -> dict[str, str]:
    return {split: found.decode(getattr(found, split)) for split in SPLITS}


def _characters(path: Path, **arguments) -> corpus.Corpus:
    return corpus.load("text", path, tokenizer="character", **arguments)


# Tokenizers

_TRAIN_IN_A_PROCESS = """
import hashlib, sys
from effnn.data.corpus import coders as tokens
coder = tokens.train("bpe", [open(sys.argv[1], encoding="utf-8").read()] * 3, 400)
ids = coder.encode(open(sys.argv[1], encoding="utf-8").read())
print(coder.fingerprint, hashlib.sha256(str(ids).encode()).hexdigest())
"""


def test_byte_pairs_are_the_same_in_every_process(tmp_path):
    file = _file(tmp_path / "a.txt", _prose(200) + "naïve café – 𝄞\n")
    running = []
    for seed, parallel in (("1", "false"), ("2", "true")):
        settings = {"PYTHONPATH": str(paths.LIB), "PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": parallel}
        command = [sys.executable, "-c", _TRAIN_IN_A_PROCESS, str(file)]
        running.append(subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True))
    first, second = (process.communicate(timeout=120)[0].split() for process in running)
    assert first == second and len(first) == 2
    assert tokens.train("bpe", [file.read_text(encoding="utf-8")] * 3, 400).fingerprint == first[0]


def test_byte_pairs_give_back_every_text():
    coder = tokens.train("bpe", [_prose(100)], 350)
    for text in (_prose(3, 1), "  two\n\n\tlines \r\n", "naïve 𝄞 \x00\x1f\xa0", "", " "):
        assert coder.decode(coder.encode(text)) == text
        assert np.array_equal(coder.encode_many(["x", text])[1], coder.encode(text))
    assert coder.vocab_size == 350 and max(coder.encode(_prose(100))) < 350
    assert len(coder.encode(_prose(100))) < len(_prose(100)) / 1.5  # pairs were learned


def test_characters_come_back_and_others_are_unknown():
    coder = tokens.train("character", ["abcab\n"])
    assert (coder.known, coder.vocab_size) == ("\nabc", 5)
    assert coder.encode("\nabc") == [1, 2, 3, 4]
    assert coder.encode("aéb𝄞\ufffd") == [2, 0, 3, 0, 0]
    assert coder.decode(coder.encode("cab\n\nbaé")) == "cab\n\nba\ufffd"
    assert coder.separator == (1, 1)


def test_the_most_frequent_characters_are_kept_ties_by_code_point():
    assert tokens.train("character", ["zzzyyyxxbbaac"], 6).known == "\nabyz"
    assert tokens.train("character", ["zzzyyy", "xxbbaac"], 5).known == "\nayz"
    assert (
        tokens.train("character", ["edcba", "\ufffd" * 9], 4).known == "\nab"
    )  # the unknown character is no character
    many = "".join(map(chr, range(0x100, 0x200)))
    assert tokens.train("character", [many]).vocab_size == 96


@pytest.mark.parametrize("kind", ["bpe", "character"])
def test_a_stored_tokenizer_is_the_same(kind):
    coder = tokens.train(kind, [_prose(50)], 300)
    again = tokens.load_coder(coder.dump())
    assert again.fingerprint == coder.fingerprint and again.separator == coder.separator
    assert again.encode(_prose(5, 2)) == coder.encode(_prose(5, 2))
    assert tokens.train(kind, [_prose(50, 9) + "XYZ"], 300).fingerprint != coder.fingerprint


@pytest.mark.parametrize("kind", ["bpe", "character"])
def test_ids_outside_the_vocabulary_are_refused(kind):
    coder = tokens.train(kind, ["some text\n"])
    for wrong in (coder.vocab_size, -1):
        with pytest.raises(InvalidInput, match=f"token id {wrong} is outside the vocabulary of {coder.vocab_size}"):
            coder.decode([1, wrong])


def test_vocabularies_that_are_too_small_are_refused(tmp_path):
    file = _file(tmp_path / "a.txt", _prose(20))
    with pytest.raises(InvalidInput, match="vocab_size=256: byte-level BPE needs at least 257"):
        corpus.load("text", file, "bpe", vocab_size=256)
    with pytest.raises(InvalidInput, match="vocab_size=2: a character vocabulary needs at least 3"):
        _characters(file, vocab_size=2)
    assert corpus.load("text", file, "bpe", vocab_size=257).vocab_size == 257
    assert _characters(file, vocab_size=3).vocab_size == 3


def _fast(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    state = json.loads(tokens.train("bpe", [_prose(50)], vocab_size).dump())["tokenizer"]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        eos_token=tokens.END_OF_TEXT,
        pad_token=tokens.END_OF_TEXT,
        model_max_length=16,
    )


@pytest.mark.parametrize("make", [lambda: tokens.train("bpe", [_prose(50)], 300), lambda: tokens.Pretrained(_fast())])
def test_the_words_end_of_text_are_text(make):
    coder = make()
    text = f"one{tokens.END_OF_TEXT}two {tokens.END_OF_TEXT}"
    for ids in (coder.encode(text), coder.encode_many([text])[0].tolist()):
        assert not set(coder.separator) & set(ids)
        assert coder.decode(ids) == text
    assert coder.decode(coder.separator) == tokens.END_OF_TEXT


def test_a_saved_tokenizer_by_object_by_folder_and_as_gpt2(tmp_path, monkeypatch):
    file, fast = _file(tmp_path / "a.txt", _prose(80)), _fast()
    fast.save_pretrained(tmp_path / "saved")
    by_object = corpus.load("text", file, fast)
    assert by_object.vocab_size == len(fast) == 300
    assert by_object.encode("abc def") == fast("abc def")["input_ids"]
    assert corpus.load("text", file, str(tmp_path / "saved")).fingerprint == by_object.fingerprint

    from transformers import AutoTokenizer

    def absent(*_, **settings):
        assert settings["local_files_only"]
        raise OSError("not in the local cache")

    with monkeypatch.context() as patched:
        patched.setattr(AutoTokenizer, "from_pretrained", absent)
        with pytest.raises(NotAvailable, match=r"python -m effnn.data download gpt2"):
            corpus.load("text", file, "gpt2")
    fast.save_pretrained(corpus_hub.gpt2_folder())
    assert corpus.load("text", file, "gpt2").fingerprint == by_object.fingerprint
    # Calling a tokenizer sets padding and truncation in it, which say nothing about its ids.
    fast(["a", "a b"], padding=True, truncation=True, max_length=2)
    assert tokens.Pretrained(fast).fingerprint == by_object.tokenizer.fingerprint
    assert len(tokens.Pretrained(fast).encode(_prose(9))) > 16


def _word_tokenizer(vocabulary: dict[str, int], **settings) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def test_large_vocabularies_take_four_bytes_also_with_unused_ids(tmp_path):
    file = _file(tmp_path / "train.jsonl", "".join(json.dumps({"text": "b"}) + "\n" for _ in range(3)))
    for vocabulary in ({f"w{i}": i + 3 for i in range(69_997)} | {"?": 0, "b": 1, "end": 2}, {"?": 0, "b": 1}):
        eos = "end" if "end" in vocabulary else "far"
        found = corpus.load("text", file.parent, _word_tokenizer(vocabulary | {eos: 69_999}, eos_token=eos))
        assert found.vocab_size == 70_000
        assert found.train.dtype == np.dtype("<u4")
        assert found.decode([69_999]) == eos
    assert token_files.dtype_for(65_535).itemsize == 2 and token_files.dtype_for(65_536).itemsize == 4


def test_tokenizers_that_cannot_be_used_are_refused(tmp_path):
    file = _file(tmp_path / "a.txt", _prose(20))
    with pytest.raises(InvalidInput, match="no end-of-sequence token"):
        corpus.load("text", file, _word_tokenizer({"?": 0}))
    with pytest.raises(NotAvailable, match=r"expected bpe, character, gpt2, or the folder"):
        corpus.load("text", file, "wordpiece")
    with pytest.raises(InvalidInput, match="no tokenizer: expected a name, a folder or a fast tokenizer"):
        corpus.load("text", file, 7)
    with pytest.raises(InvalidInput, match="vocab_size=300 goes with"):
        corpus.load("text", file, _fast(), vocab_size=300)
    with pytest.raises(InvalidInput, match="choose one of bpe, character"):
        tokens.train("words", ["a"])
    (tmp_path / "empty").mkdir()
    _fast().save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text('{"model": ')
    for folder in ("empty", "broken"):
        with pytest.raises(NotAvailable, match=f"{folder} holds no tokenizer that transformers can load"):
            corpus.load("text", file, tmp_path / folder)


# Pieces

_ODD = [
    "word",
    "Two",
    " ",
    " ",
    "\n",
    "\n",
    "\t",
    "  ",
    " " * 5,
    "\n" * 4,
    "\r",
    "\xa0",
    "\x1c",
    "\u2028",
    "\x85",
    "7",
    "'s",
    "'",
    "…",
    "é",
    "中",
    "<|endoftext|>",
]


def test_ids_do_not_depend_on_where_pieces_end():
    # Runs of blanks become pairs too, so that ids tell where the tokenizer parts them.
    blanks = "".join(random.Random(0).choices(_ODD, k=20_000))
    coders = [tokens.train("bpe", [_prose(100), blanks], 600), tokens.Pretrained(_fast())]
    for seed in range(60):
        draw = random.Random(seed)
        # A space and a word now and then, as otherwise a stretch has no place to be cut.
        text = "".join(part for _ in range(40) for part in (*draw.choices(_ODD, k=6), " so"))
        size, step = draw.randint(60, 120), draw.randint(1, 90)
        pieces = list(in_pieces((text[i : i + step] for i in range(0, len(text), step)), size))
        assert "".join(piece.text for piece in pieces) == text and len(pieces) > 2
        assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        for coder in coders:
            assert np.concatenate(coder.encode_many([piece.text for piece in pieces])).tolist() == coder.encode(text)


def test_a_stretch_without_a_place_to_cut_is_cut_where_it_ends():
    assert [piece.text for piece in in_pieces(["abcd"] * 5, 8)] == ["abcdabcd", "abcdabcd", "abcd"]
    assert list(in_pieces([], 8)) == list(in_pieces(["", ""], 8)) == []


def test_a_long_document_is_one_document():
    long = "one two " * (corpus_documents.PIECE // 4)
    pieces = list(whole(["short", "", long, "end"]))
    assert [piece.text for piece in pieces if piece.first][::2] == ["short", "end"]
    assert "".join(piece.text for piece in pieces) == f"short{long}end"
    assert max(len(piece.text) for piece in pieces) < 2 * corpus_documents.PIECE
    batches = list(corpus_documents.batches(pieces, corpus_documents.PIECE))
    assert [piece for batch in batches for piece in batch] == pieces and len(batches) > 1


def test_small_pieces_give_the_corpus_of_large_ones(tmp_path, monkeypatch):
    file = _file(tmp_path / "a.txt", _prose(400))
    expected = corpus.load("text", file, "bpe", vocab_size=300)
    monkeypatch.setattr(corpus_files, "_BLOCK", 97)
    monkeypatch.setattr(corpus_files, "in_pieces", lambda chunks: in_pieces(chunks, 300))
    monkeypatch.setattr(corpus, "batches", lambda pieces: corpus_documents.batches(pieces, 1000))
    monkeypatch.setattr(paths, "CACHE", tmp_path / "other")
    assert corpus.load("text", file, expected.tokenizer).fingerprint == expected.fingerprint


def test_a_file_that_holds_the_words_end_of_text_is_one_document(tmp_path):
    text = _prose(40).replace(" ", tokens.END_OF_TEXT)
    for tokenizer in ("bpe", _fast()):
        found = corpus.load("text", _file(tmp_path / "a.txt", text), tokenizer)
        assert "".join(_texts(found).values()) == text
        assert not any(np.isin(getattr(found, split), found.tokenizer.separator).any() for split in SPLITS)


# By path


def test_a_file_is_cut_in_three_and_nothing_is_lost(tmp_path):
    text = _prose(1000)
    found = _characters(_file(tmp_path / "a.txt", text))
    assert "".join(_texts(found).values()) == text
    assert [len(getattr(found, split)) / len(text) for split in SPLITS] == pytest.approx([0.9, 0.05, 0.05], abs=0.005)
    assert all(part.endswith(".\n") for part in _texts(found).values())
    assert found.name == "text" and str(tmp_path / "a.txt") in found.source and "90/5/5" in found.source
    for split in SPLITS:
        ids = getattr(found, split)
        assert (ids.ndim, ids.dtype) == (1, np.dtype("<u2")) and isinstance(ids, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            ids[0] = 1


@pytest.mark.parametrize("text", ["é中𝄞" * n for n in (1, 2, 3, 5, 40, 3000)] + ["𝄞" * 5, "a\n", "aaa", "a\n\n\n"])
def test_no_character_is_cut_in_two(tmp_path, text):
    assert "".join(_texts(_characters(_file(tmp_path / "a.txt", text))).values()) == text


def test_line_ends_and_byte_order_marks_make_no_difference(tmp_path):
    text = _prose(200)
    for name, raw in (("crlf", text.replace("\n", "\r\n")), ("cr", text.replace("\n", "\r")), ("bom", "\ufeff" + text)):
        found = _texts(_characters(_file(tmp_path / f"{name}.txt", raw)))
        assert "".join(found.values()) == text, name


def test_files_named_for_splits_are_these_splits(tmp_path):
    wanted = dict(zip(SPLITS, (_prose(50, 1), _prose(9, 2), _prose(7, 3)), strict=True))
    for names in (("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"), ("Train.txt", "dev.txt", "test.raw")):
        folder = tmp_path / names[0]
        for name, text in zip(names, wanted.values(), strict=True):
            _file(folder / "inner" / name, text)
        _file(folder / "latest.txt", "neither")  # the word test is not in it
        _file(folder / ".hidden.train.txt", "neither")
        (folder / "train.txt.raw").mkdir()  # a folder is no file
        found = _characters(folder)
        assert _texts(found) == wanted and "split by file names" in found.source


def test_several_train_files_are_separate_documents(tmp_path):
    for name, text in (("train-1", "abc"), ("train-2", "bcd"), ("valid", "d"), ("test", "a")):
        _file(tmp_path / f"{name}.txt", text)
    assert _texts(_characters(tmp_path)) == {"train": "abc\n\nbcd", "validation": "d", "test": "a"}
    found = corpus.load("text", tmp_path, "bpe", vocab_size=300)
    assert _texts(found)["train"] == f"abc{tokens.END_OF_TEXT}bcd"
    assert found.train.tolist() == [*found.encode("abc"), 0, *found.encode("bcd")]


def test_a_missing_split_comes_from_the_end_of_train(tmp_path):
    train, test = _prose(400), _prose(5, 1)
    _file(tmp_path / "train.txt", train)
    _file(tmp_path / "test.txt", test)
    found = _characters(tmp_path)
    parts = _texts(found)
    assert parts["train"] + parts["validation"] == train and parts["test"] == test
    assert len(parts["validation"]) / len(train) == pytest.approx(0.05, abs=0.01)
    assert "validation from the end of train" in found.source


def test_without_train_text_only_a_given_tokenizer_will_do(tmp_path):
    _file(tmp_path / "held" / "valid.txt", _prose(5))
    _file(tmp_path / "held" / "test.txt", _prose(6))
    for kind in ("bpe", "character"):
        with pytest.raises(InvalidInput, match="holds no train text to make a tokenizer of"):
            corpus.load("text", tmp_path / "held", kind)
    trained = _characters(_file(tmp_path / "a.txt", _prose(50)))
    found = corpus.load("text", tmp_path / "held", trained.tokenizer)
    assert _texts(found) == {"train": "", "validation": _prose(5), "test": _prose(6)}
    assert found.train.dtype == found.test.dtype and not found.train.flags.writeable


def test_other_folders_are_split_by_whole_files(tmp_path):
    texts = {f"{'sub/' if i % 2 else ''}part{i}.txt": _prose(10, i).rstrip() for i in range(40)}
    for name, text in texts.items():
        _file(tmp_path / "a" / name, text)
        _file(tmp_path / "b" / name, text)
    _file(tmp_path / "a" / "notes.md", "not read")
    found = _characters(tmp_path / "a")
    whose = {split: set(text.split("\n\n")) for split, text in _texts(found).items()}
    assert set.union(*whose.values()) == set(texts.values())
    assert [len(whose[split]) for split in SPLITS] == [36, 2, 2]
    assert "whole files" in found.source
    assert _characters(tmp_path / "b").fingerprint == found.fingerprint


def test_of_three_files_each_split_gets_one_and_two_are_cut(tmp_path):
    for i in range(3):
        _file(tmp_path / "three" / f"{i}.txt", _prose(20, i))
    assert sorted(_texts(_characters(tmp_path / "three")).values()) == sorted(_prose(20, i) for i in range(3))
    for i in range(2):
        _file(tmp_path / "two" / f"{i}.txt", _prose(200, i))
    parts = _texts(_characters(tmp_path / "two"))
    pieces = [text.split("\n\n\n") for text in parts.values()]
    assert ["\n".join(piece[i].rstrip("\n") for piece in pieces) for i in range(2)] == [
        _prose(200, i).rstrip("\n") for i in range(2)
    ]


def test_text_that_cannot_be_read_is_named(tmp_path):
    good = _prose(3000)
    bad = tmp_path / "bad.txt"
    for offset in (10, 70_000, 1 << 16, len(good) - 3):  # in each block, and in the part for test
        raw = bytearray(good.encode())
        raw[offset] = 0xFF
        bad.write_bytes(raw)
        with pytest.raises(InvalidInput, match=rf"bad\.txt: byte {offset} is not UTF-8"):
            _characters(bad)
    bad.write_bytes(good.encode() + "é".encode()[:1])
    with pytest.raises(InvalidInput, match=f"byte {len(good)} is not UTF-8"):
        _characters(bad)
    assert not [path for path in paths.CACHE.rglob("*") if path.is_file()]

    _file(tmp_path / "empty.txt", "")
    for source in (tmp_path / "empty.txt", tmp_path):
        with pytest.raises(InvalidInput, match=r"empty\.txt is empty"):
            _characters(source)
    with pytest.raises(NotAvailable, match="nowhere, which does not exist"):
        _characters(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(InvalidInput, match=r"none holds no text: expected files that end in \.txt"):
        _characters(tmp_path / "none")
    _file(tmp_path / "both" / "train_test.txt", "x")
    with pytest.raises(InvalidInput, match="the name says train and test"):
        _characters(tmp_path / "both")


def test_choices_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="unknown corpus 'wikitext': choose one of docstrings, text, wikitext-103"):
        corpus.load("wikitext")
    for name, source in (("docstrings", "hub"), ("docstrings", tmp_path), ("text", "builtin"), ("text", "hub")):
        with pytest.raises(InvalidInput, match=f"the source of {name} is .*, not '{re.escape(str(source))}'"):
            corpus.load(name, source)
    with pytest.raises(InvalidInput, match="the source of c4 is 'hub' or a path, not 'builtin'"):
        corpus.load("c4")
    with pytest.raises(InvalidInput, match="limit_tokens=0"):
        _characters(tmp_path, limit_tokens=0)


def test_a_corpus_shorter_than_a_context_is_refused():
    corpus.check_length(np.arange(9), 8)
    with pytest.raises(InvalidInput, match="context of 8 tokens needs at least 9 of them, found 8"):
        corpus.check_length(np.arange(8), 8)
    with pytest.raises(InvalidInput, match="context=0"):
        corpus.check_length(np.arange(8), 0)


@pytest.mark.parametrize("limit", [1, 77, 5000, 10**9])
def test_train_is_cut_at_the_limit_and_the_rest_is_not(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(corpus, "batches", lambda pieces: corpus_documents.batches(pieces, 1000))
    file = _file(tmp_path / "a.jsonl", "".join(json.dumps({"text": line}) + "\n" for line in _prose(300).split("\n")))
    full, cut = _characters(file), _characters(file, limit_tokens=limit)
    assert len(cut.train) == min(limit, len(full.train)) and np.array_equal(cut.train, full.train[:limit])
    assert np.array_equal(cut.validation, full.validation) and np.array_equal(cut.test, full.test)
    assert (cut.fingerprint == full.fingerprint) == (limit == 10**9)


# Rows


def test_rows_are_documents_and_go_by_their_hash(tmp_path):
    rows = [line for line in _prose(400).split("\n") if line]
    lines = "".join(json.dumps({"text": row, "id": 3}) + "\n" for row in rows)
    found = _characters(_file(tmp_path / "a.jsonl", lines))
    parts = {split: text.split("\n\n") for split, text in _texts(found).items()}
    assert sorted(sum(parts.values(), [])) == sorted(rows)
    assert len(parts["train"]) / len(rows) == pytest.approx(0.9, abs=0.04)
    assert parts["train"] == [row for row in rows if row in set(parts["train"])]
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(lines.encode()))
    assert _characters(tmp_path / "a.json.gz").fingerprint == found.fingerprint
    _parquet(tmp_path / "a.parquet", rows)
    assert _characters(tmp_path / "a.parquet").fingerprint == found.fingerprint


def _parquet(path: Path, texts: list, column: str = "text") -> Path:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({column: texts}), path)
    return path


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"text": 3}', 'line 2: expected a JSON object with a string "text"'),
        ('["text"]', "line 2: expected a JSON object"),
        ('{"text": "a"', "line 2: not JSON"),
    ],
)
def test_bad_rows_are_named(tmp_path, line, match):
    with pytest.raises(InvalidInput, match=rf"a\.jsonl, {match}"):
        list(text_rows.read_rows(_file(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")))


def test_bad_bytes_and_half_surrogates_in_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(InvalidInput, match="line 2: not UTF-8"):
        list(text_rows.read_rows(tmp_path / "a.jsonl"))
    assert list(text_rows.read_rows(_file(tmp_path / "b.jsonl", '{"text": "a\\ud800b"}\n'))) == ["a?b"]


def test_damaged_files_of_rows_are_named(tmp_path):
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefghijklmnop", k=2000)) for _ in range(200)]
    packed = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    middle = len(packed) // 2
    burnt = [packed[:at] + b"\xff" * 40 + packed[at + 40 :] for at in (10, middle)]
    for raw in (packed[:middle], *burnt, b"no gzip at all"):
        (tmp_path / "a.jsonl.gz").write_bytes(raw)
        with pytest.raises(InvalidInput, match=r"a\.jsonl\.gz"):
            list(text_rows.read_rows(tmp_path / "a.jsonl.gz"))

    whole_file = _parquet(tmp_path / "a.parquet", texts).read_bytes()
    middle = len(whole_file) // 2
    for raw in (whole_file[:middle], bytes([4]) * 4 + bytes([255]) * (middle - 4) + whole_file[middle:], b"PAR1"):
        (tmp_path / "a.parquet").write_bytes(raw)
        with pytest.raises(InvalidInput, match=r"a\.parquet"):
            list(text_rows.read_rows(tmp_path / "a.parquet"))
    with pytest.raises(InvalidInput, match=r'expected a column "text", found words'):
        list(text_rows.read_rows(_parquet(tmp_path / "b.parquet", ["a"], "words")))
    with pytest.raises(InvalidInput, match=r'c\.parquet: expected .*"text"'):
        list(text_rows.read_rows(_parquet(tmp_path / "c.parquet", [1, 2])))


# Token files


def _made(file: Path, kind: str = "character") -> tuple[corpus.Corpus, Path]:
    found = corpus.load("text", file, kind, vocab_size=300)
    (folder,) = (paths.CACHE / "corpus").iterdir()
    return found, folder


@pytest.mark.parametrize("kind", ["character", "bpe"])
def test_a_corpus_is_made_once(tmp_path, monkeypatch, kind):
    found, _ = _made(_file(tmp_path / "a.txt", _prose(100)), kind)
    monkeypatch.setattr(tokens, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(token_files, "write", lambda *_: pytest.fail("written again"))
    again, _ = _made(tmp_path / "a.txt", kind)
    assert again.fingerprint == found.fingerprint and _texts(again) == _texts(found)
    assert again.tokenizer.fingerprint == found.tokenizer.fingerprint
    moved = corpus.load("text", _file(tmp_path / "elsewhere.txt", _prose(100)), kind, vocab_size=300)
    assert moved.fingerprint == found.fingerprint and "elsewhere" in moved.source


def test_an_edit_of_what_decides_the_ids_gives_another_entry(tmp_path, monkeypatch):
    file = _file(tmp_path / "a.txt", _prose(100))
    _made(file)
    for module in (corpus, corpus_documents, corpus_files, text_rows, text_task, token_files, tokens):
        with monkeypatch.context() as patched:
            digest, edited = imports._digest, Path(module.__file__)
            patched.setattr(
                imports, "_digest", lambda path, *of, e=edited, d=digest: "new" if path == e else d(path, *of)
            )
            _characters(file, vocab_size=300)
    assert len(list((paths.CACHE / "corpus").iterdir())) == 8


def test_every_change_gives_another_corpus(tmp_path):
    file = _file(tmp_path / "a.txt", _prose(100))
    found = [_characters(file), _characters(file, vocab_size=10), corpus.load("text", file, "bpe", vocab_size=300)]
    _file(file, _prose(100)[:-3] + "..\n")
    found.append(_characters(file))
    assert len({one.fingerprint for one in found}) == 4
    assert _texts(found[-1])["test"].endswith("..\n")


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "test.bin", "meta.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", [_flip, _cut, Path.unlink, lambda path: path.write_bytes(b"")])
def test_damaged_token_files_are_made_again(tmp_path, caplog, name, damage):
    found, folder = _made(_file(tmp_path / "a.txt", _prose(60)))
    expected = _texts(found)
    damage(folder / name)
    with caplog.at_level(logging.WARNING, "effnn"):
        again, _ = _made(tmp_path / "a.txt")
    assert "are damaged" in caplog.text and "making them again" in caplog.text
    assert again.fingerprint == found.fingerprint and _texts(again) == expected
    caplog.clear()
    with caplog.at_level(logging.WARNING, "effnn"):
        _made(tmp_path / "a.txt")
    assert not caplog.text


def test_a_run_that_was_cut_off_leaves_nothing_and_the_next_one_is_whole(tmp_path):
    def stream() -> Iterator[np.ndarray]:
        yield np.arange(5)
        raise KeyboardInterrupt

    target = tmp_path / "tokens" / "x"
    with pytest.raises(KeyboardInterrupt):
        token_files.write(target, {"train": stream()}, np.dtype("<u2"))
    assert list(target.parent.iterdir()) == []
    token_files.write(target, {"train": [np.arange(5), np.arange(2)], "test": []}, np.dtype("<u2"), "coder")
    found = token_files.read(target)
    assert found.tokens["train"].tolist() == [0, 1, 2, 3, 4, 0, 1] and found.tokens["test"].size == 0
    assert found.tokenizer == "coder"
    with pytest.raises(token_files.Damaged):
        token_files.read(tmp_path / "tokens" / "y")
    with pytest.raises(KeyboardInterrupt):  # what stood there before stays
        token_files.write(target, {"train": stream()}, np.dtype("<u2"))
    assert len(token_files.read(target).tokens["train"]) == 7


def test_a_folder_replaces_an_older_one(tmp_path):
    for i in range(2):
        with atomic_folder(tmp_path / "f") as temporary:
            (temporary / str(i)).write_text("x")
    assert [path.name for path in (tmp_path / "f").iterdir()] == ["1"]


# Docstrings


def _library(folder: Path, files: int) -> dict[str, Path]:
    """Two packages; every file repeats a paragraph of its neighbours, and has one of its own."""
    for package in ("one", "two"):
        for i in range(files):
            own, shared = f"The {package} {i} of a kind.", f"Pasted paragraph {i // 4}\n    on two lines."
            _file(
                folder / package / f"m{i}.py",
                f'"""{own}\n\n{shared}\n"""\n\n\ndef f(x):\n    """\n    {shared}\n\n    {own[::-1]}\n    """\n',
            )
        _file(folder / package / "broken.py", "def (:\n")
        _file(folder / package / "boom.py", '"""Read."""\nraise SystemExit("imported")\n')
        _file(folder / package / "tests" / "m.py", '"""Unwanted."""\n')
        _file(folder / package / "test_m.py", '"""Unwanted."""\n')
    return {package: folder / package for package in ("one", "two")}


def test_no_paragraph_of_the_docstrings_occurs_twice(tmp_path):
    folders = _library(tmp_path, 40)
    splits = corpus_docstrings.collect(folders)
    assert splits == corpus_docstrings.collect(folders)
    seen = [" ".join(p.split()) for texts in splits.values() for text in texts for p in re.split(r"\n\s*\n", text)]
    assert len(seen) == len(set(seen))
    assert all(splits.values())
    expected = {f"The {package} {i} of a kind." for package in folders for i in range(40)}
    expected |= {own[::-1] for own in expected} | {f"Pasted paragraph {i} on two lines." for i in range(10)} | {"Read."}
    assert set(seen) == expected


def test_files_of_every_package_are_held_out_whole():
    sizes = {f"{package}/m{i}.py": 10 + i % 7 for package in ("one", "two") for i in range(300)}
    place = corpus_docstrings.split_files(sizes)
    assert place == corpus_docstrings.split_files(dict(reversed(sizes.items())))
    for package in ("one", "two"):
        files = [file for file in sizes if file.startswith(package)]
        total = sum(sizes[file] for file in files)
        for split, share in (("train", 0.9), ("validation", 0.05), ("test", 0.05)):
            have = sum(sizes[file] for file in files if place[file] == split)
            assert have / total == pytest.approx(share, abs=0.02)


def test_the_built_in_corpus_is_collected_once(tmp_path, monkeypatch):
    folders = _library(tmp_path / "library", 40)
    monkeypatch.setattr(corpus_docstrings, "locate", lambda: folders)
    found = corpus.load("docstrings", tokenizer="character")
    expected = corpus_docstrings.collect(folders)
    assert _texts(found) == {split: "\n\n".join(texts) for split, texts in expected.items()}
    monkeypatch.setattr(corpus_docstrings, "collect", lambda _: pytest.fail("read again"))
    pairs = corpus.load("docstrings", tokenizer="bpe", vocab_size=300)
    assert _texts(pairs)["test"] == tokens.END_OF_TEXT.join(expected["test"])
    assert corpus.load("docstrings", tokenizer="character").fingerprint == found.fingerprint != pairs.fingerprint


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    assert set(corpus_docstrings.locate()) == {"stdlib", "numpy", "scipy", "pandas", "matplotlib", "sklearn"}
    monkeypatch.setattr(corpus_docstrings, "PACKAGES", {"not_here_at_all": "not-here"})
    with pytest.raises(NotAvailable, match=r"not_here_at_all: install it \(pip install not-here\)"):
        corpus_docstrings.locate()


# The hub


class _Rows:
    """What `load_dataset(streaming=True)` gives, as far as it is used; the connection breaks before row `breaks`."""

    def __init__(self, hub: "_Hub", split: str, start: int = 0):
        self.hub, self.split, self.start = hub, split, start

    def skip(self, rows: int) -> "_Rows":
        return _Rows(self.hub, self.split, self.start + rows)

    def __iter__(self) -> Iterator[dict[str, str]]:
        self.hub.begun.append((self.split, self.start))
        for i, text in enumerate(self.hub.texts[self.split][self.start :], self.start):
            if i == self.hub.breaks:
                raise ConnectionError("no route to the hub\nmore words")
            yield {"text": text}


class _Hub:
    """The mocked hub: its texts by split, what was asked of it, and where each reading began."""

    def __init__(self, texts: dict[str, list[str]]):
        self.texts, self.breaks, self.asked, self.begun = texts, None, [], []

    def load_dataset(self, name, config, split, streaming, revision):
        assert streaming
        self.asked.append((name, config, split, revision))
        return _Rows(self, split)


def _hub(monkeypatch, name: str, texts: dict[str, list[str]]) -> _Hub:
    datasets = pytest.importorskip("datasets")
    hub, place = _Hub(texts), corpus_hub.PLACES[name]
    counts = {split: None if rows is None else len(texts[split]) for split, rows in place.rows.items()}
    monkeypatch.setitem(corpus_hub.PLACES, name, replace(place, rows=counts))
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    return hub


def _lines(lines: int, seed: int) -> list[str]:
    return _prose(lines, seed).split("\n")[:lines]


def _wikitext(monkeypatch) -> _Hub:
    rows = {
        split: [f" {line} \n" if i % 3 else "" for i, line in enumerate(_lines(30, k))]
        for k, split in enumerate(SPLITS)
    }
    return _hub(monkeypatch, "wikitext-103", rows)


def test_pinned_revisions_are_commits():
    assert all(re.fullmatch("[0-9a-f]{40}", place.revision) for place in corpus_hub.PLACES.values())
    assert re.fullmatch("[0-9a-f]{40}", corpus_hub.GPT2[1])


def test_wikitext_is_downloaded_once_and_is_the_published_file(tmp_path, monkeypatch):
    hub = _wikitext(monkeypatch)
    (folder,) = corpus_download.download(["wikitext-103"])
    assert corpus_download.fetch("wikitext-103") == folder == corpus_hub.folder_of("wikitext-103")
    revision = corpus_hub.PLACES["wikitext-103"].revision
    assert hub.asked == [("Salesforce/wikitext", "wikitext-103-raw-v1", split, revision) for split in SPLITS]
    found = corpus.load("wikitext-103", "hub", "character")
    assert found.source == f"hub: Salesforce/wikitext/wikitext-103-raw-v1 at {revision[:12]}"
    for split in SPLITS:
        text = "".join(row or " \n" for row in hub.texts[split])
        assert _texts(found)[split] == text
        _file(tmp_path / "local" / f"wiki.{split}.raw", text)
    assert corpus.load("wikitext-103", tmp_path / "local", "character").fingerprint == found.fingerprint


def test_what_was_not_downloaded_is_not_available(monkeypatch):
    _wikitext(monkeypatch)
    with pytest.raises(NotAvailable, match=r"Salesforce/wikitext .* run `python -m effnn.data download wikitext-103`"):
        corpus.load("wikitext-103", "hub", "character")
    with pytest.raises(InvalidInput, match="unknown corpus of the hub 'pile'"):
        corpus_download.download(["pile"])
    with pytest.raises(InvalidInput, match="limit_tokens=0"):
        corpus_download.download(["c4"], 0)


def test_a_download_that_was_cut_off_goes_on_after_the_last_whole_shard(monkeypatch):
    hub = _wikitext(monkeypatch)
    monkeypatch.setattr(corpus_download, "SHARD_CHARACTERS", 150)
    hub.breaks = 17
    with pytest.raises(NotAvailable, match="ConnectionError: no route to the hub") as raised:
        corpus_download.download(["wikitext-103"])
    folder = corpus_hub.folder_of("wikitext-103")
    kept = sum(len(list(text_rows.read_rows(path))) for path in corpus_hub.shards(folder, "train"))
    assert 0 < kept < 17 and f"{kept} rows of train are in {folder}" in str(raised.value)
    assert "more words" not in str(raised.value)
    with pytest.raises(NotAvailable, match="not whole"):
        corpus.load("wikitext-103", "hub", "character")
    hub.breaks = None
    corpus_download.download(["wikitext-103"])
    assert hub.begun == [("train", 0), ("train", kept), ("validation", 0), ("test", 0)]
    found = corpus.load("wikitext-103", "hub", "character")
    assert _texts(found) == {s: "".join(row or " \n" for row in hub.texts[s]) for s in SPLITS}
    assert len(corpus_hub.shards(folder, "train")) > 3


def test_a_split_of_another_size_is_refused_and_leaves_nothing(monkeypatch):
    hub = _wikitext(monkeypatch)
    hub.texts["validation"].append("one more")
    with pytest.raises(InvalidInput, match="split validation holds 31 rows, 30 were expected"):
        corpus_download.download(["wikitext-103"])
    folder = corpus_hub.folder_of("wikitext-103")
    assert not list(folder.glob("validation*")) and corpus_hub.shards(folder, "train")
    hub.texts["validation"].pop()
    corpus_download.download(["wikitext-103"])
    assert [split for split, _ in hub.begun] == ["train", "validation", "validation", "test"]


def test_another_revision_than_the_pinned_one_is_refused(monkeypatch):
    _wikitext(monkeypatch)
    (folder,) = corpus_download.download(["wikitext-103"])
    path = corpus_hub.state_path(folder, "test")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": "f" * 40}))
    with pytest.raises(InvalidInput, match=rf"test is of revision {'f' * 12}, b08601e04326 is pinned"):
        corpus.load("wikitext-103", "hub", "character")


def test_a_shard_that_was_lost_is_seen(monkeypatch):
    _wikitext(monkeypatch)
    monkeypatch.setattr(corpus_download, "SHARD_CHARACTERS", 150)
    (folder,) = corpus_download.download(["wikitext-103"])
    corpus_hub.shards(folder, "train")[-1].unlink()
    with pytest.raises(InvalidInput, match=r"train holds \d+ rows, 30 were downloaded"):
        corpus.load("wikitext-103", "hub", "character")


def _c4(monkeypatch) -> _Hub:
    monkeypatch.setattr(corpus_download, "HELD_OUT_CHARACTERS", 1000)
    monkeypatch.setattr(corpus_download, "SHARD_CHARACTERS", 700)
    return _hub(monkeypatch, "c4", {"train": _lines(200, 1), "validation": _lines(200, 2)})


def test_part_of_c4_and_then_more(monkeypatch):
    hub = _c4(monkeypatch)
    corpus_download.download(["c4"], 400)
    found = corpus.load("c4", "hub", "character")
    have = _texts(found)["train"].split("\n\n")
    assert have == hub.texts["train"][: len(have)] and 2000 <= sum(map(len, have)) < 2100
    assert f"the first {len(have)} rows of train" in found.source
    held_out = _texts(found)["validation"].split("\n\n"), _texts(found)["test"].split("\n\n")
    assert all(held_out) and not set(held_out[0]) & set(held_out[1])
    assert {*held_out[0], *held_out[1]} == set(hub.texts["validation"][: len(held_out[0]) + len(held_out[1])])

    assert len(corpus.load("c4", "hub", "character", limit_tokens=900).train) == 900
    with pytest.raises(InvalidInput, match=r"tokens of train were downloaded, limit_tokens=5,000 asks for more"):
        corpus.load("c4", "hub", "character", limit_tokens=5000)
    hub.begun.clear()
    corpus_download.download(["c4"], 300)  # less than is there
    assert hub.begun == []
    corpus_download.download(["c4"], 1100)
    assert hub.begun == [("train", len(have))]
    assert len(corpus.load("c4", "hub", "character", limit_tokens=5000).train) == 5000

    corpus_download.download(["c4"], 10**6)  # all there is
    everything = corpus.load("c4", "hub", "character", limit_tokens=10**6)
    assert _texts(everything)["train"].split("\n\n") == hub.texts["train"] and "rows of train" not in everything.source
    asked = len(hub.asked)
    corpus_download.download(["c4"], 10**7)
    assert not [split for _, _, split, _ in hub.asked[asked:] if split == "train"]


def test_shards_of_an_unfinished_download_do_not_change_the_corpus(monkeypatch):
    hub = _c4(monkeypatch)
    corpus_download.download(["c4"], 400)
    coder = tokens.train("character", hub.texts["train"])
    before = corpus.load("c4", "hub", coder)
    hub.breaks = 120
    with pytest.raises(NotAvailable):
        corpus_download.download(["c4"], 2000)
    for path in (paths.CACHE / "corpus").iterdir():
        (path / "meta.json").unlink()  # so that the ids are made again
    assert corpus.load("c4", "hub", coder).fingerprint == before.fingerprint
    hub.breaks = None
    corpus_download.download(["c4"], 2000)
    assert len(corpus.load("c4", "hub", coder).train) > len(before.train)


def test_openwebtext_is_carved_by_hash(monkeypatch):
    hub = _hub(monkeypatch, "openwebtext", {"train": _lines(1500, 3)})
    corpus_download.download(["openwebtext"])
    documents = corpus_hub.documents("openwebtext")
    parts = {split: [piece.text for piece in documents.read(split)] for split in SPLITS}
    assert sorted(sum(parts.values(), [])) == sorted(hub.texts["train"])
    assert all(parts.values()) and len(parts["train"]) > 1400 and not documents.cut


def test_gpt2s_tokenizer_is_fetched_once(monkeypatch):
    from transformers import AutoTokenizer

    asked = []

    def from_pretrained(name, revision):
        asked.append((name, revision))
        if len(asked) == 1:
            raise OSError("offline")
        return _fast()

    with monkeypatch.context() as patched:
        patched.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
        with pytest.raises(NotAvailable, match=r"openai-community/gpt2.*OSError: offline"):
            corpus_download.download(["gpt2"])
        assert not corpus_hub.gpt2_folder().exists()
        assert corpus_download.download(["gpt2"]) == corpus_download.download(["gpt2"]) == [corpus_hub.gpt2_folder()]
    assert asked == [corpus_hub.GPT2] * 2
    assert corpus_hub.gpt2().fingerprint == tokens.Pretrained(_fast()).fingerprint


# LAMBADA

PASSAGES = ["She gave it to  Helen", "“no,” he said ,\n and\tleft", "One two three . "]
EXAMPLES = [("She gave it to", "Helen"), ("“no,” he said ,\n and", "left"), ("One two three", ".")]


def test_lambada_from_the_hub_is_for_test_alone(monkeypatch, tmp_path):
    _hub(monkeypatch, "lambada", {"test": PASSAGES})
    with pytest.raises(NotAvailable, match="download lambada"):
        corpus.lambada_examples()
    corpus_download.download(["lambada"])
    assert [(one.context, one.word) for one in corpus.lambada_examples()] == EXAMPLES
    with pytest.raises(InvalidInput, match="no train text"):
        corpus.load("lambada", "hub", "bpe")
    coder = tokens.train("bpe", PASSAGES, 300)
    found = corpus.load("lambada", "hub", coder)
    assert _texts(found) == {"train": "", "validation": "", "test": tokens.END_OF_TEXT.join(PASSAGES)}
    local = _file(tmp_path / "l.jsonl", "".join(json.dumps({"text": passage}) + "\n" for passage in PASSAGES))
    assert [(one.context, one.word) for one in corpus.lambada_examples(local)] == EXAMPLES
    assert corpus.load("lambada", local, coder).fingerprint == found.fingerprint


def test_lambada_from_a_text_file(tmp_path):
    file = _file(tmp_path / "l.txt", "a b c\r\n\n  \nd é\n")
    assert [(one.context, one.word) for one in corpus.lambada_examples(file)] == [("a b", "c"), ("d", "é")]
    with pytest.raises(
        InvalidInput, match=r"LAMBADA passage 2 of .*l\.txt: expected at least two words, found 'alone'"
    ):
        corpus.lambada_examples(_file(file, "a b\nalone\n"))
    with pytest.raises(InvalidInput, match=r"l\.txt holds no text: its 3 bytes are white space"):
        corpus.lambada_examples(_file(file, "\n \n"))
    with pytest.raises(NotAvailable, match="which is no file"):
        corpus.lambada_examples(tmp_path)


# The command line


def _commands(monkeypatch) -> list:
    called = []
    monkeypatch.setattr(cli.text, "download", lambda: called.append("text"))
    monkeypatch.setattr(cli.corpus_download, "download", lambda names, limit: called.append((names, limit)))
    return called


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["text"]),
        (["text"], ["text"]),
        (["c4", "gpt2"], [(["c4", "gpt2"], corpus_download.LIMIT_TOKENS)]),
        (["gpt2", "c4", "gpt2"], [(["c4", "gpt2"], corpus_download.LIMIT_TOKENS)]),
        (["corpus", "--limit-tokens", "7"], [([*corpus_hub.PLACES, "gpt2"], 7)]),
        (["text", "lambada"], ["text", (["lambada"], corpus_download.LIMIT_TOKENS)]),
    ],
)
def test_the_command_line_fetches_what_it_is_told(monkeypatch, capsys, words, expected):
    called = _commands(monkeypatch)
    assert cli.main(["download", *words]) == 0
    assert called == expected and str(paths.CACHE) in capsys.readouterr().out


def test_the_command_line_refuses_what_it_does_not_know(monkeypatch, capsys):
    called = _commands(monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["download", "c4", "pile"])
    assert stopped.value.code == 2 and called == []
    assert "nothing is known as pile: choose from text, corpus, wikitext-103" in capsys.readouterr().err


def test_the_command_line_says_why_there_are_no_data(monkeypatch, capsys):
    hub = _wikitext(monkeypatch)
    hub.breaks = 0
    assert cli.main(["download", "wikitext-103"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("no data: Salesforce/wikitext (wikitext-103-raw-v1) could not be downloaded")
    assert cli.main(["download", "c4", "--limit-tokens", "0"]) == 1
    assert "limit_tokens=0: expected at least 1" in capsys.readouterr().err
    assert issubclass(NotAvailable, EffnnError)
