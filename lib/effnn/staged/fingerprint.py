"""What makes a run the same run: start, stages, recipe and tokens, as named short texts that can be compared.

A checkpoint carries it, and a run goes on only where all of it agrees. A schedule is compared by its values, so that a
lambda will do and nothing is ever unpickled. Not part of it: where checkpoints are made, how many are kept, and how a
batch is cut into micro-batches (which changes rounding alone), so that a run that was out of memory goes on with
smaller ones.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from effnn.staged.batches import checked_tokens
from effnn.staged.state import Recipe, Stage, TrainState

WHOLE = 2**20
"""Token arrays up to this length are hashed whole, longer ones by this many tokens in 64 places."""

_WRITTEN_BY_SAVING = ("transformers_version", "architectures", "dtype", "_name_or_path")
"""What a configuration gains when its model is saved and loaded, so that a loaded state is still the same start."""


def fingerprint(
    start: GPT2Config | GPT2LMHeadModel | TrainState,
    stages: Sequence[Stage],
    recipe: Recipe,
    train_tokens: object,
    validation_tokens: object,
) -> dict[str, str]:
    """Name of an ingredient -> what it is. The weights of a start are hashed whole, its moments are not."""
    furthest = sum(stage.steps for stage in stages) + max(stage.entry or 0 for stage in stages)
    furthest += start.position if isinstance(start, TrainState) else 0
    found = {"start": _start(start)}
    found |= {f"stage {number}": repr(stage) for number, stage in enumerate(stages)} | {"stages": str(len(stages))}
    left_out = ("schedule", "checkpoint_every", "keep", "micro_batch")
    found |= {f.name: repr(getattr(recipe, f.name)) for f in fields(recipe) if f.name not in left_out}
    found["schedule"] = _schedule(recipe.schedule, furthest)
    found["training tokens"] = _tokens(checked_tokens(train_tokens, recipe.context, "training"))
    found["validation tokens"] = _tokens(checked_tokens(validation_tokens, recipe.context, "validation"))
    return found


def _start(start: GPT2Config | GPT2LMHeadModel | TrainState) -> str:
    if isinstance(start, GPT2Config):
        return f"configuration {_config(start)}"
    model = start.model if isinstance(start, TrainState) else start
    weights = _hash(_bytes(parameter.detach().cpu()) for parameter in model.parameters())
    text = f"weights {weights} of configuration {_config(model.config)}"
    if not isinstance(start, TrainState):
        return text
    return f"{text} at step {start.step}, position {start.position}, rate {start.learning_rate}, stage {start.stage}"


def _config(config: GPT2Config) -> str:
    values = {key: value for key, value in config.to_dict().items() if key not in _WRITTEN_BY_SAVING}
    return _hash([json.dumps(values, sort_keys=True, default=str).encode()])


def _schedule(schedule: Callable[[int], float], furthest: int) -> str:
    if is_dataclass(schedule) and "0x" not in repr(schedule):
        return repr(schedule)
    positions = sorted({furthest * i // 1024 for i in range(1025)})
    return f"values {_hash([repr([float(schedule(position)) for position in positions]).encode()])}"


def _tokens(tokens: Tensor) -> str:
    length = len(tokens)
    if length <= WHOLE:
        parts = [tokens]
    else:
        size = WHOLE // 64
        parts = [tokens[start : start + size] for start in ((length - size) * i // 63 for i in range(64))]
    return f"{length} tokens {_hash(_bytes(part.long()) for part in parts)}"


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
