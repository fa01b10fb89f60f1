"""Notebook 03: the compute that the methods of runs.py save at equal loss, and how fast they learn."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.optimize import isotonic_regression

from effnn import staged
from effnn.base import LEAST, InvalidInput

AXES = {"flops": "FLOPs without embeddings", "flops_full": "FLOPs in full", "seconds": "seconds"}
"""Three measures of compute: FLOPs in both conventions are counted, seconds are measured here (step_times.py)."""


def compute_to_loss(ends: pd.DataFrame, loss: float, axis: str = "flops") -> float:
    """Return what a method spends to have `loss` on the test split, interpolated between its end points.

    A method that is already better at its smallest budget is charged that budget, which is an upper bound; one that
    never has the loss gives infinity. Measured seconds need not increase with the budget, so the point of equal loss is
    found in FLOPs, and its seconds by isotonic regression over all end points. ends: of one method and seed.
    """
    ends = ends.sort_values("budget")
    if ends.test_loss.min() > loss:
        return math.inf
    if ends.test_loss.iloc[0] <= loss or len(ends) == 1:
        return float(ends[axis].iloc[0])
    if axis == "seconds":
        # its means of equal seconds are rounded, hence the clip
        rising = isotonic_regression(ends.seconds).x.clip(ends.seconds.min(), ends.seconds.max())
        return float(np.interp(compute_to_loss(ends, loss), ends.flops, rising))
    return staged.Curve(ends[axis].tolist(), ends.test_loss.tolist()).x_at(loss)


def savings(ends: pd.DataFrame, reference: str = "scratch", horizon: float | None = None) -> pd.DataFrame:
    """Return what every other method saves against `reference` at equal test loss.

    horizon: the budget of the reference whose loss is compared; None takes the largest.

    One row per method, seed and those of `AXES` that `ends` has. Columns: method, seed, axis, loss (nats per token),
    spent, at_most (whether `spent` is an upper bound: the method is better at its smallest budget already), reference
    (what the reference spent), saving (percent; minus infinity if the loss is never reached).
    """
    rows = []
    for seed, of_seed in ends.groupby("seed"):
        scratch = of_seed[of_seed.method == reference].sort_values("budget")
        scratch = (scratch if horizon is None else scratch[scratch.budget == horizon]).iloc[-1]
        for name, method in of_seed[of_seed.method != reference].groupby("method", sort=False):
            for axis in (name for name in AXES if name in ends):
                spent = compute_to_loss(method, scratch.test_loss, axis)
                row = {"method": name, "seed": seed, "axis": axis, "loss": scratch.test_loss, "spent": spent}
                row["at_most"] = bool(method.sort_values("budget").test_loss.iloc[0] < scratch.test_loss)
                rows.append(row | {"reference": scratch[axis], "saving": 100 * (1 - spent / max(scratch[axis], LEAST))})
    return pd.DataFrame(rows)


def claimed_savings(
    ends: pd.DataFrame, method: str = "staged", horizon: float | None = None
) -> tuple[list[float], str]:
    """Return the numbers of the claim, FLOPs saved in percent for each seed, and a note.

    The claim is about a setting where growing also beats continuing a smaller model (`pays`). For a seed where it does,
    the number is the saving against scratch; where it does not, the saving against that model, which is 0 or less. A
    method that never has the loss is charged its largest budget, as if it had the loss there.
    """
    table, against = savings(ends, horizon=horizon), pays(ends, method, horizon=horizon)
    found = table[(table.method == method) & (table.axis == "flops")].set_index("seed").sort_index()
    against = against[against.axis == "flops"].set_index("seed").sort_index()
    spent = found.spent.where(np.isfinite(found.spent), _largest(ends, method))
    saved = 100 * (1 - spent / found.reference)
    over_small = (100 * (1 - spent / against.other_spent)).clip(upper=0.0)
    samples = saved.where(against.pays, np.minimum(saved, over_small))
    missed, won = int((~np.isfinite(found.spent)).sum()), int(against.pays.sum())
    never = int(np.isinf(against.other_spent).sum())
    others = table[(table.method == method) & (table.axis != "flops")].groupby("axis").saving.mean()
    note = f"in full FLOPs {others['flops_full']:.1f}"
    note += f", in seconds of steps timed in turn {others['seconds']:.1f}" if "seconds" in others else ""
    note += f"; the small model continued spends more in {won} of {len(against)} seeds"
    note += f" (and never gets there in {never})" if never else ""
    note += f"; the loss is not reached in {missed}" if missed else ""
    return samples.tolist(), note


def _largest(ends: pd.DataFrame, method: str) -> pd.Series:
    """FLOPs of the largest budget, by seed."""
    return ends[ends.method == method].groupby("seed").flops.max()


def jumps(points: pd.DataFrame) -> pd.DataFrame:
    """Return the validation loss just before and after the last growth, and its jump, by method and seed."""
    rows = []
    for (name, seed), own in points.groupby(["method", "seed"], sort=False):
        if last := own.phase.max():
            before = own[own.phase == last - 1].validation_loss.iloc[-1]
            after = own[own.phase == last].validation_loss.iloc[0]
            rows.append((name, seed, before, after, after - before))
    return pd.DataFrame(rows, columns=["method", "seed", "before", "after", "jump"])


def pays(
    ends: pd.DataFrame,
    method: str = "staged",
    others: Sequence[str] = ("small", "once"),
    horizon: float | None = None,
) -> pd.DataFrame:
    """Return whether growing beats continuing a smaller model, by seed and axis.

    others: the smaller models; those without results are left out. Columns: spent; other_spent (of the cheapest of
    them; infinite if none has the loss); known (False if one was better at its smallest budget already, so that only an
    upper bound of what it needs is known); pays (spent less, and known).
    """
    table = savings(ends, horizon=horizon).set_index(["seed", "axis"])
    found = table[table.method == method][["spent"]].copy()
    other = table[table.method.isin(others)].groupby(level=["seed", "axis"])
    found["other_spent"], found["known"] = other.spent.min(), ~other.at_most.any()
    found["pays"] = (found.spent < found.other_spent) & found.known
    return found.reset_index()


def slope_ratios(points: pd.DataFrame, steps: int, method: str = "staged", scratch: str = "scratch") -> pd.DataFrame:
    """Return how fast the grown model learns relative to the same size from scratch, at equal loss, by seed.

    points: at a constant rate.
    steps: of the grown model after its recovery, over which the two are compared.
    method, scratch: names of the grown model and of the one from scratch.

    Columns:
    upper: the small model's last loss. lower: the grown model's loss `steps` steps after its recovery, or the lowest
    loss that both have.
    recovery: steps after growth until the grown model is back at `upper`, at the earliest its first evaluation.
    grown_slope, scratch_slope: of straight lines through all evaluations from the recovery to `lower`, nats per token
    and step. after_recovery: their ratio, which leaves the bump after growth out.
    ratio: steps of the model from scratch from `upper` to `lower`, over those of the grown model from its growth, bump
    and re-warm included; 1 is the same dynamics, more is faster.

    Raises InvalidInput if there are fewer than two evaluations between the two losses.
    """
    rows = []
    for seed, of_seed in points.groupby("seed"):
        own, other = (of_seed[of_seed.method == name].sort_values("step", kind="stable") for name in (method, scratch))
        last = own.phase.max()
        born = own.step[own.phase == last].min()
        upper = own[own.phase < last].validation_loss.iloc[-1]
        grown = own[(own.phase == last) & (own.step > born)]
        curve = staged.Curve((grown.step - born).tolist(), grown.validation_loss.tolist())
        target = other[other.step > 0]
        reference = staged.Curve(target.step.tolist(), target.validation_loss.tolist())
        back = min(upper, float(curve.losses[0]))
        recovery = max(curve.x_at(back), float(curve.x[0]))
        lower = max(curve.loss_at(min(recovery + steps, float(curve.x[-1]))), math.exp(float(reference.log_loss[-1])))
        own_slope = _slope(curve, recovery, curve.x_at(lower))
        its_slope = _slope(reference, reference.x_at(back), reference.x_at(lower))
        row = {"seed": seed, "upper": upper, "lower": lower, "recovery": recovery}
        row |= {"grown_slope": own_slope, "scratch_slope": its_slope, "after_recovery": own_slope / its_slope}
        rows.append(row | {"ratio": (reference.x_at(lower) - reference.x_at(upper)) / curve.x_at(lower)})
    return pd.DataFrame(rows)


def _slope(curve: staged.Curve, first: float, last: float) -> float:
    inside = (curve.x >= first - 1e-6) & (curve.x <= last + 1e-6)
    if int(inside.sum()) < 2:
        raise InvalidInput(
            f"between step {first:.0f} and {last:.0f} there are {int(inside.sum())} evaluations, a slope needs two: "
            "evaluate more often, or compare over more steps"
        )
    return float(np.polyfit(curve.x[inside].numpy(), curve.losses[inside].numpy(), 1)[0])
