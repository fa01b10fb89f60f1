"""Documents in pieces: where they are cut does not matter."""

import random

import numpy as np
from helpers.corpora import fast_tokenizer, prose, texts, written

from effnn import paths
from effnn.data import corpus
from effnn.data.corpus import coders, documents, files, loading
from effnn.data.corpus.documents import SPLITS, in_pieces, whole
from effnn.data.files import reading

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
    trained = [coders.train("bpe", [prose(100), blanks], 600), coders.Pretrained(fast_tokenizer())]
    for seed in range(60):
        draw = random.Random(seed)
        # A space and a word now and then, as otherwise a stretch has no place to be cut.
        text = "".join(part for _ in range(40) for part in (*draw.choices(_ODD, k=6), " so"))
        size, step = draw.randint(60, 120), draw.randint(1, 90)
        pieces = list(in_pieces((text[i : i + step] for i in range(0, len(text), step)), size))
        assert "".join(piece.text for piece in pieces) == text and len(pieces) > 2
        assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        for coder in trained:
            assert np.concatenate(coder.encode_many([piece.text for piece in pieces])).tolist() == coder.encode(text)


def test_a_stretch_without_a_place_to_cut_is_cut_where_it_ends():
    assert [piece.text for piece in in_pieces(["abcd"] * 5, 8)] == ["abcdabcd", "abcdabcd", "abcd"]
    assert list(in_pieces([], 8)) == list(in_pieces(["", ""], 8)) == []


def test_a_long_document_is_one_document():
    long = "one two " * (documents.PIECE // 4)
    pieces = list(whole(["short", "", long, "end"]))
    assert [piece.text for piece in pieces if piece.first][::2] == ["short", "end"]
    assert "".join(piece.text for piece in pieces) == f"short{long}end"
    assert max(len(piece.text) for piece in pieces) < 2 * documents.PIECE
    batches = list(documents.batches(pieces, documents.PIECE))
    assert [piece for batch in batches for piece in batch] == pieces and len(batches) > 1


def test_small_pieces_give_the_corpus_of_large_ones(tmp_path, monkeypatch):
    file = written(tmp_path / "a.txt", prose(400))
    expected = corpus.load("text", file, "bpe", vocab_size=300)
    monkeypatch.setattr(reading, "_BLOCK", 97)
    monkeypatch.setattr(files, "in_pieces", lambda chunks: in_pieces(chunks, 300))
    monkeypatch.setattr(loading, "batches", lambda pieces: documents.batches(pieces, 1000))
    monkeypatch.setattr(paths, "CACHE", tmp_path / "other")
    assert corpus.load("text", file, expected.tokenizer).fingerprint == expected.fingerprint


def test_a_file_that_holds_the_words_end_of_text_is_one_document(tmp_path):
    text = prose(40).replace(" ", coders.END_OF_TEXT)
    for tokenizer in ("bpe", fast_tokenizer()):
        found = corpus.load("text", written(tmp_path / "a.txt", text), tokenizer)
        assert "".join(texts(found).values()) == text
        assert not any(np.isin(getattr(found, split), found.tokenizer.separator).any() for split in SPLITS)
