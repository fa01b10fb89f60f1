"""The multiple-choice knapsack: pick one option of every group, for the greatest total value within a budget.

The mask search under a latency budget is this problem: a group is one layer's heads or filters, an option is how many
of them to keep, its value the importance kept and its cost a latency read from a table. Three steps, as in Pisinger
(1995): a Lagrange multiplier gives a first solution and an upper bound; options that cannot beat the first solution
are dropped; dynamic programming over the undominated (cost, value) states decides among the rest. Costs are never
rounded, so a solution that meets the budget to the last bit is found. Nothing here knows about transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effnn.base import InvalidInput

MAX_STATES = 2048
"""States kept after each group; beyond these a cost bin keeps its most valuable member only."""

MAX_OPTIONS = 512
"""Options of one group; beyond these likewise."""


@dataclass(frozen=True)
class Choice:
    """A solution.

    picks: chosen option of each group.
    value: of all picks together.
    cost: of all picks together.
    bound: no solution is worth more than this.
    exact: nothing was binned, so no solution is better than this one. If False, the value is at least the optimum of a
        budget smaller by one bin per group: 1/2048 of the budget, or 1/512 of a group's costs, whichever applies.
    """

    picks: list[int]
    value: float
    cost: float
    bound: float
    exact: bool


def best_choice(costs: Sequence[Tensor], values: Sequence[Tensor], budget: float) -> Choice:
    """The picks of greatest value whose costs add up to at most `budget`.

    costs, values: one float64 tensor of equal length for each group, in any order; costs >= 0. Raises InvalidInput if
    the cheapest picks exceed the budget.
    """
    options = [_undominated(cost, value) for cost, value in zip(costs, values, strict=True)]
    cost = _stack([c[index] for c, index in zip(costs, options, strict=True)], fill=0.0)
    value = _stack([v[index] for v, index in zip(values, options, strict=True)], fill=-torch.inf)
    if float(cost[:, 0].sum()) > budget:
        raise InvalidInput(
            f"the cheapest picks cost {float(cost[:, 0].sum()):.6g}, more than the budget of {budget:.6g}"
        )
    # 1. the multiplier: the price of one unit of cost at which the best picks just fit
    price, picks = _multiplier(cost, value, budget)
    picks = _fill(picks, cost, value, budget)
    best = float(_at(value, picks).sum())
    # 2. the upper bound, and what it rules out: an option that loses `slack` or more against the best of its group
    reduced = value - price * cost
    top = reduced.max(dim=1).values
    bound = max(float(top.sum()) + price * budget, best)
    slack = bound - best
    improved, exact = None, True
    if slack > 1e-12 * max(abs(bound), 1e-300):
        improved, exact = _states(cost, value, (top.unsqueeze(1) - reduced) < slack, price, top, slack, budget)
    if improved is not None:
        improved = _fill(improved, cost, value, budget)
        picks = max(picks, improved, key=lambda chosen: float(_at(value, chosen).sum()))
    picked = [int(index[pick]) for index, pick in zip(options, picks.tolist(), strict=True)]
    return Choice(picked, float(_at(value, picks).sum()), float(_at(cost, picks).sum()), bound, exact)


def _undominated(cost: Tensor, value: Tensor) -> Tensor:
    """Indices, dearer and dearer, of the options that are worth more than every option of the same or a lower cost.

    Of options equal in cost and value the last stays.
    """
    backwards = torch.arange(len(cost) - 1, -1, -1)
    order = backwards[value[backwards].argsort(descending=True, stable=True)]
    order = order[cost[order].argsort(stable=True)]
    return order[_rises(value[order])]


def _rises(value: Tensor) -> Tensor:
    """Where a sequence exceeds all that came before."""
    highest = value.cummax(dim=0).values
    before = torch.cat([highest.new_full((1,), -torch.inf), highest[:-1]])
    return value > before


def _stack(rows: list[Tensor], fill: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def _at(table: Tensor, picks: Tensor) -> Tensor:
    return table.gather(1, picks.unsqueeze(1)).squeeze(1)


def _multiplier(cost: Tensor, value: Tensor, budget: float) -> tuple[float, Tensor]:
    """The lowest price found at which each group's best option, taken alone, fits the budget; and those options."""

    def best_at(price: float) -> Tensor:
        return (value - price * cost).argmax(dim=1)

    def fits(picks: Tensor) -> bool:
        return float(_at(cost, picks).sum()) <= budget

    picks = best_at(0.0)
    if fits(picks):
        return 0.0, picks
    spread = value.max(dim=1).values - value[:, 0]
    low, high = 0.0, max(float(spread.sum() / cost.max()), 1e-300)
    cheapest = torch.zeros(len(cost), dtype=torch.long)
    for _ in range(200):
        picks = best_at(high)
        if fits(picks):
            break
        low, high = high, 2 * high
    else:
        return high, cheapest
    for _ in range(60):
        middle = (low + high) / 2
        trial = best_at(middle)
        if fits(trial):
            high, picks = middle, trial
        else:
            low = middle
    return high, picks


def _fill(picks: Tensor, cost: Tensor, value: Tensor, budget: float) -> Tensor:
    """Spend what is left of the budget: move single groups to a better option, greatest gain first."""
    picks = picks.clone()
    while True:
        left = budget - _at(cost, picks).sum()
        gain = value - _at(value, picks).unsqueeze(1)
        extra = cost - _at(cost, picks).unsqueeze(1)
        gain = torch.where((extra <= left) & (gain > 0), gain, -torch.inf)
        group, option = divmod(int(gain.argmax()), gain.shape[1])
        if gain[group, option] == -torch.inf:
            return picks
        picks[group] = option


def _states(
    cost: Tensor, value: Tensor, keep: Tensor, price: float, top: Tensor, slack: float, budget: float
) -> tuple[Tensor | None, bool]:
    """Dynamic programming over the kept options: picks losing less than `slack`, or None; and whether it is exact."""
    exact = True
    cheapest = cost[:, 0].sum()
    cost_so_far, value_so_far = cost.new_zeros(1), cost.new_zeros(1)
    reduced_top = cost.new_zeros(())
    trail: list[tuple[Tensor, Tensor]] = []
    for group in range(len(cost)):
        options = (keep[group] & value[group].isfinite()).nonzero().flatten()
        if len(options) > MAX_OPTIONS:
            options, exact = options[_one_per_bin(cost[group, options], MAX_OPTIONS)], False
        cheapest = cheapest - cost[group, 0]  # of the groups still to come
        reduced_top = reduced_top + top[group]
        new_cost = (cost_so_far.unsqueeze(1) + cost[group, options]).flatten()
        new_value = (value_so_far.unsqueeze(1) + value[group, options]).flatten()
        alive = (new_cost + cheapest <= budget) & (reduced_top - (new_value - price * new_cost) < slack)
        index = alive.nonzero().flatten()
        if len(index) == 0:
            return None, exact
        index = index[_undominated(new_cost[index], new_value[index])]
        if len(index) > MAX_STATES:
            index, exact = index[_one_per_bin(new_cost[index], MAX_STATES)], False
        cost_so_far, value_so_far = new_cost[index], new_value[index]
        trail.append((index // len(options), options[index % len(options)]))
    state = len(value_so_far) - 1  # values rise with costs, so the last is the best
    picks = []
    for parents, options in reversed(trail):
        picks.append(int(options[state]))
        state = int(parents[state])
    return torch.tensor(picks[::-1]), exact


def _one_per_bin(cost: Tensor, bins: int) -> Tensor:
    """The last, dearest and most valuable, member of each of `bins` equal cost ranges; `cost` ascends."""
    width = (cost[-1] - cost[0]) / bins
    bin_of = ((cost - cost[0]) / width).floor()
    last = torch.ones(len(cost), dtype=torch.bool)
    last[:-1] = bin_of[1:] != bin_of[:-1]
    return last.nonzero().flatten()
