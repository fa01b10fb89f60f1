"""A text task that a tiny classifier learns in seconds, and the table of a sweep whose numbers are known."""

import random

import numpy as np
import pandas as pd

from effnn.data.text.task import Split, TextTask

TINY = {
    "layers": 1,
    "hidden": 32,
    "heads": 2,
    "ffn": 64,
    "vocab": 120,
    "max_length": 16,
    "epochs": 3,
    "learning_rate": 3e-3,
    "batch_size": 16,
}
FILL = "apple bench cloud door eagle field grass house iron jar".split()
SIGNS = ("rain storm flood".split(), "sun heat light".split())


def planted_task(rows: int = 400, labels: tuple[str, ...] = ("no", "yes"), pairs: bool = False) -> TextTask:
    """The label is whether the text speaks of the sun or of rain."""
    draw = random.Random(1)

    def split(count: int) -> Split:
        label = [draw.randrange(2) for _ in range(count)]
        texts = [" ".join(draw.sample(FILL, 2) + draw.sample(SIGNS[one], 2)) for one in label]
        second = [" ".join(draw.sample(FILL, 3)) for _ in label] if pairs else None
        return Split(texts, label if labels else [4.0 * one + draw.random() for one in label], second)

    return TextTask("planted", labels, split(rows), split(40), split(60), "here")


def sweep_frame():
    """Three seeds, two budgets, with differences that are known."""
    rows = []
    for seed in range(3):
        for budget in (0.5, 0.6):
            accuracy = {
                "search": 0.70,
                "rearrange": 0.71,
                "tune": 0.73 + 0.01 * seed,
                "retrain": 0.74,
                "magnitude": 0.6,
                "random": 0.4,
            }
            for method, value in accuracy.items():
                if method == "retrain" and budget == 0.5:
                    continue
                times = {"seconds": 60.0 + seed, "prune_seconds": 2.0, "load": 1.0 + seed}
                times = times if method == "retrain" else dict.fromkeys(times, np.nan)
                rows.append(
                    {"family": "bert", "seed": seed, "calibration_seed": 0, "budget": budget, "method": method,
                     "accuracy": value, "loss": 1.0, "dense_accuracy": 0.75, "mac_ratio": budget,
                     "accepted": 3, "gain": 0.4, "trial": 0} | times
                )  # fmt: skip
    return pd.DataFrame(rows)
