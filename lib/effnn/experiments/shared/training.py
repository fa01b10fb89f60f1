"""The training loop of the notebooks' small classifiers, of texts and images: AdamW, linear warm-up and decay.

An epoch is the unit of resuming: the state after each one is handed to the caller, and starting again from that state
gives the same weights as never having stopped. Nothing here knows tasks, tokenizers or the cache.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from tqdm.auto import tqdm

from effnn.base import InvalidInput

EVALUATION_BATCH = 128


class Rows(Protocol):
    """Rows of one split: tokenized texts (`EncodedSplit`) or `Images`."""

    def batches(
        self, size: int, *, shuffle: bool = False, seed: int = 0, epoch: int = 0
    ) -> Collection[dict[str, torch.Tensor]]:
        """Model inputs with labels, `size` rows at a time; shuffled, a new order for every (seed, epoch)."""


@dataclass(frozen=True)
class Accuracy:
    """Mean loss and accuracy over `n` rows; for a regression model `accuracy` is Spearman's rank correlation."""

    loss: float
    accuracy: float
    n: int


@dataclass(frozen=True)
class Recipe:
    """How to train with AdamW.

    epochs: passes over the rows.
    batch_size: rows per step.
    learning_rate: the highest; it is reached after the share `warmup` of all steps.
    warmup: share of the steps in which the learning rate rises.
    weight_decay: of matrices; biases and norms have none.
    seed: of the order of the rows and of dropout.
    """

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or self.learning_rate <= 0 or not 0 <= self.warmup < 1:
            raise InvalidInput(
                f"training needs epochs >= 1, batch_size >= 1, learning_rate > 0 and 0 <= warmup < 1, got {self}"
            )


@dataclass(frozen=True)
class Progress:
    """Where a training run is: everything that the next epoch depends on besides the rows and the recipe.

    epoch: how many are finished.
    seconds: wall time of their steps.
    curve: loss and accuracy on validation after each of them.
    model, optimizer: state dicts.
    generator: state of torch's random numbers.
    """

    epoch: int
    seconds: float
    curve: tuple[Accuracy, ...]
    model: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, Any]
    generator: torch.Tensor


def fit(
    model: nn.Module,
    rows: Rows,
    validation: Rows,
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    after_epoch: Callable[[Progress], None] | None = None,
    label: str = "training",
) -> Progress:
    """Train all weights of `model` in place; the accuracy on `validation` follows each epoch. Returns the final state.

    The model ends in eval mode; hooks on it (masks) stay in force. Raises InvalidInput if the loss is not finite.

    model: trained in place, on the device that it is on.
    rows, validation: what is trained on, and what the accuracy is read on.
    recipe: how to train.
    progress: the state to go on from.
    after_epoch: called with the state after every epoch but the last; neither its time nor what it draws from torch's
        generator changes the training or its seconds.
    label: of the progress bar.
    """
    optimizer = _optimizer(model, recipe)
    steps = len(rows.batches(recipe.batch_size))
    epoch, seconds, curve = 0, 0.0, ()
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        if progress is not None:
            model.load_state_dict(progress.model)
            optimizer.load_state_dict(progress.optimizer)
            torch.set_rng_state(progress.generator)
            epoch, seconds, curve = progress.epoch, progress.seconds, progress.curve
        with tqdm(total=steps * recipe.epochs, initial=steps * epoch, desc=label, leave=False, mininterval=1) as bar:
            while epoch < recipe.epochs:
                start = time.perf_counter()
                run_epoch(model, optimizer, rows, recipe, epoch, bar)
                seconds += time.perf_counter() - start
                curve = (*curve, evaluate(model, validation.batches(EVALUATION_BATCH)))
                bar.set_postfix_str(f"validation {curve[-1].accuracy:.3f}")
                epoch += 1
                progress = Progress(
                    epoch, seconds, curve, model.state_dict(), optimizer.state_dict(), torch.get_rng_state()
                )
                if after_epoch is not None and epoch < recipe.epochs:
                    with torch.random.fork_rng():
                        after_epoch(progress)
    return progress


def run_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows, recipe: Recipe, epoch: int, bar: tqdm
) -> None:
    """All of `rows` once, in the order of (seed, epoch); the learning rate follows from the epoch's number.

    model, optimizer: trained, and what steps it.
    rows, recipe: what is trained on, and how.
    epoch: its number, from 0.
    bar: moves on with every step.
    """
    batches = rows.batches(recipe.batch_size, shuffle=True, seed=recipe.seed, epoch=epoch)
    device = next(model.parameters()).device
    model.train()
    for step, batch in enumerate(batches, len(batches) * epoch):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(step, len(batches) * recipe.epochs, recipe.warmup)
        loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
        if not torch.isfinite(loss):
            raise InvalidInput(f"the loss became {loss.item()} at step {step}: a smaller learning rate may help")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()


def schedule(step: int, total: int, warmup: float) -> float:
    """Factor on the learning rate: rises linearly over the first `warmup * total` steps, then falls to zero."""
    rising = max(1, round(warmup * total))
    return min((step + 1) / rising, (total - step) / max(1, total - rising))


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> Accuracy:
    """Loss and accuracy of `model`, in eval mode, on labelled batches; the model is left in eval mode."""
    model.eval()
    device = next(model.parameters()).device
    loss, answers, labels = 0.0, [], []
    for batch in batches:
        out = model(**{name: value.to(device) for name, value in batch.items()})
        loss += out.loss.item() * len(batch["labels"])
        answers.append(out.logits.cpu())
        labels.append(batch["labels"])
    answer, label = torch.cat(answers), torch.cat(labels)
    if label.is_floating_point():
        from scipy.stats import spearmanr

        accuracy = float(spearmanr(answer.squeeze(-1), label).statistic)
    else:
        accuracy = (answer.argmax(-1) == label).double().mean().item()
    return Accuracy(loss / len(label), accuracy, len(label))


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [weight for weight in model.parameters() if weight.requires_grad and weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.requires_grad and weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)
