"""Held-out calibration rows: mask tuning is not fitted to them, and their loss decides whether it is accepted.

Held-out rows stand at the end of a batch, so one forward pass runs fitted and held-out rows together. Where the
sequences that the encoder sees are not the rows of the batch (a loss of your own that joins two inputs into one call),
it is not known which sequence belongs to which row, and batches are held out whole. So they are where a loss of your
own is no mean over rows (`is_mean_over_rows`), since its value on a part of a batch says nothing of the batch.
"""

import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from effnn.ltp.pruning.adapters import adapter_for
from effnn.ltp.pruning.calibration.batches import row_count, row_keys, sequences_per_row, take
from effnn.ltp.pruning.calibration.first_token import layers_skipped
from effnn.ltp.pruning.calibration.losses import Loss, label_counts, mean_loss, same_draws

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerInput:
    """What one forward pass gives the first layer, and which of its sequences and tokens count.

    states: (B, S, d), on the CPU where they were offloaded.
    attention_mask: as the model passes it to its layers (None where there is nothing to mask).
    live: (B, S) bool, False at padding.
    held_out: number of sequences, at the end of the pass, that tuning is not fitted to.
    first_only: whether only position 0 of the last layer reaches the loss.
    """

    states: Tensor
    attention_mask: Tensor | None
    live: Tensor
    held_out: int
    first_only: bool = False


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows of one mini-batch. first: (rows, 1, d), what the dense model's last layer puts out at position 0,
    where that decides the loss; else None.
    """

    batch: object
    first: Tensor | None = None


class KeptRows:
    """What is kept of every mini-batch: the first layer's inputs, and the held-out rows at its end.

    Calibration rows are drawn with replacement, so a held-out row may also be a fitted one. It would then judge scales
    that were fitted to it, so it does not count as held out (and its tokens there are marked as not live). A batch that
    is held out whole gives a loss if at least half of its rows are no fitted ones.
    """

    def __init__(self, holdout: float):
        self.holdout, self.owed, self.fitted = holdout, 0.0, 0
        self.whole: bool | None = None
        """Whether batches are held out whole; None while it is not known."""
        self.inputs: list[LayerInput] = []
        self.held_out: list[tuple[HeldOut, list[object], list[Tensor]]] = []
        self.seen: set[object] = set()

    def add(
        self,
        batch: object,
        passes: list[tuple[Tensor, Tensor | None, Tensor]],
        keep: bool,
        first_only: bool,
        first: Tensor | None,
    ) -> None:
        """Add a batch.

        batch: its entries.
        passes: states, mask and live tokens of every forward pass over it.
        keep: whether to keep the first layer's inputs.
        first_only: whether the loss reads only position 0 of the last layer.
        first: see `HeldOut`, of all rows.
        """
        size, sequences = row_count(batch), sequences_per_row(batch)
        aligned = all(len(states) == size * sequences for states, _, _ in passes)
        self.owed += self.holdout * size
        count = min(int(self.owed), size if self.fitted else size - 1)
        if self.whole or not aligned:
            count = size if count == size or (self.fitted and self.owed >= size / 2) else 0
        self.owed -= count
        self.fitted += size - count
        kept_live = []
        for states, mask, live in passes:
            held_out = count * sequences if aligned else len(states) if count else 0
            live = live.clone()
            kept_live.append(live[len(live) - held_out :])
            if keep:
                self.inputs.append(LayerInput(states, mask, live, held_out, first_only))
        if self.holdout == 0:
            return
        keys = row_keys(batch)
        self.seen.update(keys[: size - count])
        if count:
            last = take(batch, list(range(size - count, size)))
            rows = [live.unflatten(0, (count, -1)) if aligned else live[None] for live in kept_live]
            first = None if first is None else first[size - count :].clone()
            self.held_out.append((HeldOut(last, first), keys[size - count :], rows))

    def result(self) -> tuple[list[LayerInput], list[HeldOut]]:
        """The first layer's inputs, and the held-out rows."""
        batches = []
        for held, keys, passes in self.held_out:
            fresh = [row for row, key in enumerate(keys) if key not in self.seen]
            for live in passes:  # views into the LayerInputs
                if len(live) == len(keys):
                    live[[row for row, key in enumerate(keys) if key in self.seen]] = False
                elif not fresh:
                    live[:] = False
            if len(fresh) == len(keys) or (self.whole and 2 * len(fresh) >= len(keys)):
                batches.append(held)
            elif fresh and not self.whole:
                batches.append(HeldOut(take(held.batch, fresh), None if held.first is None else held.first[fresh]))
        if self.holdout and self.inputs and not batches:
            log.warning("no row could be held out: tuning is judged on the rows that it is fitted to")
        return self.inputs, batches


def is_mean_over_rows(model: PreTrainedModel, batch: object, loss: Loss, labels: Tensor) -> bool | None:
    """Whether the loss of a batch is the mean of the losses of its parts, label by label; None for a single row.

    It is not with in-batch negatives, with pairs in neighbouring rows, or drawn anew at each call. Compared are the
    whole batch, its two halves, and its last row with all others; a part on which the loss fails or is not finite
    counts as different. labels: (rows,), how many of each row count.
    """
    rows = labels.nonzero().flatten().tolist()
    if len(rows) < 2:
        return None
    close = 1e-3 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 5e-2

    def mean(*parts: list[int]) -> float:
        values = [float(mean_loss(model, take(batch, part), loss)) for part in parts]
        counts = [int(labels[part].sum()) for part in parts]
        return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)

    with same_draws(model):
        whole = mean(rows)
        try:
            parts = [mean(rows[:at], rows[at:]) for at in (len(rows) // 2, len(rows) - 1)]
        except Exception:  # raised by the caller's loss, which ran on the whole batch
            return False
    return all(math.isclose(whole, value, rel_tol=close, abs_tol=1e-6) for value in parts)


def held_out_loss(model: PreTrainedModel, rows: list[HeldOut], loss: Loss | None = None) -> float | None:
    """Mean loss per label of `model` over these rows; None if they hold no label. It need not be finite."""
    return _mean_loss(model, [(held.batch, None) for held in rows], loss)


def dense_held_out_loss(model: PreTrainedModel, rows: list[HeldOut], loss: Loss | None = None) -> float | None:
    """`held_out_loss` of the model that the rows were calibrated with; its layers run only where that is needed."""
    return _mean_loss(model, [(held.batch, held.first) for held in rows], loss)


def _mean_loss(model: PreTrainedModel, rows: list[tuple[object, Tensor | None]], loss: Loss | None) -> float | None:
    total = labels = 0
    with torch.no_grad():
        for batch, first in rows:
            if count := int(label_counts(model, batch, row_count(batch)).sum()):
                known = nullcontext() if first is None else layers_skipped(adapter_for(model).layers(model), first)
                with known:
                    total += float(mean_loss(model, batch, loss, "the held-out rows")) * count
                labels += count
    return total / labels if labels else None
