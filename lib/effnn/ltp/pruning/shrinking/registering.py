"""What `register_pruned` checks: that the classes belong together, and that no two of them share a name.

A saved folder names its classes by `model_type` and by the bare class name, so of two classes with
one name and type the loader could not know which is meant. Two classes made by one class statement, as when a notebook
cell is run twice, count as one.
"""

from collections.abc import Iterable, Sequence

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from effnn.base import InvalidInput


def check_kinds(config_class: type[PreTrainedConfig], model_classes: Sequence[type[PreTrainedModel]]) -> None:
    """InvalidInput unless these are a configuration class and a list of model classes."""
    if not _is_class(config_class, PreTrainedConfig):
        found = config_class if isinstance(config_class, type) else f"an object of {type(config_class)}"
        raise InvalidInput(f"config_class: expected a configuration class, such as BertConfig; found {found}")
    if not isinstance(model_classes, Sequence) or not all(_is_class(each, PreTrainedModel) for each in model_classes):
        raise InvalidInput(f"model_classes: expected a list of transformers model classes; found {model_classes!r}")


def check_takes(config_class: type[PreTrainedConfig], model_classes: Sequence[type[PreTrainedModel]]) -> None:
    """InvalidInput unless each model class takes configurations of the class, or of a base of it."""
    for model_class in model_classes:
        takes = getattr(model_class, "config_class", None)
        if takes is not None and not any(same_definition(base, takes) for base in config_class.__mro__):
            raise InvalidInput(
                f"{model_class.__name__} takes a {takes.__name__}, not a {config_class.__name__}: register it with that"
            )


def check_names(pairs: Iterable[tuple[type, type]]) -> None:
    """InvalidInput if a pair of classes of one name are two definitions."""
    for one, other in pairs:
        if not same_definition(one, other):
            raise InvalidInput(
                f"{_full_name(one)} has the name of {_full_name(other)}, and a saved folder holds names only: rename "
                "it, or give its configuration class a model_type of its own"
            )


def same_definition(one: type, other: type) -> bool:
    """Whether they are one class, or come from one class statement."""
    return _full_name(one) == _full_name(other)


def auto_class(model_class: type[PreTrainedModel]) -> type | None:
    """The Auto class of a model class's ending (Model, ForSequenceClassification, ...), or None."""
    name = model_class.__name__
    endings = (name[start:] for start in range(len(name)))
    found = ("AutoModel" + ("" if end == "Model" else end) for end in endings if end == "Model" or end[:3] == "For")
    return next((getattr(transformers, auto) for auto in found if hasattr(transformers, auto)), None)


def _is_class(found: object, base: type) -> bool:
    return isinstance(found, type) and issubclass(found, base)


def _full_name(found: type) -> str:
    return f"{found.__module__}.{found.__qualname__}"
