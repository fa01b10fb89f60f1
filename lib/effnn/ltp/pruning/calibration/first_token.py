"""Running the last layer for position 0 only, where nothing else of it is read.

The head of a classifier reads position 0 of the last hidden states. After the attention of the last layer, the gradient
of all other positions is then zero, so the calibration pass leaves them out, forward and backward. For the dense loss
of the same rows, position 0 of the last layer's output is all that is needed later on. All of this ends with its `with`
block; the model is not changed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from effnn.base import hooked
from effnn.ltp.pruning.adapters import Adapter


@contextmanager
def first_token_only(adapter: Adapter, layer: nn.Module) -> Iterator[None]:
    """Inside the block `layer`, the last one, computes position 0 only, from the output projection on.

    The residual sum of the attention block has all S positions again, by broadcasting; all but the first are wrong
    there and are cut off in front of the FFN. The output of the layer is (B, 1, d), or (B, S, d) with a first position
    that is right (pre-norm). A layer that cuts its FFN's input into chunks of a fixed length is left as it is.
    """
    if getattr(layer, "chunk_size_feed_forward", 0) > 1:
        yield
        return
    parts = adapter.parts(layer)

    def first_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][:, :1], *inputs[1:])

    def first_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output[:, :1]

    norm = parts.norm_after_attention or parts.norm_before_ffn

    def set_hooks() -> Iterator[RemovableHandle]:
        yield parts.out.register_forward_pre_hook(first_input)
        if norm is None:
            yield parts.fc1.register_forward_pre_hook(first_input)
        else:
            yield norm.register_forward_hook(first_output)

    with hooked(set_hooks()):
        yield


@contextmanager
def layers_skipped(layers: Sequence[nn.Module], first: Tensor) -> Iterator[None]:
    """Inside the block no layer computes anything; the last one returns `first`, (B, 1, d), of an earlier pass."""
    before = [vars(layer).get("forward") for layer in layers]  # set where another library has wrapped it

    def passed_on(hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states

    try:
        for layer in layers:
            layer.forward = passed_on
        layers[-1].forward = lambda *args, **kwargs: first
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward
