"""The sweep of notebook 01, as a tidy DataFrame; texts and images alike.

A sweep prunes every starting checkpoint to every budget and sets beside it magnitude and random pruning, and at some
budgets retraining: the same rearranged masks, then all weights of the smaller model trained on the task. Choices (the
pruner's options, the retraining's learning rate) are made on the validation split, with the same number of trials on
both sides; the dev split is read once for each row that is reported.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import joblib
import numpy as np
import pandas as pd
from torch import nn

from effnn import cache, ltp
from effnn.base import LEAST, InvalidInput, load_average, threads
from effnn.data import text
from effnn.data.digits import ImageTask
from effnn.data.text import fingerprint
from effnn.data.text.task import TextTask
from effnn.experiments.pruning.competitors import RETRAIN_RATES, baselines, best, retrain
from effnn.experiments.shared.classifier import TrainedClassifier, train_classifier
from effnn.experiments.shared.models import ClassifierConfig
from effnn.experiments.shared.pool import run_jobs
from effnn.experiments.shared.training import EVALUATION_BATCH, Rows, evaluate

STAGES = ("search", "rearrange", "tune")
BUILTIN = "docstrings"

PRUNER_TRIALS = (
    {"fisher": "batch", "solver": "ridge"},
    {"fisher": "sample", "solver": "ridge"},
    {"fisher": "batch", "solver": "lsmr"},
)


@dataclass(frozen=True)
class Sweep:
    """What is run at every budget.

    rows, batch: of the calibration draw.
    trials: tries of the pruner's options and, where it is run, of the retraining's learning rate.
    retrain_budgets, retrain_epochs: where and how long the retraining baseline trains.
    threads: torch threads of each process.
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
    """The task, cut to so many rows.

    profile: the run's; a task other than the built-in one needs a profile of its own.
    task, source: as of `text.load`.
    train_rows, dev_rows: rows of the splits that are kept; 0 for all.

    Raises InvalidInput for a regression task, and for a task under another's profile.
    """
    check_profile(profile, task)
    data = text.load(task, source).subset(train=train_rows or None, dev=dev_rows or None)
    if data.regression:
        raise InvalidInput(
            f"this notebook compares accuracies, and {task} is a regression task: choose a classification"
        )
    return data


def check_profile(profile: str, task: str) -> None:
    """Raise InvalidInput where another task's results would replace the built-in one's under the same profile."""
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


def run_sweep(
    task: TextTask | ImageTask, listed: list[tuple[ClassifierConfig, float, int]], sweep: Sweep
) -> pd.DataFrame:
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
    task: TextTask | ImageTask, config: ClassifierConfig, budget: float, seed: int, sweep: Sweep, trial: int = 0
) -> Pruned:
    """Prune one trained checkpoint to a share of its MACs; cached.

    task, config: the checkpoint, trained first where it is not in the cache.
    budget: share of the MACs to keep.
    seed: of the calibration draw.
    sweep: rows, threads and device.
    trial: which of `PRUNER_TRIALS` gives the options.
    """
    options = PRUNER_TRIALS[trial]
    trained = _trained(task, config, sweep)

    def compute() -> Pruned:
        rows = trained.calibration(task, sweep.rows, sweep.batch, seed)
        with threads(sweep.threads):
            result = ltp.prune(trained.model, rows, ltp.Macs(budget), seed=seed, progress=False, **options)
        return Pruned(result.stages, result.report.to_dict())

    key = _key(task, trained, sweep) | {"budget": budget, "seed": seed, "options": options}
    return cache.remember("pruned", key, compute)


def chosen(
    frame: pd.DataFrame, task: TextTask | ImageTask, config: ClassifierConfig, budget: float, seed: int, sweep: Sweep
) -> Pruned:
    """The pruning whose accuracy the sweep's `frame` reports: that of the trial which validation chose.

    frame: what `run_sweep` returned; a budget that is not in it gets the first trial's options.
    task, config, budget, seed, sweep: as of `prune_checkpoint`.
    """
    rows = frame[(frame.method == "tune") & (frame.family == config.family) & (frame.seed == config.seed)]
    rows = rows[(rows.budget == budget) & (rows.calibration_seed == seed)]
    trial = int(rows.trial.iloc[0]) if len(rows) else 0
    return prune_checkpoint(task, config, budget, seed, sweep, trial)


def _one(task: TextTask | ImageTask, config: ClassifierConfig, budget: float, seed: int, sweep: Sweep) -> list[dict]:
    """All rows of one checkpoint, budget and calibration seed; cached."""
    trained = _trained(task, config, sweep)
    key = _key(task, trained, sweep) | {"budget": budget, "seed": seed, "sweep": dataclasses.asdict(sweep)}
    return cache.remember("sweep", key, lambda: _rows(task, trained, budget, seed, sweep))


def _rows(task: TextTask | ImageTask, trained: TrainedClassifier, budget: float, seed: int, sweep: Sweep) -> list[dict]:
    config, model = trained.config, trained.model
    dev, validation = trained.encode(task.dev), trained.encode(task.validation)
    tries = [prune_checkpoint(task, config, budget, seed, sweep, trial) for trial in range(sweep.trials)]
    trial = 0
    if len(tries) > 1:
        trial = best([_accuracy(ltp.shrink(model, one.stages["tune"]), validation) for one in tries])
    pruned = tries[trial]
    cost = ltp.MacCost(ltp.Shape.of(model), pruned.report["seq_len"])
    masks = {name: pruned.stages[name] for name in STAGES} | baselines(model, cost, budget, seed)
    more = {"tune": _tuning(pruned.report) | {"trial": trial}}
    models = {name: ltp.shrink(model, kept) for name, kept in masks.items()}
    if budget in sweep.retrain_budgets:
        timer = _PruningTimes(trained, task, budget, seed, sweep, PRUNER_TRIALS[trial])
        with threads(sweep.threads):
            rates = RETRAIN_RATES[: sweep.trials]
            found = retrain(task, trained, masks["rearrange"], sweep.retrain_epochs, rates, timer)
        masks["retrain"], models["retrain"] = masks["rearrange"], found.model
        more["retrain"] = {"seconds": found.seconds, "trial": found.trial} | timer.summary()
    rows = []
    for method, small in models.items():
        read = evaluate(small, dev.batches(EVALUATION_BATCH))
        row = {
            "family": config.family,
            "seed": config.seed,
            "calibration_seed": seed,
            "budget": budget,
            "dense_accuracy": trained.accuracy,
            "method": method,
            "accuracy": read.accuracy,
            "loss": read.loss,
            "mac_ratio": cost.ratio(masks[method]),
        }
        rows.append(row | more.get(method, {}))
    return rows


def _tuning(report: Mapping) -> dict[str, float]:
    """Layer halves in which tuning was accepted, and the mean share of the held-out error that it removed in them."""
    accepted = [layer for layer in report["layers"] if layer["accepted"]]
    gains = [1 - layer["error_after"] / layer["error_before"] for layer in accepted]
    return {"accepted": len(accepted), "gain": float(np.mean(gains)) if gains else 0.0}


class _PruningTimes:
    """Each call prunes once more and notes the seconds that it took; what comes out is thrown away."""

    def __init__(
        self,
        trained: TrainedClassifier,
        task: TextTask | ImageTask,
        budget: float,
        seed: int,
        sweep: Sweep,
        options: Mapping[str, str],
    ) -> None:
        rows = trained.calibration(task, sweep.rows, sweep.batch, seed)
        self.prune: Callable = lambda: ltp.prune(
            trained.model, rows, ltp.Macs(budget), seed=seed, progress=False, **options
        )
        self.seconds: list[float] = []
        self.load: list[float] = []

    def __call__(self) -> None:
        self.seconds.append(max(self.prune().report.seconds, LEAST))
        self.load.append(load_average())

    def summary(self) -> dict[str, float]:
        """The median of the seconds, and the highest load average."""
        return {"prune_seconds": float(np.median(self.seconds)), "load": max(self.load)}


def _accuracy(model: nn.Module, rows: Rows) -> float:
    return evaluate(model, rows.batches(EVALUATION_BATCH)).accuracy


def _key(task: TextTask | ImageTask, trained: TrainedClassifier, sweep: Sweep) -> dict[str, object]:
    state = {name: value.cpu().numpy().tobytes() for name, value in trained.model.state_dict().items()}
    return {
        "data": task.fingerprint,
        "weights": joblib.hash(state),
        "tokenizer": trained.tokenizer and fingerprint(trained.tokenizer),
        "config": dataclasses.asdict(trained.config),
        "calibration": (sweep.rows, sweep.batch),
        "threads": sweep.threads,
        "device": sweep.device,
    }


def _trained(task: TextTask | ImageTask, config: ClassifierConfig, sweep: Sweep) -> TrainedClassifier:
    trained = train_classifier(task, config, sweep.device)
    trained.model.to(sweep.device)
    return trained
