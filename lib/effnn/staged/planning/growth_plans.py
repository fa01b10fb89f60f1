"""The cheapest growth plan of every growth path under a fitted loss law (Shen et al. 2022, the general optimizer).

A path is the sequence of growths that makes the target of a small model; a plan adds when each of them happens. The
plan of a path is the one that costs the least for a given final loss, with all stages at one batch size. A real run
may differ from the law: see projection.py for projections from measured curves.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from effnn.base import InvalidInput
from effnn.staged.planning.loss_law import LossLaw

PATHS = ("2D", "2W", "2D2W", "4D", "4W", "2D->2D", "2W->2W", "2D->2W", "2W->2D")
"""Growth paths: 2D doubles the depth (N x 2), 2W the width (N x 4), 2D2W both at once; -> begins a further stage."""


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a plan.

    layers, width: of the model.
    first, last: steps after which a model of this size from scratch has the losses at the start and the end of the
    stage.
    loss: at the end of the stage.
    flops: of the stage, 6 N per token.
    """

    layers: int
    width: int
    first: float
    last: float
    loss: float
    flops: float

    @property
    def steps(self) -> float:
        """Optimizer steps done in this stage."""
        return self.last - self.first


@dataclass(frozen=True)
class GrowthPlan:
    """The cheapest plan of a growth path to a given loss of the target. FLOPs are 6 N per token.

    scratch_flops: what the target needs from scratch for that loss.
    continued_flops: what the smallest model needs for it without growth, infinite if it never has that loss. Where this
    is less than `flops`, growing does not pay.
    """

    path: str
    stages: tuple[PlannedStage, ...]
    scratch_flops: float
    continued_flops: float

    @property
    def flops(self) -> float:
        """FLOPs of all stages."""
        return sum(stage.flops for stage in self.stages)

    @property
    def saving(self) -> float:
        """Share of the compute of training the target from scratch."""
        return 1 - self.flops / self.scratch_flops


def best_plans(
    law: LossLaw,
    layers: int,
    width: int,
    loss: float,
    paths: Sequence[str] | None = None,
    earliest: float = 1.0,
    tokens_per_step: float = 512 * 1024,
) -> tuple[GrowthPlan, ...]:
    """The cheapest plan of each path to the target with `loss`, cheapest plan first.

    Every stage enters the law's curve of its own size at the step of equal loss. The cost of a plan is then a sum over
    its growths, n_i S(n_i, L_i) - n_(i+1) S(n_(i+1), L_i), so each L_i is found alone. A last stage without steps says
    that growing does not pay; a middle stage without steps is left out.

    law: fitted, or `KAPLAN`.
    layers, width: of the target.
    loss: of the target at the end, nats per token.
    paths: any like those in `PATHS`; by default those of them that divide the target.
    earliest: no growth before this step, where the law need not hold: the end of the warm-up.
    tokens_per_step: of the batch.

    Raises InvalidInput for an unknown path, one that does not divide the target, and a loss that the target cannot
    reach, or only before `earliest`.
    """
    n_target = 12 * layers * width**2
    end = law.step(n_target, loss)
    if not earliest < end < math.inf:
        raise InvalidInput(
            f"a target of {layers} layers of width {width} has a loss from {law.loss(n_target, earliest):.4f} at step "
            f"{earliest:g} down to {law.floor(n_target):.4f}; {loss:.4f} is not within"
        )
    chosen = PATHS if paths is None else tuple(paths)
    sizes = {path: _sizes(path, layers, width) for path in chosen}
    if paths is None:
        sizes = {path: shapes for path, shapes in sizes.items() if shapes is not None}
    wrong = [path for path, shapes in sizes.items() if shapes is None]
    if wrong:
        raise InvalidInput(f"{layers} layers of width {width} cannot be divided as {', '.join(wrong)} says")
    found = [_cheapest(law, path, shapes, loss, earliest, tokens_per_step) for path, shapes in sizes.items()]
    return tuple(sorted(found, key=lambda plan: plan.flops))


def _sizes(path: str, layers: int, width: int) -> list[tuple[int, int]] | None:
    """(layers, width) of all stages from the smallest to the target; None where they are not whole numbers."""
    shapes = [(layers, width)]
    for growth in reversed(path.split("->")):
        if not re.fullmatch(r"([2-9]\d*|1\d+)([DW])(([2-9]\d*|1\d+)(?!\2)[DW])?", growth):
            raise InvalidInput(f"unknown growth path {path!r}; expected one like {', '.join(PATHS)}")
        for factor, kind in re.findall(r"(\d+)([DW])", growth):
            at = (int(factor), 1) if kind == "D" else (1, int(factor))
            if layers % at[0] or width % at[1]:
                return None
            layers, width = layers // at[0], width // at[1]
        shapes.append((layers, width))
    return shapes[::-1]


def _cheapest(
    law: LossLaw, path: str, shapes: list[tuple[int, int]], loss: float, earliest: float, tokens: float
) -> GrowthPlan:
    n = [12 * layers * width**2 for layers, width in shapes]
    scratch, continued = (6 * size * tokens * law.step(size, loss) for size in (n[-1], n[0]))
    switches = _switches(law, n, loss, earliest)
    while (rising := next((i for i in range(len(switches) - 1) if switches[i] < switches[i + 1]), None)) is not None:
        # stage rising + 1 would end before it begins: the plan without it costs less
        shapes, n = ([*items[: rising + 1], *items[rising + 2 :]] for items in (shapes, n))
        switches = _switches(law, n, loss, earliest)
    stages = []
    for i, (layers, width) in enumerate(shapes):
        first = law.step(n[i], switches[i - 1]) if i else 0.0
        until = switches[i] if i < len(switches) else loss
        last = law.step(n[i], until)
        stages.append(PlannedStage(layers, width, first, last, until, 6 * n[i] * tokens * (last - first)))
    return GrowthPlan(path, tuple(stages), scratch, continued)


def _switches(law: LossLaw, n: list[int], loss: float, earliest: float) -> list[float]:
    """Loss at which to grow from each size to the next."""
    losses = []
    for small, large in zip(n, n[1:], strict=False):
        # a small model may never reach the final loss; growth then comes long before 10^4 x the target's steps
        low, high = math.log(earliest), math.log(min(law.step(small, loss), 1e4 * law.step(n[-1], loss)))

        def cost(log_step: float, small: int = small, large: int = large) -> float:
            step = math.exp(log_step)
            return small * step - large * law.step(large, law.loss(small, step))

        losses.append(law.loss(small, math.exp(_minimum(cost, low, max(low, high)))))
    return losses


def _minimum(cost: Callable[[float], float], low: float, high: float, grid: int = 64) -> float:
    """Where `cost` is least between low and high: the best of a grid, refined between its neighbours."""
    points = np.linspace(low, high, grid + 1)
    best = min(range(grid + 1), key=lambda i: cost(points[i]))
    around = points[max(best - 1, 0)], points[min(best + 1, grid)]
    refined = minimize_scalar(cost, bounds=around, method="bounded", options={"xatol": 1e-9}).x
    return min((float(points[best]), float(refined)), key=cost)
