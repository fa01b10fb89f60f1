"""Mask tuning: real-valued scales for the kept heads and filters, layer by layer (Kwon et al. 2022, section 4.3).

The teacher is the same weights under the masks searched at the square root of the budget. Going through the layers, the
scales of the student's kept heads, then of its kept filters, are solved so that each output projection reproduces the
teacher's residual sum on the calibration tokens; the student's inputs come from its own layers as tuned so far.

The steps of one layer:
  1. the teacher runs its layer once and gives both targets; the student's attention contexts give the first equations;
  2. head scales are solved, accepted or left at one; the student's FFN inputs and activations give the second ones;
  3. filter scales likewise; the student moves on to the next layer.
Only the hidden states that enter one layer are kept for all rows, of teacher and student. A solution is accepted if its
scales are within bounds and the reconstruction error falls on held-out rows; a layer that fails is left as it was and
tuning goes on. (The paper's code stops at the first failure and tests on no held-out rows.) Where only position 0 of
the last layer reaches the loss, as in a classifier, only that is reconstructed there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from effnn.base import InvalidInput
from effnn.ltp.pruning.adapters import adapter_for
from effnn.ltp.pruning.calibration.held_out import LayerInput
from effnn.ltp.pruning.least_squares import NormalEquations, Sums
from effnn.ltp.pruning.masks import Masks, Shape
from effnn.ltp.pruning.options import check_tuning
from effnn.ltp.pruning.sliced_layer import SlicedLayer

MAX_SCALE = 10.0
"""A solution with a scale outside [-10, 10] is not accepted (the paper's bound)."""


@dataclass(frozen=True)
class LayerTuning:
    """The scales of the heads or of the filters of one layer: whether they are used, and what they are worth.

    layer: its index.
    kind: "heads" or "filters".
    kept: number of scales.
    accepted: whether the solved scales are used; otherwise they stay at one.
    reason: why they were not accepted, "" if they were.
    error_before: squared reconstruction error per token with scales at one, on held-out rows (on the fitted rows where
        none are held out).
    error_after: the same with the solved scales.
    """

    layer: int
    kind: str
    kept: int
    accepted: bool
    reason: str
    error_before: float
    error_after: float

    @property
    def gain(self) -> float:
        """Share of the reconstruction error that the scales remove; 0 where they were not accepted."""
        return 1 - self.error_after / self.error_before if self.accepted and self.error_before > 0 else 0.0


def tune_masks(
    model: PreTrainedModel,
    inputs: list[LayerInput],
    masks: Masks,
    teacher: Masks,
    solver: str = "ridge",
    autocast: torch.dtype | None = None,
    max_cached_bytes: int = 256 << 20,
    offload: torch.dtype | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> tuple[Masks, list[LayerTuning]]:
    """Masks of the same structure with tuned scales, and what was done layer by layer.

    model: the dense one, stays as it is.
    inputs: what enters the first layer, from `calibrate`; the list is emptied.
    masks: the student's, binary.
    teacher: masks at the square root of the budget.
    solver: "ridge" or "lsmr", see `NormalEquations.solve`.
    autocast: torch.bfloat16 runs the layers in it.
    max_cached_bytes: attention contexts wait from step 1 to 2, and FFN activations from 2 to 3, up to this size in all;
        others are computed twice.
    offload: hidden states of teacher and student wait on the CPU in this dtype while other rows are worked on (float32:
        nothing is lost; bfloat16: half the memory).
    on_step: called twice per layer, after its heads and after its filters.
    """
    if not inputs:
        raise InvalidInput("mask tuning needs what enters the first layer: call calibrate(..., keep_inputs=True)")
    check_tuning(solver, autocast, offload)
    adapter = adapter_for(model)
    layers = adapter.layers(model)
    shape = Shape.of(model, adapter)
    masks.check(shape)
    teacher.check(shape)
    tuned = Masks(masks.heads.clone(), masks.filters.clone())
    done: list[LayerTuning] = []
    device, dtype = model.device, model.dtype
    first_only = all(batch.first_only for batch in inputs)
    run = _LayerSteps([_BatchStates(batch, device, dtype, offload) for batch in inputs], max_cached_bytes)
    inputs.clear()
    with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for index, layer in enumerate(layers):
            parts = adapter.parts(layer)
            last = index == len(layers) - 1
            run.tokens = 1 if last and first_only else None
            run.goes_on = not last
            student = SlicedLayer.cut(parts, masks.heads[index], masks.filters[index])
            equations = run.attention(
                SlicedLayer.cut(parts, teacher.heads[index], teacher.filters[index]), student, index > 0
            )
            if equations is not None:
                scale, outcome = equations.solve(index, "heads", solver)
                student = student.scaled_heads(scale)
                tuned.heads[index, masks.heads[index] != 0] = scale
                done.append(outcome)
            on_step()
            equations = run.ffn(student)
            if equations is not None:
                scale, outcome = equations.solve(index, "filters", solver)
                student = student.scaled_filters(scale)
                tuned.filters[index, masks.filters[index] != 0] = scale
                done.append(outcome)
            if not last:
                run.advance(student)
            on_step()
    return tuned, done


def judged(before: float | None, after: float | None) -> tuple[bool, str]:
    """Whether to use the scales, by the held-out losses without and with them; and the reason, where it is not plain.

    A loss that is not known, or not finite even without the scales, judges nothing: then the layers' own errors decide.
    """
    if before is None or after is None:
        return True, ""
    if not math.isfinite(before):
        return True, f"the held-out loss is {before} without the scales, so it does not judge them: they are used"
    if after <= before:
        return True, ""
    return False, f"tuned scales raise the held-out loss from {before:.6g} to {after:.6g} and are dropped"


class _BatchStates:
    """Hidden states of one mini-batch on their way through the layers, teacher's and student's.

    Setting them puts them where they wait, reading them brings them back to the model's device and dtype.
    """

    def __init__(self, batch: LayerInput, device: torch.device, dtype: torch.dtype, offload: torch.dtype | None):
        self.device, self.dtype, self.offload = device, dtype, offload
        self.attention_mask, self.live = batch.attention_mask, batch.live
        self.fit_rows = len(batch.states) - batch.held_out
        self.context: Tensor | None = None
        self.activation: Tensor | None = None
        self._teacher = self._student = batch.states

    @property
    def teacher(self) -> Tensor:
        return self._working(self._teacher)

    @teacher.setter
    def teacher(self, states: Tensor) -> None:
        self._teacher = self._waiting(states)

    @property
    def student(self) -> Tensor:
        return self._working(self._student)

    @student.setter
    def student(self, states: Tensor) -> None:
        self._student = self._waiting(states)

    def _waiting(self, states: Tensor) -> Tensor:
        return states if self.offload is None else states.to("cpu", self.offload)

    def _working(self, states: Tensor) -> Tensor:
        return states if self.offload is None else states.to(self.device, self.dtype)

    def add(self, equations: "_Equations", inputs: Tensor, target: Tensor, tokens: int | None) -> None:
        """Add the live tokens of (B, S, n) and (B, S, d) to the sums of the fitted and of the held-out rows."""
        live = self.live[:, :tokens]
        for sums, rows in ((equations.fit, slice(None, self.fit_rows)), (equations.held, slice(self.fit_rows, None))):
            chosen = live[rows]
            if bool(chosen.all()):
                sums.add(inputs[rows].flatten(0, 1), target[rows].flatten(0, 1))
            else:
                sums.add(inputs[rows][chosen], target[rows][chosen])


class _LayerSteps:
    """The three steps of one layer over all mini-batches."""

    def __init__(self, batches: list[_BatchStates], max_cached_bytes: int):
        self.batches, self.max_cached_bytes = batches, max_cached_bytes
        self.cached_bytes = 0
        self.tokens: int | None = None
        self.goes_on = True

    def attention(self, teacher: SlicedLayer, student: SlicedLayer, solve: bool) -> "_Equations | None":
        """Step 1. Leaves the teacher's FFN residual sum in `batch.teacher`; the heads' equations, if wanted."""
        solve = solve and student.heads > 0
        equations = _Equations(student.out[0], student.parts.head_size, intercept=True) if solve else None
        for batch in self.batches:
            states = batch.teacher
            context = teacher.context(states, batch.attention_mask, self.tokens)
            attention_sum = teacher.attention_sum(states[:, : self.tokens], context)
            middle = teacher.middle(attention_sum)
            batch.teacher = teacher.ffn_sum(middle, teacher.activation(middle))
            if equations is not None:
                states = batch.student
                context = student.context(states, batch.attention_mask, self.tokens)
                target = _minus_bias(attention_sum - states[:, : self.tokens], student.out[1])
                batch.add(equations, context, target, self.tokens)
                batch.context = self._kept(context)
        return equations

    def _kept(self, values: Tensor) -> Tensor | None:
        """`values` if they fit beside what is kept already, else None: they will be computed again."""
        if self.cached_bytes + values.nbytes > self.max_cached_bytes:
            return None
        self.cached_bytes += values.nbytes
        return values

    def _taken(self, values: Tensor | None) -> Tensor | None:
        """What was kept, which is no longer counted."""
        self.cached_bytes -= 0 if values is None else values.nbytes
        return values

    def ffn(self, student: SlicedLayer) -> "_Equations | None":
        """Step 2. Leaves what enters the student's FFN in `batch.student`; the filters' equations, if any are kept."""
        equations = _Equations(student.fc2[0], block=1, intercept=False) if student.filters else None
        for batch in self.batches:
            states, context = batch.student, self._taken(batch.context)
            if context is None:
                context = student.context(states, batch.attention_mask, self.tokens)
            middle = student.middle(student.attention_sum(states[:, : self.tokens], context))
            batch.student, batch.context = middle, None
            if equations is not None:
                target = _minus_bias(batch.teacher - middle, student.fc2[1])
                activation = student.activation(middle)
                batch.add(equations, activation, target, self.tokens)
                batch.activation = self._kept(activation) if self.goes_on else None
        return equations

    def advance(self, student: SlicedLayer) -> None:
        """Step 3. Teacher and student move on to what enters the next layer."""
        for batch in self.batches:
            middle, activation = batch.student, self._taken(batch.activation)
            batch.activation = None
            if activation is None:
                activation = student.activation(middle)
            batch.student = student.next_states(student.ffn_sum(middle, activation))
            batch.teacher = student.next_states(batch.teacher)


class _Equations:
    """Sums of the fitted and of the held-out rows for one output projection."""

    def __init__(self, weight: Tensor, block: int, intercept: bool):
        self.intercept = intercept
        self.fit, self.held = Sums(weight.T, block), Sums(weight.T, block)

    def solve(self, layer: int, kind: str, solver: str) -> tuple[Tensor, LayerTuning]:
        """Scales to use, (units,) float32 on the CPU, ones if the solution is not accepted; and what was found."""
        with torch.autocast(self.fit.weight.device.type, enabled=False):
            weight_products = self.fit.weight @ self.fit.weight.T
        fit = NormalEquations.of(self.fit, weight_products, self.intercept)
        judge = NormalEquations.of(self.held, weight_products) if self.held.tokens else fit
        scale = fit.solve(solver)
        ones = torch.ones_like(scale)
        before, after, reason = judge.error(ones), float("nan"), ""
        if not bool(scale.isfinite().all()):
            reason = "the normal matrix is not positive definite"
        else:
            after = judge.error(scale)
            if float(scale.abs().max()) > MAX_SCALE:
                reason = f"a scale of {float(scale.abs().max()):.1f} is beyond {MAX_SCALE:g}"
            elif not after < before:
                reason = "the error on held-out rows does not fall" if self.held.tokens else "the error does not fall"
        scale = ones if reason else scale
        return scale.float().cpu(), LayerTuning(layer, kind, len(scale), not reason, reason, before, after)


def _minus_bias(target: Tensor, bias: Tensor | None) -> Tensor:
    return target if bias is None else target - bias
