"""The calibration pass: one forward and backward over the calibration rows gives everything the later steps need.

Empirical diagonal Fisher of the masks (ltp.md A.2; Kwon et al. 2022, section 3.2). With all masks at one, the gradient
of the loss with respect to a mask entry is the sum over positions of activation times its gradient, so no mask is ever
multiplied: an identity node in front of the attention output projection and of FFN-2 reads both during the backward
pass, row by row. Gradients of single rows ("sample") therefore cost nothing over gradients of mini-batch means
("batch", what the paper's code does), and one pass serves both. The weights stay frozen. What leads nowhere of a
classifier's last layer is not computed (first_token.py).

The same pass keeps what enters the first layer, for mask tuning, and sets aside held-out rows. The loader is read once.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from effnn.base import InvalidInput, release_free_memory
from effnn.ltp.adapters import Adapter, adapter_for
from effnn.ltp.first_token import first_token_only
from effnn.ltp.masks import Shape

log = logging.getLogger(__name__)

IGNORED = -100
"""The label that transformers' losses leave out."""

NEAR_CHANCE = 0.9
"""A calibration loss above this share of a constant predictor's loss is reported as a model that was not fine-tuned."""

PIECE = 1 << 18
"""Numbers multiplied at once on a CPU: 1 MB in float32, a part of a core's cache."""

LARGE = 64 << 20
"""Bytes of hidden states of one mini-batch, all layers together, from which freed memory is returned at once."""


@dataclass(frozen=True)
class LayerInput:
    """What one mini-batch gives the first layer, and which of its rows and tokens count.

    states: (B, S, d), on the CPU where they were offloaded. attention_mask: as the model passes it to its layers (None
    where there is nothing to mask). live: (B, S) bool, False at padding. held_out: the number of rows, at
    the end of the batch, kept out of tuning.
    """

    states: Tensor
    attention_mask: Tensor | None
    live: Tensor
    held_out: int


@dataclass
class Calibration:
    """What one pass over the calibration rows gives.

    head_gradients: (N, L, H), filter_gradients: (N, L, F), float32 on the CPU; N is the number of mini-batches, or of
    rows with fisher="sample" (2048 rows of a BERT-base take 300 MB then). loss: mean loss over mini-batches.
    chance_loss: loss of the best constant predictor on the same labels, None where it is not known. mean_length: live
    tokens a row. inputs: one `LayerInput` a mini-batch (empty unless asked for). held_out_batches: model inputs of the
    held-out rows.
    """

    head_gradients: Tensor
    filter_gradients: Tensor
    loss: float
    chance_loss: float | None
    mean_length: float
    rows: int
    inputs: list[LayerInput] = field(default_factory=list)
    held_out_batches: list[dict[str, Tensor]] = field(default_factory=list)

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
) -> Calibration:
    """Run the calibration rows through the frozen model, forward and backward; returns a `Calibration`.

    loader: mini-batches of model inputs with labels (`labels`, or `start_positions` and `end_positions`), read once, in
    its own order. labels: "data" takes them from the loader (empirical Fisher); "model" draws them from the model's own
    prediction (true Fisher, no labels needed; classification only). autocast: torch.bfloat16 runs the forward in it.
    offload: what enters the first layer waits on the CPU in this dtype.
    Raises InvalidInput for a model in training mode, an empty loader, missing labels, a loss that is not finite.
    """
    if any(module.training for module in model.modules()):
        raise InvalidInput(
            "the model is in training mode, so dropout would enter the Fisher information: call model.eval()"
        )
    if fisher not in ("batch", "sample"):
        raise InvalidInput(f'fisher={fisher!r}: expected "batch" or "sample"')
    if labels not in ("data", "model"):
        raise InvalidInput(f'labels={labels!r}: expected "data" or "model"')
    if not 0 <= holdout < 1:
        raise InvalidInput(f"holdout={holdout}: expected a share from 0 up to, but not including, 1")
    adapter = adapter_for(model)
    shape = Shape.of(model, adapter)
    device = next(model.parameters()).device
    collected = _Collected(shape)
    heads, filters, losses = [], [], []
    kept = _KeptRows(holdout)
    chance, tokens, rows = _ChanceLoss(model), 0, 0
    with _frozen(model), _probes(model, adapter, collected), ExitStack() as shortcut:
        for index, batch in enumerate(loader):
            batch = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
            collected.start()
            with torch.enable_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                loss, batch = _loss(model, batch, labels, generator)
            states, mask = collected.first_layer_input
            counted = counted_rows(batch)
            if counted == 0:
                log.warning("calibration batch %d is left out: all of its labels are to be ignored", index)
                continue
            if not torch.isfinite(loss):
                raise InvalidInput(
                    f"the loss of calibration batch {index} is {loss.item()}: check the inputs and weights for "
                    "NaN or infinity, and whether the number format of the model is wide enough"
                )
            loss.backward()
            head_rows, filter_rows = collected.gradients()
            if not losses and collected.first_only and adapter.reads_first_token_only(model):
                # the first mini-batch ran whole and shows that the head is what its class says
                shortcut.enter_context(first_token_only(adapter, adapter.layers(model)[-1]))
            # rows hold gradients of the batch's mean loss: their sum is the batch's; times the rows that count, a row's
            heads.append(head_rows.sum(0, keepdim=True) if fisher == "batch" else head_rows * counted)
            filters.append(filter_rows.sum(0, keepdim=True) if fisher == "batch" else filter_rows * counted)
            live = _live_tokens(batch, states)
            losses.append(loss.item())
            chance.add(batch, live)
            tokens, rows = tokens + int(live.sum()), rows + len(states)
            states = states if offload is None else states.to("cpu", offload)
            kept.add(batch, states if keep_inputs else None, mask, live)
            del loss
            if device.type == "cpu" and states.nbytes * shape.layers >= LARGE:
                release_free_memory()  # so that the peak stays that of one mini-batch
            on_batch()
    if not losses:
        raise InvalidInput(
            "the calibration loader is empty: expected at least one mini-batch, usually 2048 rows in all"
        )
    result = Calibration(
        torch.cat(heads),
        torch.cat(filters),
        sum(losses) / len(losses),
        chance.value(),
        tokens / rows,
        rows,
        *kept.result(),
    )
    if not (result.head_gradients.isfinite().all() and result.filter_gradients.isfinite().all()):
        raise InvalidInput(
            "gradients of the masks are not finite: the number format of the model is too narrow, try bfloat16"
        )
    if result.chance_loss is not None and result.loss > NEAR_CHANCE * result.chance_loss:
        log.warning(
            "the calibration loss %.4f is near the %.4f of a constant prediction: was this model fine-tuned on its "
            "task? Pruning follows the loss, so the result would mean little.",
            result.loss,
            result.chance_loss,
        )
    return result


def counted_rows(batch: Mapping[str, Tensor]) -> int:
    """Rows of the batch that its mean loss counts: not those labelled -100, nor answers outside the window."""
    if "start_positions" in batch:
        window = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"]
        return int((batch["start_positions"] < window.shape[1]).sum())
    labels = batch.get("labels")
    if labels is None or labels.is_floating_point() or labels.dim() != 1:
        return len(next(iter(batch.values())))
    return int((labels != IGNORED).sum())


class _KeptRows:
    """What is kept of every mini-batch: the first layer's input, and the held-out rows at its end.

    Calibration rows are drawn with replacement, so a held-out row may stand among the fitted ones too; it would not be
    unseen then, and is dropped from both sides of the judgement (its tokens are marked as not live).
    """

    def __init__(self, holdout: float):
        self.holdout, self.owed, self.fitted = holdout, 0.0, 0
        self.inputs: list[LayerInput] = []
        self.held_out: list[tuple[dict[str, Tensor], list[int], Tensor]] = []
        self.seen: set[int] = set()

    def add(self, batch: dict[str, Tensor], states: Tensor | None, mask: Tensor | None, live: Tensor) -> None:
        size = len(live)
        self.owed += self.holdout * size
        count = min(int(self.owed), size if self.fitted else size - 1)
        self.owed -= count
        self.fitted += size - count
        if states is not None:
            self.inputs.append(LayerInput(states, mask, live.clone(), count))
        if self.holdout == 0:
            return
        keys = _row_keys(batch, live)
        self.seen.update(keys[: size - count])
        if count:
            last = {name: value[size - count :] for name, value in batch.items()}
            own_live = self.inputs[-1].live if states is not None else live.clone()
            self.held_out.append((last, keys[size - count :], own_live[size - count :]))

    def result(self) -> tuple[list[LayerInput], list[dict[str, Tensor]]]:
        batches = []
        for batch, keys, live in self.held_out:
            fresh = [row for row, key in enumerate(keys) if key not in self.seen]
            repeated = [row for row, key in enumerate(keys) if key in self.seen]
            live[repeated] = False  # a view into its LayerInput
            if fresh:
                batches.append({name: value[fresh] for name, value in batch.items()})
        if self.holdout and self.inputs and not batches:
            log.warning("no row could be held out: tuning is judged on the rows that it is fitted to")
        return self.inputs, batches


def _row_keys(batch: dict[str, Tensor], live: Tensor) -> list[int]:
    """One hash a row, over its live tokens (or its pixels)."""
    inputs = next(batch[name] for name in ("input_ids", "pixel_values", "inputs_embeds") if name in batch).cpu()
    rows = live.cpu()
    return [
        hash((inputs[i][rows[i]] if inputs.dim() == 2 else inputs[i]).float().numpy().tobytes())
        for i in range(len(rows))
    ]


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
    """Row gradients of one mini-batch, filled in by the probes during its backward pass.

    first_only: whether the loss depends on no other position of the last layer than position 0.
    """

    def __init__(self, shape: Shape):
        self.shape = shape
        self.heads: list[Tensor | None] = []
        self.filters: list[Tensor | None] = []
        self.first_layer_input: tuple[Tensor, Tensor | None] = (torch.empty(0), None)
        self.first_only = True

    def start(self) -> None:
        self.heads = [None] * self.shape.layers
        self.filters = [None] * self.shape.layers
        self.first_only = True

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
        """(B, L, H) and (B, L, F)."""
        return torch.stack(self.heads, 1), torch.stack(self.filters, 1)


def _summed_products(activation: Tensor, gradient: Tensor) -> Tensor:
    """Sum over positions of activation times gradient, (B, S, n) -> (B, n), in float32."""
    if activation.device.type != "cpu" or activation.numel() == 0:
        return (activation.float() * gradient.float()).sum(1)
    # a few rows at a time: their product stays in the cache, where that of all rows is written to memory and read again
    rows = max(1, PIECE * len(activation) // activation.numel())
    pieces = zip(activation.split(rows), gradient.split(rows), strict=True)
    return torch.cat([(a.float() * g.float()).sum(1) for a, g in pieces])


def _add_at(values: list[Tensor | None], place: int, value: Tensor) -> None:
    """Add up: a model that runs its FFN in chunks of the sequence passes a probe once a chunk."""
    values[place] = value if values[place] is None else values[place] + value


@contextmanager
def _probes(model: PreTrainedModel, adapter: Adapter, collected: _Collected) -> Iterator[None]:
    device = next(model.parameters()).device
    anchor = torch.zeros(1, device=device, requires_grad=True)

    def probe(sink):
        return lambda module, inputs: (_Probe.apply(inputs[0], anchor, sink), *inputs[1:])

    def keep_first_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        states = kwargs.get("hidden_states", args[0] if args else None)
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        collected.first_layer_input = (states.detach(), mask)

    layers = adapter.layers(model)
    handles = [layers[0].register_forward_pre_hook(keep_first_input, with_kwargs=True)]
    try:
        for index, layer in enumerate(layers):
            parts = adapter.parts(layer)
            handles.append(parts.out.register_forward_pre_hook(probe(collected.head_sink(index))))
            handles.append(parts.fc2.register_forward_pre_hook(probe(collected.filter_sink(index))))
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def _loss(
    model: PreTrainedModel, batch: dict[str, Tensor], labels: str, generator: torch.Generator | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's own mean loss over the batch, and the batch with the labels that it was taken on."""
    if labels == "model":
        batch = {k: v for k, v in batch.items() if k not in ("labels", "start_positions", "end_positions")}
        logits = getattr(model(**batch), "logits", None)
        several = getattr(model.config, "problem_type", None) == "multi_label_classification"
        if logits is None or logits.dim() != 2 or logits.shape[1] < 2 or several:
            raise InvalidInput('labels="model" needs a classification head that chooses one of at least two classes')
        chances = logits.detach().float().softmax(-1)
        drawn = torch.multinomial(chances.cpu(), 1, generator=generator).squeeze(1).to(logits.device)
        return nn.functional.cross_entropy(logits.float(), drawn), batch | {"labels": drawn}
    output = model(**batch)
    loss = getattr(output, "loss", None)
    if loss is None:
        raise InvalidInput(
            f"the calibration batches carry no labels that {type(model).__name__} takes (found {sorted(batch)}): "
            'expected "labels" for classification or "start_positions" and "end_positions" for question answering. '
            'Without labels, pass labels="model"'
        )
    return loss.float(), batch


def _live_tokens(batch: dict[str, Tensor], states: Tensor) -> Tensor:
    mask = batch.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    return mask.bool()


class _ChanceLoss:
    """Loss of the best constant predictor: label entropy, label variance, or log of the length for answer spans."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.regression = getattr(model.config, "num_labels", None) == 1 or model.config.problem_type == "regression"
        self.labels: list[Tensor] = []
        self.lengths: list[Tensor] = []

    def add(self, batch: dict[str, Tensor], live: Tensor) -> None:
        if "labels" in batch:
            self.labels.append(batch["labels"].detach().cpu())
        elif "start_positions" in batch:
            self.lengths.append(live.sum(1).cpu())

    def value(self) -> float | None:
        if self.lengths:
            return math.log(torch.cat(self.lengths).double().mean().item())
        if not self.labels or self.labels[0].dim() != 1:
            return None
        labels = torch.cat(self.labels)
        if self.regression or labels.is_floating_point():
            return labels.double().var(correction=0).item()
        share = torch.bincount(labels[labels != IGNORED]).double()
        share = share[share > 0] / share.sum()
        return -(share * share.log()).sum().item()
