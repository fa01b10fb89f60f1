"""Pruned encoders as transformers models: stock classes whose layers differ in heads and filters.

Each stock class gets a subclass with "Pruned" before its name (PrunedBertForSequenceClassification, ...) and each
configuration class one that says which heads and filters of the dense model were kept. The sizes are read from it when
the model is built, so `save_pretrained`, `from_pretrained` and the Auto classes work. Importing this file registers
them. Registering never replaces: a stock class with its configuration class has one pruned class until the process
ends. Pickles name the stock classes, which every process can import. cut.py cuts a layer, shrink.py makes one of these
models from a dense one, saving.py loads it.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from effnn.base import InvalidInput, temporary_folder
from effnn.ltp.pruning.adapters import PRUNED_PREFIX, Adapter, adapter_for_type
from effnn.ltp.pruning.shrinking.cut import cut
from effnn.ltp.pruning.shrinking.registering import (
    auto_class,
    check_kinds,
    check_names,
    check_takes,
    same_definition,
)

CONFIG = "config.json"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")

_FAMILIES = {
    "Bert": "text",
    "Roberta": "text",
    "XLMRoberta": "text",
    "Camembert": "text",
    "Electra": "text",
    "DistilBert": "text",
    "ViT": "image",
}
_HEADS = {
    "text": (
        "Model",
        "ForSequenceClassification",
        "ForQuestionAnswering",
        "ForTokenClassification",
        "ForMaskedLM",
        "ForMultipleChoice",
    ),
    "image": ("Model", "ForImageClassification"),
}
_CONFIGS: dict[type[PreTrainedConfig], type[PreTrainedConfig]] = {}
"""Configuration class of the dense model -> that of the pruned one."""

_PRUNED: dict[tuple[type[PreTrainedModel], type[PreTrainedConfig]], type[PreTrainedModel]] = {}
"""Stock class and configuration class of the dense model -> pruned class."""


class PrunedConfigMixin:
    """What makes a stock configuration class a pruned one, beside `kept_heads` and `kept_filters`."""

    dense_class: type[PreTrainedConfig]
    """The stock class."""

    def __reduce_ex__(self, protocol: int) -> str | tuple:
        if "dense_class" not in vars(type(self)):  # a subclass of the user's
            return super().__reduce_ex__(protocol)
        return _blank_config, (self.dense_class,), self.__dict__


class PrunedMixin:
    """What makes a stock model class a pruned one: layers cut to `config.kept_heads` and `config.kept_filters`."""

    dense_class: type[PreTrainedModel]
    """The stock class."""

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        if not getattr(config, "add_pooling_layer", True):  # an encoder that was built without one
            kwargs.setdefault("add_pooling_layer", False)
        super().__init__(config, *args, **kwargs)
        cut(self, adapter_of(self), config.kept_heads, config.kept_filters)

    def save_pretrained(self, save_directory: str | Path, *args, **kwargs) -> None:
        """As in transformers, but the folder is whole or refuses to load whenever the process is killed.

        InvalidInput for a quantized model, whose packed weights these files cannot hold.
        """
        if kwargs.get("state_dict") is None and is_packed(self):
            raise InvalidInput(
                "save_pretrained takes float weights; found packed ones, as quantize_dynamic makes them. Save the "
                "float model and quantize again after load_pruned, or use torch.save(model.state_dict(), path)"
            )
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with whole_folder(save_directory) as folder:
            super().save_pretrained(folder, *args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> str | tuple:
        if "dense_class" not in vars(type(self)):  # a subclass of the user's
            return super().__reduce_ex__(protocol)
        return _blank_model, (self.dense_class, self.config_class.dense_class), self.__dict__


@contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty folder; on success its files replace those of the same name in `target`, on an error none do.

    They are moved one by one, and what else lies in `target` stays. `config.json`, without which nothing loads, goes
    first from the old content and comes last in the new one, so a killed process leaves no folder that seems whole.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise InvalidInput(f"{target} is a file; expected a folder to save the model in")
    target.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target) as temporary:
        yield temporary
        names = sorted((path.name for path in temporary.iterdir()), key=lambda name: (name == CONFIG, name))
        if CONFIG in names:
            (target / CONFIG).unlink(missing_ok=True)
        # a loader prefers one weight file to several: those of an earlier save must not outlive it
        if any(name.endswith(".safetensors") for name in names):
            for old in target.iterdir():
                if _WEIGHTS.fullmatch(old.name):
                    old.unlink()
        for name in names:
            os.replace(temporary / name, target / name)


def _blank_config(dense_config: type[PreTrainedConfig]) -> PreTrainedConfig:
    found = _pruned_config(dense_config)
    return found.__new__(found)


def _blank_model(dense_model: type[PreTrainedModel], dense_config: type[PreTrainedConfig]) -> PreTrainedModel:
    (found,) = register_pruned(dense_config, [dense_model])
    return found.__new__(found)


def is_packed(model: PreTrainedModel) -> bool:
    """Whether the model holds quantized weights in torch's packed form, which are not tensors."""
    return not all(isinstance(value, Tensor) for value in model.state_dict().values())


def adapter_of(model: PreTrainedModel) -> Adapter:
    """The adapter for a pruned model that is not cut yet; InvalidInput if it is not registered."""
    model_type = model.config.dense_class.model_type
    if adapter := adapter_for_type(model_type, model):
        return adapter
    raise InvalidInput(
        f"no adapter covers {type(model).__name__} (model type {model_type!r}): pass the one it was pruned with to "
        "effnn.ltp.register_adapter first"
    )


def pruned_class(
    model_class: type[PreTrainedModel], config_class: type[PreTrainedConfig] | None = None
) -> type[PreTrainedModel]:
    """The pruned class that belongs to a stock class; InvalidInput lists the ones there are.

    config_class: of the model at hand, where the stock class is registered with more than one.
    """
    found = {config: pruned for (dense, config), pruned in _PRUNED.items() if dense is model_class}
    config_class = config_class or getattr(model_class, "config_class", None)
    for base in getattr(config_class, "__mro__", ()):
        if base in found:
            return found[base]
    if found:
        return next(iter(found.values()))
    known = ", ".join(sorted({dense.__name__ for dense, _ in _PRUNED}))
    call = f"register_pruned({getattr(config_class, '__name__', 'its configuration class')}, [{model_class.__name__}])"
    raise InvalidInput(
        f"there is no pruned class for {model_class.__name__}. Expected one of {known}; "
        f"for this class call effnn.ltp.{call} first"
    )


def register_pruned(
    config_class: type[PreTrainedConfig], model_classes: Sequence[type[PreTrainedModel]]
) -> list[type[PreTrainedModel]]:
    """Make pruned classes of stock classes and register them with the Auto classes; returns them.

    For one more class of a known family, or for a family of your own beside `register_adapter`. It adds and never
    replaces; what is registered already is returned as it is. A model class is registered with the Auto class of its
    ending (Model, ForSequenceClassification, ...); where several share one, Auto takes the class that the folder names,
    else the first. One without such an ending loads through `load_pruned` only. Call it in every process that loads
    such a model. A class that is defined anew, as in a notebook cell run twice, takes its own place.

    A configuration class with the model type of another one gets its own name added to the type of its pruned models.
    InvalidInput if the classes do not belong together, or have the name of others that a saved folder may mean.
    """
    _check_classes(config_class, model_classes)
    config = _pruned_config(config_class)
    for model_class in model_classes:
        if (model_class, config_class) in _PRUNED:
            continue
        pruned = _PRUNED[model_class, config_class] = _new_class(
            f"Pruned{model_class.__name__}",
            (PrunedMixin, model_class),
            {
                "__doc__": f"{model_class.__name__} whose layers are cut to the kept heads and filters.",
                "config_class": config,
                "dense_class": model_class,
            },
        )
        _rename_weights_alike(model_class.__name__, pruned.__name__)
        if auto := auto_class(model_class):
            # by name: a class defined anew takes its own place
            alike = {
                known.__name__: known
                for (dense, of), known in _PRUNED.items()
                if of is config_class and auto_class(dense) is auto
            }
            auto.register(config, tuple(alike.values()) if len(alike) > 1 else pruned, exist_ok=True)
    return [_PRUNED[model_class, config_class] for model_class in model_classes]


def registered(model_type: str, name: str) -> type[PreTrainedModel] | None:
    """The pruned class of this model type that has this name, or whose stock class has it; the latest of several."""
    alike = [known for known in reversed(_PRUNED.values()) if known.config_class.model_type == model_type]
    # the encoder inside a model with a head is of the stock class, and says so when it is saved alone
    ranked = [known for known in alike if known.__name__ == name]
    ranked += [known for known in alike if known.dense_class.__name__ == name]
    return ranked[0] if ranked else None


def _pruned_config(config_class: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The pruned configuration class of `config_class`, made and registered at the first call."""
    if config_class not in _CONFIGS:
        config = _CONFIGS[config_class] = _new_class(
            f"Pruned{config_class.__name__}",
            (PrunedConfigMixin, config_class),
            {
                "__annotations__": {"kept_heads": list | None, "kept_filters": list | None},
                "__doc__": f"{config_class.__name__} with the kept heads and filters, layer by layer; None = all.",
                "model_type": _pruned_type(config_class),
                "kept_heads": None,
                "kept_filters": None,
                "dense_class": config_class,
            },
        )
        AutoConfig.register(config.model_type, config, exist_ok=True)
        _rename_weights_alike(config_class.model_type, config.model_type)
    return _CONFIGS[config_class]


def _pruned_type(config_class: type[PreTrainedConfig]) -> str:
    """Model type of the pruned models of `config_class`: the same whatever was registered before."""
    stock = config_class.model_type
    borrowed = "model_type" not in vars(config_class) or (
        stock in CONFIG_MAPPING and not same_definition(CONFIG_MAPPING[stock], config_class)
    )
    return PRUNED_PREFIX + stock + (f"_{config_class.__name__}" if borrowed else "")


def _check_classes(config_class: type[PreTrainedConfig], model_classes: Sequence[type[PreTrainedModel]]) -> None:
    check_kinds(config_class, model_classes)
    for each in (config_class, *model_classes):
        if issubclass(each, (PrunedConfigMixin, PrunedMixin)):
            raise InvalidInput(f"{each.__name__} is pruned already: expected the class of the dense model")
    check_takes(config_class, model_classes)
    pairs = [(config_class, other) for other in _CONFIGS if _pruned_type(other) == _pruned_type(config_class)]
    models = [*model_classes, *(other for other, of in _PRUNED if of is config_class)]
    pairs += [(each, other) for each in model_classes for other in models if each.__name__ == other.__name__]
    check_names(pairs)


def _rename_weights_alike(stock: str, pruned: str) -> None:
    """transformers saves some families (ViT) under older weight names; ours must follow, or files do not match."""
    if (renaming := get_checkpoint_conversion_mapping(stock)) is not None:
        register_checkpoint_conversion_mapping(pruned, renaming, overwrite=True)


def _new_class(name: str, bases: tuple[type, ...], content: dict) -> type:
    created = type(name, bases, content | {"__module__": __name__, "__qualname__": name})
    known = globals().get(name)
    if known is None or same_definition(known.dense_class, content["dense_class"]):
        globals()[name] = created  # so that the class can be imported
    return created


for _name, _kind in _FAMILIES.items():
    register_pruned(
        getattr(transformers, f"{_name}Config"), [getattr(transformers, _name + ending) for ending in _HEADS[_kind]]
    )
