"""How long to train each stage, and what that saves (Shen et al. 2022).

1. Train the small model to S_pre, where its slope passes a threshold (effnn.staged.slope).
2. Grow it. It continues as a target model of S_target = S_pre / rho steps, which has the same loss.
3. Stop at S_opt, where the target's slope passes another threshold.

Against scratch this saves (N S_target - n S_pre) of N S_opt, n and N being the parameters. `authors_projection` and
`project` read that off two curves trained from scratch, so both assume that growth keeps loss and dynamics;
`best_projection` tries every S_pre; `best_schedules` does it for any growth path with a fitted loss law. The batch size
is the same throughout.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from effnn.base import InvalidInput
from effnn.staged.curves import KAPLAN, Curve, LossLaw
from effnn.staged.slope import TAU_OPT, authors_crossing, without_spikes

RHOS = {"depth": 1.412, "width": 1.776, "depth+width": 2.455}
"""The authors' S_pre / S_target for growing twofold, from their curves."""

PATHS = ("2D", "2W", "2D2W", "4D", "4W", "2D->2D", "2W->2W", "2D->2W", "2W->2D")
"""Growth paths: 2D doubles the depth (N x 2), 2W the width (N x 4), 2D2W both at once; -> begins a further stage."""


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

    Needs their logs in full, an evaluation every 50 steps: see effnn.staged.slope for why it is another rule on a
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


@dataclass(frozen=True)
class Stage:
    """One stage. first, last: steps of a from-scratch model of this size at its start and end; loss: at its end."""

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
class Schedule:
    """A growth path with its best switch points, to the same loss as `scratch_flops` buys the target from scratch.

    continued_flops: what the smallest model alone would need for that loss, infinite where it never gets there; a
    saving means little where this is less than `flops`. FLOPs are 6 N a token.
    """

    path: str
    stages: tuple[Stage, ...]
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


def best_schedules(
    law: LossLaw,
    layers: int,
    width: int,
    loss: float,
    paths: Sequence[str] | None = None,
    earliest: float = 1.0,
    tokens_per_step: float = 512 * 1024,
) -> tuple[Schedule, ...]:
    """Return the cheapest schedule of each path to a target of `layers` and `width` with `loss`, cheapest path first.

    Every stage enters the law's curve of its own N at the step with equal loss. At equal loss the costs of the switches
    add up, -n_i+1 S(n_i+1, L_i) + n_i S(n_i, L_i), so each is found alone, by a grid over log S and golden section. No
    growth before step `earliest`, where the law need not hold (give the warm-up's end), and none beyond `loss`: a last
    stage without steps says that growing does not pay. A middle stage without steps is left out.

    paths: any like those in `PATHS` (the default: those of them that divide the target). Raises InvalidInput for an
    unknown path, one that does not divide the target, and a loss that the target cannot reach, or only before
    `earliest`.
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
    found = [_schedule(law, path, shapes, loss, earliest, tokens_per_step) for path, shapes in sizes.items()]
    return tuple(sorted(found, key=lambda schedule: schedule.flops))


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


def _schedule(
    law: LossLaw, path: str, shapes: list[tuple[int, int]], loss: float, earliest: float, tokens: float
) -> Schedule:
    n = [12 * layers * width**2 for layers, width in shapes]
    scratch, continued = (6 * size * tokens * law.step(size, loss) for size in (n[-1], n[0]))
    switches = _switches(law, n, loss, earliest)
    while (rising := next((i for i in range(len(switches) - 1) if switches[i] < switches[i + 1]), None)) is not None:
        # stage i + 1 would be left before it is entered: without it the cost is less
        shapes, n = ([*items[: rising + 1], *items[rising + 2 :]] for items in (shapes, n))
        switches = _switches(law, n, loss, earliest)
    stages = []
    for i, (layers, width) in enumerate(shapes):
        first = law.step(n[i], switches[i - 1]) if i else 0.0
        until = switches[i] if i < len(switches) else loss
        last = law.step(n[i], until)
        stages.append(Stage(layers, width, first, last, until, 6 * n[i] * tokens * (last - first)))
    return Schedule(path, tuple(stages), scratch, continued)


def _switches(law: LossLaw, n: list[int], loss: float, earliest: float) -> list[float]:
    """Loss at which to grow from each size to the next."""
    losses = []
    for small, large in zip(n, n[1:], strict=False):
        # a small model may never reach the final loss; it is then left long before 10^4 x the target's steps
        low, high = math.log(earliest), math.log(min(law.step(small, loss), 1e4 * law.step(n[-1], loss)))

        def cost(log_step: float, small: int = small, large: int = large) -> float:
            step = math.exp(log_step)
            return small * step - large * law.step(large, law.loss(small, step))

        losses.append(law.loss(small, math.exp(_minimum(cost, low, max(low, high)))))
    return losses


def _minimum(cost: Callable[[float], float], low: float, high: float, grid: int = 64) -> float:
    """Where `cost` is least between low and high: the best of a grid, then golden section around it."""
    points = [low + (high - low) * i / grid for i in range(grid + 1)]
    best = min(range(grid + 1), key=lambda i: cost(points[i]))
    low, high = points[max(best - 1, 0)], points[min(best + 1, grid)]
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-9:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if cost(left) < cost(right) else (left, high)
    middle = (low + high) / 2
    return min((points[best], middle), key=cost)
