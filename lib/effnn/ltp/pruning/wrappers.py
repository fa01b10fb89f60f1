"""Models that are not plain transformers models: what each is called, and how to get the plain model from it.

Third-party classes are recognised by class and module name, so that none of them needs to be installed.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

_UNWRAPPED_BY = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "DeepSpeedEngine": "module",
    "OptimizedModule": "_orig_mod",
}
"""Classes that hold the whole model unchanged, and the attribute in which they hold it."""

_ADDED_WEIGHTS = {
    "lora_": "PEFT (LoRA) adapters inside",
    "adapter": "adapter layers inside",
    "_orig_mod.": "parts wrapped by torch.compile",
    "parametrizations.": "parametrized weights (torch.nn.utils.parametrize)",
    "weight_orig": "weights masked by torch.nn.utils.prune",
}
_WAYS_OUT = {
    "lora_": "merge them into the weights first: merge_and_unload() of the PeftModel gives the plain model back (of an "
    "adapter that was saved alone: PeftModel.from_pretrained(dense_model, folder).merge_and_unload())",
    "adapter": "prune the model without them, or merge them into its weights first",
    "_orig_mod.": "prune the model with its own parts (part._orig_mod) and compile the result",
    "parametrizations.": "make them plain first: torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')",
    "weight_orig": "make them plain first: torch.nn.utils.prune.remove(module, 'weight')",
}


def refusal(model: object, covered: Callable[[PreTrainedModel], bool]) -> str | None:
    """Why `model` is not a plain transformers model, and the way to one; None if it is one.

    covered: whether an adapter covers a transformers model.
    """
    name = type(model).__name__
    if isinstance(model, type):
        return f"{model.__name__} is a class: pass a model, for example {model.__name__}.from_pretrained(folder)"
    if isinstance(model, (str, bytes)) or hasattr(model, "__fspath__"):
        return f"{model!r} is a name or a path: load the model first, AutoModelFor....from_pretrained({model!r})"
    origin = next((base for base in type(model).__mro__ if _is_peft(base)), None)
    if origin is not None:
        return (
            f"{name} is a model with PEFT adapters: merge them into the weights first, "
            "model = model.merge_and_unload(), and prune that"
        )
    for base in type(model).__mro__:
        attribute = _UNWRAPPED_BY.get(base.__name__)
        if attribute and isinstance(getattr(model, attribute, None), nn.Module):
            inner = type(getattr(model, attribute)).__name__
            return f"{name} is a wrapper around the model: pass model.{attribute} ({inner}) instead"
    if isinstance(model, nn.Module) and (sharded := _sharding(model)):
        return f"{name} has weights that are {sharded}: gather them into a plain model in one process first"
    if isinstance(model, PreTrainedModel):
        return _quantized(model, name)
    inner = getattr(model, "model", None)
    if not isinstance(model, nn.Module):
        if isinstance(inner, PreTrainedModel):
            return f"{name} is not a model but holds one: pass its .model ({type(inner).__name__}) instead"
        return f"expected a transformers model (PreTrainedModel), found {name}"
    if found := _encoders(model, covered):
        path, encoder = found[0]
        several = f" (it holds {len(found)}: {', '.join(path for path, _ in found)})" if len(found) > 1 else ""
        more = (
            "with a loss=... of your own that does what the module does around it"
            if encoder.base_model is encoder
            else f"a {type(encoder).__name__} with a loss of its own"
        )
        return (
            f"{name} is a module of your own around a transformers encoder{several}: pass {_access(path)}, {more}, and "
            "put result.materialize() in its place afterwards"
        )
    return f"no adapter covers {name}: it is not a transformers model (PreTrainedModel) and holds none that one covers"


def inner_encoder(model: nn.Module, covered: Callable[[PreTrainedModel], bool]) -> str | None:
    """How to get at the first encoder inside `model`, as code; None if there is none."""
    found = _encoders(model, covered)
    return f"{_access(found[0][0])} ({type(found[0][1]).__name__})" if found else None


def linear_refusal(name: str, part: str, linear: object) -> str | None:
    """Why one of a layer's six linear maps cannot be cut, and the way out; None if it can. name: of the model."""
    kind = type(linear)
    if kind is nn.Linear and linear.weight.is_floating_point() and type(linear.weight.data) is torch.Tensor:
        return None
    if _is_peft(kind) or any("lora" in child for child, _ in getattr(linear, "named_children", list)()):
        return f"{name} has {_ADDED_WEIGHTS['lora_']} ({part} is a {kind.__name__}): {_WAYS_OUT['lora_']}"
    if isinstance(linear, nn.Module) and hasattr(linear, "parametrizations"):
        return f"{name} has {_ADDED_WEIGHTS['parametrizations.']} ({part}): {_WAYS_OUT['parametrizations.']}"
    module = f"{kind.__module__}.{kind.__name__}"
    data = getattr(linear, "weight", None)
    tensor = type(getattr(data, "data", data)).__module__ if data is not None else ""
    if any(word in module.lower() for word in ("quant", "bitsandbytes", "8bit", "4bit", "torchao", "gptq", "awq")) or (
        "torchao" in tensor or (isinstance(data, torch.Tensor) and not data.is_floating_point())
    ):
        return (
            f"{name} is quantized ({part} is a {module}): prune the model in floating point first, and quantize what "
            "result.materialize() gives"
        )
    if not isinstance(linear, nn.Linear):
        return (
            f"{part} of {name} is a {module}, not a torch.nn.Linear: put plain linear layers with the same weights back"
        )
    return None


def added_weights(names: list[str]) -> str | None:
    """What parameters of these names were added by, and the way out; None if they are not known."""
    for mark, what in _ADDED_WEIGHTS.items():
        if any(mark in name.lower() for name in names):
            return f"{what} ({names[0]}): {_WAYS_OUT[mark]}"
    return None


def _is_peft(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "peft" or kind.__name__.startswith("PeftModel")


def _sharding(model: nn.Module) -> str | None:
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        return "sharded by FullyShardedDataParallel"
    if any(type(parameter.data).__name__ == "DTensor" for parameter in model.parameters()):
        return "distributed tensors (DTensor)"
    return None


def _quantized(model: PreTrainedModel, name: str) -> str | None:
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        return (
            f"{name} was loaded quantized: load it in floating point, prune it, and quantize what "
            "result.materialize() gives"
        )
    return None


def _encoders(model: nn.Module, covered: Callable[[PreTrainedModel], bool]) -> list[tuple[str, PreTrainedModel]]:
    """The outermost covered transformers models inside `model`, and their paths."""
    found: list[tuple[str, PreTrainedModel]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(outer + ".") for outer, _ in found)
        if path and not inside and isinstance(module, PreTrainedModel) and covered(module):
            found.append((path, module))
    return found


def _access(path: str) -> str:
    plain = all(part.isidentifier() for part in path.split("."))
    return f"model.{path}" if plain else f"model.get_submodule({path!r})"
