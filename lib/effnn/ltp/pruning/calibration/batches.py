"""What a calibration batch is: how many rows it has, which of its entries are per row, and a batch of some of the rows.

A batch is a dict of model inputs; with a loss of your own it may also be a list, a tuple, or any of these nested. An
entry is *per row* if it is a tensor or an array whose first dimension is the number of rows, or a plain list of that
length; everything else (a position table of shape (1, S), a number, a flag, a text, None) belongs to the batch as a
whole and is passed on as it is. The number of rows is read from one entry that is fixed beforehand, never from the
order of the entries.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from effnn.base import InvalidInput

INPUTS = ("input_ids", "inputs_embeds", "pixel_values")
"""Names of what transformers' encoders read; the first one that a batch has gives the number of its rows."""

LABELS = ("labels", "start_positions", "end_positions")
"""Names of what their losses compare with."""


def entries(batch: object, path: tuple = ()) -> Iterator[tuple[tuple, object]]:
    """Every entry of a batch that is not a container itself, with its path of keys and places."""
    if isinstance(batch, Mapping):
        for name, value in batch.items():
            yield from entries(value, (*path, name))
    elif _is_container(batch):
        for place, value in enumerate(batch):
            yield from entries(value, (*path, place))
    else:
        yield path, batch


def changed(batch: object, change: Callable[[object], object]) -> object:
    """A batch of the same build (mappings become dicts) whose entries went through `change`."""
    if isinstance(batch, Mapping):
        return {name: changed(value, change) for name, value in batch.items()}
    if _is_container(batch):
        values = [changed(value, change) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return change(batch)


def to_device(batch: object, device: torch.device) -> object:
    """The batch with all of its tensors on `device`."""
    return changed(batch, lambda value: value.to(device) if isinstance(value, Tensor) else value)


def main_input(batch: object) -> Tensor | None:
    """The entry among `INPUTS` that a dict of model inputs has, None for any other batch."""
    named = (batch.get(name) for name in INPUTS) if isinstance(batch, Mapping) else ()
    return next((value for value in named if isinstance(value, Tensor) and value.dim() > 1), None)


def row_count(batch: object) -> int:
    """Number of rows: of the main input; else of the labels; else the first dimension that most tensors share.

    Where several are shared by equally many tensors the smallest counts. InvalidInput if there is no tensor at all.
    """
    main = main_input(batch)
    if main is not None:
        return len(main)
    if isinstance(batch, Mapping):
        for name in LABELS:
            if isinstance(value := batch.get(name), Tensor) and value.dim() > 0:
                return len(value)
    lengths = Counter(len(value) for _, value in entries(batch) if _is_array(value) and value.ndim > 0)
    if not lengths:
        found = f"a {type(batch).__name__}" + (f" of {sorted(map(str, batch))}" if isinstance(batch, Mapping) else "")
        raise InvalidInput(f"the calibration batch holds no tensor with one item per row: found {found}")
    most = max(lengths.values())
    return min(length for length, count in lengths.items() if count == most)


def sequences_per_row(batch: object) -> int:
    """How many sequences a row has: the choices of (rows, choices, tokens) inputs, 1 for all others."""
    if not isinstance(batch, Mapping):
        return 1
    ids, embeds = batch.get("input_ids"), batch.get("inputs_embeds")
    if isinstance(ids, Tensor):
        return ids.shape[1] if ids.dim() == 3 else 1
    return embeds.shape[1] if isinstance(embeds, Tensor) and embeds.dim() == 4 else 1


def take(batch: object, rows: list[int]) -> object:
    """The batch with these of its rows only; what is not per row stays as it is."""
    size = row_count(batch)

    def chosen(value: object) -> object:
        if not _per_row(value, size):
            return value
        return value[rows] if _is_array(value) else type(value)(value[row] for row in rows)

    return changed(batch, chosen)


def row_keys(batch: object) -> list[object]:
    """One key per row, equal for rows of equal content: token ids without padding, pixels, or whatever the batch holds.

    Inputs may carry a prefix ("second_input_ids", with "second_attention_mask" beside it); without any such name every
    per-row entry counts but the labels.
    """
    size = row_count(batch)
    found = {path: value for path, value in entries(batch) if _per_row(value, size)}
    content = {path: value for path, value in found.items() if str(path[-1]).endswith(INPUTS)}
    if not content:
        content = {path: value for path, value in found.items() if path[-1] not in LABELS}
    if not content:
        return [object() for _ in range(size)]  # nothing to tell rows apart by: no two are taken for the same
    masks = {path: found.get(_mask_path(path)) for path in content}
    order = sorted(content, key=str)
    return [hash(tuple(_bytes(content[path], masks[path], row) for path in order)) for row in range(size)]


def _mask_path(path: tuple) -> tuple:
    name = str(path[-1])
    end = next((end for end in INPUTS[:2] if name.endswith(end)), None)
    return (*path[:-1], name.removesuffix(end) + "attention_mask") if end else path


def _bytes(value: object, mask: object, row: int) -> object:
    if not _is_array(value):
        return repr(value[row])
    item = torch.as_tensor(value[row])
    if isinstance(mask, Tensor) and mask is not value and mask[row].shape == item.shape[: mask.dim() - 1]:
        item = item[mask[row].bool()]
    return item.float().cpu().numpy().tobytes()


def _is_array(value: object) -> bool:
    """A tensor, or another library's array (NumPy's), recognised by its attributes."""
    return isinstance(value, Tensor) or (hasattr(value, "__array__") and hasattr(value, "ndim"))


def _is_container(value: object) -> bool:
    """A list or tuple that holds arrays or mappings; one of plain values (texts, numbers) is an entry by itself."""
    return isinstance(value, (list, tuple)) and any(
        _is_array(item) or isinstance(item, Mapping) or _is_container(item) for item in value
    )


def _per_row(value: object, size: int) -> bool:
    if _is_array(value):
        return value.ndim > 0 and len(value) == size
    return isinstance(value, (list, tuple)) and len(value) == size
