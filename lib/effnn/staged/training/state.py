"""What `train` takes and returns: stages, the recipe, points of the curve, and the training state.

Everything here is plain data; train.py does the work. The training state is what growth carries over (Shen et al.
2022): the model, its AdamW, and the position in the learning-rate schedule, with the compute spent so far.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral, Real

import torch
from torch.optim import AdamW
from transformers import GPT2LMHeadModel

from effnn.base import LEAST, InvalidInput
from effnn.staged.growth.config import GrowthRecord, history
from effnn.staged.growth.grow import check_options
from effnn.staged.planning.curves import Curve

PRECISIONS = ("float32", "bfloat16")
AXES = ("step", "tokens", "flops", "flops_full", "seconds")


class Diverged(InvalidInput):
    """The loss or a weight is no longer a finite number."""


@dataclass(frozen=True)
class Stage:
    """One stage: grow by these factors, then train. Raises InvalidInput for values out of range.

    steps: optimizer steps after growth; 0 only grows.
    width, depth, order, init, noise, moments, new_moments, adam_width_rule: as in `grow`.
    learning_rate: peak rate from this stage on; None keeps the one before. Ratios between parameter groups stay.
    entry: the position in the schedule at which the stage begins (S_target); None goes on from the current one.
    rewarm: steps of linear re-warm from there (`Rewarmed`). With 0 none begins, but one that has not ended goes on
    unless `entry` is given.
    """

    steps: int
    width: int = 1
    depth: int = 1
    learning_rate: float | None = None
    entry: int | None = None
    rewarm: int = 0
    order: str = "interleave"
    init: str = "zero_proj"
    noise: float | None = None
    moments: str = "consistent"
    new_moments: str = "zero"
    adam_width_rule: str = "none"

    def __post_init__(self) -> None:
        check_options(**self.growth)
        _check_whole(self, 0, "steps", "rewarm", *(["entry"] if self.entry is not None else []))
        if self.learning_rate is not None:
            _check_number(self, "learning_rate", 0, math.inf)

    @property
    def growth(self) -> dict[str, object]:
        """The options of `grow`, by name."""
        names = ("width", "depth", "order", "init", "noise", "moments", "new_moments", "adam_width_rule")
        return {name: getattr(self, name) for name in names}

    @property
    def grows(self) -> bool:
        """Whether the model changes at the start of the stage."""
        return self.width > 1 or self.depth > 1


@dataclass(frozen=True)
class Recipe:
    """How every stage is trained. Raises InvalidInput for values out of range.

    batch_size: sequences per step, over all ranks.
    context: tokens per sequence; the next token is predicted at each of them.
    learning_rate: peak rate of the first stage of a new run.
    schedule: position -> factor of the peak rate, for instance `WarmupStableDecay`.
    betas, eps, weight_decay: of AdamW, for all parameters; the defaults are the authors'.
    clip: largest gradient norm on the scale of the ungrown model (clipping.py); None does not clip.
    micro_batch: sequences per forward pass, over which gradients are accumulated; None takes all of a rank at once.
    precision: "float32" computes in the model's own type, "bfloat16" under torch.autocast; weights, moments and loss
    keep their type.
    seed: of new weights, data order, dropout and noise.
    evaluate_every: steps between evaluations.
    evaluate_sequences: windows of the validation tokens, spread evenly and always the same.
    checkpoint_every: steps between checkpoints; None writes them at the end of each stage only.
    keep: how many checkpoints stay in the folder.
    """

    batch_size: int
    context: int
    learning_rate: float
    schedule: Callable[[int], float]
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.0
    clip: float | None = None
    micro_batch: int | None = None
    precision: str = "float32"
    seed: int = 0
    evaluate_every: int = 100
    evaluate_sequences: int = 64
    checkpoint_every: int | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        optional = [name for name in ("micro_batch", "checkpoint_every") if getattr(self, name) is not None]
        _check_whole(self, 1, "batch_size", "context", "evaluate_every", "evaluate_sequences", "keep", *optional)
        _check_whole(self, 0, "seed")
        for name in ("learning_rate", "eps", *(["clip"] if self.clip is not None else [])):
            _check_number(self, name, 0, math.inf)
        if not (isinstance(self.weight_decay, Real) and 0 <= self.weight_decay < math.inf):
            raise InvalidInput(f"weight_decay={self.weight_decay!r}: expected a number of 0 or more")
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON and YAML give a list
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InvalidInput(f"betas={self.betas!r}: expected two numbers of 0 or more and below 1")
        if not callable(self.schedule):
            raise InvalidInput(f"schedule={self.schedule!r}: expected a function from position to factor of the peak")
        if self.precision not in PRECISIONS:
            raise InvalidInput(f"precision={self.precision!r}: expected one of {', '.join(PRECISIONS)}")
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise InvalidInput(f"batch_size={self.batch_size} cannot be divided into micro_batch={self.micro_batch}")


@dataclass(frozen=True)
class Point:
    """One evaluation. Right after growth there is a second point with the same step, tokens and FLOPs.

    step: optimizer steps done.
    stage: counts from 0 over the whole past of the model.
    tokens: trained on so far.
    flops, flops_full: of training so far, in the non-embedding and in the full convention (flops.py).
    seconds: of training alone.
    validation_loss: nats per token.
    train_loss: mean over the steps since the evaluation before; None where there were none.
    learning_rate: peak rate times the schedule's factor at this position.
    layers, width: of the model evaluated.
    """

    step: int
    stage: int
    tokens: int
    flops: int
    flops_full: int
    seconds: float
    validation_loss: float
    train_loss: float | None
    learning_rate: float
    layers: int
    width: int


@dataclass
class TrainState:
    """A model in training: what `train` returns, and what it goes on from.

    model: in eval mode when returned.
    optimizer: its AdamW.
    schedule: the one in force, with a re-warm that has not ended.
    learning_rate: peak rate.
    step: optimizer steps done in all.
    position: in the schedule.
    rewarm: (entry, steps) of the re-warm in `schedule`, None without one.
    stage, stage_step: the current stage, and the steps done in it.
    tokens, flops, flops_full: spent so far, as in `Point`.
    seconds: of training; evaluation, growth and checkpoints are not counted.
    points: the curve.
    loss_sum, loss_count: of the training losses since the last evaluation.
    """

    model: GPT2LMHeadModel
    optimizer: AdamW
    schedule: Callable[[int], float]
    learning_rate: float
    step: int = 0
    position: int = 0
    rewarm: tuple[int, int] | None = None
    stage: int = -1
    stage_step: int = 0
    tokens: int = 0
    flops: int = 0
    flops_full: int = 0
    seconds: float = 0.0
    points: list[Point] = field(default_factory=list)
    loss_sum: float = 0.0
    loss_count: int = 0

    @property
    def history(self) -> tuple[GrowthRecord, ...]:
        """All growth events, oldest first."""
        return history(self.model.config)

    def curve(self, axis: str = "flops") -> Curve:
        """The validation losses over one of `AXES`, without step 0 and without the second points right after growth.

        Measured seconds need not increase; where they do not, a tiny amount is added. Raises InvalidInput for an
        unknown axis, and as `Curve` does for fewer than two points.
        """
        if axis not in AXES:
            raise InvalidInput(f"axis={axis!r}: expected one of {', '.join(AXES)}")
        first_of = {point.step: point for point in reversed(self.points) if point.step}
        points = sorted(first_of.values(), key=lambda point: point.step)
        values = [(getattr(point, axis), point.validation_loss) for point in points]
        x, losses = torch.tensor(values, dtype=torch.float64).reshape(-1, 2).unbind(1)
        if axis == "seconds":
            x = x.clamp(min=LEAST).cummax(0).values + LEAST * torch.arange(len(x))
        return Curve(x, losses)


def _check_whole(owner: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise InvalidInput(f"{name}={value!r}: expected a whole number of {least} or more")


def _check_number(owner: object, name: str, above: float, below: float) -> None:
    value = getattr(owner, name)
    if not isinstance(value, Real) or not above < value < below:
        raise InvalidInput(f"{name}={value!r}: expected a finite number above {above:g}")
