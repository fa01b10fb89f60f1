"""Growth in depth by a whole factor: every layer gets factor - 1 new ones (Shen et al. 2022; stacking).

Where the new layers go (order):
  interleave   behind their source layer: i -> i * factor, new ones i * factor + 1, ...;
  append       on top: the whole stack again, factor - 1 times.
What they hold (init):
  zero_proj    a copy of the source layer with both projections to the residual stream at zero. The loss does not change
               by a single bit, and the zero projections have gradients at once;
  ln_zero      the source's matrices, every 1-D tensor zero. Bit-exact; no matrix has a gradient at first;
  identity     matrices the identity (cut off where they are rectangular), every 1-D tensor zero. Bit-exact; no matrix
               has a gradient at first. The paper describes this one; its released code copies layers instead and resets
               the moments of the old ones;
  copy         a copy of the source layer (progressive stacking; G_stack with append). Changes the loss.

The small model says nothing about the gradients of new layers, so their moments start at zero with step 0: AdamW then
corrects its bias for the new layers alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from effnn.base import InvalidInput
from effnn.staged.growth.roles import Kind, Role, in_layer, layer_of

ORDERS = ("interleave", "append")
INITS = ("zero_proj", "ln_zero", "identity", "copy")


@dataclass(frozen=True)
class Layout:
    """Where the layers of a grown model come from.

    sources: for every layer of the grown model, the index of the small layer that it comes from. new: whether it was
    added.
    """

    sources: tuple[int, ...]
    new: tuple[bool, ...]

    @classmethod
    def of(cls, layers: int, factor: int, order: str) -> "Layout":
        """The layout of `layers` layers grown by `factor`."""
        if order == "interleave":
            return cls(
                tuple(i for i in range(layers) for _ in range(factor)),
                tuple(bool(copy) for _ in range(layers) for copy in range(factor)),
            )
        return cls(tuple(range(layers)) * factor, tuple(index >= layers for index in range(layers * factor)))

    def places(self, name: str) -> list[tuple[str, bool]]:
        """Where a small tensor goes: (name in the grown model, whether that is a new layer), bottom up."""
        layer = layer_of(name)
        if layer is None:
            return [(name, False)]
        return [(in_layer(name, i), self.new[i]) for i, source in enumerate(self.sources) if source == layer]

    def source(self, name: str) -> str:
        """The name in the small model of a tensor or module of the grown one."""
        layer = layer_of(name)
        return name if layer is None else in_layer(name, self.sources[layer])


def new_value(wide: Tensor, role: Role, init: str) -> Tensor:
    """The value of a new layer's tensor; wide: that of its source layer, at the grown width."""
    if init == "copy" or (init == "zero_proj" and not role.ends_branch):
        return wide.clone()
    if init == "ln_zero" and role.kind is Kind.MATRIX:
        return wide.clone()
    value = torch.zeros_like(wide)
    if init == "identity" and role.kind is Kind.MATRIX:
        for part in value.view(wide.shape[0], role.parts, -1).unbind(1):
            part.fill_diagonal_(1)
    return value


def check_depth(model: GPT2LMHeadModel, factor: int, init: str) -> None:
    """InvalidInput for a model that cannot grow in depth by `factor` with new layers of this `init`."""
    if factor == 1:
        return
    if model.config.scale_attn_by_inverse_layer_idx:
        raise InvalidInput(
            "config.scale_attn_by_inverse_layer_idx is set: attention scores depend on the index of their layer, which "
            "growth in depth changes. Such a model can grow in width only"
        )
    act = model.transformer.h[0].mlp.act
    if init in ("identity", "ln_zero") and float(act(torch.zeros(1))) != 0:
        raise InvalidInput(
            f"init={init!r} needs an activation that is 0 at 0, and {model.config.activation_function} is not: "
            "take init='zero_proj'"
        )
