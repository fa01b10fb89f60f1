"""The paper's latency model and its search (Kwon et al. 2022, section 4.1): `latency_model="piecewise"`.

The latency of a block with n kept units is modelled as 0 for n = 0, a constant c up to n = T, and c + a (n - T) beyond.
A layer's best T units are its base, kept or dropped as a whole; the others are extras at cost a each, ranked over all
layers. The search tries every number of dropped attention and FFN blocks. It is a heuristic (which blocks go is decided
by their base importance alone); knapsack.py needs no such model. Unlike in the published code, the budget is the same
for all tries, base importance counts, and all blocks of a kind may go.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from effnn.base import InvalidInput
from effnn.ltp.pruning.ranking import rank_across_layers


@dataclass(frozen=True)
class Piecewise:
    """lat(0) = 0; lat(n) = base_ms for 0 < n <= base; base_ms + slope_ms * (n - base) beyond."""

    base: int
    base_ms: float
    slope_ms: float

    def ms(self, count: int) -> float:
        """Latency of `count` units."""
        return 0.0 if count == 0 else self.base_ms + self.slope_ms * max(count - self.base, 0)


def fit_piecewise(ms: Sequence[float]) -> Piecewise:
    """Least-squares fit over every T. ms: latencies of 1, 2, ... N units above that of none.

    For each T, c is the mean of the first T and a the slope of the rest through (T, c), neither below 0.
    """
    latency = torch.as_tensor(ms, dtype=torch.float64)
    if latency.ndim != 1 or len(latency) == 0 or not latency.isfinite().all():
        raise InvalidInput("fit_piecewise: expected the finite latencies of 1, 2, ... units")
    count = torch.arange(1, len(latency) + 1, dtype=torch.float64)
    # the sums for all T at once: over n > T of m, m^2, y, m y and y^2, where m = n - T
    above = len(latency) - count
    m = above * (above + 1) / 2
    mm = above * (above + 1) * (2 * above + 1) / 6
    y = latency.sum() - latency.cumsum(0)
    my = (count * latency).sum() - (count * latency).cumsum(0) - count * y
    base_ms = (latency.cumsum(0) / count).clamp(min=0)
    slope = torch.where(mm > 0, (my - base_ms * m) / mm.clamp(min=1), 0.0).clamp(min=0)
    # the squared errors from the residuals, as differences of sums lose the small ones; in blocks of T to bound memory
    errors = []
    for rows in torch.arange(len(latency)).split(256):
        line = base_ms[rows, None] + slope[rows, None] * (count - count[rows, None]).clamp(min=0)
        errors.append((latency - line).square().sum(dim=1))
    best = int(torch.cat(errors).argmin())
    return Piecewise(best + 1, float(base_ms[best]), float(slope[best]))


@dataclass(frozen=True)
class _KeptBlocks:
    """One number of dropped blocks of a kind, and which of the extras are still there to choose from.

    kept: (L,), False for a dropped block.
    cost: ms of the kept bases.
    importance: (N + 1,), of the kept bases with the first 0, 1, ... N extras.
    layer: (N,), of each extra.
    """

    kept: Tensor
    cost: float
    importance: Tensor
    layer: Tensor


@dataclass(frozen=True)
class _Blocks:
    """The attention or the FFN blocks under one fit. ranked: (L, N) importances, falling in each layer."""

    ranked: Tensor
    fit: Piecewise
    minimum: int

    @property
    def base(self) -> int:
        return max(self.fit.base, self.minimum)

    def dropping(self) -> list[_KeptBlocks]:
        """What remains after dropping 0, 1, ... L blocks, those of least base importance first."""
        base_importance = self.ranked[:, : self.base].sum(dim=1)
        order = base_importance.argsort(stable=True)
        extras, layer = rank_across_layers(self.ranked[:, self.base :])
        found = []
        for dropped in range(1 if self.minimum > 0 else len(order) + 1):
            kept = torch.ones(len(order), dtype=torch.bool)
            kept[order[:dropped]] = False
            still = kept[layer]
            importance = base_importance[kept].sum() + pad(extras[still].cumsum(0), (1, 0))
            found.append(_KeptBlocks(kept, int(kept.sum()) * self.fit.ms(self.base), importance, layer[still]))
        return found

    def counts(self, blocks: _KeptBlocks, extras: int) -> list[int]:
        """Units kept in each layer."""
        extra = torch.bincount(blocks.layer[:extras], minlength=len(blocks.kept))
        return (blocks.kept * self.base + extra).tolist()


class PiecewiseSearch:
    """The search over dropped blocks and extras; units are ranked once, for all budgets that `within` is called with.

    head_ranked: (L, H), importances, falling in each layer.
    filter_ranked: (L, N), likewise.
    head_fit: latency of an attention block by its heads.
    filter_fit: latency of an FFN block by its filters.
    min_heads: kept in every layer; a block with a minimum is never dropped.
    min_filters: likewise.
    """

    def __init__(
        self,
        head_ranked: Tensor,
        filter_ranked: Tensor,
        head_fit: Piecewise,
        filter_fit: Piecewise,
        min_heads: int = 0,
        min_filters: int = 0,
    ):
        self.heads = _Blocks(head_ranked, head_fit, min_heads)
        self.filters = _Blocks(filter_ranked, filter_fit, min_filters)
        self._kept_heads, self._kept_filters = self.heads.dropping(), self.filters.dropping()

    def within(self, budget: float) -> tuple[list[int], list[int]] | None:
        """Heads and filters to keep in each layer, of the greatest importance within `budget` ms, or None."""
        head_ms, filter_ms = self.heads.fit.slope_ms, self.filters.fit.slope_ms
        best = None
        for heads in self._kept_heads:
            for filters in self._kept_filters:
                rest = budget - heads.cost - filters.cost
                if rest < 0:
                    continue
                n_heads = torch.arange(len(heads.importance))
                left = rest - n_heads * head_ms
                n_heads, left = n_heads[left >= 0], left[left >= 0]
                most = len(filters.importance) - 1
                fitting = (left / filter_ms).floor().clamp(max=most) if filter_ms > 0 else torch.full_like(left, most)
                importance = heads.importance[n_heads] + filters.importance[fitting.long()]
                at = int(importance.argmax())
                if best is None or float(importance[at]) > best[0]:
                    best = float(importance[at]), heads, int(n_heads[at]), filters, int(fitting[at])
        if best is None:
            return None
        _, heads, n_heads, filters, n_filters = best
        return self.heads.counts(heads, n_heads), self.filters.counts(filters, n_filters)
