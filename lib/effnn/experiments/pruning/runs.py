"""Notebook 01, post-training pruning: what is run, as tidy DataFrames. Figures are drawn by `pruning_figures`.

A sweep prunes every starting checkpoint to every budget and sets beside it magnitude and random pruning, and at some
budgets retraining: the same rearranged masks, then all weights of the smaller model trained on the task. Choices (the
pruner's options, the retraining's learning rate) are made on the validation split, with the same number of trials on
both sides; the dev split is read once for each row that is reported.
"""

import copy
import dataclasses
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import joblib
import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from effnn import cache, ltp
from effnn.base import LEAST, InvalidInput, Timing, interleave, load_average, threads
from effnn.data import text
from effnn.data.text import calibration_loader, fingerprint
from effnn.data.text.encoding import EncodedSplit, EncodedTask, encode, encode_split, loader
from effnn.data.text.task import TextTask
from effnn.experiments.shared.classifier import (
    ClassifierConfig,
    TrainedClassifier,
    evaluate,
    fine_tune,
    train_classifier,
)
from effnn.experiments.shared.pool import run_jobs
from effnn.experiments.shared.training import EVALUATION_BATCH
from effnn.ltp.pruning.latency.measure import random_inputs

STAGES = ("search", "rearrange", "tune")
BUILTIN = "docstrings"
PARAMETERS = (
    *(
        "task",
        "train_rows",
        "dev_rows",
        "families",
        "seeds",
        "layers",
        "hidden",
        "heads",
        "ffn",
        "epochs",
        "max_length",
    ),
    *(
        "budgets",
        "extra_budgets",
        "calibration_seeds",
        "calibration_rows",
        "trials",
        "retrain_budgets",
        "retrain_epochs",
    ),
    *("shown_budget", "latency_batch", "latency_length", "latency_targets", "rounds", "seed", "threads"),
)
"""The notebook's parameters that its results depend on (a path is not among them: the data's fingerprint is)."""

PRUNER_TRIALS = (
    {"fisher": "batch", "solver": "ridge"},
    {"fisher": "sample", "solver": "ridge"},
    {"fisher": "batch", "solver": "lsmr"},
)
RETRAIN_TRIALS = (5e-4, 1e-3, 2e-4)
"""Learning rates of the retraining baseline in the order in which they are tried; as many as the pruner has trials."""


@dataclass(frozen=True)
class Sweep:
    """What is run at every budget.

    rows, batch: of the calibration draw. trials: tries of the pruner's options and, where it is run, of the
    retraining's learning rate. retrain_budgets, retrain_epochs: where and how long the retraining baseline trains.
    device: of models and timings; on another than the CPU jobs run one after the other.
    """

    rows: int = 2048
    batch: int = 32
    trials: int = 1
    retrain_budgets: tuple[float, ...] = (0.6, 0.4)
    retrain_epochs: int = 4
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 1 <= self.trials <= len(PRUNER_TRIALS):
            raise InvalidInput(f"trials={self.trials}: there are 1 to {len(PRUNER_TRIALS)} settings to try")


@dataclass(frozen=True)
class Pruned:
    """Masks of one pruning, stage by stage, and its report as plain values."""

    stages: dict[str, ltp.Masks]
    report: dict


def load_task(profile: str, task: str, source: str, train_rows: int, dev_rows: int) -> TextTask:
    """The task, cut to so many rows (0: all). InvalidInput for regression, and for a task under another's profile."""
    check_profile(profile, task)
    data = text.load(task, source).subset(train=train_rows or None, dev=dev_rows or None)
    if data.regression:
        raise InvalidInput(
            f"this notebook compares accuracies, and {task} is a regression task: choose a classification"
        )
    return data


def check_profile(profile: str, task: str) -> None:
    """InvalidInput if another task's results would replace the built-in one's under the same profile."""
    if profile in ("laptop", "study") and task != BUILTIN:
        raise InvalidInput(
            f"the {profile} results are those of the built-in task, not of {task}: run it under a profile of its own, "
            'for example PROFILE=sst2 ARGS="--set source=<folder>"'
        )


def jobs(
    configs: list[ClassifierConfig], budgets: list[float], extra_budgets: list[float], calibration_seeds: list[int]
) -> list[tuple[ClassifierConfig, float, int]]:
    """(checkpoint, budget, calibration seed) of a sweep.

    Every checkpoint is pruned to `budgets` with the first calibration seed; to `extra_budgets` only the first
    checkpoint of each family is, once for every calibration seed.
    """
    listed = [(config, budget, calibration_seeds[0]) for budget in budgets for config in configs]
    firsts = {config.family: config for config in reversed(configs)}
    listed += [(c, b, s) for b in extra_budgets if b not in budgets for c in firsts.values() for s in calibration_seeds]
    return listed


def run_sweep(task: TextTask, listed: list[tuple[ClassifierConfig, float, int]], sweep: Sweep) -> pd.DataFrame:
    """One row for each checkpoint, budget, calibration seed and method.

    Columns: family, seed (of the checkpoint), calibration_seed, budget, method (search, rearrange, tune, magnitude,
    random, retrain), accuracy and loss on dev, dense_accuracy, mac_ratio (exact), accepted, gain (tuning: accepted
    layer halves; mean share of the held-out reconstruction error removed in them), trial. Of the retraining also
    seconds (measured, of all its epochs), prune_seconds (of the whole pruning, which takes turns with the epochs in the
    same process, so that both see the same machine; the median) and load (the highest load average meanwhile).
    """
    # the longest jobs first, so that the last ones to end are short
    order = sorted(range(len(listed)), key=lambda i: listed[i][1] not in sweep.retrain_budgets)
    workers = None if sweep.device == "cpu" else 1
    done = run_jobs(_one, [(task, *listed[i], sweep) for i in order], "sweep", workers, sweep.threads)
    return pd.DataFrame([row for rows in done for row in rows]).sort_values(
        ["family", "budget", "method", "seed", "calibration_seed"], ignore_index=True
    )


def prune_checkpoint(
    task: TextTask, config: ClassifierConfig, budget: float, seed: int, sweep: Sweep, trial: int = 0
) -> Pruned:
    """Prune one trained checkpoint to a share of its MACs, with the options of one trial; cached."""
    options = PRUNER_TRIALS[trial]
    trained = _trained(task, config, sweep)

    def compute() -> Pruned:
        rows = calibration_loader(task, trained.tokenizer, sweep.rows, sweep.batch, seed, config.max_length)
        with threads(sweep.threads):
            result = ltp.prune(trained.model, rows, ltp.Macs(budget), seed=seed, progress=False, **options)
        return Pruned(result.stages, result.report.to_dict())

    key = _key(task, trained, sweep) | {"budget": budget, "seed": seed, "options": options}
    return cache.remember("pruned", key, compute)


def chosen(
    frame: pd.DataFrame, task: TextTask, config: ClassifierConfig, budget: float, seed: int, sweep: Sweep
) -> Pruned:
    """The pruning whose accuracy the sweep's `frame` reports: that of the trial which validation chose.

    A budget that is not in the sweep gets the first trial's options.
    """
    rows = frame[(frame.method == "tune") & (frame.family == config.family) & (frame.seed == config.seed)]
    rows = rows[(rows.budget == budget) & (rows.calibration_seed == seed)]
    trial = int(rows.trial.iloc[0]) if len(rows) else 0
    return prune_checkpoint(task, config, budget, seed, sweep, trial)


def _one(task: TextTask, config: ClassifierConfig, budget: float, seed: int, sweep: Sweep) -> list[dict]:
    """All rows of one checkpoint, budget and calibration seed; cached."""
    trained = _trained(task, config, sweep)
    key = _key(task, trained, sweep) | {"budget": budget, "seed": seed, "sweep": dataclasses.asdict(sweep)}
    return cache.remember("sweep", key, lambda: _compute_one(task, trained, budget, seed, sweep))


def _compute_one(task: TextTask, trained: TrainedClassifier, budget: float, seed: int, sweep: Sweep) -> list[dict]:
    config = trained.config
    dev, validation = (encode_split(s, trained.tokenizer, config.max_length) for s in (task.dev, task.validation))
    tries = [prune_checkpoint(task, config, budget, seed, sweep, trial) for trial in range(sweep.trials)]
    trial = 0
    if len(tries) > 1:
        trial = _best([_score(ltp.shrink(trained.model, one.stages["tune"]), validation) for one in tries])
    pruned = tries[trial]
    model, report = trained.model, pruned.report
    cost = ltp.MacCost(ltp.Shape.of(model), report["seq_len"])
    common = {
        "family": config.family,
        "seed": config.seed,
        "calibration_seed": seed,
        "budget": budget,
        "dense_accuracy": trained.accuracy,
    }
    accepted = [layer for layer in report["layers"] if layer["accepted"]]
    gain = float(np.mean([1 - layer["error_after"] / layer["error_before"] for layer in accepted])) if accepted else 0.0
    candidates = {name: pruned.stages[name] for name in STAGES} | baselines(model, cost, budget, seed)
    rows = []
    for method, masks in candidates.items():
        found = evaluate(ltp.shrink(model, masks), loader(dev, EVALUATION_BATCH))
        extra = {"accepted": len(accepted), "gain": gain, "trial": trial} if method == "tune" else {}
        rows.append(common | _measured(method, found, cost.ratio(masks)) | extra)
    if budget in sweep.retrain_budgets:
        turns = _PruningTimes(task, trained, budget, seed, sweep, PRUNER_TRIALS[trial])
        rows.append(common | _retrain(task, trained, pruned.stages["rearrange"], cost, dev, sweep, turns))
    return rows


class _PruningTimes:
    """Each call prunes once more and notes the seconds that it took; what comes out is thrown away."""

    def __init__(
        self, task: TextTask, trained: TrainedClassifier, budget: float, seed: int, sweep: Sweep, options: dict
    ) -> None:
        rows = calibration_loader(task, trained.tokenizer, sweep.rows, sweep.batch, seed, trained.config.max_length)
        self.prune = partial(ltp.prune, trained.model, rows, ltp.Macs(budget), seed=seed, progress=False, **options)
        self.seconds: list[float] = []
        self.load: list[float] = []

    def __call__(self) -> None:
        self.seconds.append(max(self.prune().report.seconds, LEAST))
        self.load.append(load_average())


def _retrain(
    task: TextTask,
    trained: TrainedClassifier,
    masks: ltp.Masks,
    cost: ltp.MacCost,
    dev: EncodedSplit,
    sweep: Sweep,
    turns: _PruningTimes,
) -> dict:
    """The row of the retraining baseline: the best of its trials on validation, read once on dev. turns: called before
    every epoch."""
    rows: EncodedTask = encode(task, trained.tokenizer, trained.config.max_length)
    tries = []
    for rate in RETRAIN_TRIALS[: sweep.trials]:
        small, seed = ltp.shrink(trained.model, masks), trained.config.seed
        with threads(sweep.threads):
            turns()
            tries.append(
                fine_tune(small, rows, epochs=sweep.retrain_epochs, learning_rate=rate, seed=seed, between_epochs=turns)
            )
    trial = _best([tried.accuracy_curve[-1] for tried in tries])
    found = evaluate(tries[trial].model, loader(dev, EVALUATION_BATCH))
    times = {"seconds": max(tries[trial].seconds, LEAST), "prune_seconds": float(np.median(turns.seconds))}
    times["load"] = max(turns.load)
    return _measured("retrain", found, cost.ratio(masks)) | times | {"trial": trial}


def baselines(model: nn.Module, cost: ltp.MacCost, budget: float, seed: int) -> dict[str, ltp.Masks]:
    """Magnitude and random pruning to the same budget, every layer to the same share.

    Magnitude of a head: Frobenius norm of its rows of the value and its columns of the output projection; of a filter:
    norm of its FFN-1 row times norm of its FFN-2 column.
    """
    adapter = ltp.adapter_for(model)
    heads, filters = [], []
    for layer in adapter.layers(model):
        parts = adapter.parts(layer)
        square = parts.out.weight.detach().square().sum(0) + parts.value.weight.detach().square().sum(1)
        heads.append(square.view(-1, parts.head_size).sum(1).sqrt())
        filters.append(parts.fc1.weight.detach().norm(dim=1) * parts.fc2.weight.detach().norm(dim=0))
    target = ltp.Macs(budget, allocation="uniform")
    draw = torch.Generator().manual_seed(seed)
    shape = cost.shape
    # heads and filters are not on one scale here: each kind is brought to a mean of its share of the MACs
    magnitude = _balanced(torch.stack(heads), torch.stack(filters), cost)
    random = _balanced(
        torch.rand(shape.layers, shape.heads, generator=draw),
        torch.rand(shape.layers, shape.filters, generator=draw),
        cost,
    )
    return {"magnitude": ltp.search_macs(*magnitude, cost, target), "random": ltp.search_macs(*random, cost, target)}


def _balanced(heads: torch.Tensor, filters: torch.Tensor, cost: ltp.MacCost) -> tuple[torch.Tensor, torch.Tensor]:
    """Importances whose sums are as the kinds' MACs, so that neither kind is preferred as a whole."""
    shape = cost.shape
    return (
        heads * (shape.layers * shape.heads * cost.head / heads.sum()),
        filters * (shape.layers * shape.filters * cost.filter / filters.sum()),
    )


def check_identity(task: TextTask, trained: TrainedClassifier, masks: ltp.Masks, rows: int = 256) -> dict[str, float]:
    """Largest absolute logit differences on dev rows: masked - shrunk, loaded from disk - shrunk, masked - dense."""
    split = encode_split(task.dev.take(range(min(rows, len(task.dev)))), trained.tokenizer, trained.config.max_length)
    small = ltp.shrink(trained.model, masks)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        small.save_pretrained(folder)
        loaded = ltp.load_pruned(folder).eval().to(trained.model.device)
    enable_progress_bar()
    largest = {"masked_shrunk": 0.0, "loaded_shrunk": 0.0, "masked_dense": 0.0}
    with torch.no_grad():
        for batch in loader(split, 64):
            batch = {name: value.to(trained.model.device) for name, value in batch.items()}
            with ltp.masked(trained.model, masks):
                masked = trained.model(**batch).logits
            shrunk, reloaded, dense = (m(**batch).logits for m in (small, loaded, trained.model))
            pairs = {
                "masked_shrunk": (masked, shrunk),
                "loaded_shrunk": (reloaded, shrunk),
                "masked_dense": (masked, dense),
            }
            for name, (a, b) in pairs.items():
                largest[name] = max(largest[name], float((a - b).abs().max()))
    return largest


def check_budgets(task: TextTask, trained: TrainedClassifier, sweep: Sweep, table: ltp.LatencyTable) -> pd.DataFrame:
    """Budgets 0.05 to 0.95 by MACs (exact count) and by latency (predicted by `table`): asked, reached, kept or not.

    A latency budget below what is left with the cheapest blocks cannot be met: only there a refusal is right. The rows
    of kind "latency" rest on a measured table: they are shown, nothing is claimed of them.
    """
    rows = calibration_loader(task, trained.tokenizer, min(sweep.rows, 256), sweep.batch, 0, trained.config.max_length)
    found = ltp.calibrate(trained.model, rows, keep_inputs=False)
    cost = ltp.MacCost(ltp.Shape.of(trained.model), found.mean_length)
    importance = found.head_importance, found.filter_importance
    dense_ms = table.predict(ltp.Masks.ones(cost.shape))
    floor_ms = table.rest_ms + cost.shape.layers * (min(table.head_ms) + min(table.filter_ms))
    listed = []
    for ratio in (round(0.05 * step, 2) for step in range(1, 20)):
        reached = cost.ratio(ltp.search_macs(*importance, cost, ltp.Macs(ratio)))
        listed.append({"budget": ratio, "kind": "macs", "reached": reached, "kept": reached <= ratio, "refused": False})
        target = ltp.Latency(ratio, batch=table.batch, seq_len=table.seq_len)
        try:
            reached = table.predict(ltp.search_latency(*importance, table, target)) / dense_ms
        except ltp.BudgetTooSmall:
            right = ratio * dense_ms < floor_ms
            listed.append({"budget": ratio, "kind": "latency", "reached": np.nan, "kept": right, "refused": True})
            continue
        kept = reached <= ratio * (1 + 1e-9)
        listed.append({"budget": ratio, "kind": "latency", "reached": reached, "kept": kept, "refused": False})
    return pd.DataFrame(listed)


def latency_curves(
    trained: TrainedClassifier, masks: dict[float, ltp.Masks], batch: int, seq_len: int, rounds: int, count: int = 1
) -> pd.DataFrame:
    """Counted MACs, and the measured latency of the masked and of the shrunk model, as shares of the dense model's.

    masks: budget -> masks. All variants take turns in one run on `count` threads. Columns: budget, mac_ratio, dense_ms,
    masked, masked_low, masked_high, shrunk, shrunk_low, shrunk_high, speedup (median of dense / shrunk, round by
    round), load (highest load average).
    """
    model = trained.model
    inputs = random_inputs(model, batch, seq_len)[0]
    cost = ltp.MacCost(ltp.Shape.of(model), float(seq_len))

    def forward(network: nn.Module):
        def run() -> None:
            with torch.no_grad():
                network(**inputs)

        return run

    with threads(count), ExitStack() as stack:
        variants = {"dense": forward(model)}
        for budget, chosen in masks.items():
            # a copy of its own, so that setting the hooks is not timed
            variants[f"masked {budget}"] = forward(stack.enter_context(ltp.masked(copy.deepcopy(model), chosen)))
            variants[f"shrunk {budget}"] = forward(ltp.shrink(model, chosen))
        times = interleave(variants, rounds=rounds, warmup=2, device=model.device)
    dense = times["dense"]
    rows = []
    for budget, chosen in masks.items():
        row = {"budget": budget, "mac_ratio": cost.ratio(chosen), "dense_ms": 1e3 * dense.median}
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
    *timing: int,
) -> tuple[list[float], float]:
    """Dense latency / shrunk latency at one budget, one number for each checkpoint of the first family; and the load.

    timing: batch, seq_len and rounds, as in `latency_curves`.
    """
    found = []
    for trained in _of_first_family(checkpoints):
        masks = chosen(frame, task, trained.config, budget, seed, sweep).stages["tune"]
        found.append(latency_curves(trained, {budget: masks}, *timing, sweep.threads))
    measured = pd.concat(found)
    return measured.speedup.tolist(), float(measured.load.max())


def latency_target(
    task: TextTask,
    checkpoints: list[TrainedClassifier],
    ratios: list[float],
    sweep: Sweep,
    batch: int,
    seq_len: int,
    rounds: int,
) -> tuple[pd.DataFrame, ltp.LatencyTable]:
    """Every checkpoint of the first family pruned to latency budgets; and the table of the first one's block times.

    One row a checkpoint and budget: family, seed, budget, predicted and measured latency (shares of the dense model's,
    which is measured in turn with the pruned one), the same in ms, searches (repeated while the model that one proposes
    is measured over the budget), mac_ratio, accuracy on dev, refused (the budget is below what the cheapest blocks take
    by this table: the dense model stays, at 1), load (highest load average).
    """
    listed, tables = [], []
    for trained in _of_first_family(checkpoints):
        config = trained.config
        dev = encode_split(task.dev, trained.tokenizer, config.max_length)
        with threads(sweep.threads):
            tables.append(
                ltp.LatencyTable.measure(
                    trained.model, ltp.Latency(0.5, batch, seq_len, repeats=rounds), progress=False
                )
            )
            for ratio in ratios:
                row = {"family": config.family, "seed": config.seed, "budget": ratio}
                rows = calibration_loader(task, trained.tokenizer, sweep.rows, sweep.batch, 0, config.max_length)
                target = ltp.Latency(ratio, batch, seq_len, repeats=rounds)
                try:
                    result = ltp.prune(trained.model, rows, target, table=tables[-1], progress=False)
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
                        "accuracy": evaluate(result.materialize(), loader(dev, EVALUATION_BATCH)).accuracy,
                        "refused": False,
                        "load": load_average(),
                    }
                )
    return pd.DataFrame(listed), tables[0]


def latency_kept(targets: pd.DataFrame) -> tuple[list[float], str]:
    """Return the largest measured latency over its budget, one number a checkpoint, and a note with all of them."""
    over = (targets.measured / targets.budget).groupby(targets.seed).max()
    each = targets.groupby("budget", sort=False).measured.mean()
    note = "measured, mean over checkpoints: " + ", ".join(
        f"{share:.3f} for {budget:g}" for budget, share in each.items()
    )
    refused = int(targets.refused.sum())
    return over.tolist(), note + (f"; {refused} of {len(targets)} refused as impossible" if refused else "")


def _of_first_family(checkpoints: list[TrainedClassifier]) -> list[TrainedClassifier]:
    return [one for one in checkpoints if one.config.family == checkpoints[0].config.family]


def claim_samples(frame: pd.DataFrame, family: str, calibration_seed: int) -> dict[str, list[float]]:
    """Values of the ltp.* claims that the sweep answers, one for each checkpoint seed of one family.

    Points of accuracy on dev, or a ratio of times; only rows of the calibration draw that all checkpoints share count.
    """
    chosen = frame[(frame.family == family) & (frame.calibration_seed == calibration_seed)]
    accuracy = chosen.pivot_table(index=["seed", "budget"], columns="method", values="accuracy")
    dense = chosen.groupby("seed").dense_accuracy.first()
    samples: dict[str, list[float]] = {}
    shared = [b for b, group in chosen.groupby("budget") if group.seed.nunique() == chosen.seed.nunique()]
    retrained = chosen[chosen.method == "retrain"]
    if len(retrained):
        samples["ltp.time"] = list((retrained.seconds / retrained.prune_seconds).groupby(retrained.seed).mean())
        if 0.6 in shared:
            at = accuracy.xs(0.6, level="budget")
            samples["ltp.tradeoff"] = list(100 * (at.retrain - at.tune))
    if 0.5 in shared:
        samples["ltp.half"] = list(100 * (dense - accuracy.xs(0.5, level="budget").tune))
    steps = accuracy[accuracy.index.get_level_values("budget").isin(shared)]
    gains = pd.DataFrame(
        {"rearrange": steps["rearrange"] - steps["search"], "tune": steps["tune"] - steps["rearrange"]}
    )
    samples["ltp.stages"] = list(100 * gains.groupby("seed").mean().min(axis=1))
    return samples


def time_table(frame: pd.DataFrame, published: pd.DataFrame, epochs: int) -> pd.DataFrame:
    """The talk's table of retraining epochs and end-to-end hours, and below it what was measured here, in turn."""
    rows = []
    for method, group in published.groupby("method", sort=False):
        value = group.set_index("metric").value
        rows.append(
            {"method": method, "epochs": float(value["training epochs"]), "hours": float(value["end-to-end time"])}
        )
    table = pd.DataFrame(rows).assign(source="talk")
    retrained = frame[frame.method == "retrain"]
    here = {"prune_seconds": ("post-training pruning", 0), "seconds": ("prune, then retrain", epochs)}
    for column, (name, count) in here.items():
        if len(retrained):
            table.loc[len(table)] = [name, count, retrained[column].median() / 3600, "measured here"]
    return table.assign(seconds=table.hours * 3600)


def epoch_note(table: pd.DataFrame) -> str:
    """How one epoch of the retraining compares with the pruning, from `time_table`."""
    here = table[table.source == "measured here"].set_index("epochs").seconds
    if 0 not in here or len(here) < 2:
        return "no retraining ran: no ratio"
    epochs = float(here.index.max())
    return f"one epoch of retraining takes {here[epochs] / epochs / here[0]:.1f} times as long as pruning"


def _measured(method: str, found, ratio: float) -> dict:
    return {"method": method, "accuracy": found.accuracy, "loss": found.loss, "mac_ratio": ratio}


def _score(model: nn.Module, split: EncodedSplit) -> float:
    return evaluate(model, loader(split, EVALUATION_BATCH)).accuracy


def _best(scores: list[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _share(name: str, timing: Timing, dense: Timing) -> dict[str, float]:
    ratios = timing.over(dense)
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {name: float(middle), f"{name}_low": float(low), f"{name}_high": float(high)}


def _key(task: TextTask, trained: TrainedClassifier, sweep: Sweep) -> dict[str, object]:
    state = {name: value.cpu().numpy().tobytes() for name, value in trained.model.state_dict().items()}
    return {
        "data": task.fingerprint,
        "weights": joblib.hash(state),
        "tokenizer": fingerprint(trained.tokenizer),
        "config": dataclasses.asdict(trained.config),
        "calibration": (sweep.rows, sweep.batch),
        "threads": sweep.threads,
        "device": sweep.device,
    }


def _trained(task: TextTask, config: ClassifierConfig, sweep: Sweep) -> TrainedClassifier:
    trained = train_classifier(task, config, sweep.device)
    trained.model.to(sweep.device)
    return trained
