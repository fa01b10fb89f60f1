"""A file for an AdamW, by the names of its parameters.

torch's own `state_dict` numbers parameters by position: with another order of groups or layers, one tensor would get
the moments of another. The model itself needs only save_pretrained and from_pretrained.
"""

import copy
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch.optim import AdamW
from transformers import GPT2LMHeadModel

from effnn.base import InvalidInput, atomic_path
from effnn.staged.growth.optimizer import names_by_group
from effnn.staged.growth.unwrap import plain_model, plain_optimizer

_FORMAT = "effnn AdamW by name 1"


def save_optimizer(path: str | Path, model: GPT2LMHeadModel, optimizer: AdamW) -> Path:
    """Write settings, groups and state of the AdamW of `model` to `path`, atomically; returns the path.

    InvalidInput for another kind of optimizer or one of another model, CannotWrite where the disk takes no more.
    """
    model, optimizer = plain_model(model), plain_optimizer(optimizer)
    groups = [
        {**{key: value for key, value in group.items() if key != "params"}, "names": names}
        for group, names in zip(optimizer.param_groups, names_by_group(model, optimizer), strict=True)
    ]
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {names[parameter]: dict(entry) for parameter, entry in optimizer.state.items()}
    content = {"format": _FORMAT, "defaults": optimizer.defaults, "groups": groups, "state": state}
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)
    return Path(path)


def load_optimizer(path: str | Path, model: GPT2LMHeadModel) -> AdamW:
    """An AdamW for `model` as `save_optimizer` wrote it; moments go to the devices of their parameters.

    InvalidInput if the file cannot be read to its end, is of another format, or belongs to a model with other
    parameters.
    """
    model = plain_model(model)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError, ValueError, KeyError) as error:
        raise InvalidInput(
            f"{path} is not a readable checkpoint ({type(error).__name__}): it was cut off or is not one. Go back to "
            "the one before"
        ) from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise InvalidInput(f"{path} was not written by save_optimizer")
    parameters = dict(model.named_parameters())
    wanted = [name for group in content["groups"] for name in group["names"]]
    if missing := sorted(set(wanted) - set(parameters)):
        raise InvalidInput(f"{path} is of another model: this one has no parameters {missing[:5]}")
    groups = []
    for group in copy.deepcopy(content["groups"]):
        held = [parameters[name] for name in group.pop("names")]
        called = group.pop("param_names", None)  # the names that the optimizer itself was given, if any
        groups.append({"params": held if called is None else list(zip(called, held, strict=True)), **group})
    defaults = {key: value for key, value in content["defaults"].items() if key != "decoupled_weight_decay"}
    optimizer = AdamW(groups, **defaults)
    for name, entry in content["state"].items():
        parameter = parameters[name]
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        on_device = group["capturable"] or group["fused"]
        optimizer.state[parameter] = {
            key: value if key == "step" and not on_device else value.to(parameter.device)
            for key, value in entry.items()
        }
    names_by_group(model, optimizer)  # the shapes fit
    return optimizer
