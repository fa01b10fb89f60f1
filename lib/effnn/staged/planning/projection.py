"""How long to train each stage, and what that saves (Shen et al. 2022).

1. Train the small model to S_pre, where its slope passes a threshold (effnn.staged.planning.slope).
2. Grow it. It continues as a target model of S_target = S_pre / rho steps, which has the same loss.
3. Stop at S_opt, where the target's slope passes another threshold.

Against scratch this saves (N S_target - n S_pre) of N S_opt, n and N being the parameters. `authors_projection` and
`project` read that off two curves trained from scratch, so both assume that growth keeps loss and dynamics;
`best_projection` tries every S_pre. The batch size is the same throughout. Paths of several growths: paths.py.
"""

import math
from dataclasses import dataclass

from effnn.base import InvalidInput
from effnn.staged.planning.curves import KAPLAN, Curve
from effnn.staged.planning.slope import TAU_OPT, authors_crossing, without_spikes

RHOS = {"depth": 1.412, "width": 1.776, "depth+width": 2.455}
"""The authors' S_pre / S_target for growing twofold, from their curves."""


def growth_rho(size_ratio: float, b: float = KAPLAN.b) -> float:
    """S_pre / S_target at the cheapest growth point: r^(1 / (1 + b)), where both models gain the same from a FLOP.

    Follows from L = (Nc/N)^a + (K/S)^b for every N and loss: 1.48, 2.20, 3.26 for r = 2, 4, 8. Raises InvalidInput for
    size_ratio <= 1.
    """
    if not size_ratio > 1:
        raise InvalidInput(f"growing needs a size ratio above 1, got {size_ratio}; depth x2 is 2, width x2 is 4")
    return size_ratio ** (1 / (1 + b))


def target_step(pre: float, rho: float) -> float:
    """S_target, where a model grown after `pre` steps stands in the target's schedule. InvalidInput for rho <= 1."""
    if not rho > 1 or not pre > 0:
        raise InvalidInput(
            f"expected S_pre > 0 and rho > 1, got {pre} and {rho}: a larger model needs fewer steps to the same loss"
        )
    return pre / rho


@dataclass(frozen=True)
class Projection:
    """Growing `size_ratio`-fold in parameters at step `pre` (S_pre). target: S_target; opt: S_opt; loss: at growth."""

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
    """The authors' own rule on two curves over steps: their slope estimator, S_target the evaluation nearest in loss.

    Needs their logs in full, an evaluation every 50 steps: see slope.py for why it is another rule on a
    thinned curve. Raises InvalidInput where a threshold is never reached.
    """
    _check_ratio(size_ratio)
    grow = authors_crossing(small.x, small.losses, tau_growth)
    stop = authors_crossing(target.x, target.losses, tau_opt)
    loss = float(small.losses[grow])
    kept = without_spikes(target.losses)
    nearest = kept[int((target.losses[kept] - loss).abs().argmin())]
    return Projection(size_ratio, float(small.x[grow]), float(target.x[nearest]), float(target.x[stop]), loss)


def project(small: Curve, target: Curve, size_ratio: float, pre: float, opt: float) -> Projection:
    """Projection for a growth point S_pre and an end S_opt that are given; S_target is interpolated.

    small, target: curves over steps. On the authors' curves thinned to 50 or 70 evaluations S_target is right to 50
    steps, rho to 1.2 percent and the saving to 0.7 points. Raises InvalidInput for steps outside the curves, and where
    the target never has the small model's loss.
    """
    _check_ratio(size_ratio)
    target.loss_at(opt)
    loss = small.loss_at(pre)
    return Projection(size_ratio, pre, target.x_at(loss), opt, loss)


@dataclass(frozen=True)
class BestProjection:
    """The best growth point, and the first and last that are within `margin` (a share, 0.01: one point) of it."""

    best: Projection
    first: float
    last: float
    margin: float


def best_projection(
    small: Curve, target: Curve, size_ratio: float, opt: float, step: float = 50, margin: float = 0.01
) -> BestProjection:
    """Try S_pre every `step` steps wherever the target has the small model's loss before S_opt; see `BestProjection`.

    Raises InvalidInput where there is no such S_pre.
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
