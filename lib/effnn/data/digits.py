"""The built-in image task: 1,797 handwritten digits of 8 x 8 pixels, which come with scikit-learn (UCI, Alpaydin 1998).

No files and no network. The splits are drawn by a fixed seed, each class in the same share: all tuning is done on
`validation`, and `dev` is read once, for reporting. The scans do not name their writers, so a writer may stand in two
splits.
"""

import hashlib
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

SPLIT = {"train": 1000, "validation": 297, "dev": 500}


@dataclass(frozen=True)
class Images:
    """pixels: (N, 1, 8, 8), float32 from -1 to 1; labels: (N,), int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> "Images":
        """The given rows, in the given order; a row may be taken more than once."""
        return Images(self.pixels[rows], self.labels[rows])

    def batches(self, size: int, *, shuffle: bool = False, seed: int = 0, epoch: int = 0) -> list[dict[str, Tensor]]:
        """Mini-batches of model inputs (`pixel_values`, `labels`).

        shuffle: a new order for every (seed, epoch), the same on every run; else the rows as they lie.
        """
        # a plain sum of seed and epoch would give seed 0 epoch 1 the order of seed 1 epoch 0
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self), generator=generator) if shuffle else torch.arange(len(self))
        return [{"pixel_values": self.pixels[rows], "labels": self.labels[rows]} for rows in order.split(size)]


@dataclass(frozen=True)
class ImageTask:
    """The task: rows of ten classes, an image each.

    train, validation, dev: the splits; choices are made on validation, and dev is read once, for reporting.
    name: of the task.
    num_labels: outputs a model needs.
    """

    train: Images
    validation: Images
    dev: Images
    name: str = "digits"
    num_labels: int = 10

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all pixels and labels, split by split."""
        parts = [t.numpy().tobytes() for s in (self.train, self.validation, self.dev) for t in (s.pixels, s.labels)]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def majority(self) -> float:
        """Accuracy on dev of always the commonest class."""
        return float(self.dev.labels.bincount().max() / len(self.dev))


@cache
def load() -> ImageTask:
    """The task; the same rows in the same order on every call."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train, rest, train_labels, rest_labels = train_test_split(
        pixels, labels, train_size=SPLIT["train"], stratify=labels, random_state=0
    )
    validation, dev, validation_labels, dev_labels = train_test_split(
        rest, rest_labels, train_size=SPLIT["validation"], stratify=rest_labels, random_state=0
    )
    return ImageTask(_images(train, train_labels), _images(validation, validation_labels), _images(dev, dev_labels))


def pixel_baseline(task: ImageTask) -> float:
    """Accuracy on dev of logistic regression on the raw pixels, its strength chosen on validation."""
    from sklearn.linear_model import LogisticRegression

    best = None
    for strength in (0.01, 0.1, 1.0):
        fitted = LogisticRegression(C=strength, max_iter=2000).fit(*_flat(task.train))
        score = fitted.score(*_flat(task.validation))
        best = max(best or (score, -strength, fitted), (score, -strength, fitted), key=lambda item: item[:2])
    return float(best[2].score(*_flat(task.dev)))


def _images(pixels, labels) -> Images:
    scaled = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return Images(scaled, torch.tensor(labels, dtype=torch.long))


def _flat(images: Images) -> tuple:
    return images.pixels.flatten(1).numpy(), images.labels.numpy()
