"""A mocked hub: its rows come from a dictionary, and its connection may break."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from effnn.data import hub
from effnn.data.corpus import download as corpus_download
from effnn.data.corpus.documents import SPLITS
from helpers.corpora import prose


class FakeRows:
    """What `load_dataset(streaming=True)` gives, as far as it is used; the connection breaks before row `breaks`."""

    def __init__(self, hub: "FakeHub", split: str, start: int = 0):
        self.hub, self.split, self.start = hub, split, start

    def skip(self, rows: int) -> "FakeRows":
        return FakeRows(self.hub, self.split, self.start + rows)

    def __iter__(self) -> Iterator[dict[str, str]]:
        self.hub.begun.append((self.split, self.start))
        for i, text in enumerate(self.hub.texts[self.split][self.start :], self.start):
            if i == self.hub.breaks:
                raise ConnectionError("no route to the hub\nmore words")
            yield {"text": text}


class FakeHub:
    """The mocked hub: its texts by split, what was asked of it, and where each reading began."""

    def __init__(self, texts: dict[str, list[str]]):
        self.texts, self.breaks, self.asked, self.begun = texts, None, [], []

    def load_dataset(self, name, config, split, streaming, revision):
        assert streaming
        self.asked.append((name, config, split, revision))
        return FakeRows(self, split)


def fake_hub(monkeypatch, name: str, texts: dict[str, list[str]]) -> FakeHub:
    datasets = pytest.importorskip("datasets")
    mocked, entry = FakeHub(texts), hub.CORPORA[name]
    counts = {s: None if rows is None else len(texts[s]) for s, rows in entry.rows[entry.config].items()}
    monkeypatch.setitem(hub.CORPORA, name, replace(entry, rows={entry.config: counts}))
    monkeypatch.setattr(datasets, "load_dataset", mocked.load_dataset)
    return mocked


def lines_of(lines: int, seed: int) -> list[str]:
    return prose(lines, seed).split("\n")[:lines]


def wikitext(monkeypatch) -> FakeHub:
    rows = {
        split: [f" {line} \n" if i % 3 else "" for i, line in enumerate(lines_of(30, k))]
        for k, split in enumerate(SPLITS)
    }
    return fake_hub(monkeypatch, "wikitext-103", rows)


def c4(monkeypatch) -> FakeHub:
    monkeypatch.setattr(corpus_download, "HELD_OUT_CHARACTERS", 1000)
    monkeypatch.setattr(corpus_download, "SHARD_CHARACTERS", 700)
    return fake_hub(monkeypatch, "c4", {"train": lines_of(200, 1), "validation": lines_of(200, 2)})
