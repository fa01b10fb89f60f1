"""Validation curves and their interpolation.

A measured curve is noisy, so "the step at which the loss is L" is ambiguous. Here it is read off the lower envelope,
which is the evaluations that were better than all before them. The envelope falls monotonically, so it can be
inverted, and it is too low by at most the amplitude of the noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
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
    """Validation losses (nats per token) of one run, in the order of training.

    x: where each was measured, in steps, tokens or FLOPs, increasing and above 0. A staged run is one curve over its
    accumulated FLOPs. Raises InvalidInput for fewer than two evaluations and for an x that does not increase.
    """

    x: Sequence[float] | Tensor
    losses: Sequence[float] | Tensor
    log_x: Tensor = field(init=False, repr=False)  # both of the envelope
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
        return math.exp(np.interp(math.log(x), self.log_x, self.log_loss))

    def x_at(self, loss: float) -> float:
        """Where the envelope reaches `loss`; InvalidInput for a loss outside its range."""
        highest, lowest = math.exp(self.log_loss[0]), math.exp(self.log_loss[-1])
        if not lowest * (1 - 1e-12) <= loss <= highest * (1 + 1e-12):
            raise InvalidInput(
                f"this curve's loss goes from {highest:.4f} to {lowest:.4f}, {loss:.4f} is not in it; train it longer, "
                "or compare at a loss that both runs have"
            )
        return math.exp(np.interp(-math.log(loss), -self.log_loss, self.log_x))
