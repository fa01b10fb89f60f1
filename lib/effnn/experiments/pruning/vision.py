"""The vision encoder of notebook 01: small ViTs trained on the built-in digits, pruned and compared like the text ones.

The rows have the columns of `pruning.run_sweep`, so that the same figures and tables take them. Choices are made on
validation, with as many tries for the retraining as for the pruner; dev is read once for each row.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from effnn import cache, ltp
from effnn.base import InvalidInput, threads
from effnn.data import digits
from effnn.data.digits import Images, ImageTask
from effnn.experiments.pruning import runs as pruning
from effnn.experiments.pruning.runs import PRUNER_TRIALS, RETRAIN_TRIALS, STAGES, Sweep
from effnn.experiments.shared.pool import run_jobs
from effnn.experiments.shared.training import EVALUATION_BATCH, Accuracy, Recipe, evaluate, schedule


@dataclass(frozen=True)
class VisionConfig:
    """Shape and training of a small ViT on images of 8 x 8 pixels, cut into 16 patches."""

    seed: int = 0
    epochs: int = 30
    layers: int = 4
    hidden: int = 64
    heads: int = 4
    ffn: int = 256
    learning_rate: float = 1e-3
    threads: int = 1

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise InvalidInput(f"hidden={self.hidden} cannot be divided among heads={self.heads}")
        self.recipe()

    def recipe(self) -> Recipe:
        """The part that says how to train."""
        return Recipe(self.epochs, learning_rate=self.learning_rate, weight_decay=0.05, seed=self.seed)


@dataclass(frozen=True)
class TrainedVit:
    """A trained model (eval mode), its accuracy on dev, and the wall seconds of its training."""

    model: ViTForImageClassification
    config: VisionConfig
    dev: Accuracy
    seconds: float


def run_vision_sweep(
    configs: Sequence[VisionConfig], budgets: Sequence[float], seed: int, sweep: Sweep
) -> pd.DataFrame:
    """Every checkpoint pruned to every budget; one row for each method, with the columns of `pruning.run_sweep`.

    seed: of the calibration draw. Checkpoints that are not cached are trained first. The jobs run side by side.
    """
    jobs = [(config, tuple(budgets), seed, sweep) for config in configs]
    rows = [row for found in run_jobs(_one, jobs, "vision", threads=sweep.threads) for row in found]
    order = ["family", "budget", "method", "seed", "calibration_seed"]
    return pd.DataFrame(rows).sort_values(order, ignore_index=True)


def train_vit(task: ImageTask, config: VisionConfig) -> TrainedVit:
    """Train a ViT from scratch, or take it from the cache."""

    def compute() -> dict:
        model = build_vit(config)
        with threads(config.threads):
            seconds = fit(model, task.train, config.recipe())
            dev = _accuracy(model, task.dev)
        return {"state": model.state_dict(), "dev": dev, "seconds": seconds}

    found = cache.remember("vision", _key(task, config), compute)
    model = build_vit(config)
    model.load_state_dict(found["state"])
    return TrainedVit(model.eval(), config, found["dev"], found["seconds"])


def build_vit(config: VisionConfig) -> ViTForImageClassification:
    """An untrained ViT, its weights drawn under `config.seed`."""
    shape = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.ffn,
        hidden_dropout_prob=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return ViTForImageClassification(shape)


def fit(model: nn.Module, rows: Images, recipe: Recipe) -> float:
    """Train all weights in place (AdamW, warm-up and linear decay); returns the seconds. Ends in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    generator = torch.Generator().manual_seed(recipe.seed)
    steps = -(-len(rows) // recipe.batch_size)
    start = time.perf_counter()
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        for epoch in range(recipe.epochs):
            batches = rows.batches(recipe.batch_size, torch.randperm(len(rows), generator=generator))
            for step, batch in enumerate(batches, steps * epoch):
                for group in optimizer.param_groups:
                    group["lr"] = recipe.learning_rate * schedule(step, steps * recipe.epochs, recipe.warmup)
                loss = model(**batch).loss
                if not torch.isfinite(loss):
                    raise InvalidInput(f"the loss became {loss.item()}: a smaller learning rate may help")
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    model.eval()
    return time.perf_counter() - start


def _one(config: VisionConfig, budgets: tuple[float, ...], seed: int, sweep: Sweep) -> list[dict]:
    """All rows of one checkpoint; cached by budget."""
    task = digits.load()
    trained = train_vit(task, config)
    rows = []
    for budget in budgets:
        key = _key(task, config) | {"budget": budget, "seed": seed, "sweep": dataclasses.asdict(sweep)}
        rows += cache.remember("vision", key, lambda b=budget: _rows(task, trained, b, seed, sweep))
    return rows


def _rows(task: ImageTask, trained: TrainedVit, budget: float, seed: int, sweep: Sweep) -> list[dict]:
    draw = torch.randint(len(task.train), (sweep.rows,), generator=torch.Generator().manual_seed(seed))
    batches, model = task.train.batches(sweep.batch, draw), trained.model
    with threads(sweep.threads):
        tries = [
            ltp.prune(model, batches, ltp.Macs(budget), seed=seed, progress=False, **options)
            for options in PRUNER_TRIALS[: sweep.trials]
        ]
        trial = _best([ltp.shrink(model, one.masks) for one in tries], task)
        result = tries[trial]
        cost = ltp.MacCost(ltp.Shape.of(model), result.report.seq_len)
        masks = {name: result.stages[name] for name in STAGES} | pruning.baselines(model, cost, budget, seed)
        accepted = [layer.gain for layer in result.report.layers if layer.accepted]
        more = {
            "tune": {
                "seconds": result.report.seconds,
                "accepted": len(accepted),
                "gain": float(np.mean(accepted)) if accepted else 0.0,
                "trial": trial,
            }
        }
        models = {name: ltp.shrink(model, chosen) for name, chosen in masks.items()}
        if budget in sweep.retrain_budgets:
            masks["retrain"] = masks["rearrange"]
            models["retrain"], more["retrain"] = _retrain(task, trained, masks["rearrange"], sweep)
        rows = []
        for name, small in models.items():
            found = _accuracy(small, task.dev)
            rows.append(
                {
                    "family": "vit",
                    "seed": trained.config.seed,
                    "calibration_seed": seed,
                    "budget": budget,
                    "dense_accuracy": trained.dev.accuracy,
                    "method": name,
                    "accuracy": found.accuracy,
                    "loss": found.loss,
                    "mac_ratio": cost.ratio(masks[name]),
                }
                | more.get(name, {})
            )
    return rows


def _retrain(task: ImageTask, trained: TrainedVit, masks: ltp.Masks, sweep: Sweep) -> tuple[nn.Module, dict]:
    """The best of the retraining's tries on validation, as long as the checkpoint's own training, and its seconds."""
    models, seconds = [], []
    for rate in RETRAIN_TRIALS[: sweep.trials]:
        models.append(ltp.shrink(trained.model, masks))
        seconds.append(fit(models[-1], task.train, dataclasses.replace(trained.config, learning_rate=rate).recipe()))
    trial = _best(models, task)
    return models[trial], {"seconds": seconds[trial], "trial": trial}


def _best(models: list[nn.Module], task: ImageTask) -> int:
    if len(models) == 1:
        return 0
    scores = [_accuracy(model, task.validation).accuracy for model in models]
    return max(range(len(scores)), key=scores.__getitem__)


def _accuracy(model: nn.Module, images: Images) -> Accuracy:
    return evaluate(model, images.batches(EVALUATION_BATCH))


def _key(task: ImageTask, config: VisionConfig) -> dict[str, object]:
    return {"data": task.fingerprint, "config": dataclasses.asdict(config)}
