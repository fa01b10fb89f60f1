"""Notebook 03, the study's part: when growing pays (growth points, paths, horizons), and other growth operators."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from effnn import staged
from effnn.experiments.staged.compute_saved import compute_to_loss, jumps, savings
from effnn.experiments.staged.other_operators import OTHER_OPERATORS
from effnn.experiments.staged.runs import Method, RunResults, Setting, run_methods
from effnn.experiments.staged.tuning import best_rates


def by_growth_point(
    points: Sequence[Sequence[object]],
    results: RunResults,
    rate: float,
    budgets: dict[str, Sequence[float]],
    seeds: Sequence[int],
    setting: Setting,
) -> pd.DataFrame:
    """Return what other growth points and paths save, one row per path, horizon and seed.

    points: [kind, sizes of the stages, steps and peak rates of all stages but the last]. The last size is that of
    `results`.
    results: of the reference from scratch. If they hold the small model of a path too, it is not trained again.
    rate: peak rate of the last stages.
    budgets: in FLOPs; "staged" of the paths, "small" of the small models continued at their own rate.
    seeds: of weights and data order.
    setting: as of `results`.

    Columns: kind, path, steps, seed, horizon (a budget of scratch), share (of the FLOPs of scratch at that horizon that
    is spent before the last growth), slope (`slope_at_growth`), saving (percent; minus infinity if the loss is never
    reached), at_least (the saving may be larger: the path was better at its smallest budget already), small_saving (of
    the first stage's model continued).
    """
    trained = results.points[results.points.method == "small"][["layers", "width"]].head(1)
    small = {tuple(size): Method("small", (tuple(size),), (1.0,)) for size in trained.itertuples(index=False)}
    missing, methods = {}, {}
    for kind, sizes, steps, rates in points:
        path = tuple(tuple(size) for size in sizes)
        name = f"{_named(path)} after {'+'.join(map(str, steps))}"
        methods[name] = kind, Method(name, path, (*rates, rate), tuple(steps))
        if path[0] not in small:
            missing[path[0]] = Method(f"small {_named(path[:1])}", path[:1], tuple(rates[:1]))
    small |= missing
    jobs = [(method, budgets["staged"]) for _, method in methods.values()]
    jobs += [(method, budgets["small"]) for method in missing.values()]
    found = run_methods(jobs, seeds, setting, "growth points")
    given = results.ends[results.ends.method.isin(["scratch", "small"]) & results.ends.seed.isin(seeds)]
    reference, ends = given[given.method == "scratch"], pd.concat([given, found.ends])
    rows = []
    for horizon in sorted(reference.budget.unique()):
        table = savings(ends, horizon=horizon)
        table = table[table.axis == "flops"].set_index(["method", "seed"])
        for name, (kind, method) in methods.items():
            for seed in seeds:
                own = found.points[(found.points.method == name) & (found.points.seed == seed)]
                entry, other = table.loc[(name, seed)], table.loc[(small[method.sizes[0]].name, seed)]
                rows.append(
                    {
                        "kind": kind,
                        "path": _named(method.sizes),
                        "steps": "+".join(map(str, method.steps)),
                        "seed": seed,
                        "slope": slope_at_growth(own),
                        "horizon": horizon,
                        "share": own[own.phase == own.phase.max()].flops.min() / entry.reference,
                        "saving": entry.saving,
                        "at_least": entry.at_most,
                        "small_saving": other.saving,
                    }
                )
    return pd.DataFrame(rows)


def slope_at_growth(points: pd.DataFrame) -> float:
    """The last known slope d log(loss) / d log(FLOPs) of the model before its last growth; NaN for too few points.

    points: of one method and seed, at a constant rate. FLOPs count from the beginning of that stage: counted from the
    first stage, the curve of a grown model would look flat. Compare with `staged.growth_tau`.
    """
    phase = points.phase.max() - 1
    before = points[points.phase == phase]
    start = points[points.phase < phase].flops.max() if phase else 0
    before = before[before.flops > start]
    if len(before) < 5:
        return math.nan
    slopes = staged.local_slope((before.flops - start).tolist(), before.validation_loss.tolist())
    known = slopes[~slopes.isnan()]
    return float(known[-1]) if len(known) else math.nan


def by_horizon(ends: pd.DataFrame, count: int = 17) -> pd.DataFrame:
    """Return the FLOPs that every method saves against scratch, for `count` budgets of scratch.

    The budgets (horizons) are evenly spaced on a logarithmic scale between the smallest and the largest of scratch;
    scratch's loss is interpolated between its end points, for each seed. Columns: method, seed, horizon (FLOPs of
    scratch), loss, saving (percent; minus infinity if the loss is never reached), at_least (the saving may be larger:
    the method was better at its smallest budget already).
    """
    scratch = ends[ends.method == "scratch"].sort_values("budget")
    horizons = np.geomspace(scratch.groupby("seed").flops.min().max(), scratch.groupby("seed").flops.max().min(), count)
    rows = []
    for (name, seed), own in ends[ends.method != "scratch"].groupby(["method", "seed"], sort=False):
        of_seed = scratch[scratch.seed == seed]
        curve = staged.Curve(of_seed.flops.tolist(), of_seed.test_loss.tolist())
        at_smallest = own.sort_values("budget").test_loss.iloc[0]
        for horizon in horizons:
            loss = curve.loss_at(min(max(horizon, float(curve.x[0])), float(curve.x[-1])))
            saving = 100 * (1 - compute_to_loss(own, loss) / horizon)
            row = {"method": name, "seed": seed, "horizon": horizon, "loss": loss, "saving": saving}
            rows.append(row | {"at_least": bool(at_smallest < loss)})
    return pd.DataFrame(rows)


def compare_operators(
    ours: Method,
    deep: Method,
    candidates: Sequence[float],
    tuning: tuple[float, int],
    budgets: Sequence[float],
    results: RunResults,
    horizon: float | None,
    seeds: Sequence[int],
    setting: Setting,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the other growth operators beside ours, and the table of their tuning.

    ours, deep: methods of two stages that grow in width and in depth to the size of `results`. The other operators of
    width start from the small model of the first, stacking from that of the second.
    candidates: peak rates that every method tries in its last stage.
    tuning: (budget in FLOPs, seed) of each try, compared on the validation split.
    budgets: in FLOPs, of the compared runs.
    results: of the reference from scratch.
    horizon: as in `savings`.
    seeds: of weights and data order.
    setting: as of `results`.

    Columns: method, rate, jump (of the validation loss at growth), test_loss (at the largest budget), saving (percent
    of FLOPs against scratch), saving_low, saving_high. jump, test_loss and saving are means over seeds, saving_low and
    saving_high the extremes.
    """
    compared = {"ours (width)": ours, "ours (depth)": deep}
    for operator in OTHER_OPERATORS:
        compared[operator] = replace(deep if operator == "stack" else ours, growth=(("operator", operator),))
    tried = [
        (replace(method, name=f"{name}@{rate:g}", rates=(*method.rates[:-1], rate)), tuning[:1])
        for name, method in compared.items()
        for rate in candidates
    ]
    tuned = best_rates(run_methods(tried, tuning[1:], setting, "operators: rates").ends)
    best = tuned[tuned.best].set_index("method").rate
    methods = [replace(method, name=name, rates=(*method.rates[:-1], best[name])) for name, method in compared.items()]
    found = run_methods([(method, budgets) for method in methods], seeds, setting, "operators")
    reference = results.ends[(results.ends.method == "scratch") & results.ends.seed.isin(seeds)]
    saved = savings(pd.concat([reference, found.ends]), horizon=horizon)
    saved = saved[saved.axis == "flops"].groupby("method").saving
    moved = jumps(found.points).groupby("method").jump.mean()
    ends = found.ends[found.ends.budget == max(budgets)].groupby("method").test_loss.mean()
    table = pd.DataFrame({"rate": best, "jump": moved, "test_loss": ends, "saving": saved.mean()}).loc[list(compared)]
    table["saving_low"], table["saving_high"] = saved.min(), saved.max()
    return table.rename_axis("method").reset_index(), tuned


def _named(path: Sequence[tuple[int, int]]) -> str:
    return " to ".join(f"{layers}x{width}" for layers, width in path)
