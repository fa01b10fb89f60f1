"""Sentences of movie reviews with the mean of twenty people's ratings: positive or negative? Real data, MIT licence.

Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014. The
sentences come out of a pinned package (effnn.data.packages). They are those that Pang and Lee collected in 2005, of
which SST-2 is made too, so a model that was trained on one of the two must never be tested on the other.
"""

import re
from collections import defaultdict
from pathlib import Path

from effnn.base import InvalidInput
from effnn.data import packages
from effnn.data.splits import unit_hash
from effnn.data.text.task import Split, TextTask

LABELS = ("negative", "positive")
LEAST_RATING = 0.5
"""Sentences whose mean rating, from -4 to 4, is nearer to 0 are left out: people do not agree on them."""

ROWS = {"train": 6500, "validation": 1500}
"""Rows that a split has at least; the rest, about 2,000, is dev."""

SHARED_RUN = 8
"""Two sentences with a run of so many words in common are near duplicates and stand in one split."""

_LINE = re.compile(r"(?P<id>\d+)\t(?P<rating>-?\d+(\.\d+)?)\t(?P<text>.*)")


def load() -> TextTask:
    """The task; raises NotAvailable where the package was not fetched, with the ways out."""
    file = packages.folder("movie_sentences") / "sentences.tsv"
    texts, labels = read(file)
    return TextTask("movie_sentences", LABELS, *split(texts, labels), "package vaderSentiment 3.3.2, MIT licence")


def read(path: Path) -> tuple[list[str], list[int]]:
    """Sentences that people agree on and their labels, in the order of the file, each sentence once.

    Raises InvalidInput naming file and line of the first bad row, or a sentence that is rated both ways.
    """
    found: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        row = _LINE.fullmatch(line.rstrip("\r"))
        if row is None or not -4 <= float(row["rating"]) <= 4:
            raise InvalidInput(f"{path}, line {number}: expected an id, a mean rating from -4 to 4 and a sentence")
        text, rating = " ".join(row["text"].split()), float(row["rating"])
        if abs(rating) < LEAST_RATING or not text:
            continue
        if found.setdefault(text, int(rating > 0)) != int(rating > 0):
            raise InvalidInput(f"{path}, line {number}: the sentence stands above with the other sign")
    return list(found), list(found.values())


def split(texts: list[str], labels: list[int]) -> tuple[Split, Split, Split]:
    """Train, validation and dev: near duplicates together, in the order of a hash of the sentences."""
    groups = sorted(near_duplicates(texts), key=lambda group: min(unit_hash(f"movie/{texts[row]}") for row in group))
    rows: dict[str, list[int]] = {name: [] for name in (*ROWS, "dev")}
    for group in groups:
        name = next((name for name, least in ROWS.items() if len(rows[name]) < least), "dev")
        rows[name] += group
    whole = Split(texts, labels)
    train, validation, dev = (whole.take(sorted(chosen)) for chosen in rows.values())
    return train, validation, dev


def near_duplicates(texts: list[str]) -> list[list[int]]:
    """The sentences in groups: equal words, or a run of `SHARED_RUN` of them in common, join two sentences.

    Also through a third one: sentences are joined until nothing more is shared between two groups.
    """
    group = list(range(len(texts)))

    def root(row: int) -> int:
        while group[row] != row:
            group[row] = group[group[row]]
            row = group[row]
        return row

    first: dict[tuple[str, ...], int] = {}
    for row, text in enumerate(texts):
        words = re.findall(r"\w+", text.lower())
        for start in range(max(1, len(words) - SHARED_RUN + 1)):
            other = first.setdefault(tuple(words[start : start + SHARED_RUN]), row)
            group[root(row)] = root(other)
    found = defaultdict(list)
    for row in range(len(texts)):
        found[root(row)].append(row)
    return list(found.values())
