"""Masks over heads and filters, and how a model runs with them (Kwon et al. 2022, section 3).

A head mask multiplies a head's context vector, which is the input of the attention output projection; a filter mask
multiplies the activated intermediate vector, the input of the second FFN linear. Both are set by forward pre-hooks, so
nothing is written on the model, its state dict is unchanged, and no `head_mask` argument is needed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from effnn.base import InvalidInput, hooked
from effnn.ltp.pruning.adapters import Adapter, adapter_for


class BudgetTooSmall(InvalidInput):
    """No masks fit the budget; the message names the smallest share that does."""


@dataclass(frozen=True)
class Shape:
    """Sizes of an encoder as far as pruning goes.

    layers: encoder layers.
    heads: attention heads of a layer.
    filters: width of a layer's FFN.
    hidden: hidden size.
    head_size: context columns of a head.
    """

    layers: int
    heads: int
    filters: int
    hidden: int
    head_size: int

    @classmethod
    def of(cls, model: PreTrainedModel, adapter: Adapter | None = None) -> "Shape":
        """Read the sizes off a model; InvalidInput if its layers differ (it was pruned before) or share modules."""
        adapter = adapter or adapter_for(model)
        sizes = []
        layers = adapter.layers(model)
        _check_unshared(layers)
        for layer in layers:
            parts = adapter.parts(layer)
            heads = parts.out.in_features // parts.head_size
            sizes.append((heads, parts.fc1.out_features, parts.out.out_features, parts.head_size))
        if len(set(sizes)) != 1:
            raise InvalidInput(
                "the layers differ in heads or filters: was this model pruned before? Start from a dense one"
            )
        heads, filters, hidden, head_size = sizes[0]
        return cls(len(sizes), heads, filters, hidden, head_size)


def _check_unshared(layers: Sequence[nn.Module]) -> None:
    """InvalidInput if a module with weights stands at two places: it cannot be masked or cut for one of them alone."""
    places: dict[nn.Module, str] = {}
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules(remove_duplicate=False):
            if next(module.parameters(recurse=False), None) is None:
                continue
            place = f"{name} of layer {index}"
            if (other := places.setdefault(module, place)) != place:
                raise InvalidInput(
                    f"{other} and {place} are one module, and pruning cuts every layer by itself: expected a module of "
                    "its own at each place, put a copy.deepcopy of it there"
                )


@dataclass(frozen=True)
class Masks:
    """heads: (L, H), filters: (L, F), float32 on the CPU. Zero = pruned; any other number = kept, scaled by it."""

    heads: Tensor
    filters: Tensor

    @classmethod
    def ones(cls, shape: Shape) -> "Masks":
        """Nothing pruned."""
        return cls(torch.ones(shape.layers, shape.heads), torch.ones(shape.layers, shape.filters))

    @property
    def kept_heads(self) -> list[list[int]]:
        """Indices of the kept heads, layer by layer."""
        return [row.nonzero().flatten().tolist() for row in self.heads]

    @property
    def kept_filters(self) -> list[list[int]]:
        """Indices of the kept filters, layer by layer."""
        return [row.nonzero().flatten().tolist() for row in self.filters]

    @property
    def heads_per_layer(self) -> list[int]:
        """Number of kept heads, layer by layer."""
        return self.heads.count_nonzero(dim=1).tolist()

    @property
    def filters_per_layer(self) -> list[int]:
        """Number of kept filters, layer by layer."""
        return self.filters.count_nonzero(dim=1).tolist()

    def binary(self) -> "Masks":
        """The same structure with every kept unit at 1."""
        return Masks((self.heads != 0).float(), (self.filters != 0).float())

    def check(self, shape: Shape) -> None:
        """InvalidInput unless the masks fit a model of this shape and are finite."""
        expected = (shape.layers, shape.heads), (shape.layers, shape.filters)
        found = tuple(self.heads.shape), tuple(self.filters.shape)
        if found != expected:
            raise InvalidInput(f"masks of shapes {found} do not fit the model: expected heads and filters {expected}")
        if not (self.heads.isfinite().all() and self.filters.isfinite().all()):
            raise InvalidInput("masks must be finite numbers (0 = pruned, 1 = kept as it is)")


@contextmanager
def masked(model: PreTrainedModel, masks: Masks) -> Iterator[PreTrainedModel]:
    """Run `model` with `masks` inside the block: exactly what the pruned model computes, without any speed-up."""
    adapter = adapter_for(model)
    masks.check(Shape.of(model, adapter))

    def set_hooks() -> Iterator[RemovableHandle]:
        for index, layer in enumerate(adapter.layers(model)):
            parts = adapter.parts(layer)
            columns = masks.heads[index].repeat_interleave(parts.head_size)
            yield parts.out.register_forward_pre_hook(_multiply_input(columns))
            yield parts.fc2.register_forward_pre_hook(_multiply_input(masks.filters[index]))

    with hooked(set_hooks()):
        yield model


def _multiply_input(columns: Tensor):
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0] * columns.to(inputs[0]), *inputs[1:])

    return hook
