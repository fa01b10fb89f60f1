"""Corpora of the hub as they were downloaded: splits, revisions, lost and unfinished shards."""

import json

import pytest
from helpers.hub import c4, fake_hub, lines_of, wikitext

from effnn import paths
from effnn.base import InvalidInput, NotAvailable
from effnn.data import corpus
from effnn.data.corpus import coders
from effnn.data.corpus import download as corpus_download
from effnn.data.corpus import hub as corpus_hub
from effnn.data.corpus.documents import SPLITS


def test_another_revision_than_the_pinned_one_is_refused(monkeypatch):
    wikitext(monkeypatch)
    (folder,) = corpus_download.download(["wikitext-103"])
    path = corpus_hub.state_path(folder, "test")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": "f" * 40}))
    with pytest.raises(InvalidInput, match=rf"test is of revision {'f' * 12}, b08601e04326 is pinned"):
        corpus.load("wikitext-103", "hub", "character")


def test_a_shard_that_was_lost_is_seen(monkeypatch):
    wikitext(monkeypatch)
    monkeypatch.setattr(corpus_download, "SHARD_CHARACTERS", 150)
    (folder,) = corpus_download.download(["wikitext-103"])
    corpus_hub.shards(folder, "train")[-1].unlink()
    with pytest.raises(InvalidInput, match=r"train holds \d+ rows, 30 were downloaded"):
        corpus.load("wikitext-103", "hub", "character")


def test_shards_of_an_unfinished_download_do_not_change_the_corpus(monkeypatch):
    mocked = c4(monkeypatch)
    corpus_download.download(["c4"], 400)
    coder = coders.train("character", mocked.texts["train"])
    before = corpus.load("c4", "hub", coder)
    mocked.breaks = 120
    with pytest.raises(NotAvailable):
        corpus_download.download(["c4"], 2000)
    for path in (paths.CACHE / "corpus").iterdir():
        (path / "meta.json").unlink()  # so that the ids are made again
    assert corpus.load("c4", "hub", coder).fingerprint == before.fingerprint
    mocked.breaks = None
    corpus_download.download(["c4"], 2000)
    assert len(corpus.load("c4", "hub", coder).train) > len(before.train)


def test_openwebtext_is_carved_by_hash(monkeypatch):
    mocked = fake_hub(monkeypatch, "openwebtext", {"train": lines_of(1500, 3)})
    corpus_download.download(["openwebtext"])
    found = corpus_hub.documents("openwebtext")
    parts = {split: [piece.text for piece in found.read(split)] for split in SPLITS}
    assert sorted(sum(parts.values(), [])) == sorted(mocked.texts["train"])
    assert all(parts.values()) and len(parts["train"]) > 1400 and not found.cut
