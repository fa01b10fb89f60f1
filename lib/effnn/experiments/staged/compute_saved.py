"""Notebook 03: what the lines of staged_lines.py save against each other, to equal loss, and how fast they learn."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.optimize import isotonic_regression

from effnn import staged
from effnn.base import LEAST, InvalidInput

AXES = {"flops": "FLOPs without embeddings", "flops_full": "FLOPs in full", "seconds": "seconds"}
"""What can be spent: both conventions of FLOPs are counted, the seconds (staged_times.py) are of this machine."""


def compute_to_loss(ends: pd.DataFrame, loss: float, axis: str = "flops") -> float:
    """Return what a line spends until its end point has `loss` on the test split: interpolated between budgets.

    ends: of one line and seed. A line that is already better at its smallest budget is charged that budget, which can
    only be too much; one that never gets there gives infinity. Seconds are measured, and a longer run may have taken
    less time by the clock: they are fitted, not taken as ordered. Where the loss is reached is found in FLOPs, and the
    seconds there are read off the rising step function that is nearest to all end points (isotonic regression).
    """
    ends = ends.sort_values("budget")
    if ends.test_loss.min() > loss:
        return math.inf
    if ends.test_loss.iloc[0] <= loss or len(ends) == 1:
        return float(ends[axis].iloc[0])
    if axis == "seconds":
        rising = isotonic_regression(ends.seconds).x
        return float(np.interp(compute_to_loss(ends, loss), ends.flops, rising))
    return staged.Curve(ends[axis].tolist(), ends.test_loss.tolist()).x_at(loss)


def savings(ends: pd.DataFrame, reference: str = "scratch", horizon: float | None = None) -> pd.DataFrame:
    """Return what every other line saves against `reference`, to the loss that it has at its largest budget.

    horizon: a smaller budget of the reference, whose loss is then compared.
    One row a line, seed and axis (of `AXES`, those that `ends` has): line, seed, axis, loss (nats a token, of the test
    split), spent, at_most
    (whether less would have done: the line is already better at its smallest budget), reference (what the reference
    spent), saving (percent; minus infinity where the loss is never reached).
    """
    rows = []
    for seed, of_seed in ends.groupby("seed"):
        scratch = of_seed[of_seed.line == reference].sort_values("budget")
        scratch = (scratch if horizon is None else scratch[scratch.budget == horizon]).iloc[-1]
        for name, line in of_seed[of_seed.line != reference].groupby("line", sort=False):
            for axis in (name for name in AXES if name in ends):
                spent = compute_to_loss(line, scratch.test_loss, axis)
                row = {"line": name, "seed": seed, "axis": axis, "loss": scratch.test_loss, "spent": spent}
                row["at_most"] = bool(line.sort_values("budget").test_loss.iloc[0] < scratch.test_loss)
                rows.append(row | {"reference": scratch[axis], "saving": 100 * (1 - spent / max(scratch[axis], LEAST))})
    return pd.DataFrame(rows)


def claimed_savings(ends: pd.DataFrame, line: str = "staged", horizon: float | None = None) -> tuple[list[float], str]:
    """Return what the claim asks for, one number a seed, and a note: FLOPs saved in percent.

    The claim wants a setting where growing also beats the small model simply continued (and, with three stages, what
    the first growth gave). Where it does, a seed counts what it saves against scratch. Where it does not, it counts
    what it saves against that model, which is 0 or less. A line that never reaches the loss is taken at its largest
    budget, as if it had reached it there.
    """
    table, against = savings(ends, horizon=horizon), pays(ends, line, horizon=horizon)
    found = table[(table.line == line) & (table.axis == "flops")].set_index("seed").sort_index()
    against = against[against.axis == "flops"].set_index("seed").sort_index()
    spent = found.spent.where(np.isfinite(found.spent), _largest(ends, line))
    saved = 100 * (1 - spent / found.reference)
    over_small = (100 * (1 - spent / against.other_spent)).clip(upper=0.0)
    samples = saved.where(against.pays, np.minimum(saved, over_small))
    missed, won = int((~np.isfinite(found.spent)).sum()), int(against.pays.sum())
    never = int(np.isinf(against.other_spent).sum())
    others = table[(table.line == line) & (table.axis != "flops")].groupby("axis").saving.mean()
    note = f"in full FLOPs {others['flops_full']:.1f}"
    note += f", in seconds of steps timed in turn {others['seconds']:.1f}" if "seconds" in others else ""
    note += f"; the small model simply continued spends more in {won} of {len(against)} seeds"
    note += f" (and never gets there in {never})" if never else ""
    note += f"; the loss is not reached in {missed}" if missed else ""
    return samples.tolist(), note


def _largest(ends: pd.DataFrame, line: str) -> pd.Series:
    """FLOPs of the largest budget, by seed."""
    return ends[ends.line == line].groupby("seed").flops.max()


def jumps(points: pd.DataFrame) -> pd.DataFrame:
    """Return, by line and seed, the validation loss just before and just after the last growth, and the difference."""
    rows = []
    for (name, seed), own in points.groupby(["line", "seed"], sort=False):
        if last := own.phase.max():
            before = own[own.phase == last - 1].validation_loss.iloc[-1]
            after = own[own.phase == last].validation_loss.iloc[0]
            rows.append((name, seed, before, after, after - before))
    return pd.DataFrame(rows, columns=["line", "seed", "before", "after", "jump"])


def pays(
    ends: pd.DataFrame,
    line: str = "staged",
    others: Sequence[str] = ("small", "once"),
    horizon: float | None = None,
) -> pd.DataFrame:
    """Return whether growing beats simply continuing a smaller model, by seed and axis.

    others: those smaller models, as far as there are such lines. Columns: spent; other_spent (of the cheapest of them;
    infinite where none gets there); known (False where one was already better at its smallest budget, so that what it
    needs is only known to be less); pays (spent less, and known).
    """
    table = savings(ends, horizon=horizon).set_index(["seed", "axis"])
    found = table[table.line == line][["spent"]].copy()
    other = table[table.line.isin(others)].groupby(level=["seed", "axis"])
    found["other_spent"], found["known"] = other.spent.min(), ~other.at_most.any()
    found["pays"] = (found.spent < found.other_spent) & found.known
    return found.reset_index()


def slope_ratios(points: pd.DataFrame, steps: int, line: str = "staged", scratch: str = "scratch") -> pd.DataFrame:
    """Return, by seed, the grown model's fall of the loss over that of the same size from scratch, at equal loss.

    points: at a constant rate. ratio counts from the growth point, bump and re-warm included: the steps that the model
    from scratch takes from the small model's last loss (`upper`) to a lower one (`lower`), over those that the grown
    model takes; 1 is the same dynamics, more is faster. after_recovery leaves the bump out: from where the grown model
    is back at `upper` (`recovery` steps after growth, at the earliest its first evaluation), lines are fitted through
    all evaluations of both between the same two losses, since single ones are noisy, and their slopes divided
    (grown_slope over scratch_slope, nats a token and step). lower is what the grown model has `steps` steps after its
    recovery, or as far as both reach. Raises InvalidInput where a window holds fewer than two evaluations.
    """
    rows = []
    for seed, of_seed in points.groupby("seed"):
        own, other = (of_seed[of_seed.line == name].sort_values("step", kind="stable") for name in (line, scratch))
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
