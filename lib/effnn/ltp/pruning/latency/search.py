"""The mask search under a latency budget, by a lookup table (Kwon et al. 2022, section 4.1).

Within a layer the best n heads are its n most important ones, and likewise for filters: what is left to choose is how
many each layer keeps. With a table of what they cost, that is a multiple-choice knapsack, which knapsack.py solves on
the measured staircase itself. `latency_model="piecewise"` is the paper's search on its two-piece fit (piecewise.py).
Both keep the latency that the table predicts within the budget; measured_search.py checks it on the assembled model.
"""

import math

import torch
from torch import Tensor

from effnn.base import InvalidInput
from effnn.ltp.pruning.latency.knapsack import best_choice
from effnn.ltp.pruning.latency.piecewise import PiecewiseSearch, fit_piecewise
from effnn.ltp.pruning.latency.table import Latency, LatencyTable
from effnn.ltp.pruning.masks import BudgetTooSmall, Masks
from effnn.ltp.pruning.ranking import RankedUnits

_ROUNDING = 1e-9  # of the dense latency: sums of floats may exceed the budget by this much


def search_latency(
    head_importance: Tensor, filter_importance: Tensor, table: LatencyTable, target: Latency, round_to: int = 1
) -> Masks:
    """Binary masks of the greatest kept importance whose predicted latency is at most ratio times the dense one's.

    head_importance: (L, H), not negative.
    filter_importance: (L, F), not negative, on the same scale.
    table: what a layer costs by what it keeps.
    target: the budget, and which search: `latency_model="piecewise"` searches the paper's fit; where the fit is below
        the table, its budget is lowered until the table agrees.
    round_to: kept filters of a layer are a multiple of it, or all.

    Blocks may lose all their units. Ties go to the lower index. Raises BudgetTooSmall if no choice fits, naming the
    smallest ratio that does.
    """
    heads, filters, budget = _within_budget(head_importance, filter_importance, table, target, round_to)
    search = _search_table if target.latency_model == "table" else _search_piecewise
    kept_heads, kept_filters = search(heads, filters, budget)
    return Masks(heads.mask(torch.tensor(kept_heads)), filters.mask(torch.tensor(kept_filters)))


def check_reachable(table: LatencyTable, target: Latency, layers: int, round_to: int = 1) -> None:
    """BudgetTooSmall where `search_latency` would raise it, whatever the importances of the `layers` layers."""
    heads, filters = (torch.zeros(layers, len(ms) - 1) for ms in (table.head_ms, table.filter_ms))
    _within_budget(heads, filters, table, target, round_to)


def _within_budget(
    head_importance: Tensor, filter_importance: Tensor, table: LatencyTable, target: Latency, round_to: int
) -> tuple["_TimedUnits", "_TimedUnits", float]:
    """Heads and filters as the table times them, and the ms that they may take together."""
    table.check(target)
    heads = _TimedUnits("heads", head_importance, table.head_ms, 1, target.min_heads)
    filters = _TimedUnits("filters", filter_importance, table.filter_ms, round_to, target.min_filters)
    layers = len(head_importance)
    if len(filter_importance) != layers:
        raise InvalidInput(f"importances of {layers} layers of heads and {len(filter_importance)} layers of filters")
    dense = table.dense_prediction(layers)
    budget = target.ratio * dense - table.rest_ms + _ROUNDING * dense
    least = layers * float(heads.ms[heads.cheapest] + filters.ms[filters.cheapest])
    if least > budget:
        smallest = math.ceil(1e4 * (least + table.rest_ms) / dense) / 1e4
        raise BudgetTooSmall(
            f"no choice of heads and filters reaches {target.ratio} of the dense latency: {table.rest_ms:.3g} of "
            f"{dense:.3g} ms are spent outside the layers, and empty blocks and the minimum per layer take time "
            f"too. The smallest feasible ratio is {smallest:.4f}"
        )
    return heads, filters, budget


class _TimedUnits(RankedUnits):
    """Ranked heads or filters, and the ms of a block that keeps 0, 1, ... K chunks of them: (K + 1,)."""

    def __init__(self, kind: str, importance: Tensor, ms: tuple[float, ...], chunk: int, minimum: int):
        width = len(ms) - 1
        if importance.ndim != 2 or importance.shape[1] != width:
            raise InvalidInput(f"importance of {kind}, {tuple(importance.shape)}: the table expects (layers, {width})")
        super().__init__(kind, importance, chunk, minimum)
        self.ms = torch.tensor(ms, dtype=torch.float64)[self.counts]
        self.cheapest = self.lowest + int(self.ms[self.lowest :].argmin())

    def totals(self, chunks: list[int]) -> tuple[float, float]:
        """Importance kept and ms taken, of all layers together."""
        index = torch.tensor(chunks)
        return float(self.kept_importance.gather(1, index.unsqueeze(1)).sum()), float(self.ms[index].sum())


def _search_table(heads: _TimedUnits, filters: _TimedUnits, budget: float) -> tuple[list[int], list[int]]:
    """Chunks of heads and of filters to keep in each layer; a layer's heads, or its filters, are one knapsack group."""
    layers = len(heads.order)
    groups = [(kind, layer) for kind in (heads, filters) for layer in range(layers)]
    costs = [kind.ms[kind.lowest :] for kind, _ in groups]
    values = [kind.kept_importance[layer, kind.lowest :] for kind, layer in groups]
    picks = best_choice(costs, values, budget).picks
    kept = [kind.lowest + pick for (kind, _), pick in zip(groups, picks, strict=True)]
    return kept[:layers], kept[layers:]


def _search_piecewise(heads: _TimedUnits, filters: _TimedUnits, budget: float) -> tuple[list[int], list[int]]:
    """The same by the paper's fit, under the greatest of the tried budgets at which the table agrees."""
    # the fit knows no cost of an empty block, so that cost is taken off every entry and off the budget
    layers = len(heads.order)
    empty = layers * float(heads.ms[0] + filters.ms[0])
    ranked = [kind.kept_importance.diff(dim=1) for kind in (heads, filters)]
    fits = [fit_piecewise((kind.ms[1:] - kind.ms[0]).tolist()) for kind in (heads, filters)]
    search = PiecewiseSearch(*ranked, *fits, heads.lowest, filters.lowest)
    best, best_value = ([heads.cheapest] * layers, [filters.cheapest] * layers), -math.inf
    low, high, trial = 0.0, budget - empty, budget - empty
    for _ in range(24):
        found = search.within(trial)
        if found is not None:
            (head_value, head_ms), (filter_value, filter_ms) = heads.totals(found[0]), filters.totals(found[1])
            fits_table = head_ms + filter_ms <= budget
            if fits_table and head_value + filter_value > best_value:
                best, best_value = found, head_value + filter_value
            if fits_table and trial == high:
                break
            low, high = (trial, high) if fits_table else (low, trial)
        else:
            low = trial
        trial = (low + high) / 2
    return best
