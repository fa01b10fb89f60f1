"""Modules of torch, changed for the length of a block."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module has its own mode again."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are removed at the end of the block, also those set before setting another one failed.

    handles: what `register_*_hook` returned; a generator sets its hooks one by one.
    """
    kept: list[RemovableHandle] = []
    try:
        for handle in handles:
            kept.append(handle)
        yield
    finally:
        for handle in kept:
            handle.remove()
