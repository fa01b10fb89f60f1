"""The mask search under a latency budget (ltp.md A.4; Kwon et al. 2022).

Within a layer the best n heads are its n most important ones, and so for filters: what is left to choose is how many
each layer keeps. With a table of what they cost, that is a multiple-choice knapsack, which `knapsack` solves on the
measured staircase itself. `latency_model="piecewise"` is the paper's search on its two-piece fit. Both keep the
latency that the table predicts within the budget; that the table tells the truth is measured, not assumed
(`compare_latency`).
"""

import math

import torch
from torch import Tensor

from effnn.base import InvalidInput
from effnn.ltp.pruning.latency.knapsack import best_choice
from effnn.ltp.pruning.latency.measure import compare_latency, measure_latency
from effnn.ltp.pruning.latency.piecewise import PiecewiseSearch, fit_piecewise
from effnn.ltp.pruning.latency.table import Latency, LatencyTable
from effnn.ltp.pruning.masks import BudgetTooSmall, Masks

__all__ = ["Latency", "LatencyTable", "compare_latency", "measure_latency", "search_latency"]

_ROUNDING = 1e-9  # of the dense latency: sums of floats may exceed the budget by this much


def search_latency(
    head_importance: Tensor, filter_importance: Tensor, table: LatencyTable, target: Latency, round_to: int = 1
) -> Masks:
    """Binary masks of the greatest kept importance whose predicted latency is at most ratio times the dense one's.

    head_importance: (L, H), filter_importance: (L, F), non-negative and on one scale. round_to: kept filters of a layer
    are a multiple of it or all. Blocks may lose all their units. Ties go to the lower index. Raises InvalidInput if no
    choice fits, naming the smallest ratio that does. `latency_model="piecewise"` searches the paper's fit; where the
    fit is below the table, its budget is lowered until the table agrees.
    """
    table.check(target)
    heads = _Kind("heads", head_importance, table.head_ms, 1, target.min_heads)
    filters = _Kind("filters", filter_importance, table.filter_ms, round_to, target.min_filters)
    layers = len(head_importance)
    if len(filter_importance) != layers:
        raise InvalidInput(f"importances of {layers} layers of heads and {len(filter_importance)} layers of filters")
    dense = table.dense_prediction(layers)
    budget = target.ratio * dense - table.rest_ms + _ROUNDING * dense
    least = layers * (float(heads.cost[heads.lowest :].min()) + float(filters.cost[filters.lowest :].min()))
    if least > budget:
        smallest = math.ceil(1e4 * (least + table.rest_ms) / dense) / 1e4
        raise BudgetTooSmall(
            f"no choice of heads and filters reaches {target.ratio} of the dense latency: {table.rest_ms:.3g} of "
            f"{dense:.3g} ms are spent outside the layers, and empty blocks and the minimum per layer take time "
            f"too. The smallest feasible ratio is {smallest:.4f}"
        )
    search = _search_table if target.latency_model == "table" else _search_piecewise
    kept_heads, kept_filters = search(heads, filters, budget)
    return Masks(heads.mask(kept_heads), filters.mask(kept_filters))


class _Kind:
    """The heads or the filters as chunks that are kept together, most important first in each layer.

    value: (L, K + 1), importance kept with 0, 1, ... K chunks; cost: (K + 1,), ms; lowest: chunks kept at least.
    """

    def __init__(self, name: str, importance: Tensor, ms: tuple[float, ...], chunk: int, minimum: int):
        width = len(ms) - 1
        if importance.ndim != 2 or importance.shape[1] != width:
            raise InvalidInput(f"importance of {name}, {tuple(importance.shape)}: the table expects (layers, {width})")
        if not (importance.isfinite().all() and (importance >= 0).all()):
            raise InvalidInput(f"importance of {name}: expected finite numbers of at least 0")
        if minimum > width:
            raise InvalidInput(f"a minimum of {minimum} {name} a layer, which has {width}")
        if not 1 <= chunk <= width:
            raise InvalidInput(f"round_to={chunk}: expected a number from 1 to the {width} {name} of a layer")
        importance = importance.detach().double().cpu()
        self.width = width
        self.rank = importance.argsort(dim=1, descending=True, stable=True)
        ranked = importance.gather(1, self.rank)
        self.units = torch.tensor([*range(0, width, chunk), width])
        self.value = torch.nn.functional.pad(ranked.cumsum(1), (1, 0))[:, self.units]
        self.cost = torch.tensor(ms, dtype=torch.float64)[self.units]
        self.lowest = math.ceil(minimum / chunk)

    def mask(self, chunks: list[int]) -> Tensor:
        """(L, width) binary mask of each layer's most important units."""
        kept = self.units[torch.tensor(chunks)]
        keep_rank = torch.arange(self.width).unsqueeze(0) < kept.unsqueeze(1)
        return torch.zeros(len(chunks), self.width).scatter_(1, self.rank, keep_rank.float())

    def totals(self, chunks: list[int]) -> tuple[float, float]:
        """Importance kept and ms taken."""
        index = torch.tensor(chunks)
        return float(self.value.gather(1, index.unsqueeze(1)).sum()), float(self.cost[index].sum())


def _search_table(heads: _Kind, filters: _Kind, budget: float) -> tuple[list[int], list[int]]:
    kinds = (heads, filters)
    values = [row[kind.lowest :] for kind in kinds for row in kind.value]
    costs = [kind.cost[kind.lowest :] for kind in kinds for _ in kind.value]
    lowest = [kind.lowest for kind in kinds for _ in kind.value]
    picks = [pick + low for pick, low in zip(best_choice(costs, values, budget).picks, lowest, strict=True)]
    return picks[: len(heads.value)], picks[len(heads.value) :]


def _search_piecewise(heads: _Kind, filters: _Kind, budget: float) -> tuple[list[int], list[int]]:
    # the fit knows no cost of an empty block, so that cost is taken off every entry and off the budget
    layers = len(heads.value)
    empty = layers * float(heads.cost[0] + filters.cost[0])
    ranked = [kind.value.diff(dim=1) for kind in (heads, filters)]
    fits = [fit_piecewise((kind.cost[1:] - kind.cost[0]).tolist()) for kind in (heads, filters)]
    search = PiecewiseSearch(*ranked, *fits, heads.lowest, filters.lowest)
    best, best_value = ([_cheapest(heads)] * layers, [_cheapest(filters)] * layers), -math.inf
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


def _cheapest(kind: _Kind) -> int:
    return kind.lowest + int(kind.cost[kind.lowest :].argmin())
