"""What is checked of every calibration batch as it comes: a batch that the model cannot make a loss of is refused.

The first batch is read and checked before any pass over the others.
"""

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from effnn.base import InvalidInput
from effnn.ltp.pruning.calibration.batches import INPUTS, LABELS, main_input, row_count, sequences_per_row
from effnn.ltp.pruning.calibration.losses import IGNORED, Loss, is_regression, missing_labels


def checked_loader(
    model: PreTrainedModel, loader: Iterable, labels: str = "data", loss: Loss | None = None
) -> tuple[object, Iterator[object]]:
    """The first batch of `loader`, read and checked at the call, and all of its batches in order, each checked."""
    batches = enumerate(_iterator(loader))
    first = next(batches, None)
    if first is None:
        raise InvalidInput(
            "the calibration loader is empty: expected at least one mini-batch, usually 2048 rows in all "
            "(an iterator that was read before gives nothing again)"
        )
    check_batch(model, first[1], 0, labels, loss)

    def rest() -> Iterator[object]:
        for index, batch in batches:
            check_batch(model, batch, index, labels, loss)
            yield batch

    return first[1], itertools.chain([first[1]], rest())


def _iterator(loader: object) -> Iterator[object]:
    if isinstance(loader, Mapping):
        raise InvalidInput(
            f"the calibration loader is one batch (a {type(loader).__name__} of {sorted(map(str, loader))}): expected "
            "an iterable of batches, for example [batch] or a DataLoader"
        )
    if isinstance(loader, (str, bytes, Tensor)):
        raise InvalidInput(f"the calibration loader is a {type(loader).__name__}: expected an iterable of batches")
    try:
        return iter(loader)
    except TypeError as error:
        raise InvalidInput(
            f"the calibration loader is a {type(loader).__name__} and gives no batches: expected an iterable of "
            "batches, for example a DataLoader"
        ) from error


def check_batch(
    model: PreTrainedModel, batch: object, index: int = 0, labels: str = "data", loss: Loss | None = None
) -> None:
    """InvalidInput unless the model can make a loss of the batch; with a `loss` only known inputs are looked at."""
    where = f"calibration batch {index}"
    if not isinstance(batch, Mapping):
        if loss is not None:
            row_count(batch)
            return
        raise InvalidInput(
            f"{where} is a {type(batch).__name__}: expected a dict of model inputs. If it holds inputs and labels, "
            'pass ({"input_ids": ids, "labels": labels} for ids, labels in loader), or a loss=... that takes '
            "such batches"
        )
    if loss is None:
        for name in (*INPUTS, *LABELS, "attention_mask", "token_type_ids", "position_ids"):
            if name in batch and not isinstance(batch[name], (Tensor, type(None))):
                raise InvalidInput(
                    f"{name} of {where} is a {type(batch[name]).__name__}: expected a torch tensor, "
                    f"torch.as_tensor(batch[{name!r}])"
                )
        if main_input(batch) is None:
            wanted = model.main_input_name
            found = batch.get(wanted)
            what = f"{wanted} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"only {sorted(batch)}"
            raise InvalidInput(
                f"{where} holds {what}: expected {wanted} with one item per row, a first dimension of rows "
                "(a DataLoader with a batch_size makes it from single rows)"
            )
        if labels == "data" and not has_labels(model, batch):
            raise InvalidInput(missing_labels(model, batch))
        _check_build(model, batch, where)
    _check_tokens(model, batch, where)
    if loss is None and labels == "data":
        _check_labels(model, batch, where)


def labels_taken(model: PreTrainedModel) -> set[str]:
    """Names of the labels that the forward pass of the model takes."""
    return set(LABELS) & set(inspect.signature(model.forward).parameters)


def has_labels(model: PreTrainedModel, batch: Mapping) -> bool:
    """Whether the batch holds what the model's own loss needs; True if the model takes no labels at all."""
    taken = labels_taken(model)
    given = {name for name in LABELS if batch.get(name) is not None}
    if "start_positions" in taken:
        return {"start_positions", "end_positions"} <= given
    return not taken or bool(given & taken)


def _check_build(model: PreTrainedModel, batch: Mapping, where: str) -> None:
    """Sequences where the head wants sequences, choices of sequences where it wants those."""
    ids, choices = batch.get("input_ids"), type(model).__name__.endswith("ForMultipleChoice")
    if isinstance(ids, Tensor) and ids.dim() != (3 if choices else 2):
        axes = "(rows, choices, tokens)" if choices else "(rows, tokens)"
        raise InvalidInput(
            f"input_ids of {where} are of shape {tuple(ids.shape)}: {type(model).__name__} expects {axes}"
        )


def _check_tokens(model: PreTrainedModel, batch: Mapping, where: str) -> None:
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.numel() == 0:
        return
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise InvalidInput(f"input_ids of {where} are {ids.dtype}: expected token ids, batch['input_ids'].long()")
    embedding = model.get_input_embeddings()
    size = getattr(embedding, "num_embeddings", None)
    if size is not None:
        _check_range(ids, size, "input_ids", where, f"the vocabulary of the model has {size} tokens: is the tokenizer "
                     "that of this model?")  # fmt: skip
    types, known = batch.get("token_type_ids"), getattr(model.config, "type_vocab_size", None)
    if isinstance(types, Tensor) and types.numel() and known and not types.is_floating_point():
        _check_range(types, known, "token_type_ids", where, f"the model knows {known} token type(s): leave them out?")
    longest = _longest(model)
    if longest is not None and batch.get("position_ids") is None and ids.shape[-1] > longest:
        raise InvalidInput(
            f"{where} has sequences of {ids.shape[-1]} tokens, and the model has positions for {longest}: truncate "
            f"them, tokenizer(..., truncation=True, max_length={longest})"
        )


def _longest(model: PreTrainedModel) -> int | None:
    """Longest sequence that the position table covers; RoBERTa's positions start after the padding index."""
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    size, padding = getattr(table, "num_embeddings", None), getattr(table, "padding_idx", None)
    return size if size is None or padding is None else size - padding - 1


def _check_labels(model: PreTrainedModel, batch: Mapping, where: str) -> None:
    rows, config = row_count(batch), model.config
    for name in LABELS:
        value = batch.get(name)
        if isinstance(value, Tensor) and value.dim() > 0 and len(value) != rows:
            raise InvalidInput(
                f"{name} of {where} are of shape {tuple(value.shape)}, and its inputs have {rows} rows: expected "
                "labels row by row"
            )
        if isinstance(value, Tensor) and name != "labels" and value.dtype != torch.long:
            raise InvalidInput(f"{name} of {where} are {value.dtype}: expected torch.int64, batch[{name!r}].long()")
    found = batch.get("labels")
    if not isinstance(found, Tensor) or found.numel() == 0 or is_regression(model, found, rows):
        return
    head = type(model).__name__
    chooses_by_row = head.endswith(("ForSequenceClassification", "ForImageClassification"))
    several = getattr(config, "problem_type", None) == "multi_label_classification"
    if chooses_by_row and (several or found.dim() == 2 and found.shape[1] > 1):
        expected = (rows, config.num_labels)
        if tuple(found.shape) != expected or not found.is_floating_point():
            raise InvalidInput(
                f"labels of {where} are {found.dtype} of shape {tuple(found.shape)}: expected floats of shape "
                f"{expected}, one 0 or 1 for each of the labels that a row may have"
            )
        return
    chooses_by_token = head.endswith(("ForTokenClassification", "ForMaskedLM"))
    if not chooses_by_row and not chooses_by_token and not head.endswith("ForMultipleChoice"):
        return
    tokens = main_input(batch).shape[:2]
    if chooses_by_token and found.shape != tokens:
        raise InvalidInput(
            f"labels of {where} are of shape {tuple(found.shape)}: {head} expects one per token, {tuple(tokens)} (-100 "
            "for tokens without a label)"
        )
    if found.dtype != torch.long:
        raise InvalidInput(
            f"labels of {where} are {found.dtype}: expected classes as torch.int64, batch['labels'].long() (a model "
            f"that predicts numbers has config.num_labels=1; here it is {config.num_labels})"
            if chooses_by_row
            else f"labels of {where} are {found.dtype}: expected torch.int64, batch['labels'].long()"
        )
    counts = {"ForMaskedLM": getattr(config, "vocab_size", None), "ForMultipleChoice": sequences_per_row(batch)}
    size = next((count for end, count in counts.items() if head.endswith(end)), config.num_labels)
    if size is not None:
        _check_range(
            found[found != IGNORED], size, "labels", where, f"{head} tells {size} classes apart (-100 is left out)"
        )


def _check_range(values: Tensor, size: int, name: str, where: str, meaning: str) -> None:
    if values.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(values))
    if low < 0 or high >= size:
        raise InvalidInput(f"{name} of {where} run from {low} to {high}: expected 0 to {size - 1}, {meaning}")
