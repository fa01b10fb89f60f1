"""Counting multiply-accumulates, and the mask search under a MAC budget (ltp.md A.3; Kwon et al. 2022, Algorithm 1).

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

from effnn.base import InvalidInput
from effnn.ltp.pruning.masks import BudgetTooSmall, Masks, Shape


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

    ratio: in (0, 1]. seq_len: tokens in the MAC formula; "auto" takes the mean live length of the calibration rows.
    min_heads, min_filters: kept in every layer whatever their importance. allocation: "global" ranks units across
    layers (the paper), "uniform" gives every layer the same numbers.
    """

    ratio: float
    seq_len: float | str = "auto"
    min_heads: int = 0
    min_filters: int = 0
    allocation: str = "global"

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise InvalidInput(f"Macs(ratio={self.ratio}): expected a number above 0 and at most 1, such as 0.6")
        if self.seq_len != "auto" and not (isinstance(self.seq_len, (int, float)) and self.seq_len > 0):
            raise InvalidInput(f'Macs(seq_len={self.seq_len!r}): expected "auto" or a positive number of tokens')
        if self.allocation not in ("global", "uniform"):
            raise InvalidInput(f'Macs(allocation={self.allocation!r}): expected "global" or "uniform"')
        if self.min_heads < 0 or self.min_filters < 0:
            raise InvalidInput("Macs(min_heads, min_filters): expected numbers of at least 0")

    def relaxed(self) -> "Macs":
        """The teacher's target in mask tuning: the square root of the ratio (A.6)."""
        return replace(self, ratio=math.sqrt(self.ratio))


def search_macs(
    head_importance: Tensor, filter_importance: Tensor, cost: MacCost, target: Macs, round_to: int = 1
) -> Masks:
    """Binary masks of the greatest kept importance whose MACs do not exceed the budget.

    head_importance: (L, H), filter_importance: (L, F), both non-negative and on one scale. round_to: kept filters of
    a layer are a multiple of it (a last, smaller chunk counts as a full one). Ties go to the lower (layer, index).
    Raises InvalidInput if no choice fits, naming the smallest ratio that does.
    """
    shape = cost.shape
    for name, importance in (("head", head_importance), ("filter", filter_importance)):
        if not (importance.isfinite().all() and (importance >= 0).all()):
            raise InvalidInput(f"{name} importances: expected finite numbers of at least 0")
    if target.ratio == 1:
        return Masks.ones(shape)
    if target.min_heads > shape.heads or target.min_filters > shape.filters:
        raise InvalidInput(
            f"the minimum per layer exceeds the {shape.heads} heads or {shape.filters} filters of a layer"
        )
    if not 1 <= round_to <= shape.filters:
        raise InvalidInput(f"round_to={round_to}: expected a number from 1 to the {shape.filters} filters of a layer")
    heads = _Units(head_importance.double(), cost.head, chunk=1, minimum=target.min_heads)
    filters = _Units(filter_importance.double(), cost.filter, chunk=round_to, minimum=target.min_filters)
    if target.allocation == "uniform":
        heads, filters = heads.by_layer(), filters.by_layer()
    budget = target.ratio * cost.total - heads.base_cost - filters.base_cost
    if budget < 0:
        least = heads.base_cost + filters.base_cost
        smallest = math.ceil(1e4 * least / cost.total) / 1e4  # rounded up, so that the ratio that is named can be met
        smallest += 1e-4 if smallest * cost.total < least else 0
        raise BudgetTooSmall(
            f"the minimum of {target.min_heads} heads and {target.min_filters} filters a layer needs {smallest:.4f} of "
            f"the MACs, more than the budget of {target.ratio}. The smallest feasible ratio is {smallest:.4f}"
        )
    n_heads = torch.arange(len(heads.order) + 1, dtype=torch.float64)
    rest = budget - n_heads * heads.cost
    # the division may round either way past a whole number: start one above, and step down while it is too much
    n_filters = ((rest / filters.cost).floor() + 1).clamp(max=len(filters.order))
    for _ in range(2):
        spent = heads.base_cost + filters.base_cost + n_heads * heads.cost + n_filters * filters.cost
        n_filters -= (spent / cost.total > target.ratio).double()
    feasible = (rest >= 0) & (n_filters >= 0)
    score = heads.prefix_sum[n_heads.long()] + filters.prefix_sum[n_filters.clamp(min=0).long()]
    best = int(torch.where(feasible, score, -torch.inf).argmax())
    return Masks(heads.mask(best), filters.mask(int(n_filters[best])))


class _Units:
    """Chunks of units of one kind that are chosen together, best first; the minimum of each layer is chosen already."""

    def __init__(self, importance: Tensor, unit_cost: float, chunk: int, minimum: int):
        layers, width = importance.shape
        self.width, self.chunk = width, chunk
        self.rank_in_layer = importance.argsort(dim=1, descending=True, stable=True)
        ranked = importance.gather(1, self.rank_in_layer)
        chunks = math.ceil(width / chunk)
        padded = torch.nn.functional.pad(ranked, (0, chunks * chunk - width))
        self.value = padded.view(layers, chunks, chunk).sum(-1)
        self.forced = math.ceil(minimum / chunk)
        self.cost = unit_cost * chunk
        self.base_cost = layers * min(self.forced * chunk, width) * unit_cost
        # chunks of all layers compete by their value, which falls with the rank within a layer
        free = self.value[:, self.forced :]
        self.owner = torch.arange(layers).unsqueeze(1).expand_as(free).flatten()
        # single units tie by (layer, index), as the ranking of the flattened importances would
        tie = torch.arange(importance.numel()).view(layers, width) if chunk == 1 else None
        self.order = self._rank(free.flatten(), tie)
        self._sums(free.flatten())

    def _rank(self, values: Tensor, tie: Tensor | None) -> Tensor:
        if tie is not None:
            index = tie.gather(1, self.rank_in_layer)[:, self.forced :].flatten()
            by_index = index.argsort(stable=True)
            return by_index[values[by_index].argsort(descending=True, stable=True)]
        return values.argsort(descending=True, stable=True)

    def _sums(self, values: Tensor) -> None:
        self.prefix_sum = torch.cat([values.new_zeros(1), values[self.order].cumsum(0)])

    def by_layer(self) -> "_Units":
        """The same units, but one choice takes a chunk from every layer at once."""
        free = self.value[:, self.forced :]
        layers = free.shape[0]
        self.cost *= layers
        self.order = torch.arange(free.shape[1])
        self.prefix_sum = torch.cat([free.new_zeros(1), free.sum(0).cumsum(0)])
        self.owner = None
        return self

    def mask(self, chosen: int) -> Tensor:
        """(L, width) binary mask: the minimum of every layer and the first `chosen` choices."""
        layers = self.value.shape[0]
        if self.owner is None:
            extra = torch.full((layers,), chosen)
        else:
            extra = torch.bincount(self.owner[self.order[:chosen]], minlength=layers)
        kept = ((self.forced + extra) * self.chunk).clamp(max=self.width)
        keep_rank = torch.arange(self.width).unsqueeze(0) < kept.unsqueeze(1)
        return torch.zeros(layers, self.width).scatter_(1, self.rank_in_layer, keep_rank.float())
