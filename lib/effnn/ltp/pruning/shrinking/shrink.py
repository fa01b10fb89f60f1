"""Physical removal: from a dense model and masks to a smaller dense model that computes the same.

1. Rows of the query, key and value projections are kept for kept heads.
2. Columns of the output projection are multiplied by their head's scale, and kept for kept heads.
3. Rows of FFN-1 are kept for kept filters; columns of FFN-2 are multiplied by the filter's scale, and kept likewise.
4. Biases of the output projection and of FFN-2 stay, as does everything outside these six maps.

`pad` goes the other way: a stock model of the original sizes, zero where something was removed.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from effnn.base import InvalidInput
from effnn.ltp.pruning.adapters import adapter_for
from effnn.ltp.pruning.masks import Masks, Shape
from effnn.ltp.pruning.shrinking.models import PrunedMixin, is_packed, pruned_class
from effnn.ltp.pruning.shrinking.module_settings import carry_settings

_ROWS = {"query": "heads", "key": "heads", "value": "heads", "fc1": "filters"}
_COLUMNS = {"out": "heads", "fc2": "filters"}
"""Which units the rows or the columns of each map belong to."""


def shrink(model: PreTrainedModel, masks: Masks, share: bool = False) -> PreTrainedModel:
    """A new, smaller model that computes what `model` computes under `masks`; `model` is left as it was.

    Device, dtype, `requires_grad`, and the mode and the settings of every module (dropout, eps, gradient checkpointing)
    are kept. Beyond the small model itself no memory of the size of the weights is used. share: parameters that nothing
    is cut from (embeddings, task head) are not copied but the model's own, for a quick look that is thrown away.
    InvalidInput if the masks do not fit, if the model is pruned already or quantized, or if its class has no pruned
    counterpart.
    """
    adapter = adapter_for(model)
    if is_packed(model):
        raise InvalidInput(
            "shrink takes float weights; found quantized ones: shrink first, then quantize what it returns"
        )
    masks.check(Shape.of(model, adapter))
    small_class = pruned_class(type(model), type(model.config))
    structure = {"kept_heads": masks.kept_heads, "kept_filters": masks.kept_filters}
    if _lacks_pooling(model):
        structure["add_pooling_layer"] = False
    small = _skeleton(small_class, _converted(model.config, small_class.config_class, structure))
    names = {module: name for name, module in model.named_modules()}
    changed: dict[str, Tensor] = {}
    for layer, heads, filters in zip(adapter.layers(model), masks.heads, masks.filters, strict=True):
        parts = adapter.parts(layer)
        scale = {"heads": heads.repeat_interleave(parts.head_size), "filters": filters}
        for part in _ROWS | _COLUMNS:
            linear: nn.Linear = getattr(parts, part)
            weight = linear.weight.detach()
            if part in _ROWS:
                kept = scale[_ROWS[part]].nonzero().flatten().to(weight.device)
                changed[f"{names[linear]}.weight"] = weight[kept]
                if linear.bias is not None:
                    changed[f"{names[linear]}.bias"] = linear.bias.detach()[kept]
            else:
                kept = scale[_COLUMNS[part]].nonzero().flatten().to(weight.device)
                columns = scale[_COLUMNS[part]].to(weight.device)[kept]
                # a product with float32 scales is float32; half precision rounds once, here
                changed[f"{names[linear]}.weight"] = (weight[:, kept] * columns).to(weight.dtype)
    _fill(small, model, changed, share)
    carry_settings(model, small)
    return small


def pad(small: PreTrainedModel) -> PreTrainedModel:
    """A stock model of the original sizes that computes what the pruned model `small` computes.

    Zeros stand where something was removed, so it is no faster than the original was; scales stay folded in.
    """
    if not isinstance(small, PrunedMixin):
        raise InvalidInput(f"pad takes a pruned model, as effnn.ltp.shrink makes it; found a {type(small).__name__}")
    if is_packed(small):
        raise InvalidInput(
            "pad takes float weights; found quantized ones: call pad first, then quantize what it returns"
        )
    options = {"add_pooling_layer": False} if _lacks_pooling(small) else {}
    dense = _skeleton(small.dense_class, _converted(small.config, small.config_class.dense_class, {}), **options)
    adapter = adapter_for(dense)
    names = {module: name for name, module in dense.named_modules()}
    changed: dict[str, Tensor] = {}
    for index, (layer, cut) in enumerate(zip(adapter.layers(dense), adapter.layers(small), strict=True)):
        parts = adapter.parts(layer)
        out = cut.get_submodule(adapter.linear_names["out"]).weight.detach()
        kept = _kept_units(small.config, index, parts.query.out_features, parts.head_size, parts.fc1.out_features)
        for part in _ROWS | _COLUMNS:
            linear = getattr(parts, part)
            unit, axis = (_ROWS[part], 0) if part in _ROWS else (_COLUMNS[part], 1)
            where = kept[unit].to(out.device)
            # a layer without heads has no query, key and value left to read: all zero
            source = cut.get_submodule(adapter.linear_names[part]) if len(where) else None
            for name, parameter in linear.named_parameters():
                if axis == 1 and name == "bias":
                    continue
                zeros = out.new_zeros(parameter.shape)
                if source is not None:
                    zeros.index_copy_(axis, where, source.get_parameter(name).detach())
                changed[f"{names[linear]}.{name}"] = zeros
    _fill(dense, small, changed)
    carry_settings(small, dense)
    return dense


def _kept_units(config: PreTrainedConfig, layer: int, context: int, head_size: int, filters: int) -> dict[str, Tensor]:
    """Indices of the kept context columns (heads) and filters of one layer."""
    columns = torch.arange(context).view(-1, head_size)
    heads = columns if config.kept_heads is None else columns[torch.tensor(config.kept_heads[layer], dtype=torch.long)]
    kept = torch.arange(filters) if config.kept_filters is None else torch.tensor(config.kept_filters[layer])
    return {"heads": heads.flatten(), "filters": kept.long()}


def _converted(config: PreTrainedConfig, config_class: type[PreTrainedConfig], structure: dict) -> PreTrainedConfig:
    """`config` as another class of the same family."""
    gone = ("model_type", "architectures", "transformers_version", "kept_heads", "kept_filters", "add_pooling_layer")
    values = {key: value for key, value in config.to_dict().items() if key not in gone}
    converted = config_class(**values | structure)
    converted._attn_implementation = config._attn_implementation
    return converted


def _skeleton(model_class: type[PreTrainedModel], config: PreTrainedConfig, **options: bool) -> PreTrainedModel:
    """The model without values: on the meta device, as `from_pretrained` builds it."""
    with torch.device("meta"):
        return model_class(config, **options)


def _lacks_pooling(model: PreTrainedModel) -> bool:
    """Whether this is an encoder built with `add_pooling_layer=False`, as it stands inside most models with a head."""
    return hasattr(model, "pooler") and model.pooler is None


def _fill(target: PreTrainedModel, source: PreTrainedModel, changed: dict[str, Tensor], share: bool = False) -> None:
    """Give every parameter and buffer of `target` its tensor: `changed[name]`, else a copy of the source's."""
    origins = dict(source.named_parameters(remove_duplicate=False))
    places = dict(target.named_parameters(remove_duplicate=False))
    if foreign := sorted(set(places) - set(origins) - set(changed)) + sorted(set(origins) - set(places) - set(changed)):
        raise InvalidInput(
            f"the model has or lacks parameters compared with a plain {type(source).__name__}: {foreign[:5]}. "
            "Merge or remove what was added to it first"
        )
    done: dict[int, nn.Parameter] = {}
    for name, place in places.items():
        origin = origins.get(name)
        if name in changed:  # also where it was tied: each place is cut by itself
            parameter = nn.Parameter(changed[name], requires_grad=origin is None or origin.requires_grad)
        elif id(origin) in done:  # what nothing is cut from stays tied
            parameter = done[id(origin)]
        else:
            value = origin.detach() if share else origin.detach().clone()
            parameter = done[id(origin)] = nn.Parameter(value, requires_grad=origin.requires_grad)
        if parameter.shape != place.shape:
            raise InvalidInput(
                f"{name} is of shape {tuple(parameter.shape)}, but its configuration says {tuple(place.shape)}"
            )
        _put(target, name, parameter)
    for name, _ in list(target.named_buffers()):  # of an empty map, in `changed`, or the model's own
        _put(target, name, changed[name] if name in changed else source.get_buffer(name).detach().clone())


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, value)
