"""The calibration pass: one forward and backward over the calibration rows gives everything the later steps need.

Empirical diagonal Fisher of the masks (ltp.md A.2; Kwon et al. 2022, section 3.2). With all masks at one, the gradient
of the loss with respect to a mask entry is the sum over positions of activation times its gradient, so no mask is ever
multiplied: an identity node in front of the attention output projection and of FFN-2 reads both during the backward
pass, row by row. Gradients of single rows ("sample") therefore cost nothing over gradients of mini-batch means
("batch", what the paper's code does), and one pass serves both. The weights stay frozen. What leads nowhere of a
classifier's last layer is not computed (first_token.py).

The same pass keeps what enters the first layer, for mask tuning, and sets aside held-out rows. The loader is read once.
"""

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from effnn.base import InvalidInput, release_free_memory
from effnn.ltp.pruning.adapters import Adapter, adapter_for
from effnn.ltp.pruning.calibration.batches import row_count, sequences_per_row, to_device
from effnn.ltp.pruning.calibration.first_token import first_token_only
from effnn.ltp.pruning.calibration.held_out import HeldOut, KeptRows, LayerInput
from effnn.ltp.pruning.calibration.losses import ChanceLoss, Loss, drawn_labels, label_counts, mean_loss
from effnn.ltp.pruning.checks import check_model, checked_batches
from effnn.ltp.pruning.masks import Shape

log = logging.getLogger(__name__)

NEAR_CHANCE = 0.9
"""A calibration loss above this share of a constant predictor's loss is reported as a model that was not fine-tuned."""

PIECE = 1 << 18
"""Numbers multiplied at once on a CPU: 1 MB in float32, a part of a core's cache."""

LARGE = 64 << 20
"""Bytes of hidden states of one mini-batch, all layers together, from which freed memory is returned at once."""


@dataclass
class Calibration:
    """What one pass over the calibration rows gives.

    head_gradients: (N, L, H), filter_gradients: (N, L, F), float32 on the CPU; N is the number of mini-batches, or of
    rows with fisher="sample" (2048 rows of a BERT-base take 300 MB then). Batches without any label are left out of
    all of this. loss: mean loss over mini-batches. chance_loss: loss of the best constant predictor on the same labels,
    None where it is not known. mean_length: live tokens a sequence. inputs: one `LayerInput` a forward pass (empty
    unless asked for). held_out: the held-out rows, for the loss on them.
    """

    head_gradients: Tensor
    filter_gradients: Tensor
    loss: float
    chance_loss: float | None
    mean_length: float
    rows: int
    inputs: list[LayerInput] = field(default_factory=list)
    held_out: list[HeldOut] = field(default_factory=list)

    @property
    def held_out_batches(self) -> list[object]:
        """The held-out rows as batches of the model's inputs."""
        return [rows.batch for rows in self.held_out]

    @property
    def head_importance(self) -> Tensor:
        """Diagonal Fisher of the heads, (L, H): the sum of squared gradients."""
        return self.head_gradients.double().square().sum(0)

    @property
    def filter_importance(self) -> Tensor:
        """Diagonal Fisher of the filters, (L, F): the sum of squared gradients."""
        return self.filter_gradients.square().sum(0, dtype=torch.float64)


def calibrate(
    model: PreTrainedModel,
    loader: Iterable[Mapping[str, Tensor]],
    fisher: str = "batch",
    labels: str = "data",
    holdout: float = 0.1,
    keep_inputs: bool = True,
    autocast: torch.dtype | None = None,
    offload: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    on_batch=lambda: None,
    loss: Loss | None = None,
) -> Calibration:
    """Run the calibration rows through the frozen model, forward and backward; returns a `Calibration`.

    loader: mini-batches of model inputs with labels (`labels`, or `start_positions` and `end_positions`), read once, in
    its own order. labels: "data" takes them from the loader (empirical Fisher); "model" draws them from the model's own
    prediction (true Fisher, no labels needed; classification only). autocast: torch.bfloat16 runs the forward in it.
    offload: what enters the first layer waits on the CPU in this dtype.

    loss: `loss(model, batch)` instead of the model's own; it returns the mean loss of the batch, and must call the
    model that it is given. Batches may then be of any build (batches.py); what weighs how much is told in losses.py.
    It may call the model several times, row i of each call being row i of the batch; where a call has other
    numbers of rows, fisher="sample" is refused and held-out batches are whole ones.

    Raises InvalidInput for a model or batch that checks.py refuses, an empty loader, missing labels, a loss that is not
    finite.
    """
    check_model(model, labels, loss)
    if fisher not in ("batch", "sample"):
        raise InvalidInput(f'fisher={fisher!r}: expected "batch" or "sample"')
    if not 0 <= holdout < 1:
        raise InvalidInput(f"holdout={holdout}: expected a share from 0 up to, but not including, 1")
    adapter = adapter_for(model)
    shape = Shape.of(model, adapter)
    device = next(model.parameters()).device
    collected = _Collected(shape)
    heads, filters, losses = [], [], []
    kept = KeptRows(holdout)
    chance, tokens, sequences, rows = ChanceLoss(), 0, 0, 0
    head_reads_first = loss is None and adapter.reads_first_token_only(model)
    with _frozen(model), _probes(model, adapter, collected) as anchor, _eager(model), ExitStack() as shortcut:
        for index, batch in enumerate(checked_batches(model, loader, labels, loss)[1]):
            size, where = row_count(batch), f"calibration batch {index}"
            counts = label_counts(model, batch, size) if labels == "data" else torch.ones(size, dtype=torch.long)
            if not counts.any():
                log.warning("%s is left out: it has no label that counts", where)
                on_batch()
                continue
            batch = to_device(batch, device)
            collected.start()
            with torch.enable_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                if labels == "model":
                    value, batch = drawn_labels(model, batch, generator, where)
                else:
                    value = mean_loss(model, batch, loss, where)
            collected.check(value, where)
            value.backward(inputs=[anchor])  # weights of the caller's own, outside the model, collect nothing
            head_rows, filter_rows = collected.gradients()
            if fisher == "sample":
                # rows hold gradients of the batch's mean loss, a mean over all labels; a row's own mean is over its own
                weight = torch.where(counts > 0, counts.sum() / counts.clamp(min=1), 0)[:, None, None]
                head_rows, filter_rows = (_by_row(found, batch, size) * weight for found in (head_rows, filter_rows))
            else:
                head_rows, filter_rows = head_rows.sum(0, keepdim=True), filter_rows.sum(0, keepdim=True)
            alone = collected.first_only and collected.heads[-1] is not None
            if alone and head_reads_first and not losses:
                # the first mini-batch ran whole and shows that the head is what its class says
                shortcut.enter_context(first_token_only(adapter, adapter.layers(model)[-1]))
            heads.append(head_rows)
            filters.append(filter_rows)
            losses.append(value.item())
            live = [live for _, _, live in collected.passes]
            chance.add(model, batch, size, live[0])
            tokens += sum(int(one.sum()) for one in live)
            sequences, rows = sequences + sum(len(one) for one in live), rows + size
            passes = collected.passes
            large = device.type == "cpu" and passes[0][0].nbytes * shape.layers >= LARGE
            if offload is not None:
                passes = [(states.to("cpu", offload), mask, live) for states, mask, live in passes]
            first = collected.first_state if alone and head_reads_first and autocast is None else None
            kept.add(batch, passes, keep_inputs, alone, first)
            del value, passes
            collected.passes = []
            if large:
                release_free_memory()  # so that the peak stays that of one mini-batch
            on_batch()
    if not losses:
        raise InvalidInput("no calibration batch has a label that counts: all of them are to be ignored (-100)")
    result = Calibration(
        torch.cat(heads),
        torch.cat(filters),
        sum(losses) / len(losses),
        chance.value() if loss is None else None,
        tokens / sequences,
        rows,
        *kept.result(),
    )
    if not (result.head_gradients.isfinite().all() and result.filter_gradients.isfinite().all()):
        raise InvalidInput(
            "gradients of the masks are not finite: the number format of the model is too narrow, try bfloat16"
        )
    if result.chance_loss is not None and chance.enough() and result.loss > NEAR_CHANCE * result.chance_loss:
        log.warning(
            "the calibration loss %.4f is near the %.4f of a constant prediction: was this model fine-tuned on its "
            "task? Pruning follows the loss, so the result would mean little.",
            result.loss,
            result.chance_loss,
        )
    return result


def _by_row(found: Tensor, batch: object, rows: int) -> Tensor:
    """Gradients (B, L, n) of sequences, summed over those of each row: (rows, L, n)."""
    several = sequences_per_row(batch)
    if len(found) == rows and several == 1:
        return found
    if len(found) != rows * several:
        raise InvalidInput(
            f'fisher="sample" needs one sequence a row: the batch has {rows} rows, and loss(model, batch) ran the '
            f'model on {len(found)}. Call the model once for each input of a row, or pass fisher="batch"'
        )
    return found.unflatten(0, (rows, several)).sum(1)


class _Probe(torch.autograd.Function):
    """Identity; in the backward pass hands activation and gradient to `sink`. `anchor` makes the graph begin here."""

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


class _Collected:
    """Gradients of one mini-batch, sequence by sequence, filled in by the probes during its backward pass.

    passes: hidden states and mask that enter the first layer, and live tokens, of every forward pass of the encoder.
    first_only: whether the loss depends on no other position of the last layer than position 0.
    first_state: what the last layer put out there, (B, 1, d).
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
        def sink(activation: Tensor, gradient: Tensor) -> None:
            products = _summed_products(activation, gradient)
            _add_at(self.heads, layer, products.unflatten(-1, (self.shape.heads, self.shape.head_size)).sum(-1).cpu())
            if layer == self.shape.layers - 1 and self.first_only:
                self.first_only = not bool(gradient[:, 1:].any())

        return sink

    def filter_sink(self, layer: int):
        def sink(activation: Tensor, gradient: Tensor) -> None:
            _add_at(self.filters, layer, _summed_products(activation, gradient).cpu())

        return sink

    def gradients(self) -> tuple[Tensor, Tensor]:
        """(B, L, H) and (B, L, F); zero for a layer that the loss does not depend on."""
        return _stacked(self.heads, self.shape.heads), _stacked(self.filters, self.shape.filters)


def _summed_products(activation: Tensor, gradient: Tensor) -> Tensor:
    """Sum over positions of activation times gradient, (B, S, n) -> (B, n), in float32."""
    if activation.device.type != "cpu" or activation.numel() == 0:
        return (activation.float() * gradient.float()).sum(1)
    # a few rows at a time: their product stays in the cache, where that of all rows is written to memory and read again
    rows = max(1, PIECE * len(activation) // activation.numel())
    pieces = zip(activation.split(rows), gradient.split(rows), strict=True)
    return torch.cat([(a.float() * g.float()).sum(1) for a, g in pieces])


def _add_at(values: list[Tensor | None], place: int, value: Tensor) -> None:
    """Add up: an FFN run in chunks of the sequence passes a probe once a chunk, a model called twice once a call.

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
def _probes(model: PreTrainedModel, adapter: Adapter, collected: _Collected) -> Iterator[Tensor]:
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
        # a family of one's own may put out a tuple; its layers are run again for the held-out loss
        collected.first_state = output[:, :1].detach() if isinstance(output, Tensor) else None

    layers = adapter.layers(model)
    handles = [
        encoder.register_forward_pre_hook(keep_padding_mask, with_kwargs=True),
        layers[0].register_forward_pre_hook(keep_first_input, with_kwargs=True),
        layers[-1].register_forward_hook(keep_first_state),
    ]
    try:
        for index, layer in enumerate(layers):
            parts = adapter.parts(layer)
            handles.append(parts.out.register_forward_pre_hook(probe(collected.head_sink(index))))
            handles.append(parts.fc2.register_forward_pre_hook(probe(collected.filter_sink(index))))
        yield anchor
    finally:
        for handle in handles:
            handle.remove()


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


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """No gradient for any weight inside the block; the flags are restored after it."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _eager(model: PreTrainedModel) -> AbstractContextManager:
    """A model compiled in place (`model.compile()`) runs as it is written: compiling around the probes takes longer."""
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
