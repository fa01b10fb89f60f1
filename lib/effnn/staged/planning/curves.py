"""Validation curves: interpolation, and the law L(N, S) of a family of sizes (Shen et al. 2022; Kaplan et al. 2020).

A measured curve is noisy, so "the step at which the loss is L" is ambiguous. Here it is read off the lower envelope,
the evaluations that were better than all before them: this is monotone, hence invertible, and at most one noise
amplitude too low.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from effnn.base import InvalidInput


def checked_curve(x: Sequence[float] | Tensor, losses: Sequence[float] | Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Return both as float64 CPU tensors.

    Raises InvalidInput unless they are equally long, at least `least` long, finite and positive, and x increases.
    """
    x, losses = (torch.as_tensor(values).detach().to("cpu", torch.float64) for values in (x, losses))
    if x.ndim != 1 or x.shape != losses.shape:
        raise InvalidInput(f"a curve is one loss for each step; got shapes {tuple(x.shape)} and {tuple(losses.shape)}")
    if len(x) < least:
        raise InvalidInput(f"this curve has {len(x)} evaluations, too few; at least {least} are needed: evaluate more")
    if not (x.isfinite() & (x > 0)).all() or not (losses.isfinite() & (losses > 0)).all():
        raise InvalidInput("steps, compute and losses of a curve must be finite and above 0; leave out step 0 and NaN")
    wrong = (x.diff() <= 0).nonzero()
    if len(wrong):
        at = int(wrong[0]) + 1
        raise InvalidInput(f"a curve's compute must increase; evaluation {at} is at {x[at]:g} after {x[at - 1]:g}")
    return x, losses


@dataclass(frozen=True, eq=False)
class Curve:
    """Validation losses (nats a token) of one run, in the order of training.

    x: where each was measured, in steps, tokens or FLOPs, increasing and above 0. A staged run is one curve over its
    accumulated FLOPs. Raises InvalidInput for fewer than two evaluations or a sequence that does not increase.
    """

    x: Sequence[float] | Tensor
    losses: Sequence[float] | Tensor
    log_x: Tensor = field(init=False, repr=False)  # of the envelope, as is the next
    log_loss: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        x, losses = checked_curve(self.x, self.losses, least=2)
        best = losses.cummin(0).values
        kept = torch.cat([torch.ones(1, dtype=torch.bool), best[1:] < best[:-1]])
        values = {"x": x, "losses": losses, "log_x": x[kept].log(), "log_loss": losses[kept].log()}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def loss_at(self, x: float) -> float:
        """Loss of the envelope at x, interpolated in log-log; x outside the measured range raises InvalidInput."""
        first, last = float(self.x[0]), float(self.x[-1])
        if not first <= x <= last:
            raise InvalidInput(f"this curve was measured from {first:g} to {last:g}; nothing is known at {x:g}")
        return math.exp(_interpolate(math.log(x), self.log_x, self.log_loss))

    def x_at(self, loss: float) -> float:
        """Where the envelope reaches `loss`; a loss that it never has raises InvalidInput with those it has."""
        highest, lowest = math.exp(self.log_loss[0]), math.exp(self.log_loss[-1])
        if not lowest * (1 - 1e-12) <= loss <= highest * (1 + 1e-12):
            raise InvalidInput(
                f"this curve's loss goes from {highest:.4f} to {lowest:.4f}, {loss:.4f} is not in it; train it longer, "
                "or compare at a loss that both runs have"
            )
        return math.exp(_interpolate(-math.log(loss), -self.log_loss, self.log_x))


def _interpolate(at: float, x: Tensor, y: Tensor) -> float:
    """Piecewise linear through increasing x, constant outside."""
    right = int(torch.searchsorted(x, at))
    if right == 0 or right == len(x):
        return float(y[min(right, len(x) - 1)])
    share = (at - x[right - 1]) / (x[right] - x[right - 1])
    return float(y[right - 1] + share * (y[right] - y[right - 1]))


@dataclass(frozen=True)
class LossLaw:
    """L(N, S) = (nc / N)^a + (k / S)^b at a constant batch; N: non-embedding parameters, S: steps (Kaplan et al., 1.6).

    `KAPLAN` holds the constants of Kaplan et al. 2020 (table 5) at the critical batch, where k is twice their S_c.
    """

    nc: float
    a: float
    k: float
    b: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) and value > 0 for value in (self.nc, self.a, self.k, self.b)):
            raise InvalidInput(f"the constants of a loss law must be finite and above 0; got {self}")

    def floor(self, parameters: float) -> float:
        """Loss after infinitely many steps."""
        return (self.nc / parameters) ** self.a

    def loss(self, parameters: float, step: float) -> float:
        """Loss after `step` steps (above 0)."""
        return self.floor(parameters) + (self.k / step) ** self.b

    def step(self, parameters: float, loss: float) -> float:
        """Step at which a model trained from scratch has `loss`; infinite where it never gets there."""
        above = loss - self.floor(parameters)
        return self.k * above ** (-1 / self.b) if above > 0 else math.inf


KAPLAN = LossLaw(nc=8.8e13, a=0.076, k=2 * 2.1e3, b=0.76)


@dataclass(frozen=True)
class LawFit:
    """A fitted law. residuals: log(fitted loss / measured loss), one tensor a curve, over the evaluations used."""

    law: LossLaw
    residuals: tuple[Tensor, ...]

    @property
    def rms(self) -> float:
        """Root mean square of all residuals: 0.01 is one percent of the loss."""
        return float(torch.cat(self.residuals).square().mean().sqrt())


def fit_loss_law(
    parameters: Sequence[float], curves: Sequence[Curve], warmup: float = 0, iterations: int = 500
) -> LawFit:
    """Fit `LossLaw` by least squares on the log loss. curves: over steps, one for each of `parameters` (N, above 0).

    Only evaluations after `warmup` steps count, since the law knows no warm-up. Raises InvalidInput for fewer than two
    sizes, fewer than three evaluations of a curve after the warm-up, and where the larger models are not the better.
    """
    if len(parameters) != len(curves) or len(set(parameters)) < 2 or min(parameters) <= 0:
        raise InvalidInput(
            f"the law needs one curve for each N > 0 and two different N; got N = {list(parameters)} and {len(curves)} "
            "curves"
        )
    used = [curve.x > warmup for curve in curves]
    short = [f"N = {n:g}" for n, kept in zip(parameters, used, strict=True) if int(kept.sum()) < 3]
    if short:
        raise InvalidInput(f"fewer than 3 evaluations after step {warmup:g} of {', '.join(short)}: train longer")
    lengths = [int(kept.sum()) for kept in used]
    n = torch.cat([torch.full((length,), float(size)) for size, length in zip(parameters, lengths, strict=True)])
    step = torch.cat([curve.x[kept] for curve, kept in zip(curves, used, strict=True)])
    loss = torch.cat([curve.losses[kept] for curve, kept in zip(curves, used, strict=True)])
    # f = exp(t0) (N/N0)^-a and g = exp(t2) (S/S0)^-b about the centre of the data: t0 and a are then nearly
    # independent, which nc and a are not
    u, v = n.double().log(), step.log()
    u0, v0 = u.mean(), v.mean()
    theta = _levenberg_marquardt(_start(u - u0, v - v0, loss), u - u0, v - v0, loss.log(), iterations)
    a, b = theta[1].exp(), theta[3].exp()
    nc, k = (u0 + theta[0] / a).exp(), (v0 + theta[2] / b).exp()
    if a < 1e-3 or not nc.isfinite():
        raise InvalidInput(
            "the larger models are not better at equal steps, so there is no law of N: train them longer"
        )
    residual = _residual(theta, u - u0, v - v0, loss.log())[0]
    return LawFit(LossLaw(float(nc), float(a), float(k), float(b)), residual.split(lengths))


def _start(u: Tensor, v: Tensor, loss: Tensor) -> Tensor:
    """Starting point: for each b of a grid a free floor for every size, which is linear; the best of them."""
    sizes, owner = u.unique(return_inverse=True)
    best, start = math.inf, None
    for b in torch.linspace(0.1, 2.0, 39, dtype=torch.float64):
        design = torch.cat([torch.eye(len(sizes), dtype=torch.float64)[owner], (-b * v).exp()[:, None]], 1)
        solution = torch.linalg.lstsq(design / loss[:, None], torch.ones(len(loss), 1, dtype=torch.float64)).solution
        error = float(((design @ solution).squeeze(1) / loss - 1).square().sum())
        if error < best and (solution > 0).all():
            floors, scale = solution[:-1, 0].log(), solution[-1, 0].log()
            a = -float((sizes * (floors - floors.mean())).sum() / (sizes * (sizes - sizes.mean())).sum())
            best, start = (
                error,
                torch.stack([(floors + a * sizes).mean(), torch.tensor(max(a, 0.01)).log(), scale, b.log()]),
            )
    if start is None:
        raise InvalidInput("these curves do not fall towards a floor as a law of N and S does: train longer")
    return start


def _residual(theta: Tensor, u: Tensor, v: Tensor, log_loss: Tensor) -> tuple[Tensor, Tensor]:
    """Residuals (n,) and their Jacobian (n, 4)."""
    a, b = theta[1].exp(), theta[3].exp()
    log_f, log_g = theta[0] - a * u, theta[2] - b * v
    total = torch.logaddexp(log_f, log_g)
    f, g = (log_f - total).exp(), (log_g - total).exp()
    return total - log_loss, torch.stack([f, -a * u * f, g, -b * v * g], 1)


def _levenberg_marquardt(theta: Tensor, u: Tensor, v: Tensor, log_loss: Tensor, iterations: int) -> Tensor:
    damping = 1e-3
    residual, jacobian = _residual(theta, u, v, log_loss)
    for _ in range(iterations):
        normal = jacobian.T @ jacobian
        damped = normal + damping * torch.diag(normal.diagonal() + 1e-12)
        step = torch.linalg.solve(damped, jacobian.T @ residual).clamp(-1, 1)
        trial = _residual(theta - step, u, v, log_loss)
        if float(trial[0].square().sum()) < float(residual.square().sum()):
            theta, (residual, jacobian), damping = theta - step, trial, max(damping / 3, 1e-12)
        else:
            damping *= 4
        if float(step.abs().max()) < 1e-12 or damping > 1e12:
            break
    return theta
