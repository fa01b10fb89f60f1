"""One encoder layer with only its kept heads and filters, its attention block and its FFN block run one by one.

Mask tuning needs the two residual sums of a layer and the inputs of its two output projections, at the cost of the
kept units only. `SlicedLayer` holds the cut weights of one layer and computes exactly these; it is made, used and
dropped layer by layer, so no second model is ever in memory. Shapes: B rows, S tokens, d hidden, k kept heads, d_h head
size, f kept filters.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from effnn.base import InvalidInput
from effnn.ltp.pruning.adapters import LayerParts


@dataclass(frozen=True)
class SlicedLayer:
    """Weights of the kept units, each with its bias or None.

    query: (k d_h, d).
    key: (k d_h, d).
    value: (k d_h, d).
    out: (d, k d_h).
    fc1: (f, d).
    fc2: (d, f).
    parts: the whole layer, of which the activation and the normalisations are used.
    """

    query: tuple[Tensor, Tensor | None]
    key: tuple[Tensor, Tensor | None]
    value: tuple[Tensor, Tensor | None]
    out: tuple[Tensor, Tensor | None]
    fc1: tuple[Tensor, Tensor | None]
    fc2: tuple[Tensor, Tensor | None]
    parts: LayerParts

    @classmethod
    def cut(cls, parts: LayerParts, heads: Tensor, filters: Tensor) -> "SlicedLayer":
        """Keep the units where the masks (H,) and (F,) are not zero, scaled by them."""
        device = parts.out.weight.device
        columns = heads.to(device).repeat_interleave(parts.head_size)
        filters = filters.to(device)
        head_index, filter_index = columns.nonzero().flatten(), filters.nonzero().flatten()
        return cls(
            query=_rows(parts.query, head_index),
            key=_rows(parts.key, head_index),
            value=_rows(parts.value, head_index),
            out=_columns(parts.out, head_index, columns),
            fc1=_rows(parts.fc1, filter_index),
            fc2=_columns(parts.fc2, filter_index, filters),
            parts=parts,
        )

    @property
    def heads(self) -> int:
        """Number of kept heads."""
        return self.out[0].shape[1] // self.parts.head_size

    @property
    def filters(self) -> int:
        """Number of kept filters."""
        return self.fc2[0].shape[1]

    def scaled_heads(self, scale: Tensor) -> "SlicedLayer":
        """The layer with its kept heads multiplied by `scale` (k,)."""
        columns = scale.to(self.out[0]).repeat_interleave(self.parts.head_size)
        return replace(self, out=(self.out[0] * columns, self.out[1]))

    def scaled_filters(self, scale: Tensor) -> "SlicedLayer":
        """The layer with its kept filters multiplied by `scale` (f,)."""
        return replace(self, fc2=(self.fc2[0] * scale.to(self.fc2[0]), self.fc2[1]))

    def context(self, states: Tensor, attention_mask: Tensor | None, tokens: int | None = None) -> Tensor:
        """Input of the attention output projection, (B, S, k d_h); only for the first `tokens` positions if given."""
        x = _norm(self.parts.norm_before_attention, states)
        if self.heads == 0:
            return x.new_empty(x.shape[0], tokens or x.shape[1], 0)
        queries = self._split(functional.linear(x[:, :tokens], *self.query))
        keys, values = (self._split(functional.linear(x, *linear)) for linear in (self.key, self.value))
        mask = sdpa_mask(attention_mask)
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., :tokens, :]
        result = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return result.transpose(1, 2).flatten(2)

    def attention_sum(self, states: Tensor, context: Tensor) -> Tensor:
        """Residual sum of the attention block, (B, S, d): input + projection + bias."""
        return states + functional.linear(context, *self.out)

    def middle(self, attention_sum: Tensor) -> Tensor:
        """What enters the FFN block, (B, S, d)."""
        return _norm(self.parts.norm_after_attention, attention_sum)

    def activation(self, middle: Tensor) -> Tensor:
        """Input of FFN-2, (B, S, f)."""
        return self.parts.activation(functional.linear(_norm(self.parts.norm_before_ffn, middle), *self.fc1))

    def ffn_sum(self, middle: Tensor, activation: Tensor) -> Tensor:
        """Residual sum of the FFN block, (B, S, d)."""
        return middle + functional.linear(activation, *self.fc2)

    def next_states(self, ffn_sum: Tensor) -> Tensor:
        """What enters the next layer, (B, S, d)."""
        return _norm(self.parts.norm_after_ffn, ffn_sum)

    def _split(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.heads, self.parts.head_size)).transpose(1, 2)


def sdpa_mask(attention_mask: Tensor | None) -> Tensor | None:
    """The mask that a model passes to its layers, in a form that torch's attention takes.

    Models pass None, a boolean or additive (B, 1, S or 1, S) tensor, or with flash attention the plain (B, S) mask.
    """
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise InvalidInput(
            f"mask tuning cannot read a mask of type {type(attention_mask).__name__}: "
            'call model.set_attn_implementation("sdpa") first'
        )
    if attention_mask is not None and attention_mask.dim() == 2:
        return attention_mask.bool()[:, None, None, :]
    return attention_mask


def _norm(module: nn.Module | None, states: Tensor) -> Tensor:
    return states if module is None else module(states)


def _rows(linear: nn.Linear, index: Tensor) -> tuple[Tensor, Tensor | None]:
    whole = len(index) == linear.out_features
    bias = linear.bias if linear.bias is None or whole else linear.bias[index]
    return (linear.weight if whole else linear.weight[index]).detach(), None if bias is None else bias.detach()


def _columns(linear: nn.Linear, index: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    weight = linear.weight.detach().index_select(1, index) * scale[index].to(linear.weight)
    return weight, None if linear.bias is None else linear.bias.detach()


def run_encoder(layers: list[SlicedLayer], states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Hidden states after the last of `layers`, (B, S, d): the plain use of the pieces above."""
    with torch.no_grad():
        for layer in layers:
            middle = layer.middle(layer.attention_sum(states, layer.context(states, attention_mask)))
            states = layer.next_states(layer.ffn_sum(middle, layer.activation(middle)))
    return states
