"""Settings on the modules of a model, carried over to a model that was built anew from its configuration.

Dropout that was switched off, another eps, gradient checkpointing with its arguments: the configuration knows of none
of them, so no model built from it has them. Hooks, and modules or functions put in by hand, are not settings.
"""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_CHECKPOINTING, _CHECKPOINT = "gradient_checkpointing", "_gradient_checkpointing_func"
_SIZES = ("in_features", "out_features", "out_path")
"""What cutting a layer sets."""


def carry_settings(source: nn.Module, target: nn.Module) -> None:
    """Give each module of `target` the mode and the settings of the module of `source` that has its name."""
    origins = dict(source.named_modules(remove_duplicate=False))
    for name, module in target.named_modules(remove_duplicate=False):
        if (origin := origins.get(name)) is None:
            continue
        module.training = origin.training
        for key, value in _settings(origin):
            if hasattr(module, key) and getattr(module, key) != value:
                setattr(module, key, value)
        if hasattr(origin, _CHECKPOINT):
            setattr(module, _CHECKPOINT, getattr(origin, _CHECKPOINT))
    if getattr(source, "_require_grads_hooks", None):
        # goes with gradient checkpointing: without it, frozen embeddings would block the gradients of later layers
        target.enable_input_require_grads()


def _settings(module: nn.Module) -> Iterator[tuple[str, object]]:
    # other attributes of a whole model are names and records that change nothing
    only = (_CHECKPOINTING,) if isinstance(module, PreTrainedModel) else vars(module)
    for key, value in vars(module).items():
        if key in only and key != "training" and key not in _SIZES and not key.startswith("_"):
            if all(isinstance(one, _PLAIN) for one in (value if isinstance(value, (list, tuple)) else [value])):
                yield key, value
