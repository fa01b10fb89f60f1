"""LAMBADA: passages and their last words."""

import json

import pytest
from helpers.corpora import texts, written
from helpers.hub import fake_hub

from effnn.base import InvalidInput, NotAvailable
from effnn.data import corpus
from effnn.data.corpus import coders
from effnn.data.corpus import download as corpus_download

PASSAGES = ["She gave it to  Helen", "“no,” he said ,\n and\tleft", "One two three . "]


EXAMPLES = [("She gave it to", "Helen"), ("“no,” he said ,\n and", "left"), ("One two three", ".")]


def test_lambada_from_the_hub_is_for_test_alone(monkeypatch, tmp_path):
    fake_hub(monkeypatch, "lambada", {"test": PASSAGES})
    with pytest.raises(NotAvailable, match="download lambada"):
        corpus.lambada_examples()
    corpus_download.download(["lambada"])
    assert [(one.context, one.word) for one in corpus.lambada_examples()] == EXAMPLES
    with pytest.raises(InvalidInput, match="no train text"):
        corpus.load("lambada", "hub", "bpe")
    coder = coders.train("bpe", PASSAGES, 300)
    found = corpus.load("lambada", "hub", coder)
    assert texts(found) == {"train": "", "validation": "", "test": coders.END_OF_TEXT.join(PASSAGES)}
    local = written(tmp_path / "l.jsonl", "".join(json.dumps({"text": passage}) + "\n" for passage in PASSAGES))
    assert [(one.context, one.word) for one in corpus.lambada_examples(local)] == EXAMPLES
    assert corpus.load("lambada", local, coder).fingerprint == found.fingerprint


def test_lambada_from_a_text_file(tmp_path):
    file = written(tmp_path / "l.txt", "a b c\r\n\n  \nd é\n")
    assert [(one.context, one.word) for one in corpus.lambada_examples(file)] == [("a b", "c"), ("d", "é")]
    with pytest.raises(
        InvalidInput, match=r"LAMBADA passage 2 of .*l\.txt: expected at least two words, found 'alone'"
    ):
        corpus.lambada_examples(written(file, "a b\nalone\n"))
    with pytest.raises(InvalidInput, match=r"l\.txt holds no text: its 3 bytes are white space"):
        corpus.lambada_examples(written(file, "\n \n"))
    with pytest.raises(NotAvailable, match="which is no file"):
        corpus.lambada_examples(tmp_path)
