"""Token arrays of any kind, made readable without a copy: tensors, NumPy arrays, memory maps, lists.

torch cannot share the memory of every array: not with another byte order, negative strides, or a field of a record.
Such an array is read window by window, so its file may be of any size.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from effnn.base import InvalidInput, first_line


class ForeignArray:
    """A NumPy array whose memory torch cannot share: `array[slice or index tensor]` gives a new tensor."""

    def __init__(self, array: object) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        picked = self.array[index.numpy() if isinstance(index, Tensor) else index]
        return torch.from_numpy(picked.astype(picked.dtype.newbyteorder("="), order="C"))


Tokens = Tensor | ForeignArray


def checked_tokens(tokens: object, context: int, what: str) -> Tokens:
    """The tokens over the same memory, on the CPU: integers, 1-D, longer than `context`.

    tokens: a tensor, a NumPy array or memory map in any byte order and with any strides, anything that turns into an
    array (`__array__`), or a sequence of whole numbers. what: "training" or "validation", for the message. Raises
    InvalidInput that says what was found and how to convert it.
    """
    tokens = _as_array(tokens, what)
    if tokens.ndim != 1:
        hint = "join the rows by .reshape(-1)" if tokens.ndim > 1 else "give more than a single number"
        raise _refusal(what, f"{tokens.dtype} of shape {tuple(tokens.shape)}: {hint}")
    if len(tokens) <= context:
        raise InvalidInput(
            f"there are {len(tokens)} {what} tokens; a context of {context} needs {context + 1} or more (each position "
            "predicts the next)"
        )
    return _as_tensor(tokens, what) if isinstance(tokens, Tensor) else _mapped(tokens, what)


def _as_array(tokens: object, what: str) -> object:
    """A tensor, or an object with the attributes of a NumPy array."""
    if isinstance(tokens, Tensor) or (hasattr(tokens, "ndim") and hasattr(getattr(tokens, "dtype", None), "kind")):
        return tokens.to_numpy() if hasattr(tokens, "to_numpy") else tokens
    if hasattr(tokens, "__array__"):
        return tokens.__array__()
    if isinstance(tokens, Sequence) and not isinstance(tokens, str | bytes | bytearray):
        try:
            # list() for what torch.tensor would not take: an array.array or a range
            made = torch.tensor(list(tokens)) if len(tokens) else torch.empty(0, dtype=torch.int64)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            found = f"a {type(tokens).__name__} that torch.tensor does not take ({first_line(error)})"
            raise _refusal(what, f"{found}: join its parts into one list of whole numbers") from None
        if made.is_floating_point() or made.is_complex():
            raise _refusal(what, f"a {type(tokens).__name__} with fractions: convert whole numbers by int()")
        return made
    raise _refusal(what, f"{_found(tokens)}: give its token ids as one array")


def _as_tensor(tokens: Tensor, what: str) -> Tensor:
    if type(tokens) is not Tensor or tokens.layout is not torch.strided or tokens.is_quantized or tokens.is_meta:
        kind = type(tokens).__name__ if type(tokens) is not Tensor else f"a {tokens.layout} tensor on {tokens.device}"
        raise _refusal(what, f"{kind}: give a plain tensor that holds its values")
    if tokens.is_floating_point() or tokens.is_complex():
        raise _refusal(what, f"{tokens.dtype}: convert whole numbers by .long()")
    if tokens.dtype == torch.bool:
        raise _refusal(what, "torch.bool, which looks like a mask: give the tokens themselves")
    return tokens.cpu()


def _mapped(array: object, what: str) -> Tokens:
    kind = array.dtype.kind
    if kind == "b":
        raise _refusal(what, "bool, which looks like a mask: give the tokens themselves")
    if kind in "fc":
        raise _refusal(what, f"{array.dtype}: convert whole numbers by .astype('int64')")
    if kind not in "iu":
        held = f", the first entry of type {type(array[0]).__name__}" if kind == "O" else ""
        hint = "join its entries by numpy.concatenate, or convert whole numbers by .astype('int64')"
        raise _refusal(what, f"{array.dtype}{held}: {hint}" if kind == "O" else f"{array.dtype}: give token ids")
    if hasattr(array, "mask"):
        raise _refusal(what, "a masked array: .compressed() leaves out what is masked")
    try:
        with warnings.catch_warnings():
            # a read-only memory map is fine: nothing writes here
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(array)
    except (TypeError, ValueError):
        return ForeignArray(array)


def _found(tokens: object) -> str:
    return "None" if tokens is None else f"a {type(tokens).__name__}"


def _refusal(what: str, found: str) -> InvalidInput:
    return InvalidInput(f"{what} tokens: expected one dimension of integers, found {found}")
