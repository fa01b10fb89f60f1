"""Latency in notebook 01: of masked and shrunk models, and of models pruned to a latency."""

import copy
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from effnn import ltp
from effnn.base import Timing, interleave, load_average, threads
from effnn.data.text.task import TextTask
from effnn.experiments.pruning.runs import Sweep, chosen
from effnn.experiments.shared.classifier import TrainedClassifier
from effnn.experiments.shared.training import EVALUATION_BATCH, evaluate
from effnn.ltp.pruning.latency.measure import random_inputs


@dataclass(frozen=True)
class TimedBatch:
    """What is timed: `batch` rows of `seq_len` tokens, `rounds` times, all variants in turn on `threads` threads."""

    batch: int
    seq_len: int
    rounds: int
    threads: int = 1


def latency_curves(trained: TrainedClassifier, masks: dict[float, ltp.Masks], timed: TimedBatch) -> pd.DataFrame:
    """Counted MACs, and the measured latency of the masked and of the shrunk model, as shares of the dense model's.

    masks: budget -> masks. All variants take turns in one run. Columns: budget, mac_ratio, dense_ms, masked,
    masked_low, masked_high, shrunk, shrunk_low, shrunk_high, speedup (median of dense / shrunk, round by round), load
    (highest load average).
    """
    model = trained.model
    inputs = random_inputs(model, timed.batch, timed.seq_len)[0]
    cost = ltp.MacCost(ltp.Shape.of(model), float(timed.seq_len))

    def forward(network: nn.Module):
        def run() -> None:
            with torch.no_grad():
                network(**inputs)

        return run

    with threads(timed.threads), ExitStack() as stack:
        variants = {"dense": forward(model)}
        for budget, kept in masks.items():
            # a copy of its own, so that setting the hooks is not timed
            variants[f"masked {budget}"] = forward(stack.enter_context(ltp.masked(copy.deepcopy(model), kept)))
            variants[f"shrunk {budget}"] = forward(ltp.shrink(model, kept))
        times = interleave(variants, rounds=timed.rounds, warmup=2, device=model.device)
    dense = times["dense"]
    rows = []
    for budget, kept in masks.items():
        row = {"budget": budget, "mac_ratio": cost.ratio(kept), "dense_ms": 1e3 * dense.median}
        for name in ("masked", "shrunk"):
            row |= _share(name, times[f"{name} {budget}"], dense)
        row["speedup"] = float(np.median(dense.over(times[f"shrunk {budget}"])))
        row["load"] = max(dense.load)
        rows.append(row)
    return pd.DataFrame(rows)


def speedups(
    frame: pd.DataFrame,
    task: TextTask,
    checkpoints: list[TrainedClassifier],
    budget: float,
    seed: int,
    sweep: Sweep,
    timed: TimedBatch,
) -> tuple[list[float], float]:
    """Dense latency / shrunk latency at one budget, one number for each checkpoint of the first family; and the load.

    frame, task, sweep: what `run_sweep` returned, and what it was given.
    checkpoints: all of the sweep.
    budget, seed: of the pruning that is timed.
    timed: what is timed.
    """
    found = []
    for trained in _of_first_family(checkpoints):
        masks = chosen(frame, task, trained.config, budget, seed, sweep).stages["tune"]
        found.append(latency_curves(trained, {budget: masks}, timed))
    measured = pd.concat(found)
    return measured.speedup.tolist(), float(measured.load.max())


def latency_targets(
    task: TextTask,
    checkpoints: list[TrainedClassifier],
    ratios: list[float],
    sweep: Sweep,
    timed: TimedBatch,
) -> tuple[pd.DataFrame, ltp.LatencyTable]:
    """Every checkpoint of the first family pruned to latency budgets; and the table of the first one's block times.

    One row per checkpoint and budget: family, seed, budget, predicted and measured latency (shares of the dense
    model's, which is measured in turn with the pruned one), the same in ms, searches (repeated while the model that one
    proposes is measured over the budget), mac_ratio, accuracy on dev, refused (the budget is below what the cheapest
    blocks take by this table: the dense model stays, at 1), load (highest load average).

    task, sweep: as of the sweep, for the calibration draw.
    checkpoints: all of the sweep.
    ratios: the budgets, shares of the dense latency.
    timed: what the latency is of.
    """
    listed, tables = [], []
    for trained in _of_first_family(checkpoints):
        dev = trained.encode(task.dev)
        target = lambda ratio: ltp.Latency(ratio, timed.batch, timed.seq_len, repeats=timed.rounds)  # noqa: E731
        with threads(timed.threads):
            tables.append(ltp.LatencyTable.measure(trained.model, target(0.5), progress=False))
            for ratio in ratios:
                row = {"family": trained.config.family, "seed": trained.config.seed, "budget": ratio}
                rows = trained.calibration(task, sweep.rows, sweep.batch, 0)
                try:
                    result = ltp.prune(trained.model, rows, target(ratio), table=tables[-1], progress=False)
                except ltp.BudgetTooSmall:  # a measured time decides it, so it must not end the run
                    refused = {"predicted": np.nan, "measured": 1.0, "mac_ratio": 1.0, "accuracy": trained.accuracy}
                    listed.append(row | refused | {"refused": True, "load": load_average()})
                    continue
                check, final = result.report.latency, result.report.stages[-1]
                listed.append(
                    row
                    | {
                        "predicted": check.predicted / check.dense_predicted,
                        "measured": check.ratio,
                        "predicted_ms": check.predicted,
                        "measured_ms": check.measured,
                        "searches": len(check.attempts),
                        "mac_ratio": final.mac_ratio,
                        "accuracy": evaluate(result.materialize(), dev.batches(EVALUATION_BATCH)).accuracy,
                        "refused": False,
                        "load": load_average(),
                    }
                )
    return pd.DataFrame(listed), tables[0]


def _of_first_family(checkpoints: list[TrainedClassifier]) -> list[TrainedClassifier]:
    return [one for one in checkpoints if one.config.family == checkpoints[0].config.family]


def _share(name: str, timing: Timing, dense: Timing) -> dict[str, float]:
    ratios = timing.over(dense)
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {name: float(middle), f"{name}_low": float(low), f"{name}_high": float(high)}
