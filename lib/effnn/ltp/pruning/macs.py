"""Counting multiply-accumulates, and the mask search under a MAC budget (Kwon et al. 2022, section 4.1, Algorithm 1).

The diagonal Fisher gives every head and filter an importance; all heads cost the same and so do all filters, so for
each number of heads the best set is a prefix of the two rankings, and trying every number of heads is exact. With a
minimum per layer or with rounded filter counts the ranking is over what is left to choose, which is exact for heads
and for whole chunks of filters, but no longer over single filters. Counted: the six linear maps and the two attention
products. Not counted: biases, normalisations, embeddings, the task head.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from effnn.base import InvalidInput
from effnn.ltp.pruning.masks import BudgetTooSmall, Masks, Shape
from effnn.ltp.pruning.options import check_choice, check_count, is_number
from effnn.ltp.pruning.ranking import RankedUnits, fewest_kept, rank_across_layers


@dataclass(frozen=True)
class MacCost:
    """MACs of one head and of one filter at `seq_len` tokens (a mean, so it need not be a whole number)."""

    shape: Shape
    seq_len: float

    @property
    def head(self) -> float:
        """Query, key, value and output projections (4 S d d_h) and the two attention products (2 S^2 d_h)."""
        return (4 * self.seq_len * self.shape.hidden + 2 * self.seq_len**2) * self.shape.head_size

    @property
    def filter(self) -> float:
        """One row of FFN-1 and one column of FFN-2: 2 S d."""
        return 2 * self.seq_len * self.shape.hidden

    @property
    def total(self) -> float:
        """MACs of the dense encoder."""
        return self.of(self.shape.layers * self.shape.heads, self.shape.layers * self.shape.filters)

    def of(self, heads: int, filters: int) -> float:
        """MACs of `heads` heads and `filters` filters, wherever they stand."""
        return heads * self.head + filters * self.filter

    def ratio(self, masks: Masks) -> float:
        """Share of the dense encoder's MACs that the kept units need."""
        return self.of(sum(masks.heads_per_layer), sum(masks.filters_per_layer)) / self.total


@dataclass(frozen=True)
class Macs:
    """Target: keep at most `ratio` of the encoder's multiply-accumulates.

    ratio: in (0, 1].
    seq_len: tokens in the MAC formula; "auto" takes the mean live length of the calibration rows.
    min_heads: kept in every layer whatever their importance.
    min_filters: likewise.
    allocation: "global" ranks units across layers (the paper), "uniform" gives every layer the same numbers.
    """

    ratio: float
    seq_len: float | str = "auto"
    min_heads: int = 0
    min_filters: int = 0
    allocation: str = "global"

    def __post_init__(self) -> None:
        if not is_number(self.ratio, 0, 1):
            raise InvalidInput(f"Macs(ratio={self.ratio!r}): expected a number above 0 and at most 1, such as 0.6")
        if self.seq_len != "auto" and not is_number(self.seq_len, 0):
            raise InvalidInput(f'Macs(seq_len={self.seq_len!r}): expected "auto" or a positive number of tokens')
        check_choice("Macs.allocation", self.allocation, "global", "uniform")
        check_count("Macs.min_heads", self.min_heads, 0)
        check_count("Macs.min_filters", self.min_filters, 0)

    def relaxed(self) -> "Macs":
        """The teacher's target in mask tuning: the square root of the ratio (section 4.3)."""
        return replace(self, ratio=math.sqrt(self.ratio))


def spare_macs(cost: MacCost, target: Macs, round_to: int = 1) -> float:
    """MACs of the budget beyond the minimum of every layer.

    BudgetTooSmall, naming the smallest ratio that fits, where the minimum alone is too much.
    """
    shape = cost.shape
    heads = shape.layers * fewest_kept(shape.heads, 1, target.min_heads) * cost.head
    filters = shape.layers * fewest_kept(shape.filters, round_to, target.min_filters) * cost.filter
    spare = target.ratio * cost.total - heads - filters
    if spare < 0 and target.ratio < 1:
        least = heads + filters
        smallest = math.ceil(1e4 * least / cost.total) / 1e4  # rounded up, so that the ratio that is named can be met
        smallest += 1e-4 if smallest * cost.total < least else 0
        raise BudgetTooSmall(
            f"the minimum of {target.min_heads} heads and {target.min_filters} filters per layer needs {smallest:.4f} "
            f"of the MACs, more than the budget of {target.ratio}. The smallest feasible ratio is {smallest:.4f}"
        )
    return spare


def search_macs(
    head_importance: Tensor, filter_importance: Tensor, cost: MacCost, target: Macs, round_to: int = 1
) -> Masks:
    """Binary masks of the greatest kept importance whose MACs do not exceed the budget.

    head_importance: (L, H), not negative.
    filter_importance: (L, F), not negative, on the same scale.
    cost: MACs of one head and of one filter.
    target: the budget.
    round_to: kept filters of a layer are a multiple of it, or all (a last, smaller chunk counts as a full one).

    Ties go to the lower (layer, index). Raises BudgetTooSmall if no choice fits, naming the smallest ratio that does.
    """
    heads = _Choices(RankedUnits("heads", head_importance, 1, target.min_heads), cost.head, 1, target.allocation)
    filters = RankedUnits("filters", filter_importance, round_to, target.min_filters)
    filters = _Choices(filters, cost.filter, round_to, target.allocation)
    if target.ratio == 1:
        return Masks.ones(cost.shape)
    budget = spare_macs(cost, target, round_to)
    # for every number of heads, as many filters as the rest of the budget takes
    n_heads = torch.arange(len(heads.importance), dtype=torch.float64)
    rest = budget - n_heads * heads.cost
    # the division may round either way past a whole number: start one above, and step down while it is too much
    n_filters = ((rest / filters.cost).floor() + 1).clamp(max=len(filters.importance) - 1)
    for _ in range(2):
        spent = heads.base_cost + filters.base_cost + n_heads * heads.cost + n_filters * filters.cost
        n_filters -= (spent / cost.total > target.ratio).double()
    feasible = (rest >= 0) & (n_filters >= 0)
    score = heads.importance + filters.importance[n_filters.clamp(min=0).long()]
    best = int(torch.where(feasible, score, -torch.inf).argmax())
    return Masks(heads.mask(best), filters.mask(int(n_filters[best])))


class _Choices:
    """What the search takes beyond the minimum, best first: chunks of single layers, or one chunk of every layer.

    importance: (N + 1,), of the first 0, 1, ... N choices. cost: MACs of one. base_cost: MACs of the minimum.
    """

    def __init__(self, units: RankedUnits, unit_cost: float, chunk: int, allocation: str):
        layers, uniform = len(units.order), allocation == "uniform"
        free = units.chunk_importance[:, units.lowest :]
        ranked, self.layer = (free.sum(0), None) if uniform else rank_across_layers(free)
        self.units = units
        self.importance = pad(ranked.cumsum(0), (1, 0))
        self.cost = unit_cost * chunk * (layers if uniform else 1)
        self.base_cost = layers * int(units.counts[units.lowest]) * unit_cost

    def mask(self, chosen: int) -> Tensor:
        """(L, units) binary mask: the minimum of every layer and the first `chosen` choices."""
        layers = len(self.units.order)
        extra = torch.full((layers,), chosen)
        if self.layer is not None:
            extra = torch.bincount(self.layer[:chosen], minlength=layers)
        return self.units.mask(self.units.lowest + extra)
