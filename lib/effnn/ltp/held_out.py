"""Which calibration rows are held out: kept from tuning and used to judge it (ltp.md A.6, [design]).

Held-out rows stand at the end of a batch, so that one forward pass serves fitted and held-out rows alike. Where the
sequences that the encoder sees are not the rows of the batch (a loss of one's own that joins two inputs into one call),
nobody can say which sequence belongs to which row, and batches are held out whole.
"""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from effnn.ltp.batches import row_count, row_keys, sequences_per_row, take
from effnn.ltp.losses import Loss, label_counts, mean_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerInput:
    """What one forward pass gives the first layer, and which of its sequences and tokens count.

    states: (B, S, d), on the CPU where they were offloaded. attention_mask: as the model passes it to its layers (None
    where there is nothing to mask). live: (B, S) bool, False at padding. held_out: the number of sequences, at
    the end of the pass, kept out of tuning. first_only: nothing but position 0 of the last layer reaches the loss.
    """

    states: Tensor
    attention_mask: Tensor | None
    live: Tensor
    held_out: int
    first_only: bool = False


class KeptRows:
    """What is kept of every mini-batch: the first layer's inputs, and the held-out rows at its end.

    Calibration rows are drawn with replacement, so a held-out row may stand among the fitted ones too; it would not be
    unseen then, and is dropped from both sides of the judgement (its tokens are marked as not live).
    """

    def __init__(self, holdout: float):
        self.holdout, self.owed, self.fitted = holdout, 0.0, 0
        self.inputs: list[LayerInput] = []
        self.held_out: list[tuple[object, list[object], list[Tensor]]] = []
        self.seen: set[object] = set()

    def add(self, batch: object, passes: list[tuple[Tensor, Tensor | None, Tensor]], keep: bool, first_only: bool):
        """Add a batch. passes: states, mask and live tokens of every forward pass over it. keep: the states as well."""
        size, sequences = row_count(batch), sequences_per_row(batch)
        aligned = all(len(states) == size * sequences for states, _, _ in passes)
        self.owed += self.holdout * size
        count = min(int(self.owed), size if self.fitted else size - 1)
        if not aligned:
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
            self.held_out.append((last, keys[size - count :], rows))

    def result(self) -> tuple[list[LayerInput], list[object]]:
        """The first layer's inputs, and the batches of held-out rows."""
        batches = []
        for batch, keys, passes in self.held_out:
            fresh = [row for row, key in enumerate(keys) if key not in self.seen]
            for live in passes:  # views into the LayerInputs
                if len(live) == len(keys):
                    live[[row for row, key in enumerate(keys) if key in self.seen]] = False
                elif not fresh:
                    live[:] = False
            if fresh:
                batches.append(batch if len(fresh) == len(keys) else take(batch, fresh))
        if self.holdout and self.inputs and not batches:
            log.warning("no row could be held out: tuning is judged on the rows that it is fitted to")
        return self.inputs, batches


def held_out_loss(model: PreTrainedModel, batches: list[object], loss: Loss | None = None) -> float | None:
    """Mean loss a label of `model` over these batches; None if they hold no label."""
    total = labels = 0
    with torch.no_grad():
        for batch in batches:
            if count := int(label_counts(model, batch, row_count(batch)).sum()):
                total += float(mean_loss(model, batch, loss, "the held-out rows")) * count
                labels += count
    return total / labels if labels else None
