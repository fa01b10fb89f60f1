"""The search under a latency budget, repeated until the pruned model keeps the budget when it is measured.

A table adds up blocks, and a real model is not quite the sum of its blocks. So the model that the search proposes is
assembled and measured in turn with the dense one. If it is over the budget, the search is repeated for a smaller ratio.
The number of repetitions is bounded whatever the clock says. So is how much each of them takes off the ratio: one bad
measurement on a busy machine does not empty the model. Every attempt is reported.
"""

import logging
import statistics
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from effnn.base import LEAST, Timing
from effnn.ltp.pruning.latency.measure import compare_latency
from effnn.ltp.pruning.latency.search import search_latency
from effnn.ltp.pruning.latency.table import Latency, LatencyTable
from effnn.ltp.pruning.macs import Macs
from effnn.ltp.pruning.masks import BudgetTooSmall, Masks
from effnn.ltp.pruning.shrinking.shrink import shrink

log = logging.getLogger(__name__)

TOLERANCE = 0.01
"""A measured ratio this share above the budget still counts as kept: a median of a few runs is no more exact."""

LARGEST_CORRECTION = 0.8
"""A repeated search aims at no less than this share of the ratio before."""


@dataclass(frozen=True)
class SearchAttempt:
    """One search, in shares of the dense latency: its budget, what the table predicted, and what was measured."""

    planned: float
    predicted: float
    measured: float


@dataclass(frozen=True)
class SearchResult:
    """masks: binary. target: that of the search which gave them. attempts: empty where nothing was measured."""

    masks: Masks
    target: Macs | Latency
    attempts: tuple[SearchAttempt, ...]


def search_measured(
    model: PreTrainedModel,
    head_importance: Tensor,
    filter_importance: Tensor,
    table: LatencyTable,
    target: Latency,
    round_to: int = 1,
) -> SearchResult:
    """Masks of the greatest importance (`search_latency`) with which the assembled model keeps the budget.

    model: the dense one, stays as it is.
    head_importance: (L, H).
    filter_importance: (L, F).
    table: what a layer costs by what it keeps.
    target: the budget; the search is repeated `target.corrections` times at most. With 0 the table is believed and
        nothing is measured.
    round_to: kept filters of a layer are a multiple of it, or all.

    If no attempt keeps the budget, the nearest one is taken, with a warning. Raises BudgetTooSmall where the table
    allows no choice within the budget.
    """
    planned = target
    masks = search_latency(head_importance, filter_importance, table, planned, round_to)
    tried: list[tuple[SearchAttempt, Masks, Latency]] = []
    while target.corrections > 0:
        predicted = table.predict(masks) / table.dense_prediction(len(masks.heads))
        attempt = SearchAttempt(planned.ratio, predicted, measured_ratio(measure_pair(model, masks, target)))
        tried.append((attempt, masks, planned))
        if attempt.measured <= (1 + TOLERANCE) * target.ratio or len(tried) > target.corrections:
            break
        planned = replace(planned, ratio=planned.ratio * max(target.ratio / attempt.measured, LARGEST_CORRECTION))
        try:
            masks = search_latency(head_importance, filter_importance, table, planned, round_to)
        except BudgetTooSmall:  # by the table nothing is faster
            break
    if not tried:
        return SearchResult(masks, planned, ())
    # the last one is within the budget, or none is
    attempt, masks, planned = min(tried, key=lambda one: one[0].measured)
    if attempt.measured > (1 + TOLERANCE) * target.ratio:
        log.warning(
            "the pruned model was measured at %.3f of the dense latency, over the budget of %.3f, after %d attempts",
            attempt.measured,
            target.ratio,
            len(tried),
        )
    return SearchResult(masks, planned, tuple(one for one, _, _ in tried))


def measure_pair(model: PreTrainedModel, masks: Masks, target: Latency) -> dict[str, Timing]:
    """Seconds of the dense ("dense") and of the pruned ("pruned") model, in turn, under the target's inputs."""
    models = {"dense": model, "pruned": shrink(model, masks)}
    return compare_latency(
        models, target.batch, target.seq_len, target.device, target.repeats, dtype=target.torch_dtype()
    )


def measured_ratio(times: dict[str, Timing]) -> float:
    """Median over the rounds of pruned / dense.

    A round in which the clock stood still for the dense model (`interleave` gives `LEAST`) does not count. 1.0 where
    none counts: then nothing was found out.
    """
    pairs = zip(times["pruned"].seconds, times["dense"].seconds, strict=True)
    ratios = [pruned / dense for pruned, dense in pairs if dense > LEAST]
    return statistics.median(ratios) if ratios else 1.0
