"""The diagonal Fisher information of the masks, and the gradients that it is made of (Kwon et al. 2022, section 4.1).

The importance of a head or a filter is its entry on the diagonal of the empirical Fisher matrix, the sum of squared
gradients of the loss with respect to its mask entry: `fisher_diagonal`. With all masks at one, such a gradient is the
sum over positions of activation times its gradient, so no mask is ever multiplied: an identity node in front of the
attention output projection and of FFN-2 reads both during the backward pass, sequence by sequence (`probes`). Gradients
of single rows therefore cost nothing over gradients of mini-batch means.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from effnn.base import InvalidInput, hooked
from effnn.ltp.pruning.adapters import Adapter
from effnn.ltp.pruning.calibration.batches import sequences_per_row
from effnn.ltp.pruning.masks import Shape

PIECE = 1 << 18
"""Numbers multiplied at once on a CPU: 1 MB in float32, a part of a core's cache."""


def fisher_diagonal(gradients: Tensor) -> Tensor:
    """Sum of squared gradients, (N, L, units) -> (L, units) float64; N counts mini-batches, or rows."""
    return gradients.square().sum(0, dtype=torch.float64)


class _Probe(torch.autograd.Function):
    """Identity; in the backward pass hands activation and gradient to `sink`. `anchor` lets the graph begin here."""

    @staticmethod
    def forward(ctx, activation: Tensor, anchor: Tensor, sink) -> Tensor:
        ctx.save_for_backward(activation)
        ctx.sink = sink
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (activation,) = ctx.saved_tensors
        ctx.sink(activation, gradient)
        return (gradient if ctx.needs_input_grad[0] else None), torch.zeros(1, device=gradient.device), None


class MaskGradients:
    """Gradients of the masks for one mini-batch, sequence by sequence; the probes fill them in as it passes.

    heads: per layer (B, H), None where the loss does not depend on it.
    filters: per layer (B, F), likewise.
    passes: hidden states and mask that enter the first layer, and live tokens, of every forward pass of the encoder.
    first_only: whether the loss depends on position 0 of the last layer only.
    first_state: output of the last layer there, (B, 1, d).
    """

    def __init__(self, shape: Shape):
        self.shape = shape
        self.heads: list[Tensor | None] = []
        self.filters: list[Tensor | None] = []
        self.passes: list[tuple[Tensor, Tensor | None, Tensor]] = []
        self.padding_mask: Tensor | None = None
        self.first_only = True
        self.first_state: Tensor | None = None

    def start(self) -> None:
        """A mini-batch begins."""
        self.heads = [None] * self.shape.layers
        self.filters = [None] * self.shape.layers
        self.passes, self.padding_mask, self.first_only, self.first_state = [], None, True, None

    def enter(self, states: Tensor, mask: Tensor | None) -> None:
        """A forward pass begins: what enters the first layer."""
        self.passes.append((states.detach(), mask, _live_tokens(self.padding_mask, states)))
        self.padding_mask = None

    def check(self, loss: Tensor, where: str) -> None:
        """InvalidInput unless the loss is a finite number that came from the model."""
        if not self.passes or not loss.requires_grad:
            raise InvalidInput(
                f"no gradient leads from the loss of {where} to the model's encoder: loss(model, batch) must return "
                "what it computed from the model's output, without torch.no_grad, detach or item"
            )
        if not torch.isfinite(loss):
            raise InvalidInput(
                f"the loss of {where} is {loss.item()}: check the inputs and weights for "
                "NaN or infinity, and whether the number format of the model is wide enough"
            )

    def head_sink(self, layer: int):
        """What the probe in front of the output projection of `layer` calls."""

        def sink(activation: Tensor, gradient: Tensor) -> None:
            products = _summed_products(activation, gradient)
            _add_at(self.heads, layer, products.unflatten(-1, (self.shape.heads, self.shape.head_size)).sum(-1).cpu())
            if layer == self.shape.layers - 1 and self.first_only:
                self.first_only = not bool(gradient[:, 1:].any())

        return sink

    def filter_sink(self, layer: int):
        """What the probe in front of FFN-2 of `layer` calls."""

        def sink(activation: Tensor, gradient: Tensor) -> None:
            _add_at(self.filters, layer, _summed_products(activation, gradient).cpu())

        return sink

    def gradients(self, batch: object, label_counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gradients of the masks, zero for a layer that the loss does not depend on.

        label_counts: None for the gradient of the mini-batch mean, (1, L, H) and (1, L, F); the labels of each row,
        (B,), for that of each row's own mean, (B, L, H) and (B, L, F).
        """
        found = _stacked(self.heads, self.shape.heads), _stacked(self.filters, self.shape.filters)
        if label_counts is None:
            return found[0].sum(0, keepdim=True), found[1].sum(0, keepdim=True)
        # what was collected is the gradient of a mean over all labels; a row's own mean is over its own labels
        weight = torch.where(label_counts > 0, label_counts.sum() / label_counts.clamp(min=1), 0)[:, None, None]
        heads, filters = (_by_row(sequences, batch, len(label_counts)) * weight for sequences in found)
        return heads, filters


def _by_row(found: Tensor, batch: object, rows: int) -> Tensor:
    """Gradients (B, L, n) of sequences, summed over those of each row: (rows, L, n)."""
    several = sequences_per_row(batch)
    if len(found) == rows and several == 1:
        return found
    if len(found) != rows * several:
        raise InvalidInput(
            f'fisher="sample" needs one sequence per row: the batch has {rows} rows, and loss(model, batch) ran the '
            f'model on {len(found)}. Call the model once for each input of a row, or pass fisher="batch"'
        )
    return found.unflatten(0, (rows, several)).sum(1)


def _summed_products(activation: Tensor, gradient: Tensor) -> Tensor:
    """Sum over positions of activation times gradient, (B, S, n) -> (B, n), in float32."""
    if activation.device.type != "cpu" or activation.numel() == 0:
        return (activation.float() * gradient.float()).sum(1)
    # a few rows at a time: their product stays in the cache, where that of all rows is written to memory and read again
    rows = max(1, PIECE * len(activation) // activation.numel())
    pieces = zip(activation.split(rows), gradient.split(rows), strict=True)
    return torch.cat([(a.float() * g.float()).sum(1) for a, g in pieces])


def _add_at(values: list[Tensor | None], place: int, value: Tensor) -> None:
    """Add up: an FFN run in chunks of the sequence passes a probe once per chunk, a model called twice once per call.

    Calls of different numbers of sequences have their sum in common only.
    """
    other = values[place]
    if other is None:
        values[place] = value
    elif len(other) == len(value):
        values[place] = other + value
    else:
        values[place] = other.sum(0, keepdim=True) + value.sum(0, keepdim=True)


def _stacked(values: list[Tensor | None], width: int) -> Tensor:
    sizes = {len(value) for value in values if value is not None}
    if len(sizes) > 1:  # layers that were run on different numbers of sequences
        values = [value if value is None else value.sum(0, keepdim=True) for value in values]
    size = 1 if len(sizes) > 1 else max(sizes, default=1)
    return torch.stack([torch.zeros(size, width) if value is None else value for value in values], 1)


@contextmanager
def probes(model: PreTrainedModel, adapter: Adapter, collected: MaskGradients) -> Iterator[Tensor]:
    """Hooks that fill `collected`; yields the tensor at which backward passes may end."""
    device = next(model.parameters()).device
    anchor = torch.zeros(1, device=device, requires_grad=True)
    encoder = model.base_model
    signature = inspect.signature(encoder.forward)

    def probe(sink):
        return lambda module, inputs: (_Probe.apply(inputs[0], anchor, sink), *inputs[1:])

    def keep_padding_mask(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = signature.bind_partial(*args, **kwargs).arguments
        collected.padding_mask = given.get("attention_mask", given.get("kwargs", {}).get("attention_mask"))

    def keep_first_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        states = kwargs.get("hidden_states", args[0] if args else None)
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        collected.enter(states, mask)

    def keep_first_state(module: nn.Module, args: tuple, output: Tensor) -> None:
        # the layers of a family of your own may return a tuple; they are run again for the held-out loss
        collected.first_state = output[:, :1].detach() if isinstance(output, Tensor) else None

    def set_hooks() -> Iterator[RemovableHandle]:
        layers = adapter.layers(model)
        yield encoder.register_forward_pre_hook(keep_padding_mask, with_kwargs=True)
        yield layers[0].register_forward_pre_hook(keep_first_input, with_kwargs=True)
        yield layers[-1].register_forward_hook(keep_first_state)
        for index, layer in enumerate(layers):
            parts = adapter.parts(layer)
            yield parts.out.register_forward_pre_hook(probe(collected.head_sink(index)))
            yield parts.fc2.register_forward_pre_hook(probe(collected.filter_sink(index)))

    with hooked(set_hooks()):
        yield anchor


def _live_tokens(mask: Tensor | None, states: Tensor) -> Tensor:
    """(B, S) bool: the positions that are not padding, by the attention mask that the encoder was called with.

    The mask is (B, S), or (B, ..., queries, S), boolean or added to the scores; a position is live if any query may
    attend to it. All are live without a mask.
    """
    rows, length = states.shape[:2]
    if isinstance(mask, Tensor) and mask.shape[-1] == length:
        live = mask.bool() if mask.dim() == 2 or not mask.is_floating_point() else mask > -1e3
        live = live.flatten(1, -2).any(1) if live.dim() > 2 else live
        if len(live) in (1, rows):
            return live.expand(rows, length).to(states.device)
    return torch.ones(rows, length, dtype=torch.bool, device=states.device)
