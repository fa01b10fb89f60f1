"""Notebook 03: the learning rates of the methods. All methods try the same rates in their last stage."""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from effnn.experiments.staged.runs import Method, Sizes, standard_methods

TUNED = ("scratch", "staged", "reset", "small")
"""The methods whose rates are tuned."""


def candidate_methods(
    path: Sizes, steps: Sequence[int], rates: dict[str, Sequence[float]], candidates: Sequence[float]
) -> list[Method]:
    """Return methods "name@rate" for all of `TUNED`: each tries the same rates in its last stage."""
    tried = []
    for rate in candidates:
        last = [*rates["staged"][:-1], rate]
        methods = standard_methods(path, steps, {"scratch": [rate], "small": [rate], "staged": last, "reset": last})
        tried += [replace(methods[name], name=f"{name}@{rate:g}") for name in TUNED]
    return tried


def best_rates(ends: pd.DataFrame) -> pd.DataFrame:
    """Return the validation losses of the candidate methods "name@rate", best first.

    ends: of candidates that all have the same budget. Columns: method, rate, validation_loss, best (whether it is the
    best rate of its method), edge (whether the best is also the smallest or largest rate tried, so that a better one
    may lie outside).
    """
    means = ends.groupby("method").validation_loss.mean()
    table = pd.DataFrame(
        [(name.split("@")[0], float(name.split("@")[1]), loss) for name, loss in means.items()],
        columns=["method", "rate", "validation_loss"],
    )
    table["best"] = table.validation_loss == table.groupby("method").validation_loss.transform("min")
    rates = table.groupby("method").rate
    table["edge"] = table.best & ((table.rate == rates.transform("min")) | (table.rate == rates.transform("max")))
    return table.sort_values(["method", "validation_loss"], ignore_index=True)


def tuned_rates(rates: dict[str, Sequence[float]], tuned: pd.DataFrame) -> dict[str, list[float]]:
    """Return rates as for `standard_methods` with the best ones of `best_rates` in the last stages."""
    best, before = tuned[tuned.best].set_index("method").rate, rates["staged"][:-1]
    return {name: [best[name]] for name in ("scratch", "small")} | {
        name: [*before, best[name]] for name in ("staged", "reset")
    }
