"""The calibration pass: one forward and backward over the calibration rows gives everything the later steps need.

For every mini-batch the gradients of the masks (fisher.py), of which the search takes the diagonal Fisher and the
rearrangement the blocks; the loss, and that of a constant prediction (losses.py); what enters the first layer, for mask
tuning, and the held-out rows that tuning is judged on (held_out.py). The weights stay frozen. What leads nowhere of a
classifier's last layer is not computed (first_token.py). The loader is read once.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from effnn.base import InvalidInput, release_free_memory
from effnn.ltp.pruning.adapters import adapter_for
from effnn.ltp.pruning.calibration.batch_checks import checked_loader
from effnn.ltp.pruning.calibration.batches import row_count, to_device
from effnn.ltp.pruning.calibration.first_token import first_token_only
from effnn.ltp.pruning.calibration.fisher import MaskGradients, fisher_diagonal, probes
from effnn.ltp.pruning.calibration.held_out import HeldOut, KeptRows, LayerInput, is_mean_over_rows
from effnn.ltp.pruning.calibration.losses import (
    ChanceLoss,
    Loss,
    drawn_labels,
    label_counts,
    mean_loss,
    no_labels_because,
)
from effnn.ltp.pruning.calibration.model_checks import check_model, eager
from effnn.ltp.pruning.masks import Shape
from effnn.ltp.pruning.options import check_calibration

log = logging.getLogger(__name__)

NEAR_CHANCE = 0.9
"""A calibration loss above this share of a constant predictor's loss is reported as a model that was not fine-tuned."""

LARGE = 64 << 20
"""Bytes of hidden states of one mini-batch, all layers together, from which freed memory is returned at once."""


@dataclass
class Calibration:
    """What one pass over the calibration rows gives.

    head_gradients: (N, L, H), float32 on the CPU; N is the number of mini-batches, or of rows with fisher="sample".
    filter_gradients: (N, L, F), likewise; 2048 rows of a BERT-base take 300 MB.
    loss: mean loss over mini-batches.
    chance_loss: loss of the best constant prediction on the same labels, None where it is not known.
    mean_length: live tokens per sequence.
    rows: calibration rows, without those of batches that have no label; these are left out of everything here.
    inputs: one `LayerInput` per forward pass (empty unless asked for).
    held_out: the held-out rows, for the loss on them.
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
        """Diagonal Fisher of the heads, (L, H): see `fisher_diagonal`."""
        return fisher_diagonal(self.head_gradients.double())

    @property
    def filter_importance(self) -> Tensor:
        """Diagonal Fisher of the filters, (L, F): see `fisher_diagonal`."""
        return fisher_diagonal(self.filter_gradients)


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
    on_batch: Callable[[], object] = lambda: None,
    loss: Loss | None = None,
) -> Calibration:
    """Run the calibration rows through the frozen model, forward and backward; returns a `Calibration`.

    loader: mini-batches of model inputs with labels (`labels`, or `start_positions` and `end_positions`), read once, in
        its own order.
    fisher: "batch" keeps the gradients of mini-batch means (the paper's code), "sample" those of single rows.
    labels: "data" takes them from the loader (empirical Fisher); "model" draws them from the model's own prediction
        (true Fisher, no labels needed; classification only).
    holdout: share of the rows that are held out, from 0 up to, but not including, 1.
    keep_inputs: whether to keep what enters the first layer.
    autocast: torch.bfloat16 runs the forward in it.
    offload: what enters the first layer waits on the CPU in this dtype.
    generator: of the labels that the model draws.
    on_batch: called after each mini-batch.
    loss: `loss(model, batch)` instead of the model's own; it returns the mean loss of the batch, and must call the
        model that it is given. Batches may then be of any form (batches.py); which labels count is said in losses.py.
        It may call the model several times, row i of each call being row i of the batch; where a call has other
        numbers of rows, fisher="sample" is refused and batches are held out whole. They also are where the loss is no
        mean over rows (`is_mean_over_rows`).

    Raises InvalidInput for a model or batch that is refused (model_checks.py, batch_checks.py), an empty loader,
    missing labels, a loss that is not finite.
    """
    check_model(model, labels, loss)
    check_calibration(fisher, holdout, autocast, offload)
    adapter = adapter_for(model)
    shape = Shape.of(model, adapter)
    device = next(model.parameters()).device
    collected = MaskGradients(shape)
    heads, filters, losses = [], [], []
    kept = KeptRows(holdout)
    chance, tokens, sequences, rows = ChanceLoss(), 0, 0, 0
    head_reads_first = loss is None and adapter.reads_first_token_only(model)
    with _frozen(model), probes(model, adapter, collected) as anchor, eager(model), ExitStack() as shortcut:
        for index, batch in enumerate(checked_loader(model, loader, labels, loss)[1]):
            size, where = row_count(batch), f"calibration batch {index}"
            counts = label_counts(model, batch, size) if labels == "data" else torch.ones(size, dtype=torch.long)
            if not counts.any():
                log.warning("%s is left out: it has no label that counts", where)
                on_batch()
                continue
            batch = to_device(batch, device)
            if loss is not None and holdout > 0 and kept.whole is None:
                rowwise = is_mean_over_rows(model, batch, loss, counts)
                kept.whole = None if rowwise is None else not rowwise
            collected.start()
            with torch.enable_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                if labels == "model":
                    value, batch = drawn_labels(model, batch, generator, where)
                else:
                    value = mean_loss(model, batch, loss, where)
            collected.check(value, where)
            value.backward(inputs=[anchor])  # weights outside the model, in the caller's loss, get no gradient
            head_rows, filter_rows = collected.gradients(batch, counts if fisher == "sample" else None)
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
        raise InvalidInput(f"no calibration batch has a label that counts: {no_labels_because(batch)}")
    inputs, held_out = kept.result()
    result = Calibration(
        head_gradients=torch.cat(heads),
        filter_gradients=torch.cat(filters),
        loss=sum(losses) / len(losses),
        chance_loss=chance.value() if loss is None else None,
        mean_length=tokens / sequences,
        rows=rows,
        inputs=inputs,
        held_out=held_out,
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
