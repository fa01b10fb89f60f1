"""Cutting the layers of a freshly built encoder to kept heads and filters: sizes only, values come later.

Attention cores infer their number of heads from the width of the projections, so smaller linear maps are enough, except
where no head is left: there the core computes nothing, which is faster, and some export formats do not support empty
attention. Linear maps that lose all rows or all columns become an `EmptyLinear`, since quantizers take the range of
weights and inputs, and the range of an empty tensor gives wrong numbers or ends the process.
"""

import functools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from effnn.base import InvalidInput
from effnn.ltp.pruning.adapters import Adapter


def cut(
    model: PreTrainedModel,
    adapter: Adapter,
    kept_heads: Sequence[Sequence[int]] | None,
    kept_filters: Sequence[Sequence[int]] | None,
) -> None:
    """Resize the linear maps of a freshly built dense model in place; the values that remain mean nothing yet.

    A layer without heads computes no attention, one without filters no FFN: only the bias of its output map is left.
    InvalidInput if the indices do not fit the model.
    """
    layers = adapter.layers(model)
    for what, kept in (("kept_heads", kept_heads), ("kept_filters", kept_filters)):
        if kept is not None and len(kept) != len(layers):
            raise InvalidInput(
                f"{what} of the configuration: expected {len(layers)} lists, one per layer; found {len(kept)}"
            )
    for index, layer in enumerate(layers):
        parts = adapter.parts(layer)
        sizes: dict[str, dict[str, int]] = {}
        if kept_heads is not None:
            heads = _checked(kept_heads[index], parts.query.out_features // parts.head_size, f"kept_heads[{index}]")
            width = heads * parts.head_size
            sizes |= {"out": {"columns": width}}
            if heads == 0:
                _remove_attention(layer, adapter)
            else:
                sizes |= {part: {"rows": width} for part in ("query", "key", "value")}
        if kept_filters is not None:
            filters = _checked(kept_filters[index], parts.fc1.out_features, f"kept_filters[{index}]")
            sizes |= {"fc1": {"rows": filters}, "fc2": {"columns": filters}}
        for part, size in sizes.items():
            linear = getattr(parts, part)
            _resize(linear, **size)
            if linear.weight.numel() == 0:
                layer.set_submodule(adapter.linear_names[part], EmptyLinear(linear), strict=True)


class EmptyLinear(nn.Module):
    """What a linear map without inputs or without outputs computes: its bias, or nothing.

    Not a Linear, so that quantizers, which go by the type, leave it alone. Its empty tensors are buffers: a state dict
    has the keys and shapes of the linear map, and nothing empty is trained. weight: (outputs, inputs), one of them 0;
    the result is (..., outputs).
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", linear.weight.detach())
        if linear.bias is None or self.out_features:
            self.register_parameter("bias", linear.bias)
        else:
            self.register_buffer("bias", linear.bias.detach())
        self.train(linear.training)

    def forward(self, inputs: Tensor) -> Tensor:
        # of the graph, so that what comes before it has a gradient: zero
        nothing = inputs[..., :0]
        if self.out_features == 0:
            return nothing
        zeros = functional.pad(nothing, (0, self.out_features))
        return zeros if self.bias is None else zeros + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class NoHeads:
    """Mixed into the attention class of a layer that has no head left: what remains is the output projection's bias.

    It stays an instance of that class, so that `output_attentions` still has one entry per layer: maps of 0 heads.
    """

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        rows, length, _ = hidden_states.shape
        context = hidden_states[..., :0]  # of the graph, so that a normalisation before it has a gradient: zero
        out = self.get_submodule(self.out_path) if self.out_path else None
        return (out(context) if out else context), hidden_states.new_empty((rows, 0, length, length))

    def __reduce__(self):
        return _empty_without_heads, (type(self).__mro__[2],), self.__dict__


@functools.cache
def _without_heads(attention_class: type[nn.Module]) -> type[nn.Module]:
    return type(f"{attention_class.__name__}WithoutHeads", (NoHeads, attention_class), {})


def _empty_without_heads(attention_class: type[nn.Module]) -> nn.Module:
    found = _without_heads(attention_class)
    return found.__new__(found)


def _remove_attention(layer: nn.Module, adapter: Adapter) -> None:
    attention = layer.get_submodule(adapter.attention)
    inside = adapter.attention + "."
    for part in ("query", "key", "value"):
        setattr(attention, adapter.linear_names[part].removeprefix(inside), None)
    out = adapter.linear_names["out"]
    # in some families the attention module applies the output projection itself, in others its parent does
    attention.out_path = out.removeprefix(inside) if out.startswith(inside) else None
    attention.__class__ = _without_heads(type(attention))


def _resize(linear: nn.Linear, rows: int | None = None, columns: int | None = None) -> None:
    linear.weight = nn.Parameter(linear.weight.detach()[:rows, :columns].clone())
    linear.out_features, linear.in_features = linear.weight.shape
    if rows is not None and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[:rows].clone())


def _checked(kept: Sequence[int], width: int, name: str) -> int:
    if list(kept) != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < width):
        raise InvalidInput(f"{name} of the configuration: expected ascending indices below {width}, found {list(kept)}")
    return len(kept)
