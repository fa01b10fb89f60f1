"""Settings on the modules of a model that were changed after it was built: found, compared, and carried over.

Dropout that was switched off, another eps, gradient checkpointing with its arguments: neither the configuration nor
`save_pretrained` knows of them. They are found by a comparison with a model that is built from the configuration
(without values), and carried over by growth and by a resumed run. Hooks and functions set on a module are not.
"""

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from effnn.base import InvalidInput

_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_FUNCTION = "_gradient_checkpointing_func"
_FLAG = "gradient_checkpointing"


def skeleton(config: GPT2Config, kind: type[GPT2LMHeadModel] = GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The model of a configuration, without values (meta device). kind: its class, which takes no more."""
    try:
        with torch.device("meta"):
            return kind(copy.deepcopy(config))
    except TypeError as error:
        raise InvalidInput(f"{kind.__name__} cannot be built from its configuration alone ({error})") from None


def changed_settings(model: GPT2LMHeadModel) -> dict[tuple[str, str], object]:
    """(Module name, attribute) -> value, for all plain settings that differ from what the configuration gives."""
    found, made = {}, dict(skeleton(model.config, type(model)).named_modules())
    for name, module in model.named_modules():
        for key, value in _plain_attributes(module):
            if name in made and getattr(made[name], key, None) != value:
                found[name, key] = value
    return found


def checkpointing_arguments(model: GPT2LMHeadModel) -> dict[str, str]:
    """Module name -> arguments of its gradient checkpointing; empty without."""
    return {
        name: _described(getattr(module, _FUNCTION, None))
        for name, module in model.named_modules()
        if getattr(module, _FLAG, False)
    }


def carry_over(model: GPT2LMHeadModel, target: GPT2LMHeadModel, source: Callable[[str], str]) -> None:
    """Give `target` what `model` holds besides tensors: settings, train or eval mode, checkpointing, generation.

    source: name of a module of the target -> name of its origin in `model`.
    """
    changed: dict[str, dict[str, object]] = {}
    for (name, key), value in changed_settings(model).items():
        changed.setdefault(name, {})[key] = value
    for name, module in target.named_modules():
        origin = model.get_submodule(source(name))
        module.training = origin.training
        for key, value in changed.get(source(name), {}).items():
            setattr(module, key, value)
        if hasattr(origin, _FUNCTION):
            setattr(module, _FUNCTION, getattr(origin, _FUNCTION))
    if getattr(model, "_require_grads_hooks", None):
        # goes with gradient checkpointing: without it, frozen embeddings would block the gradients of later layers
        target.enable_input_require_grads()
    target.generation_config = copy.deepcopy(model.generation_config)


def check_modules(model: GPT2LMHeadModel) -> None:
    """InvalidInput for a module or tensor that does not follow from the configuration: replaced, quantized or cut."""
    made = skeleton(model.config, type(model))
    kinds = {name: type(module) for name, module in made.named_modules()}
    for name, module in model.named_modules():
        made_as, found = kinds.pop(name, None), type(module)
        if made_as is not found:
            expected = "no module" if made_as is None else _kind(made_as, found)
            raise InvalidInput(
                f"{name} is of type {_kind(found, made_as)} where the configuration makes {expected}, and only what it "
                "makes can be grown or loaded again: change the configuration instead (the activation), set p=0 on a "
                "Dropout that should do nothing, or take the model before it was quantized or wrapped"
            )
    if kinds:
        raise InvalidInput(f"the model has no {next(iter(kinds))}, which its configuration makes: correct one of them")
    shapes = {name: parameter.shape for name, parameter in made.named_parameters()}
    for name, parameter in model.named_parameters():
        if name in shapes and parameter.shape != shapes[name]:
            raise InvalidInput(
                f"{name} is of shape {tuple(parameter.shape)}, which does not fit the model's configuration: it makes "
                f"{tuple(shapes[name])}"
            )


def _kind(kind: type, other: type | None) -> str:
    """The name of a class, with its module's where both classes have the same name."""
    same = other is not None and other.__name__ == kind.__name__
    return f"{kind.__module__}.{kind.__name__}" if same else kind.__name__


def _plain_attributes(module: nn.Module) -> Iterator[tuple[str, object]]:
    # other attributes of a whole model are names and records that change nothing
    only = (_FLAG,) if isinstance(module, PreTrainedModel) else None
    for key, value in vars(module).items():
        if key.startswith("_") or key == "training" or (only and key not in only):
            continue
        if isinstance(value, _PLAIN) or (isinstance(value, Sequence) and all(isinstance(v, _PLAIN) for v in value)):
            yield key, value


def _described(function: object) -> str:
    """A partial function and its arguments in words, the same in every process."""
    settings = getattr(function, "keywords", None) or {}
    words = (
        f"{key}={value!r}" if isinstance(value, _PLAIN) else f"{key}={_name(value)}" for key, value in settings.items()
    )
    return f"{_name(getattr(function, 'func', function))}({', '.join(sorted(words))})"


def _name(value: object) -> str:
    return getattr(value, "__qualname__", None) or type(value).__qualname__
