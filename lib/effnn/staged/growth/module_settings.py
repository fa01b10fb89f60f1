"""Settings on the modules of a model that were changed after it was built: found, compared, and carried over.

Dropout that was switched off, another eps, an attribute of a subclass, gradient checkpointing with its arguments:
neither the configuration nor `save_pretrained` knows of them. They are found by a comparison with a model that is built
from the configuration (without values), and carried over by growth and by a resumed run. What can be neither compared
nor carried over is refused: modules and tensors here, hooks and replaced methods in hooks.py.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel

from effnn.base import InvalidInput, first_line

_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_FUNCTION = "_gradient_checkpointing_func"
_FLAG = "gradient_checkpointing"


def skeleton(config: GPT2Config, kind: type[GPT2LMHeadModel] = GPT2LMHeadModel) -> GPT2LMHeadModel:
    """The model of a configuration, without values (meta device). kind: its class, which takes no more."""
    try:
        with torch.device("meta"):
            return kind(copy.deepcopy(config))
    except Exception as error:
        if kind is GPT2LMHeadModel:
            raise
        raise InvalidInput(
            f"{kind.__name__} cannot be built from its configuration alone ({first_line(error)}): let its __init__ "
            "take the configuration and nothing else, and read what it needs from there"
        ) from error


def changed_settings(model: GPT2LMHeadModel) -> dict[tuple[str, str], object]:
    """(Module name, attribute) -> value, for all plain settings that differ from what the configuration gives.

    Plain are numbers, texts, dtypes, None, and sequences and mappings of these.
    """
    return {(name, key): value for name, key, value, _ in _differing(model) if _plain(value)}


def checkpointing_arguments(model: GPT2LMHeadModel) -> dict[str, str]:
    """Module name -> arguments of its gradient checkpointing; empty without."""
    return {
        name: _described(getattr(module, _FUNCTION, None))
        for name, module in model.named_modules()
        if getattr(module, _FLAG, False)
    }


def carry_over(model: GPT2LMHeadModel, target: GPT2LMHeadModel, source: Callable[[str], str]) -> None:
    """Give `target` what `model` holds besides tensors: settings, train or eval mode, checkpointing, generation.

    source: name of a module of the target -> name of its origin in `model`. InvalidInput for a setting that was changed
    although the configuration gives another one for the target's size: growth does not know what it would be there.
    """
    changed: dict[str, list[tuple[str, object, object]]] = {}
    for name, key, value, made in _differing(model):
        changed.setdefault(name, []).append((key, value, made))
    for name, module in target.named_modules():
        origin = model.get_submodule(source(name))
        module.training = origin.training
        for key, value, made in changed.get(source(name), ()):
            if not _equal(made, here := getattr(module, key, None)):
                raise InvalidInput(
                    f"{dotted(source(name), key)} was set to {value!r} where the configuration gives {made!r}, and "
                    f"after growth it gives {here!r}: let the class compute it from the configuration"
                )
            setattr(module, key, copy.deepcopy(value))
        if hasattr(origin, _FUNCTION):
            setattr(module, _FUNCTION, getattr(origin, _FUNCTION))
    if getattr(model, "_require_grads_hooks", None):
        # goes with gradient checkpointing: without it, frozen embeddings would block the gradients of later layers
        target.enable_input_require_grads()
    target.generation_config = copy.deepcopy(model.generation_config)


def check_modules(model: GPT2LMHeadModel) -> None:
    """InvalidInput for what does not follow from the configuration: a module or tensor that was replaced, quantized or
    cut, and an attribute of a subclass that holds another object.
    """
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
    for name, key, value, _ in _differing(model):
        if not _plain(value):
            raise InvalidInput(
                f"{dotted(name, key)} holds a {type(value).__name__}: carried over are numbers, texts, and lists and "
                f"dictionaries of these, other objects only where {type(model).__name__}(config) makes an equal one. "
                "Hold it as numbers or texts, or delete it before"
            )


def _kind(kind: type, other: type | None) -> str:
    """The name of a class, with its module's where both classes have the same name."""
    same = other is not None and other.__name__ == kind.__name__
    return f"{kind.__module__}.{kind.__name__}" if same else kind.__name__


def _differing(model: GPT2LMHeadModel) -> Iterator[tuple[str, str, object, object]]:
    """(Module name, attribute, value, value that the configuration gives) wherever the two differ.

    Of the classes of torch and transformers only plain public attributes count, and of their whole models only gradient
    checkpointing: the others are names and records that change nothing. Of your own classes all count that stock ones
    do not have, private ones where the class itself makes them.
    """
    made, stock = dict(skeleton(model.config, type(model)).named_modules()), None
    for name, module in model.named_modules():
        whole, own = isinstance(module, PreTrainedModel), not _is_stock(type(module))
        if own and stock is None:
            stock = {True: skeleton(model.config), False: nn.Module()}
        for key, value in vars(module).items() if name in made else ():
            if own and key != _FLAG:
                counts = not hasattr(stock[whole], key) and (key[0] != "_" or hasattr(made[name], key))
                counts = counts and key != "_is_hf_initialized" and not isinstance(value, PreTrainedConfig)
            else:
                counts = key == _FLAG if whole else key[0] != "_" and key != "training" and _plain(value)
            if counts and not _equal(given := getattr(made[name], key, None), value):
                yield name, key, value, given


def _is_stock(kind: type) -> bool:
    return kind.__module__.split(".")[0] in ("torch", "transformers")


def _plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(_plain(part) for pair in value.items() for part in pair)
    return isinstance(value, _PLAIN) or (isinstance(value, Sequence) and all(_plain(part) for part in value))


def _equal(made: object, found: object) -> bool:
    if inspect.isroutine(made) and inspect.isroutine(found):
        return _name(made) == _name(found)  # a method or lambda is another object in every model
    try:
        return bool(made == found)
    except Exception:  # tensors and arrays have no single answer
        return False


def dotted(name: str, key: str) -> str:
    """The path of an attribute, from the model on."""
    return f"{name}.{key}" if name else key


def _described(function: object) -> str:
    """A partial function and its arguments in words, the same in every process."""
    settings = getattr(function, "keywords", None) or {}
    words = (
        f"{key}={value!r}" if isinstance(value, _PLAIN) else f"{key}={_name(value)}" for key, value in settings.items()
    )
    return f"{_name(getattr(function, 'func', function))}({', '.join(sorted(words))})"


def _name(value: object) -> str:
    return getattr(value, "__qualname__", None) or type(value).__qualname__
