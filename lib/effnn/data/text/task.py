"""What every text loader returns: a task of three splits with a fingerprint. It knows no file format and no model.

The rules of the splits hold for every source: all tuning is done on `validation`, which is carved out of the training
rows; `dev` is read once, for reporting.
"""

import dataclasses
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from effnn.base import InvalidInput


@dataclass(frozen=True)
class Split:
    """Rows of one split: `texts[i]` (and `texts_b[i]` for a task on pairs) has the label `label[i]`.

    label: class indices (int), or scores (float) for a regression task.
    """

    texts: list[str]
    label: list[int] | list[float]
    texts_b: list[str] | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.texts), len(self.label), len(self.texts if self.texts_b is None else self.texts_b)}
        if len(lengths) != 1:
            raise InvalidInput(f"a split needs one label (and one second text) per text, got lengths {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> "Split":
        """The given rows, in the given order; a row may be taken more than once."""
        second = None if self.texts_b is None else [self.texts_b[i] for i in rows]
        return Split([self.texts[i] for i in rows], [self.label[i] for i in rows], second)

    def joined(self) -> list[str]:
        """One string per row: the text, or both texts of a pair with a space between them."""
        if self.texts_b is None:
            return list(self.texts)
        return [f"{a} {b}" for a, b in zip(self.texts, self.texts_b, strict=True)]


@dataclass(frozen=True)
class TextTask:
    """A text classification (or regression) task; equal fingerprints mean equal rows in equal order.

    name: of the task.
    labels: names of the classes, in the order of their indices; empty for regression.
    train, validation, dev: the splits; choices are made on validation, and dev is read once, for reporting.
    source: where the rows came from, for a person to read; it does not enter the fingerprint, so the same files in
        another folder are the same data.
    """

    name: str
    labels: tuple[str, ...]
    train: Split
    validation: Split
    dev: Split
    source: str

    def __post_init__(self) -> None:
        for name, split in self.splits().items():
            if not len(split):
                raise InvalidInput(f"{self.name}: the {name} split of {self.source} is empty; more rows are needed")

    @property
    def regression(self) -> bool:
        """True where labels are scores rather than classes."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Outputs a model needs: the number of classes, or 1 for regression."""
        return len(self.labels) or 1

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the name, the label names and every row of every split."""
        digest = hashlib.sha256(json.dumps([self.name, self.labels]).encode())
        for name, split in self.splits().items():
            digest.update(name.encode())
            for row in zip(split.texts, split.texts_b or [None] * len(split), split.label, strict=True):
                digest.update(json.dumps(row).encode())
        return digest.hexdigest()

    def splits(self) -> dict[str, Split]:
        """The three splits by name: train, validation, dev."""
        return {"train": self.train, "validation": self.validation, "dev": self.dev}

    def majority(self) -> float:
        """Share of the commonest class of `dev`: what a model that ignores its input reaches.

        Raises InvalidInput for a regression task.
        """
        if self.regression:
            raise InvalidInput(f"{self.name} is a regression task: it has no majority class")
        return max(self.dev.label.count(c) for c in range(len(self.labels))) / len(self.dev)

    def subset(
        self, train: int | None = None, validation: int | None = None, dev: int | None = None, seed: int = 0
    ) -> "TextTask":
        """A smaller task: that many rows of each split, drawn without replacement in a fixed order (None: all)."""
        smaller = {}
        for (name, split), count in zip(self.splits().items(), (train, validation, dev), strict=True):
            if count is not None and count < len(split):
                split = split.take(sorted(random.Random(f"{seed}/{name}").sample(range(len(split)), count)))
            smaller[name] = split
        return dataclasses.replace(self, **smaller)
