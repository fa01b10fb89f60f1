"""The loss law L(N, S) = (Nc / N)^a + (k / S)^b of a family of model sizes, and its fit to measured curves.

N: non-embedding parameters, S: optimizer steps at a constant batch (Kaplan et al. 2020, equation 1.6).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor

from effnn.base import InvalidInput
from effnn.staged.planning.curves import Curve


@dataclass(frozen=True)
class LossLaw:
    """L(N, S) = (nc / N)^a + (k / S)^b.

    `KAPLAN` has the constants of Kaplan et al. 2020 (table 5) at the critical batch, where k is twice their S_c.
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
    """A fitted law. residuals: log(fitted loss / measured loss), one tensor per curve, over the evaluations used."""

    law: LossLaw
    residuals: tuple[Tensor, ...]

    @property
    def rms(self) -> float:
        """Root mean square of all residuals: 0.01 is one percent of the loss."""
        return float(torch.cat(self.residuals).square().mean().sqrt())


def fit_loss_law(parameters: Sequence[float], curves: Sequence[Curve], warmup: float = 0) -> LawFit:
    """Fit `LossLaw` by least squares on the log loss. curves: over steps, one for each of `parameters` (N, above 0).

    Only evaluations after `warmup` steps count, since the law leaves the warm-up out. Raises InvalidInput for fewer
    than two sizes, fewer than three evaluations of a curve after the warm-up, and curves on which larger models are not
    better.
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
    n = np.repeat(np.asarray(parameters, dtype=float), lengths)
    step = torch.cat([curve.x[kept] for curve, kept in zip(curves, used, strict=True)]).numpy()
    loss = torch.cat([curve.losses[kept] for curve, kept in zip(curves, used, strict=True)]).numpy()
    # f = exp(t0) (N/N0)^-a and g = exp(t2) (S/S0)^-b about the centre of the data: t0 and a are then nearly
    # independent, which nc and a are not
    u, v = np.log(n), np.log(step)
    u0, v0 = u.mean(), v.mean()
    given = (u - u0, v - v0, loss)
    limits = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-14)
    fit = least_squares(_residual, _start(*given), _jacobian, method="lm", args=given, **limits)
    a, b = np.exp(fit.x[[1, 3]])
    with np.errstate(over="ignore"):
        nc, k = np.exp(u0 + fit.x[0] / a), np.exp(v0 + fit.x[2] / b)
    if a < 1e-3 or not np.isfinite(nc):
        raise InvalidInput(
            "the larger models are not better at equal steps, so there is no law of N: train them longer"
        )
    residuals = torch.from_numpy(fit.fun).split(lengths)
    return LawFit(LossLaw(float(nc), float(a), float(k), float(b)), residuals)


def _start(u: np.ndarray, v: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """A starting point: for each b of a grid, the best scale of the steps and a floor of its own for every size.

    That is a linear problem; the floors of the best b then give a.
    """
    sizes, owner = np.unique(u, return_inverse=True)
    best, start = math.inf, None
    for b in np.linspace(0.1, 2.0, 39):
        design = np.column_stack([np.eye(len(sizes))[owner], np.exp(-b * v)])
        solution = np.linalg.lstsq(design / loss[:, None], np.ones(len(loss)))[0]
        error = np.square(design @ solution / loss - 1).sum()
        if error < best and (solution > 0).all():
            slope, middle = np.polyfit(sizes, np.log(solution[:-1]), 1)
            best, start = error, np.array([middle, math.log(max(-slope, 0.01)), math.log(solution[-1]), math.log(b)])
    if start is None:
        raise InvalidInput("these curves do not fall towards a floor as a law of N and S does: train longer")
    return start


def _terms(theta: np.ndarray, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log f and log g."""
    return theta[0] - np.exp(theta[1]) * u, theta[2] - np.exp(theta[3]) * v


def _residual(theta: np.ndarray, u: np.ndarray, v: np.ndarray, loss: np.ndarray) -> np.ndarray:
    return np.logaddexp(*_terms(theta, u, v)) - np.log(loss)


def _jacobian(theta: np.ndarray, u: np.ndarray, v: np.ndarray, loss: np.ndarray) -> np.ndarray:
    log_f, log_g = _terms(theta, u, v)
    f = 1 / (1 + np.exp(log_g - log_f))  # f's share of the loss
    return np.column_stack([f, -np.exp(theta[1]) * u * f, 1 - f, -np.exp(theta[3]) * v * (1 - f)])
