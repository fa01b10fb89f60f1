"""The fingerprint of a run: everything that decides its curve, as short named texts that can be compared.

These are the start (configuration, weights, frozen weights, settings on the modules, gradient checkpointing, groups and
moments of the optimizer, the position), the stages, the recipe and the tokens. Every checkpoint holds the fingerprint,
and a run goes on from it only if all of it agrees. A schedule is compared by all its values up to the last step, so a
lambda will do and nothing is unpickled. Not part of it: when checkpoints are written, how many are kept, train or eval
mode (training sets it), and the size of micro-batches, which changes rounding alone: a run that was out of memory goes
on with smaller ones. The code of a subclass and of the forward pass is not compared, only the name of the class.
"""

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import GPT2Config, GPT2LMHeadModel

from effnn.staged.growth.module_settings import changed_settings, checkpointing_arguments, dotted, skeleton
from effnn.staged.growth.optimizer import names_by_group
from effnn.staged.training.batches import Tokens, checked_tokens
from effnn.staged.training.state import Recipe, Stage, TrainState

WHOLE = 2**26
"""Token arrays up to this length are hashed whole; of longer ones, this many tokens in 64 places."""

_ADDED_BY_SAVE_PRETRAINED = ("transformers_version", "architectures", "dtype", "_name_or_path")
"""Entries that a configuration gains in save_pretrained; without them a loaded model is still the same start."""
_NOT_OF_THE_RUN = ("schedule", "checkpoint_every", "keep", "micro_batch")
_POSITION = ("step", "position", "rewarm", "stage", "tokens", "flops", "flops_full", "loss_sum", "loss_count")


def fingerprint(
    start: GPT2Config | GPT2LMHeadModel | TrainState,
    stages: Sequence[Stage],
    recipe: Recipe,
    train_tokens: object,
    validation_tokens: object,
) -> dict[str, str]:
    """Name -> description of everything that decides the curve, in the order of interest. Tensors are hashed whole."""
    model = skeleton(start) if isinstance(start, GPT2Config) else getattr(start, "model", start)
    found = {"start": f"a {type(start).__name__}"} | _config(model)
    found |= {f"stage {number}": repr(stage) for number, stage in enumerate(stages)} | {"stages": str(len(stages))}
    settings = {field.name: repr(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)}
    found |= {name: text for name, text in settings.items() if name not in _NOT_OF_THE_RUN}
    found["schedule"] = _schedule(recipe.schedule, _last_position(start, stages))
    found["training tokens"] = _tokens(checked_tokens(train_tokens, recipe.context, "training"))
    found["validation tokens"] = _tokens(checked_tokens(validation_tokens, recipe.context, "validation"))
    if not isinstance(start, GPT2Config):
        found |= _modules(model)
        if isinstance(start, TrainState):
            found |= _groups(model, start.optimizer) | _position(start)
        found |= {f"weights of {name}": _hash(parameter) for name, parameter in model.named_parameters()}
        if isinstance(start, TrainState):
            found |= _moments(model, start.optimizer)
    return found


def _config(model: GPT2LMHeadModel) -> dict[str, str]:
    values = {key: value for key, value in model.config.to_dict().items() if key not in _ADDED_BY_SAVE_PRETRAINED}
    texts = {f"start's {key}": json.dumps(value, sort_keys=True, default=str) for key, value in sorted(values.items())}
    return {name: _short(text) for name, text in texts.items()} | {
        "start's class": type(model).__name__,
        "attention implementation": str(model.config._attn_implementation),
    }


def _modules(model: GPT2LMHeadModel) -> dict[str, str]:
    """Changed settings on the modules (dropout rates, ...), gradient checkpointing, frozen weights."""
    found = {f"setting {dotted(name, key)}": repr(value) for (name, key), value in changed_settings(model).items()}
    found |= {f"checkpointing of {name}": text for name, text in checkpointing_arguments(model).items()}
    return found | {f"training of {name}": "frozen" for name, p in model.named_parameters() if not p.requires_grad}


def _groups(model: GPT2LMHeadModel, optimizer: AdamW) -> dict[str, str]:
    """Settings and parameters of every group. The rate is its peak, since the schedule sets the current one."""
    found = {"optimizer groups": str(len(optimizer.param_groups))}
    for number, (group, names) in enumerate(zip(optimizer.param_groups, names_by_group(model, optimizer), strict=True)):
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names", "lr")}
        settings["peak rate"] = float(settings.pop("initial_lr", group["lr"]))
        found |= {f"group {number} {key}": _setting(value) for key, value in sorted(settings.items())}
        found[f"group {number} parameters"] = f"{len(names)} parameters {_digest([json.dumps(names).encode()])}"
    return found


def _setting(value: object) -> str:
    return repr(tuple(value) if isinstance(value, list) else value)


def _position(state: TrainState) -> dict[str, str]:
    points = [dataclasses.replace(point, seconds=0.0) for point in state.points]
    return {f"start's {name}": repr(getattr(state, name)) for name in _POSITION} | {
        "start's peak rate": repr(state.learning_rate),
        "start's curve": f"{len(points)} points {_digest([repr(points).encode()])}",
    }


def _moments(model: GPT2LMHeadModel, optimizer: AdamW) -> dict[str, str]:
    found, states = {}, optimizer.state
    for name, parameter in model.named_parameters():
        for key, value in states[parameter].items() if parameter in states else ():
            found[f"{key} of {name}"] = str(float(value)) if key == "step" else _hash(value)
    return found


def _last_position(start: GPT2Config | GPT2LMHeadModel | TrainState, stages: Sequence[Stage]) -> int:
    """The last position of which the schedule is asked; a re-warm asks for its own end."""
    position, last = (start.position, sum(start.rewarm or ())) if isinstance(start, TrainState) else (0, 0)
    for stage in stages:
        position = position if stage.entry is None else stage.entry
        last = max(last, position + max(stage.steps, stage.rewarm))
        position += stage.steps
    return last


def _schedule(schedule: Callable[[int], float], last: int) -> str:
    """By all its values up to the last position, and by its own words where they are the same in every process."""
    values = array("d", (schedule(position) for position in range(last + 1)))
    words = f"{schedule!r}, " if dataclasses.is_dataclass(schedule) and "0x" not in repr(schedule) else ""
    return f"{words}values to position {last} {_digest([values])}"


def _tokens(tokens: Tokens) -> str:
    """By value, whatever type and byte order they are stored in."""
    length, places = len(tokens), 1 if len(tokens) <= WHOLE else 64
    size, block = min(length, WHOLE) // places, 2**20
    starts = [(length - size) * i // max(places - 1, 1) for i in range(places)]
    parts = (tokens[at : min(at + block, start + size)] for start in starts for at in range(start, start + size, block))
    return f"{length} tokens {_digest(_bytes(part.long()) for part in parts)}"


def _short(text: str) -> str:
    return text if len(text) <= 60 else _digest([text.encode()])


def _hash(tensor: Tensor) -> str:
    shape = "x".join(map(str, tensor.shape))
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')} {_digest([_bytes(tensor.detach().cpu())])}"


def _digest(parts: Iterable[bytes | memoryview | array]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
