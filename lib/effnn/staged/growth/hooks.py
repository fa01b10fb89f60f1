"""Refusal of hooks and replaced methods: a new model would silently compute without them.

Hooks of transformers that growth sets again or that change nothing are let through, and so is the mixed precision of
accelerate, which belongs to its wrapper.
"""

import inspect
from collections.abc import Iterator

from torch import nn
from torch.optim import Optimizer

from effnn.base import InvalidInput
from effnn.staged.growth.module_settings import dotted

_OF_MODULES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_OF_OPTIMIZERS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_HARMLESS = {
    "transformers.modeling_utils": "make_inputs_require_grads",  # gradient checkpointing; carried over
    "transformers.utils.output_capturing": "output_capturing_hook",  # hidden states, where a call asks for them
}


def check_hooks(model: nn.Module) -> None:
    """InvalidInput for a hook on a module or a parameter, and for a method that was replaced on a single module."""
    for name, module in model.named_modules():
        _check(f"module {name or type(module).__name__}", module, _OF_MODULES)
        for key in _replaced(module):
            raise InvalidInput(
                f"{dotted(name, key)} was replaced on this module alone, which neither growth nor a checkpoint carries "
                f"over: undo it by `del model.get_submodule({name!r}).{key}`, or define it in a subclass of the model"
            )
    for name, parameter in model.named_parameters():
        _check(f"parameter {name}", parameter, _OF_PARAMETERS)


def check_optimizer_hooks(optimizer: Optimizer) -> None:
    """InvalidInput for an optimizer with hooks around its steps."""
    _check("optimizer", optimizer, _OF_OPTIMIZERS)


def _check(what: str, owner: object, kinds: tuple[str, ...]) -> None:
    for kind in kinds:
        for hook in (getattr(owner, kind, None) or {}).values():
            function = getattr(hook, "func", hook)
            name = getattr(function, "__name__", type(function).__name__)
            if _HARMLESS.get(getattr(function, "__module__", None)) != name:
                raise InvalidInput(
                    f"the {what} has a hook ({name}), which neither growth nor a checkpoint carries over: call "
                    "remove() on its handle before, and register it again on what comes back; to train with it, write "
                    "it into a method of a subclass of the model"
                )


def _replaced(module: nn.Module) -> Iterator[str]:
    """Names of the methods that the module itself holds instead of those of its class."""
    for key, value in vars(module).items():
        method = getattr(type(module), key, None)
        if inspect.isroutine(method) and getattr(value, "__func__", None) is not method:
            original = getattr(vars(module).get("_original_forward"), "__func__", None)
            if not (key == "forward" and original is method):  # under the mixed precision of accelerate
                yield key
