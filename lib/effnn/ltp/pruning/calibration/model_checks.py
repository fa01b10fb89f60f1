"""What is checked of a model before any pass over the rows.

A model is refused by the name of what was found, with the way out: wrappers (wrappers.py), decoders and unknown
families (adapters.py), training mode, quantized weights, encoders without a loss, and anything that could not be made
smaller in the end. The last is found by doing it: the model is rebuilt as its pruned class with nothing pruned, before
a batch is read, and that must give the outputs of the model on some rows of the first batch.
"""

import itertools
import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from effnn.base import InvalidInput, hooked
from effnn.ltp.pruning.adapters import adapter_for
from effnn.ltp.pruning.calibration.batch_checks import has_labels, labels_taken
from effnn.ltp.pruning.calibration.batches import entries, row_count, take, to_device
from effnn.ltp.pruning.calibration.losses import Loss, forward, label_counts, mean_loss, same_draws
from effnn.ltp.pruning.masks import Masks, Shape
from effnn.ltp.pruning.shrinking.models import pruned_class
from effnn.ltp.pruning.shrinking.shrink import shrink
from effnn.ltp.pruning.wrappers import added_weights, inner_encoder, linear_refusal

COMPARED_ROWS = 2
"""Rows of the first batch on which the rebuilt model must agree with the model."""

_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Share of its largest number by which an output may differ; the same sums of the same weights hardly do."""


def check_model(model: PreTrainedModel, labels: str = "data", loss: Loss | None = None) -> None:
    """InvalidInput unless calibration can run on `model`: an encoder of a known family, in eval mode, with a loss."""
    adapter, name = adapter_for(model), type(model).__name__
    for layer in adapter.layers(model):
        for part, path in adapter.linear_names.items():
            if reason := linear_refusal(name, part, layer.get_submodule(path)):
                raise InvalidInput(reason)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InvalidInput(f"{name} is on the meta device and has no weights: load them first, from_pretrained(folder)")
    if any(module.training for module in model.modules()):
        raise InvalidInput(
            "the model is in training mode, so dropout would enter the Fisher information: call model.eval()"
        )
    if labels not in ("data", "model"):
        raise InvalidInput(f'labels={labels!r}: expected "data" or "model"')
    if loss is not None:
        if not callable(loss):
            raise InvalidInput(f"loss={loss!r}: expected a function loss(model, batch) that returns the mean loss")
        if labels == "model":
            raise InvalidInput(
                'labels="model" draws labels for the model\'s own loss: leave it out, or leave out loss='
            )
    elif model.base_model is model and name.endswith("Model") and not labels_taken(model):
        raise InvalidInput(
            f"{name} is an encoder without a task head and has no loss: pass loss=..., a function loss(model, batch) "
            "that returns the mean loss of the batch, or load the class with the head of your task (AutoModelFor...)"
        )


def rebuilt(model: PreTrainedModel) -> PreTrainedModel:
    """`model` as its pruned class, with nothing pruned and what is never cut shared: what `materialize` will do.

    InvalidInput names what stands in the way.
    """
    try:
        pruned_class(type(model))
    except InvalidInput as error:
        inside = inner_encoder(model, lambda _: True)
        raise InvalidInput(
            f"{error}" + (f"; or pass its encoder, {inside}, with a loss=... of your own" if inside else "")
        ) from None
    try:
        return shrink(model, Masks.ones(Shape.of(model)), share=True)
    except InvalidInput as error:
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        with torch.device("meta"):
            plain = type(model)(model.config)
        added = sorted(names - {name for name, _ in plain.named_parameters(remove_duplicate=False)})
        known = added_weights(added)
        raise InvalidInput(f"{type(model).__name__} has {known}" if known else str(error)) from error


def check_rebuilt(model: PreTrainedModel, small: PreTrainedModel, batch: object, loss: Loss | None) -> None:
    """InvalidInput unless `small`, as `rebuilt` gives it, puts out what `model` does on some rows of the first batch.

    What neither the configuration nor the settings of the modules say would be lost in the smaller model: another
    activation, a changed forward, hooks. All outputs are compared, since a loss may hide a difference.
    """
    counted = label_counts(model, batch, row_count(batch)).nonzero().flatten().tolist()[:COMPARED_ROWS]
    if not counted:
        return
    batch = to_device(take(batch, counted), next(model.parameters()).device)
    close = _CLOSE.get(next(model.parameters()).dtype, 1e-2)
    with eager(model):
        one, other = _outputs(model, batch, loss), _outputs(small, batch, loss)
        if _difference(one, other) <= close:
            return
        again = _outputs(model, batch, loss)
    if len(one) == len(other) == len(again):  # what is drawn anew at each call says nothing, such as a random loss
        steady = [_difference([value], [repeated]) <= close for value, repeated in zip(one, again, strict=True)]
        one, other = (list(itertools.compress(values, steady)) for values in (one, other))
    if (difference := _difference(one, other)) <= close:
        return
    raise InvalidInput(
        f"rebuilt from its configuration, {type(model).__name__} gives other outputs on the first rows (apart by "
        f"{difference:.2g} of the largest): its configuration does not tell all of it (an activation put in by hand, a "
        "changed forward, hooks)"
    )


def _outputs(model: PreTrainedModel, batch: object, loss: Loss | None) -> list[Tensor]:
    """Every tensor that the model and the encoder inside it return in one run of the loss, and the loss."""
    found: list[Tensor] = []

    def collect(_: nn.Module, __: tuple, output: object) -> None:
        found.extend(value.detach() for _, value in entries(output) if isinstance(value, Tensor))

    handles = (module.register_forward_hook(collect) for module in {model, model.base_model})
    with same_draws(model), hooked(handles):
        if loss is None and not has_labels(model, batch):
            forward(model, batch, "calibration batch 0")
        else:
            found.append(mean_loss(model, batch, loss, "calibration batch 0"))
    return found


def _difference(some: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference between two lists of outputs, each as a share of the largest number of its tensor.

    Infinite where they differ in number, in shape, or in what is not finite.
    """
    if [value.shape for value in some] != [value.shape for value in others]:
        return math.inf
    largest = 0.0
    for one, other in zip(some, others, strict=True):
        one, other = one.double().flatten(), other.double().flatten()
        same = (one == other) | (one.isnan() & other.isnan())
        if not same.all():
            apart = (one - other)[~same].abs().nan_to_num(nan=math.inf).max()
            scale = torch.where(one.isfinite(), one.abs(), 0.0).max().clamp(min=1e-3)
            largest = max(largest, float(apart / scale))
    return largest


def eager(model: PreTrainedModel) -> AbstractContextManager:
    """A model compiled in place (`model.compile()`) runs as it is written: compiling around hooks takes longer."""
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
