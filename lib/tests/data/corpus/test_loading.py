"""The front door of the corpora: its arguments, and what makes another entry of the cache."""

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.corpora import characters, prose, texts, written

from effnn import paths
from effnn.base import InvalidInput, imports
from effnn.data import corpus, splits
from effnn.data.corpus import coders, documents, files, loading, token_files
from effnn.data.files import reading


def test_choices_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="unknown corpus 'wikitext': choose one of docstrings, text, wikitext-103"):
        corpus.load("wikitext")
    for name, source in (("docstrings", "hub"), ("docstrings", tmp_path), ("text", "builtin"), ("text", "hub")):
        with pytest.raises(InvalidInput, match=f"the source of {name} is .*, not '{re.escape(str(source))}'"):
            corpus.load(name, source)
    with pytest.raises(InvalidInput, match="the source of c4 is 'hub' or a path, not 'builtin'"):
        corpus.load("c4")
    with pytest.raises(InvalidInput, match="limit_tokens=0"):
        characters(tmp_path, limit_tokens=0)


@pytest.mark.parametrize("limit", [1, 77, 5000, 10**9])
def test_train_is_cut_at_the_limit_and_the_rest_is_not(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(loading, "batches", lambda pieces: documents.batches(pieces, 1000))
    file = written(tmp_path / "a.jsonl", "".join(json.dumps({"text": line}) + "\n" for line in prose(300).split("\n")))
    full, cut = characters(file), characters(file, limit_tokens=limit)
    assert len(cut.train) == min(limit, len(full.train)) and np.array_equal(cut.train, full.train[:limit])
    assert np.array_equal(cut.validation, full.validation) and np.array_equal(cut.test, full.test)
    assert (cut.fingerprint == full.fingerprint) == (limit == 10**9)


def _made(file: Path, kind: str = "character") -> tuple[corpus.Corpus, Path]:
    found = corpus.load("text", file, kind, vocab_size=300)
    (folder,) = (paths.CACHE / "corpus").iterdir()
    return found, folder


@pytest.mark.parametrize("kind", ["character", "bpe"])
def test_a_corpus_is_made_once(tmp_path, monkeypatch, kind):
    found, _ = _made(written(tmp_path / "a.txt", prose(100)), kind)
    monkeypatch.setattr(coders, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(token_files, "write", lambda *_: pytest.fail("written again"))
    again, _ = _made(tmp_path / "a.txt", kind)
    assert again.fingerprint == found.fingerprint and texts(again) == texts(found)
    assert again.tokenizer.fingerprint == found.tokenizer.fingerprint
    moved = corpus.load("text", written(tmp_path / "elsewhere.txt", prose(100)), kind, vocab_size=300)
    assert moved.fingerprint == found.fingerprint and "elsewhere" in moved.source


def test_an_edit_of_what_decides_the_ids_gives_another_entry(tmp_path, monkeypatch):
    file = written(tmp_path / "a.txt", prose(100))
    _made(file)
    for module in (loading, documents, files, reading, splits, token_files, coders):
        with monkeypatch.context() as patched:
            digest, edited = imports._digest, Path(module.__file__)
            patched.setattr(
                imports, "_digest", lambda path, *of, e=edited, d=digest: "new" if path == e else d(path, *of)
            )
            characters(file, vocab_size=300)
    assert len(list((paths.CACHE / "corpus").iterdir())) == 8


def test_every_change_gives_another_corpus(tmp_path):
    file = written(tmp_path / "a.txt", prose(100))
    found = [characters(file), characters(file, vocab_size=10), corpus.load("text", file, "bpe", vocab_size=300)]
    written(file, prose(100)[:-3] + "..\n")
    found.append(characters(file))
    assert len({one.fingerprint for one in found}) == 4
    assert texts(found[-1])["test"].endswith("..\n")


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "test.bin", "meta.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", [_flip, _cut, Path.unlink, lambda path: path.write_bytes(b"")])
def test_damaged_token_files_are_made_again(tmp_path, caplog, name, damage):
    found, folder = _made(written(tmp_path / "a.txt", prose(60)))
    expected = texts(found)
    damage(folder / name)
    with caplog.at_level(logging.WARNING, "effnn"):
        again, _ = _made(tmp_path / "a.txt")
    assert "are damaged" in caplog.text and "making them again" in caplog.text
    assert again.fingerprint == found.fingerprint and texts(again) == expected
    caplog.clear()
    with caplog.at_level(logging.WARNING, "effnn"):
        _made(tmp_path / "a.txt")
    assert not caplog.text
