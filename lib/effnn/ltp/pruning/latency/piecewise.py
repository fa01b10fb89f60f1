"""The paper's latency model and its search (Kwon et al. 2022; ltp.md A.4): `latency_model="piecewise"`.

Latency over the number n of units kept in a layer is taken as 0 for n = 0, a constant c up to n = T, and c + a (n - T)
beyond. A layer's best T units are its base, kept or dropped as a whole; the others are extras at cost a each, ranked
over all layers. The search tries every number of dropped attention and FFN blocks. It is a heuristic (which blocks go
is decided by their base importance alone); `knapsack` needs no such model. The defects of the published search that
ltp.md lists are not repeated here: the budget stays what it is, base importance counts, and all extremes are tried.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effnn.base import InvalidInput


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
    """Least-squares fit over every T. ms: latencies of 1, 2, ... N units above that of none (ltp.md A.4).

    For each T, c is the mean of the first T and a the slope of the rest through (T, c), neither below 0.
    """
    latency = torch.as_tensor(ms, dtype=torch.float64)
    if latency.ndim != 1 or len(latency) == 0 or not latency.isfinite().all():
        raise InvalidInput("fit_piecewise: expected the finite latencies of 1, 2, ... units")
    count = torch.arange(1, len(latency) + 1, dtype=torch.float64)
    # the sums of A.4 for all T at once: over n > T of m, m^2, y, m y and y^2, where m = n - T
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
class _Kind:
    """The heads or the filters: base and extras under one fit. ranked: (L, N) importances, descending in each layer."""

    ranked: Tensor
    fit: Piecewise
    minimum: int

    @property
    def base(self) -> int:
        return max(self.fit.base, self.minimum)

    def plans(self) -> list["_Plan"]:
        """What is left to choose after dropping 0, 1, ... L blocks, those of least base importance first."""
        base_value = self.ranked[:, : self.base].sum(dim=1)
        order = base_value.argsort(stable=True)
        extras = self.ranked[:, self.base :].flatten()
        by_value = extras.argsort(descending=True, stable=True)
        owner = by_value // max(self.ranked.shape[1] - self.base, 1)
        plans = []
        for dropped in range(1 if self.minimum > 0 else len(order) + 1):
            kept = torch.ones(len(order), dtype=torch.bool)
            kept[order[:dropped]] = False
            still = kept[owner]
            worth = torch.cat([extras.new_zeros(1), extras[by_value[still]].cumsum(0)])
            cost = int(kept.sum()) * self.fit.ms(self.base)
            plans.append(_Plan(kept, cost, base_value[kept].sum() + worth, owner[still]))
        return plans

    def counts(self, plan: "_Plan", extras: int) -> list[int]:
        """Units kept in each layer."""
        extra = torch.bincount(plan.owner[:extras], minlength=len(plan.kept))
        return (plan.kept * self.base + extra).tolist()


@dataclass(frozen=True)
class _Plan:
    """One number of dropped blocks. kept: (L,); cost: of the kept bases; worth: importance with 0, 1, ... extras."""

    kept: Tensor
    cost: float
    worth: Tensor
    owner: Tensor


class PiecewiseSearch:
    """The search over dropped blocks and extras; the rankings are made once, `within` may be asked many budgets.

    head_ranked: (L, H), filter_ranked: (L, N), importances in descending order in each layer. min_heads, min_filters:
    kept in every layer (a block with a minimum is never dropped).
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
        self.heads = _Kind(head_ranked, head_fit, min_heads)
        self.filters = _Kind(filter_ranked, filter_fit, min_filters)
        self._head_plans, self._filter_plans = self.heads.plans(), self.filters.plans()

    def within(self, budget: float) -> tuple[list[int], list[int]] | None:
        """Heads and filters to keep in each layer, of the greatest importance within `budget` ms, or None."""
        head_ms, filter_ms = self.heads.fit.slope_ms, self.filters.fit.slope_ms
        best = None
        for heads in self._head_plans:
            for filters in self._filter_plans:
                rest = budget - heads.cost - filters.cost
                if rest < 0:
                    continue
                n_heads = torch.arange(len(heads.worth))
                left = rest - n_heads * head_ms
                n_heads, left = n_heads[left >= 0], left[left >= 0]
                most = len(filters.worth) - 1
                fitting = (left / filter_ms).floor().clamp(max=most) if filter_ms > 0 else torch.full_like(left, most)
                worth = heads.worth[n_heads] + filters.worth[fitting.long()]
                at = int(worth.argmax())
                if best is None or float(worth[at]) > best[0]:
                    best = float(worth[at]), heads, int(n_heads[at]), filters, int(fitting[at])
        if best is None:
            return None
        _, heads, n_heads, filters, n_filters = best
        return self.heads.counts(heads, n_heads), self.filters.counts(filters, n_filters)
