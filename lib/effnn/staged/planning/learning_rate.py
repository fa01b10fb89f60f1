"""Learning rates of staged training: the peak by size, the schedule over steps, and its re-warm after growth.

The steps are those of the target model: a grown model enters at S_target, the step at which a target-size model from
scratch has its loss, and the decay horizon belongs to the target, not to a stage (Shen et al. 2022; their code).
Schedules are functions step -> factor of the peak, made for `torch.optim.lr_scheduler.LambdaLR`, and can be pickled.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from effnn.base import InvalidInput

REWARM_STEPS = {"depth": 150, "width": 200}
"""Steps of the re-warm after growth in the authors' code."""


def peak_learning_rate(parameters: float, base: float = 10) -> float:
    """Peak rate for N non-embedding parameters at 512 x 1024 tokens a batch: 0.003239 - 0.0001395 log(N).

    base 10 gives the rates in the authors' code (2.007e-3 for GPT2-large). They credit Kaplan et al. 2020, appendix
    D.6, where the logarithm is most likely natural (base=math.e: 4.0e-4). Raises InvalidInput for an N below 1, and for
    one so large that the rate would not be above 0.
    """
    if not parameters >= 1 or not base > 1:
        raise InvalidInput(f"expected N of 1 or more and a logarithm's base above 1; got {parameters} and {base}")
    rate = 0.003239 - 0.0001395 * math.log(parameters) / math.log(base)
    if rate <= 0:
        raise InvalidInput(f"the formula gives {rate:.2g} for N = {parameters:g}; it does not hold for that size")
    return rate


@dataclass(frozen=True)
class WarmupStableDecay:
    """Factor at a step: linear from 0 over `warmup`, 1 on the plateau, linear to `final` over the last `decay` steps.

    warmup: steps.
    horizon: the step at which the decay ends, in steps of the target model.
    decay: steps; None decays from the warm-up on, as the authors do (warm-up 3000, horizon 250,000); 0 stays on the
    plateau. For loss curves that can be compared across stages, run all stages on the plateau and let only the last one
    decay.
    final: factor at the end of the decay.
    """

    warmup: int
    horizon: int
    decay: int | None = None
    final: float = 0.0

    def __post_init__(self) -> None:
        decay = 0 if self.decay is None else self.decay
        if self.warmup < 0 or decay < 0 or self.warmup + decay > self.horizon or not 0 <= self.final <= 1:
            raise InvalidInput(
                f"warm-up and decay must be 0 or more and fit into the horizon, final within 0 .. 1; got {self}"
            )

    def __call__(self, step: int) -> float:
        decay = self.horizon - self.warmup if self.decay is None else self.decay
        if step < self.warmup:
            return step / self.warmup
        if decay == 0:
            return 1.0
        left = min(max((self.horizon - step) / decay, 0.0), 1.0)
        return self.final + (1 - self.final) * left


@dataclass(frozen=True)
class Rewarmed:
    """`schedule` with a re-warm at step `entry`: linear from 0 to its value at entry + steps, then unchanged.

    entry: S_target, in steps of the target model. steps: R, `REWARM_STEPS` of the growth operator.
    """

    schedule: Callable[[int], float]
    entry: int
    steps: int

    def __post_init__(self) -> None:
        if self.entry < 0 or self.steps < 0:
            raise InvalidInput(f"entry and steps must be 0 or more; got {self.entry} and {self.steps}")

    def __call__(self, step: int) -> float:
        if step >= self.entry + self.steps:
            return self.schedule(step)
        return max(step - self.entry, 0) / self.steps * self.schedule(self.entry + self.steps)
