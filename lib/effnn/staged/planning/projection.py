"""How long to train each stage, and what that saves (Shen et al. 2022).

1. Train the small model to S_pre, where its slope passes a threshold (effnn.staged.planning.slope).
2. Grow it. It continues as a target model of S_target = S_pre / rho steps, which has the same loss.
3. Stop at S_opt, where the target's slope passes another threshold.

Compared with training from scratch this saves (N S_target - n S_pre) of N S_opt, where n and N are the parameters of
the small model and of the target. `authors_projection` and `project` read that off two curves of models from scratch,
so both assume that growth keeps loss and dynamics; `best_projection` tries every S_pre. The batch size is the same
throughout. For several growths see growth_plans.py.
"""

import math
from dataclasses import dataclass

from effnn.base import InvalidInput
from effnn.staged.planning.curves import Curve
from effnn.staged.planning.loss_law import KAPLAN
from effnn.staged.planning.slope import TAU_OPT, authors_crossing, without_spikes

RHOS = {"depth": 1.412, "width": 1.776, "depth+width": 2.455}
"""The authors' S_pre / S_target for growing twofold, from their curves."""


def growth_rho(size_ratio: float, b: float = KAPLAN.b) -> float:
    """S_pre / S_target at the cheapest growth point, where both models gain the same from a FLOP: r^(1 / (1 + b)).

    Under L = (Nc/N)^a + (K/S)^b this holds for every N and loss: 1.48, 2.20, 3.26 for r = 2, 4, 8. Raises InvalidInput
    for size_ratio <= 1.
    """
    if not size_ratio > 1:
        raise InvalidInput(f"growing needs a size ratio above 1, got {size_ratio}; depth x2 is 2, width x2 is 4")
    return size_ratio ** (1 / (1 + b))


def target_step(pre: float, rho: float) -> float:
    """S_target, the position of a model grown after `pre` steps in the target's schedule. InvalidInput for rho <= 1."""
    if not rho > 1 or not pre > 0:
        raise InvalidInput(
            f"expected S_pre > 0 and rho > 1, got {pre} and {rho}: a larger model needs fewer steps to the same loss"
        )
    return pre / rho


@dataclass(frozen=True)
class Projection:
    """The projection of one growth.

    size_ratio: parameters of the target over those of the small model.
    pre: S_pre, steps of the small model before growth.
    target: S_target, the step at which the target from scratch has the same loss.
    opt: S_opt, the step of the target at which training stops.
    loss: at growth, nats per token.
    """

    size_ratio: float
    pre: float
    target: float
    opt: float
    loss: float

    @property
    def rho(self) -> float:
        """S_pre / S_target."""
        return self.pre / self.target

    @property
    def saving(self) -> float:
        """Share of the compute of training the target to S_opt from scratch, non-embedding convention."""
        return (self.target - self.pre / self.size_ratio) / self.opt


def authors_projection(
    small: Curve, target: Curve, size_ratio: float, tau_growth: float, tau_opt: float = TAU_OPT
) -> Projection:
    """The authors' rule on two curves over steps: their slope estimator; S_target is the evaluation nearest in loss.

    small, target: curves over steps with an evaluation every 50 steps; on thinned curves the rule gives other results
    (slope.py).
    size_ratio: parameters of the target over those of the small model.
    tau_growth, tau_opt: thresholds of the slope for growing and for stopping.

    Raises InvalidInput where a threshold is never reached.
    """
    _check_ratio(size_ratio)
    grow = authors_crossing(small.x, small.losses, tau_growth)
    stop = authors_crossing(target.x, target.losses, tau_opt)
    loss = float(small.losses[grow])
    kept = without_spikes(target.losses)
    nearest = kept[int((target.losses[kept] - loss).abs().argmin())]
    return Projection(size_ratio, float(small.x[grow]), float(target.x[nearest]), float(target.x[stop]), loss)


def project(small: Curve, target: Curve, size_ratio: float, pre: float, opt: float) -> Projection:
    """The projection for given S_pre and S_opt; S_target is interpolated.

    small, target: curves over steps. With the authors' curves thinned to 50 or 70 evaluations S_target is off by at
    most 50 steps, rho by 1.2 percent and the saving by 0.7 percentage points.
    size_ratio: parameters of the target over those of the small model.
    pre, opt: S_pre and S_opt.

    Raises InvalidInput for steps outside the curves, and if the target never has the small model's loss.
    """
    _check_ratio(size_ratio)
    target.loss_at(opt)
    loss = small.loss_at(pre)
    return Projection(size_ratio, pre, target.x_at(loss), opt, loss)


@dataclass(frozen=True)
class BestProjection:
    """The best growth point, and the first and last S_pre whose saving is within `margin` (0.01: one point) of it."""

    best: Projection
    first: float
    last: float
    margin: float


def best_projection(
    small: Curve, target: Curve, size_ratio: float, opt: float, step: float = 50, margin: float = 0.01
) -> BestProjection:
    """The best S_pre, tried every `step` steps wherever the target has the small model's loss before S_opt.

    small, target, size_ratio, opt: as in `project`.
    step: between the S_pre that are tried.
    margin: of `BestProjection`.

    Raises InvalidInput if the target never has a loss of the small model before S_opt.
    """
    _check_ratio(size_ratio)
    first, last = float(small.x[0]), float(small.x[-1])
    lowest, highest = target.loss_at(opt), math.exp(float(target.log_loss[0]))
    candidates = [first + i * step for i in range(int((last - first) / step) + 1)]
    tried = [project(small, target, size_ratio, s, opt) for s in candidates if lowest <= small.loss_at(s) <= highest]
    if not tried:
        raise InvalidInput(f"the small model has none of the target's losses up to step {opt:g}: train it longer")
    best = max(tried, key=lambda projection: projection.saving)
    near = [projection.pre for projection in tried if projection.saving >= best.saving - margin]
    return BestProjection(best, near[0], near[-1], margin)


def _check_ratio(size_ratio: float) -> None:
    if not size_ratio > 1:
        raise InvalidInput(f"the target must have more parameters than the small model; got a ratio of {size_ratio}")
