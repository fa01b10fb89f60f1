"""What post-training pruning is compared with: magnitude and random pruning, and retraining."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from effnn import ltp
from effnn.base import LEAST
from effnn.data.digits import ImageTask
from effnn.data.text.task import TextTask
from effnn.experiments.shared.classifier import TrainedClassifier
from effnn.experiments.shared.training import fit

RETRAIN_RATES = (5e-4, 1e-3, 2e-4)
"""Learning rates of the retraining in the order in which they are tried; as many as the pruner has trials."""


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


@dataclass(frozen=True)
class Retrained:
    """The retrained model that was best on validation, the number of its try, and the seconds of all its epochs."""

    model: nn.Module
    trial: int
    seconds: float


def retrain(
    task: TextTask | ImageTask,
    trained: TrainedClassifier,
    masks: ltp.Masks,
    epochs: int,
    rates: Sequence[float],
    between_epochs: Callable[[], object],
) -> Retrained:
    """Cut `trained` down to `masks` and train all weights of the smaller model, once for each learning rate.

    task: whose training rows are used, and whose validation rows choose among the tries.
    trained: the dense start.
    masks: what is kept.
    epochs: of each try.
    rates: learning rates; the rest of the recipe is that of the start.
    between_epochs: called before every epoch; its time does not count, and the training is the same without it.
    """
    rows, validation = trained.encode(task.train), trained.encode(task.validation)
    models, ends = [], []
    after = lambda _: between_epochs()  # noqa: E731
    for rate in rates:
        recipe = dataclasses.replace(trained.config.recipe(), epochs=epochs, learning_rate=rate)
        models.append(ltp.shrink(trained.model, masks))
        between_epochs()
        ends.append(fit(models[-1], rows, validation, recipe, after_epoch=after, label="retraining"))
    trial = best([end.curve[-1].accuracy for end in ends])
    return Retrained(models[trial], trial, max(ends[trial].seconds, LEAST))


def best(scores: Sequence[float]) -> int:
    """The place of the highest score, the first of equal ones."""
    return max(range(len(scores)), key=scores.__getitem__)


def _balanced(heads: torch.Tensor, filters: torch.Tensor, cost: ltp.MacCost) -> tuple[torch.Tensor, torch.Tensor]:
    """Importances whose sums are as the kinds' MACs, so that neither kind is preferred as a whole."""
    shape = cost.shape
    return (
        heads * (shape.layers * shape.heads * cost.head / heads.sum()),
        filters * (shape.layers * shape.filters * cost.filter / filters.sum()),
    )
