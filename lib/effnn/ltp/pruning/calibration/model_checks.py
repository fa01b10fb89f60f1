"""What is checked of a model before any pass over the rows.

A model is refused by the name of what was found, with the way out: wrappers (wrappers.py), decoders and unknown
families (adapters.py), training mode, quantized weights, encoders without a loss, and anything that could not be made
smaller in the end. The last is found by doing it: the model is rebuilt as its pruned class with nothing pruned, before
a batch is read, and that must give the loss of the model on some rows of the first batch.
"""

import math

import torch
from transformers import PreTrainedModel

from effnn.base import InvalidInput
from effnn.ltp.pruning.adapters import adapter_for
from effnn.ltp.pruning.calibration.batch_checks import has_labels, labels_taken
from effnn.ltp.pruning.calibration.batches import row_count, take, to_device
from effnn.ltp.pruning.calibration.losses import Loss, label_counts, mean_loss
from effnn.ltp.pruning.masks import Masks, Shape
from effnn.ltp.pruning.shrinking.models import pruned_class
from effnn.ltp.pruning.shrinking.shrink import shrink
from effnn.ltp.pruning.wrappers import added_weights, inner_encoder, linear_refusal

COMPARED_ROWS = 2
"""Rows of the first batch on which the rebuilt model must agree with the model."""


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
    """InvalidInput unless `small`, as `rebuilt` gives it, has the loss of `model` on some rows of the first batch.

    What a configuration does not say would be lost in the smaller model: another activation, a changed forward, hooks.
    """
    rows = row_count(batch)
    counted = label_counts(model, batch, rows).nonzero().flatten().tolist()[:COMPARED_ROWS]
    if not counted or (loss is None and not has_labels(model, batch)):
        return
    batch = to_device(take(batch, counted), next(model.parameters()).device)

    def value(of: PreTrainedModel) -> float:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return float(mean_loss(of, batch, loss, "calibration batch 0"))

    one, other = value(model), value(small)
    close = 1e-3 if next(model.parameters()).dtype == torch.float32 else 5e-2
    if abs(one - other) <= close * max(abs(one), abs(other), 1e-3) or not math.isfinite(one):
        return
    if value(model) != one:
        return  # a loss that is drawn anew at each call says nothing
    raise InvalidInput(
        f"rebuilt from its configuration, {type(model).__name__} gives another loss on the first rows ({other:.6g}, "
        f"the model itself {one:.6g}): its configuration does not tell all of it (an activation put in by hand, a "
        "changed forward, hooks)"
    )
