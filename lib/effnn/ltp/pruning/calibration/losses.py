"""The loss that pruning follows: the model's own, or one that the caller passes; and the labels it is a mean over.

A loss is a mean over labels. What a batch weighs in a mean over batches is therefore its number of labels, not of rows:

- integer labels other than -100 count, one or several per row (classification: one; token classification and masked
  language models: the labelled tokens; multiple choice: one);
- of an answer span, the row counts if start and end lie within the window;
- float labels (regression, several labels at once), and rows of a batch without known labels, count one each.

A row without any label weighs nothing, and a batch without any is left out. The rule is the same for the model's own
loss and for a loss of your own, so that `loss=lambda model, batch: model(**batch).loss` changes nothing.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from effnn.base import InvalidInput, hooked
from effnn.ltp.pruning.calibration.batches import LABELS, entries, main_input, row_count

IGNORED = -100
"""The label that torch's and transformers' losses leave out."""

Loss = Callable[[PreTrainedModel, object], Tensor]
"""loss(model, batch) -> the mean loss of the batch, a tensor of one element that gradients flow through."""

_RAW_ERRORS = (RuntimeError, IndexError, ValueError, TypeError, AttributeError, KeyError)


def mean_loss(model: PreTrainedModel, batch: object, loss: Loss | None = None, where: str = "the batch") -> Tensor:
    """The mean loss of the batch as a float32 scalar: `loss(model, batch)`, or the model's own.

    InvalidInput if the model does not run on the batch or has no loss there, or if `loss` returns anything but one
    number or does not call the model. Errors raised inside `loss` are the caller's and come through as they are.
    """
    if loss is not None:
        ran = []
        with hooked([model.base_model.register_forward_pre_hook(lambda *_: ran.append(True))]):
            value = loss(model, batch)
        if not ran:
            raise InvalidInput(
                f"loss(model, batch) did not run the model that it was given, {type(model).__name__}: it must call its "
                "argument, which is the dense model at first and smaller ones later on"
            )
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            found = (
                f"a {value.dtype} tensor of shape {tuple(value.shape)}"
                if isinstance(value, Tensor)
                else f"a {type(value).__name__}"
            )
            raise InvalidInput(
                f"loss(model, batch) returned {found}: expected the mean loss of the batch, a float tensor of one "
                "element (return output.loss of a model output, losses.mean() of losses per row)"
            )
        return value.reshape(()).float()
    output = forward(model, batch, where)
    value = getattr(output, "loss", None)
    if value is None:
        raise InvalidInput(missing_labels(model, batch))
    return value.float()


@contextmanager
def same_draws(model: PreTrainedModel) -> Iterator[None]:
    """No gradients, and the same random numbers in every such block; the generators are restored after it."""
    device = next(model.parameters()).device
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def forward(model: PreTrainedModel, batch: Mapping, where: str) -> object:
    """The output of the model on the batch; InvalidInput if it does not run."""
    # a configuration or a batch may ask for tuples, which do not say which of their items is the loss
    tuples = "return_dict" in batch or not getattr(model.config, "return_dict", True)
    options = {"return_dict": True} if tuples else {}
    try:
        return model(**batch | options)
    except _RAW_ERRORS as error:
        if isinstance(error, torch.OutOfMemoryError) or "memory" in str(error):
            raise
        raise InvalidInput(
            f"{type(model).__name__} does not run on {where} ({described(batch)}), expected a batch on which "
            f"model(**batch) runs: {type(error).__name__}: {error}"
        ) from error


def missing_labels(model: PreTrainedModel, batch: Mapping) -> str:
    """The message for a batch from which the model makes no loss."""
    return (
        f"the calibration batches carry no labels that {type(model).__name__} takes (found {sorted(batch)}): "
        'expected "labels" for classification or "start_positions" and "end_positions" for question answering. '
        'Without labels, pass labels="model", or a loss=... of your own that needs none'
    )


def described(batch: object) -> str:
    """The entries of a batch in a few words: name, dtype and shape of tensors, type and value of others."""

    def one(value: object) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        return f"{type(value).__name__}" + (f" {value!r}" if isinstance(value, (bool, int, float)) else "")

    return ", ".join(f"{'.'.join(map(str, path))}: {one(value)}" for path, value in entries(batch))


def drawn_labels(
    model: PreTrainedModel, batch: dict, generator: torch.Generator | None, where: str
) -> tuple[Tensor, dict]:
    """The loss on labels drawn from the model's own prediction, and the batch with these labels."""
    batch = {name: value for name, value in batch.items() if name not in LABELS}
    logits = getattr(forward(model, batch, where), "logits", None)
    several = getattr(model.config, "problem_type", None) == "multi_label_classification"
    if logits is None or logits.dim() != 2 or logits.shape[1] < 2 or several:
        raise InvalidInput('labels="model" needs a classification head that chooses one of at least two classes')
    chances = logits.detach().float().softmax(-1)
    drawn = torch.multinomial(chances.cpu(), 1, generator=generator).squeeze(1).to(logits.device)
    return nn.functional.cross_entropy(logits.float(), drawn), batch | {"labels": drawn}


def label_counts(model: PreTrainedModel, batch: object, rows: int) -> Tensor:
    """Labels of each row that the mean loss counts, (rows,) int64 on the CPU."""
    one_each = torch.ones(rows, dtype=torch.long)
    if not isinstance(batch, Mapping) or rows == 0:
        return one_each
    start, end = batch.get("start_positions"), batch.get("end_positions")
    if isinstance(start, Tensor) and isinstance(end, Tensor):
        window = main_input(batch)
        if window is None or start.numel() != rows or end.numel() != rows:
            return one_each
        return ((start < window.shape[1]) & (end < window.shape[1])).reshape(rows).long().cpu()
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or is_regression(model, labels, rows):
        return one_each
    if labels.numel() == 0 or labels.numel() % rows:
        return one_each
    return (labels != IGNORED).reshape(rows, -1).sum(1).cpu()


def no_labels_because(batch: object) -> str:
    """Why no row of the batch has a label that counts, and the way out."""
    if row_count(batch) == 0:
        return "the batches hold no rows"
    if isinstance(batch.get("start_positions"), Tensor) and (window := main_input(batch)) is not None:
        return (
            f"all answers start or end outside the window of {window.shape[1]} tokens: expected start_positions and "
            f"end_positions below {window.shape[1]} in some rows (leave out rows without one, or raise max_length)"
        )
    return f"all of them are to be ignored ({IGNORED}): expected classes or token ids"


def is_regression(model: PreTrainedModel, labels: Tensor, rows: int) -> bool:
    """Whether the labels are numbers to come near to, not classes."""
    if getattr(model.config, "problem_type", None) == "regression":
        return True
    return getattr(model.config, "num_labels", None) == 1 and labels.numel() == rows


class ChanceLoss:
    """Loss of the best constant predictor: label entropy, label variance, or log of the length for answer spans."""

    def __init__(self) -> None:
        self.regression = False
        self.labels: list[Tensor] = []
        self.spans: list[Tensor] = []
        self.by_token = False

    def add(self, model: PreTrainedModel, batch: object, rows: int, live: Tensor) -> None:
        """Take in the labels of a batch. live: (B, S), the tokens that are not padding."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if isinstance(labels, Tensor):
            self.regression = self.regression or is_regression(model, labels, rows) or labels.is_floating_point()
            self.by_token = self.by_token or labels.numel() != rows
            self.labels.append(labels.detach().flatten().cpu())
        elif isinstance(batch, Mapping) and "start_positions" in batch:
            self.spans.append(live.sum(1).cpu())

    def value(self) -> float | None:
        """The loss, None where it is not known."""
        if self.spans:
            return math.log(torch.cat(self.spans).double().mean().item())
        if not self.labels or (self.regression and self.by_token):
            return None
        labels = torch.cat(self.labels)
        if self.regression:
            return labels.double().var(correction=0).item()
        share = torch.bincount(labels[labels != IGNORED]).double()
        share = share[share > 0] / share.sum()
        return -(share * share.log()).sum().item()

    def enough(self) -> bool:
        """Whether there are enough labels to call a loss near it poor: a few words of a vocabulary fit themselves."""
        if not self.by_token or not self.labels:
            return True
        labels = torch.cat(self.labels)
        labels = labels[labels != IGNORED]
        return len(labels) >= 10 * len(labels.unique())
