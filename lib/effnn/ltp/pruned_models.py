"""Pruned encoders as transformers models: stock classes whose layers differ in heads and filters (ltp.md A.10).

Each stock class gets a subclass with "Pruned" before its name (PrunedBertForSequenceClassification, ...) and each
configuration one that holds which heads and filters of the dense model were kept. The sizes are read from it when the
model is built, so `save_pretrained`, `from_pretrained` and the Auto classes work. Importing this file registers them.
How a layer is cut is in cut.py, how a dense model becomes one of these in shrink.py.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from effnn.base import InvalidInput
from effnn.ltp.adapters import PRUNED_PREFIX, Adapter, adapter_for_type
from effnn.ltp.cut import cut
from effnn.ltp.saving import CONFIG, whole_folder

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
_PRUNED: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}
"""Stock class -> pruned class."""


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
        """As in transformers, but the folder is whole or refuses to load whenever the process is killed."""
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with whole_folder(save_directory) as folder:
            super().save_pretrained(folder, *args, **kwargs)


def adapter_of(model: PreTrainedModel) -> Adapter:
    """The adapter of the dense model that a pruned one was made from."""
    return adapter_for_type(model.config.model_type.removeprefix(PRUNED_PREFIX))


def pruned_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The pruned class that belongs to a stock class; InvalidInput lists the ones there are."""
    if model_class in _PRUNED:
        return _PRUNED[model_class]
    known = ", ".join(sorted(known.__name__ for known in _PRUNED))
    raise InvalidInput(
        f"there is no pruned class for {model_class.__name__}. Expected one of {known}; "
        "for another class call effnn.ltp.register_pruned first"
    )


def register_pruned(
    config_class: type[PreTrainedConfig], model_classes: Sequence[type[PreTrainedModel]]
) -> list[type[PreTrainedModel]]:
    """Make pruned classes of stock classes and register them with the Auto classes; returns them.

    For a family of one's own, after `register_adapter`. A model class is registered with the Auto class of its ending
    (Model, ForSequenceClassification, ...); one with another ending loads through `load_pruned` only. Call it in every
    process that loads such a model.
    """
    config = _new_class(
        f"Pruned{config_class.__name__}",
        (config_class,),
        {
            "__annotations__": {"kept_heads": list | None, "kept_filters": list | None},
            "__doc__": f"{config_class.__name__} with the kept heads and filters, layer by layer; None = all of them.",
            "model_type": PRUNED_PREFIX + config_class.model_type,
            "kept_heads": None,
            "kept_filters": None,
            "dense_class": config_class,
        },
    )
    AutoConfig.register(config.model_type, config, exist_ok=True)
    created = []
    for model_class in model_classes:
        pruned = _new_class(
            f"Pruned{model_class.__name__}",
            (PrunedMixin, model_class),
            {
                "__doc__": f"{model_class.__name__} whose layers are cut to the kept heads and filters.",
                "config_class": config,
                "dense_class": model_class,
            },
        )
        ending = next((end for ends in _HEADS.values() for end in ends if model_class.__name__.endswith(end)), None)
        if ending is not None:
            getattr(transformers, "Auto" + ("" if ending == "Model" else "Model") + ending).register(
                config, pruned, exist_ok=True
            )
        _rename_weights_alike(model_class.__name__, pruned.__name__)
        _PRUNED[model_class] = pruned
        created.append(pruned)
    _rename_weights_alike(config_class.model_type, config.model_type)
    return created


def load_pruned(folder: str | Path, **options) -> PreTrainedModel:
    """The pruned model saved in `folder`, in eval mode, with the class it was saved from.

    options go to `from_pretrained` (dtype, device_map, attn_implementation, ...). InvalidInput if the folder holds
    another kind of model, or is half written.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise InvalidInput(
            f"{folder} holds no {CONFIG}: expected the folder of a saved pruned model (or it is half written)"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model_type, names = str(config.get("model_type")), config.get("architectures") or [""]
    except (ValueError, AttributeError) as error:
        raise InvalidInput(f"{path} cannot be read as a model configuration ({error}); save the model again") from error
    if not model_type.startswith(PRUNED_PREFIX):
        raise InvalidInput(
            f"{folder} holds a model of type {model_type!r}, not a pruned one ({PRUNED_PREFIX}...). "
            "Load it with transformers; effnn.ltp.shrink(model, masks) makes a pruned model"
        )
    # the encoder inside a model with a head is of the stock class, and says so when it is saved alone
    found = (known for known in _PRUNED.values() if names[0] in (known.__name__, known.dense_class.__name__))
    model_class = next(found, None)
    if model_class is None or model_class.config_class.model_type != model_type:
        raise InvalidInput(
            f"{folder} holds a {names[0]} ({model_type}), which is not registered: see effnn.ltp.register_pruned"
        )
    try:
        model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    except InvalidInput:
        raise
    except Exception as error:  # safetensors, OSError, RuntimeError: all mean that the files do not fit together
        raise InvalidInput(
            f"the weights in {folder} are missing, damaged or do not fit its {CONFIG}: {error}"
        ) from error
    wrong = {kind: sorted(keys) for kind, keys in info.items() if keys and kind in ("missing_keys", "unexpected_keys")}
    if wrong:
        raise InvalidInput(f"the weights in {folder} do not fit its {CONFIG}: {wrong}")
    return model


def _rename_weights_alike(stock: str, pruned: str) -> None:
    """transformers saves some families (ViT) under older weight names; ours must follow, or files do not match."""
    if (renaming := get_checkpoint_conversion_mapping(stock)) is not None:
        register_checkpoint_conversion_mapping(pruned, renaming, overwrite=True)


def _new_class(name: str, bases: tuple[type, ...], content: dict) -> type:
    created = type(name, bases, content | {"__module__": __name__, "__qualname__": name})
    globals()[name] = created  # so that instances can be pickled
    return created


for _name, _kind in _FAMILIES.items():
    register_pruned(
        getattr(transformers, f"{_name}Config"), [getattr(transformers, _name + ending) for ending in _HEADS[_kind]]
    )
