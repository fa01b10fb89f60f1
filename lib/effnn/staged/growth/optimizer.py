"""AdamW and its scheduler for a grown model: state by name, never by position.

Moments of what grew in width (k: the factor; see the table in width.py):
  consistent   those of the grown model's own gradients: m / k and v / k^2, in all k x k blocks of a matrix;
  authors      m / k and v / k^2 on the block diagonal, zero outside it (the released code);
  reset        none, as in a new optimizer.
The final normalisation keeps its m and v, as its gradient is not divided.

Adam divides a gradient by its own size, so it does not see the 1 / k: all k blocks in a column move by a full learning
rate, and the function changes k times as fast. adam_width_rule="1/k" corrects that: learning rate / k and weight decay
times k for matrices and the final normalisation, eps / k for all but the final normalisation. With consistent moments,
without noise and dropout, training then goes on exactly as the small model's would have.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2LMHeadModel

from effnn.base import InvalidInput
from effnn.staged.growth.depth import Layout
from effnn.staged.growth.roles import Kind, role_of
from effnn.staged.growth.unwrap import plain_optimizer
from effnn.staged.growth.width import gradient_divisor, widen

MOMENTS = ("consistent", "authors", "reset")
NEW_MOMENTS = ("zero", "copy")
WIDTH_RULES = ("none", "1/k")
_POWERS = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
"""Moment -> the power of the gradient that it is an average of."""


def names_by_group(model: GPT2LMHeadModel, optimizer: AdamW) -> list[list[str]]:
    """Names of the parameters of every group, in the group's order.

    InvalidInput for an optimizer other than torch.optim.AdamW, one with parameters of another model, and state that
    does not fit its parameter (a state dictionary of another model was loaded).
    """
    if type(optimizer) is not AdamW:
        raise InvalidInput(
            f"growth knows the state of torch.optim.AdamW, found {type(optimizer).__name__}. Grow the model alone and "
            "make a new optimizer for it"
        )
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        if foreign := [tuple(p.shape) for p in group["params"] if p not in names]:
            raise InvalidInput(
                f"the optimizer holds {len(foreign)} tensors that are not parameters of this model (shapes "
                f"{foreign[:3]}): it belongs to another model"
            )
        groups.append([names[parameter] for parameter in group["params"]])
    for parameter, state in optimizer.state.items():
        if parameter not in names:
            raise InvalidInput("the optimizer holds state of tensors that are not parameters of this model")
        for key, value in state.items():
            if key != "step" and (key not in _POWERS or value.shape != parameter.shape):
                found = tuple(getattr(value, "shape", ()))
                raise InvalidInput(
                    f"optimizer state {key} of {names[parameter]}: expected {', '.join(_POWERS)} of shape "
                    f"{tuple(parameter.shape)}, found {found}; was it loaded from another model?"
                )
    return groups


def steps_done(optimizer: AdamW | None) -> int | None:
    """The largest step count in the optimizer's state; None without state."""
    steps = [int(state["step"]) for state in optimizer.state.values() if "step" in state] if optimizer else []
    return max(steps, default=None)


def grow_optimizer(
    optimizer: AdamW,
    model: GPT2LMHeadModel,
    grown: GPT2LMHeadModel,
    layout: Layout,
    width: int,
    *,
    moments: str = "consistent",
    new_moments: str = "zero",
    adam_width_rule: str = "none",
) -> tuple[AdamW, list[int]]:
    """The AdamW of the grown model, and for each of its groups the index of the group that it comes from.

    Groups and their hyper-parameters stay. The parameters of a group are in the order of `grown.named_parameters()`;
    new layers join the group of their source layer. Parameters without state get none.

    optimizer: of the small model.
    model, grown: the small and the grown model.
    layout: where the layers of the grown model come from.
    width: factor of the width.
    moments: "consistent", "authors" or "reset", as above.
    new_moments: of new layers: "zero" with step 0, or "copy" of the source layer's.
    adam_width_rule: "none" or "1/k", which splits groups that hold several kinds of tensors.
    """
    parameters = dict(grown.named_parameters())
    order = {name: index for index, name in enumerate(parameters)}
    groups, origins = [], []
    for origin, (group, names) in enumerate(zip(optimizer.param_groups, names_by_group(model, optimizer), strict=True)):
        places = sorted((place for name in names for place, _ in layout.places(name)), key=order.__getitem__)
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for chosen, changes in _split(settings, places, width if adam_width_rule == "1/k" else 1):
            values = [(name, parameters[name]) if "param_names" in group else parameters[name] for name in chosen]
            groups.append({"params": values, **copy.deepcopy(settings), **changes})
            origins.append(origin)
    defaults = {key: value for key, value in optimizer.defaults.items() if key != "decoupled_weight_decay"}
    result = AdamW(groups, **copy.deepcopy(defaults))
    if moments != "reset":
        names = {parameter: name for name, parameter in model.named_parameters()}
        for parameter, state in optimizer.state.items():
            for place, new in layout.places(names[parameter]):
                zero = new and new_moments == "zero"
                result.state[parameters[place]] = _grow_moments(state, names[parameter], width, moments, zero)
    return result, origins


def grow_scheduler(scheduler: LambdaLR, optimizer: AdamW, origins: list[int]) -> LambdaLR:
    """The scheduler at the same position, with the same functions, for the grown optimizer."""
    lambdas = [copy.deepcopy(scheduler.lr_lambdas[origin]) for origin in origins]
    # its constructor takes one step, so it begins one position earlier
    grown = LambdaLR(optimizer, lambdas, last_epoch=scheduler.last_epoch - 1)
    grown._step_count = scheduler._step_count
    return grown


def check_scheduler(scheduler: LambdaLR, optimizer: AdamW | None) -> None:
    """InvalidInput for a scheduler other than LambdaLR, and for one that drives another optimizer."""
    if type(scheduler) is not LambdaLR:
        raise InvalidInput(
            f"growth knows torch's LambdaLR, found {type(scheduler).__name__}; write the schedule as a function of the "
            "step, or grow without it and make a new one"
        )
    if plain_optimizer(scheduler.optimizer) is not optimizer:
        raise InvalidInput("the scheduler drives another optimizer than the one given")


def _grow_moments(state: dict[str, Tensor], name: str, width: int, moments: str, zero: bool) -> dict[str, Tensor]:
    role, grown = role_of(name), {}
    for key, value in state.items():
        if key == "step":
            grown[key] = torch.zeros_like(value) if zero else value.clone()
        elif zero:
            shape = widen(value.to("meta"), role, width).shape
            grown[key] = value.new_zeros(shape)
        else:
            divisor = gradient_divisor(role, width) ** _POWERS[key]
            grown[key] = widen(value, role, width, divisor=divisor, cross=moments == "consistent")
    return grown


def _split(settings: dict, names: list[str], width: int) -> Iterable[tuple[list[str], dict]]:
    """The parts of one group, each with the settings that the width rule changes; one part where it changes none."""
    if width == 1:
        yield names, {}
        return
    slower = {key: settings[key] / width for key in ("lr", "initial_lr") if key in settings}
    slower["weight_decay"] = settings["weight_decay"] * width
    smaller = {"eps": settings["eps"] / width}
    for kinds, changes in (
        ((Kind.EMBEDDING, Kind.VECTOR), smaller),
        ((Kind.MATRIX,), slower | smaller),
        ((Kind.FINAL_NORM,), slower),
    ):
        if chosen := [name for name in names if role_of(name).kind in kinds]:
            yield chosen, changes
