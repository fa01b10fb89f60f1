"""Notebook 03, the study's part: when growing pays (growth points, paths, horizons), and competitors' ways to grow."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from effnn import staged
from effnn.experiments.staged import peers as staged_peers
from effnn.experiments.staged.compute_saved import compute_to_loss, jumps, savings
from effnn.experiments.staged.lines import Line, Outcome, Setting, best_rates, run_lines


def run_map(
    points: Sequence[Sequence[object]],
    runs: Outcome,
    rate: float,
    budgets: dict[str, Sequence[float]],
    seeds: Sequence[int],
    setting: Setting,
) -> pd.DataFrame:
    """Return what other growth paths save at every budget of scratch, one row a path, horizon and seed.

    points: [kind, sizes of the stages, steps of all stages but the last, peak rates of these]; the last size is that of
    `runs`, whose reference from scratch they are compared with; its last stage trains at `rate`. budgets: "staged" of
    the paths, "small" of each first stage's model continued at its own rate. Where `runs` has such a small model
    already, it is not trained again. Columns: kind, path, steps, seed, horizon (the budget of scratch), share (of the
    reference's FLOPs at that horizon that is spent when the last growth comes), slope (`slope_at_growth`), saving
    (percent; minus infinity where the loss is never reached), at_least (it may have saved more: the path was better at
    its smallest budget already), small_saving (of the first stage's model continued).
    """
    trained = runs.points[runs.points.line == "small"][["layers", "width"]].head(1)
    small = {tuple(size): Line("small", (tuple(size),), (1.0,)) for size in trained.itertuples(index=False)}
    missing, lines = {}, {}
    for kind, sizes, steps, rates in points:
        path = tuple(tuple(size) for size in sizes)
        lines[f"{_named(path)} after {'+'.join(map(str, steps))}"] = kind, Line("", path, (*rates, rate), tuple(steps))
        if path[0] not in small:
            missing[path[0]] = Line(f"small {_named(path[:1])}", path[:1], tuple(rates[:1]))
    small |= missing
    lines = {name: (kind, replace(line, name=name)) for name, (kind, line) in lines.items()}
    jobs = [(line, budgets["staged"]) for _, line in lines.values()]
    found = run_lines(jobs + [(line, budgets["small"]) for line in missing.values()], seeds, setting, "map")
    given = runs.ends[runs.ends.line.isin(["scratch", "small"]) & runs.ends.seed.isin(seeds)]
    reference, ends = given[given.line == "scratch"], pd.concat([given, found.ends])
    rows = []
    for horizon in sorted(reference.budget.unique()):
        table = savings(ends, horizon=horizon)
        table = table[table.axis == "flops"].set_index(["line", "seed"])
        for name, (kind, line) in lines.items():
            for seed in seeds:
                own = found.points[(found.points.line == name) & (found.points.seed == seed)]
                entry, other = table.loc[(name, seed)], table.loc[(small[line.sizes[0]].name, seed)]
                row = {"kind": kind, "path": _named(line.sizes), "steps": "+".join(map(str, line.steps)), "seed": seed}
                row["slope"] = slope_at_growth(own)
                row |= {"horizon": horizon, "share": own[own.phase == own.phase.max()].flops.min() / entry.reference}
                rows.append(row | {"saving": entry.saving, "at_least": entry.at_most, "small_saving": other.saving})
    return pd.DataFrame(rows)


def slope_at_growth(points: pd.DataFrame) -> float:
    """Slope d log(loss) / d log(FLOPs) of the model before the last growth, the last that is known (NaN: too short).

    points: of one line and seed, at a constant rate. FLOPs count from the beginning of that stage, as the slope of a
    model that was itself grown would otherwise look flat. Compare with `staged.growth_tau`.
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
    """Return the FLOPs that every line saves against scratch, by what scratch was given: `count` amounts, evenly apart
    on a logarithmic scale from its smallest to its largest budget.

    Scratch's loss is interpolated between its end points, under each seed. Columns: line, seed, horizon (FLOPs of
    scratch), loss, saving (percent; minus infinity where the loss is never reached), at_least (it may have saved more:
    the line was better at its smallest budget already).
    """
    scratch = ends[ends.line == "scratch"].sort_values("budget")
    horizons = np.geomspace(scratch.groupby("seed").flops.min().max(), scratch.groupby("seed").flops.max().min(), count)
    rows = []
    for (name, seed), own in ends[ends.line != "scratch"].groupby(["line", "seed"], sort=False):
        of_seed = scratch[scratch.seed == seed]
        curve = staged.Curve(of_seed.flops.tolist(), of_seed.test_loss.tolist())
        best_small = own.sort_values("budget").test_loss.iloc[0]
        for horizon in horizons:
            loss = curve.loss_at(min(max(horizon, float(curve.x[0])), float(curve.x[-1])))
            saving = 100 * (1 - compute_to_loss(own, loss) / horizon)
            row = {"line": name, "seed": seed, "horizon": horizon, "loss": loss, "saving": saving}
            rows.append(row | {"at_least": bool(best_small < loss)})
    return pd.DataFrame(rows)


def run_peers(
    ours: Line,
    deep: Line,
    candidates: Sequence[float],
    tuning: tuple[float, int],
    budgets: Sequence[float],
    runs: Outcome,
    horizon: float | None,
    seeds: Sequence[int],
    setting: Setting,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return competitors' ways to grow beside ours, and the table of their tuning.

    ours, deep: lines of two stages that grow in width and in depth to the size of `runs`; width's competitors start
    from the first one's small model, stacking from the second one's. candidates: rates that every line tries in its
    last stage; tuning: (budget in FLOPs, seed) of each try, judged on the validation split. horizon: as in `savings`.
    Columns: line, rate, jump (of the validation loss at growth), test_loss (at the largest budget), saving (percent of
    FLOPs against scratch), all but the rate means over seeds, and saving_low and saving_high, the extremes over seeds.
    """
    compared = {"ours (width)": ours, "ours (depth)": deep}
    compared |= {
        peer: replace(deep if peer == "stack" else ours, growth=(("peer", peer),)) for peer in staged_peers.PEERS
    }
    tried = [
        (replace(line, name=f"{name}@{rate:g}", rates=(*line.rates[:-1], rate)), tuning[:1])
        for name, line in compared.items()
        for rate in candidates
    ]
    tuned = best_rates(run_lines(tried, tuning[1:], setting, "competitors: rates").ends)
    best = tuned[tuned.best].set_index("what").rate
    lines = [replace(line, name=name, rates=(*line.rates[:-1], best[name])) for name, line in compared.items()]
    found = run_lines([(line, budgets) for line in lines], seeds, setting, "competitors")
    reference = runs.ends[(runs.ends.line == "scratch") & runs.ends.seed.isin(seeds)]
    saved = savings(pd.concat([reference, found.ends]), horizon=horizon)
    saved = saved[saved.axis == "flops"].groupby("line").saving
    moved = jumps(found.points).groupby("line").jump.mean()
    ends = found.ends[found.ends.budget == max(budgets)].groupby("line").test_loss.mean()
    table = pd.DataFrame({"rate": best, "jump": moved, "test_loss": ends, "saving": saved.mean()}).loc[list(compared)]
    table["saving_low"], table["saving_high"] = saved.min(), saved.max()
    return table.rename_axis("line").reset_index(), tuned


def _named(path: Sequence[tuple[int, int]]) -> str:
    return " to ".join(f"{layers}x{width}" for layers, width in path)
