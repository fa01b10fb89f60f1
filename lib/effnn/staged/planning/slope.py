"""When to grow and when to stop: the slope d log(loss) / d log(compute) of a validation curve (Shen et al. 2022).

The rule: leave a stage at the first evaluation after the steepest point at which the slope is above a threshold tau.
There are two estimators of the slope, and each has thresholds of its own:

- `local_slope` fits a straight line to all evaluations in a window, which averages the noise. Its thresholds
  `growth_tau` and `stopping_tau` follow from the loss law alone.
- `authors_crossing` takes differences of a 5-point mean, to reproduce the authors' numbers. On a curve with 50 steps
  between evaluations its noise is as large as tau, so noise makes it cross early, where the true slope is about -0.08.
  On thinned curves, whose differences have little noise, it crosses far too late, and so does `local_slope` with the
  authors' thresholds `TAUS`.

At a constant batch compute is proportional to steps, so a curve over steps has the same slopes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from effnn.base import InvalidInput
from effnn.staged.planning.curves import checked_curve
from effnn.staged.planning.loss_law import KAPLAN

TAUS = {"depth": -0.0575, "width": -0.0475, "depth+width": -0.03}
"""The authors' thresholds for growing twofold (in depth, in width, in both), for `authors_crossing`."""
TAU_OPT = -0.052
"""The authors' threshold for stopping. It is `stopping_tau` with compute counted at the critical batch, which grows as
the loss falls: s / (1 - s / 0.21) for s = -0.069 (Kaplan et al. 2020, alpha_B = 0.21)."""
WINDOW = 0.2
"""Decades of compute that `local_slope` fits over; it must be 0.1 or more."""
HITS = 3
"""Evaluations in a row that must be above tau."""

Values = Sequence[float] | Tensor


def growth_tau(size_ratio: float, a: float = KAPLAN.a, b: float = KAPLAN.b) -> float:
    """Slope of the small model where growing `size_ratio`-fold in parameters costs the least, at a constant batch.

    There both models gain the same from a FLOP at equal loss. Under L = (Nc/N)^a + (K/S)^b the constants N, Nc and K
    cancel: tau = -b q / (1 + q) with q = (1 - r^-a) / (rho^b - 1) and rho = r^(1 / (1 + b)). With Kaplan's exponents
    this is -0.097, -0.083 and -0.069 for r = 2 (depth), 4 (width) and 8 (both). Raises InvalidInput for
    size_ratio <= 1.
    """
    if not size_ratio > 1:
        raise InvalidInput(f"growing needs a size ratio above 1, got {size_ratio}; depth x2 is 2, width x2 is 4")
    q = (1 - size_ratio**-a) / (size_ratio ** (b / (1 + b)) - 1)
    return -b * q / (1 + q)


def stopping_tau(a: float = KAPLAN.a, b: float = KAPLAN.b) -> float:
    """Slope beyond which a larger model reaches the same loss with less compute, at a constant batch: -ab / (a + b)."""
    return -a * b / (a + b)


def local_slope(compute: Values, losses: Values, window: float = WINDOW, points: int = 5) -> Tensor:
    """Slope of log(loss) against log(compute) at every evaluation, (n,) float64.

    The slope at evaluation i is that of a least-squares line over the evaluations i - j to i + j. j is the smallest
    that covers at least `points` evaluations and `window` decades; near the ends of the curve there is no such j, and
    the slope is NaN. During a run the last known slope is therefore half a window old. Raises InvalidInput for a curve
    shorter than `points`, or not increasing in compute.
    """
    if not window >= 0.1 or points < 3:
        raise InvalidInput(f"expected a window of 0.1 decades or more over 3 or more points; got {window}, {points}")
    compute, losses = checked_curve(compute, losses, least=points)
    x, y = compute.log10(), losses.log10()
    x, y = x - x.mean(), y - y.mean()
    sums = [torch.cat([v.new_zeros(1), v.cumsum(0)]) for v in (x, y, x * x, x * y)]
    n = len(x)
    slope = torch.full_like(x, torch.nan)
    for j in range(points // 2, (n - 1) // 2 + 1):
        i = torch.arange(j, n - j)
        i = i[slope[i].isnan() & (x[i + j] - x[i - j] >= window - 1e-9)]
        sx, sy, sxx, sxy = (total[i + j + 1] - total[i - j] for total in sums)
        count = 2 * j + 1
        slope[i] = (count * sxy - sx * sy) / (count * sxx - sx * sx)
    return slope


def find_crossing(
    compute: Values, losses: Values, tau: float, window: float = WINDOW, hits: int = HITS, points: int = 5
) -> int | None:
    """Index of the first evaluation after the steepest at which the slope has been above tau `hits` times in a row.

    None if there is none yet: call it after each evaluation to decide during training. Spikes are left out first
    (`without_spikes`).

    compute, losses: the curve.
    tau: threshold of the slope, below 0.
    window, points: of `local_slope`.
    hits: evaluations in a row that must be above tau.

    Raises InvalidInput for a tau that is not below 0, and for a curve that does not increase in compute.
    """
    kept, slope = _cleaned_slope(compute, losses, tau, window, hits, points)
    return _first_run(kept, slope, tau, hits)


def crossing(
    compute: Values, losses: Values, tau: float, window: float = WINDOW, hits: int = HITS, points: int = 5
) -> int:
    """As `find_crossing`, but InvalidInput, with the slopes of the curve, where there is no crossing."""
    kept, slope = _cleaned_slope(compute, losses, tau, window, hits, points)
    index = _first_run(kept, slope, tau, hits)
    if index is None:
        raise _never(tau, slope)
    return index


def _cleaned_slope(
    compute: Values, losses: Values, tau: float, window: float, hits: int, points: int
) -> tuple[list[int], Tensor]:
    _check_tau(tau)
    if hits < 1:
        raise InvalidInput(f"expected 1 or more evaluations above tau in a row; got {hits}")
    compute, losses = checked_curve(compute, losses, least=1)
    kept = without_spikes(losses)
    if len(kept) < points:
        return kept, losses.new_full((len(kept),), torch.nan)
    return kept, local_slope(compute[kept], losses[kept], window, points)


def _first_run(kept: list[int], slope: Tensor, tau: float, hits: int) -> int | None:
    steepest = int(slope.nan_to_num(nan=torch.inf).argmin())
    run = 0
    for index, value in enumerate(slope[steepest:].tolist(), steepest):
        run = run + 1 if value > tau else 0
        if run == hits:
            return kept[index]
    return None


def authors_crossing(compute: Values, losses: Values, tau: float) -> int:
    """Index of the authors' growth point, with their own estimator (their notebook remove_oracle).

    Evaluations more than 1 % above the last one kept are dropped. log10(loss) is smoothed by a 5-point mean, with
    mirrored ends, and differenced; the crossing is the first difference above tau after the smallest one. Unlike
    theirs, a tau that is never reached raises InvalidInput instead of giving the last evaluation.
    """
    _check_tau(tau)
    compute, losses = checked_curve(compute, losses, least=6)
    kept = without_spikes(losses)
    if len(kept) < 6:
        raise InvalidInput(f"only {len(kept)} of {len(losses)} evaluations are left without spikes; 6 are needed")
    log_loss = losses[kept].log10()
    ended = torch.cat([log_loss[:2].flip(0), log_loss, log_loss[-2:].flip(0)])
    slope = ended.unfold(0, 5, 1).mean(1).diff() / compute[kept].log10().diff()
    steepest = int(slope.argmin())
    above = (slope[steepest:] > tau).nonzero()
    if len(above) == 0:
        raise _never(tau, slope)
    return kept[steepest + int(above[0])]


def without_spikes(losses: Values, tolerance: float = 0.01) -> list[int]:
    """Indices that are left when each loss more than `tolerance` above the last one kept is dropped."""
    kept: list[int] = []
    last = float("inf")
    for index, loss in enumerate(torch.as_tensor(losses).tolist()):
        if loss <= last * (1 + tolerance):
            kept.append(index)
            last = loss
    return kept


def _check_tau(tau: float) -> None:
    if not tau < 0:
        raise InvalidInput(f"tau is the slope of a falling loss, below 0; got {tau}")


def _never(tau: float, slope: Tensor) -> InvalidInput:
    known = slope[~slope.isnan()]
    if len(known) == 0:
        return InvalidInput("the curve is shorter than one window of the slope: train longer, or evaluate more often")
    return InvalidInput(
        f"after its steepest point, {float(known.min()):.4f}, the slope does not stay above tau = {tau:.4f}; it ends "
        f"at {float(known[-1]):.4f}: train longer, or use a lower tau"
    )
