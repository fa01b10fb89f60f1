"""Every reduction of torch, asked of a library that adds, multiplies and compares numbers only.

Three things are made here, the same on every rank, so that it does not matter which algorithm the library picks:

Comparing floats. What a library's minimum of a NaN and a number is depends on which of them it looks at first, so the
ranks end with different values. They are compared as integers instead: read as a signed integer, with the bits below
the sign inverted where the sign is set, a float's bits stand in the order of the values (-0 below +0). A NaN is
set to the largest integer for a maximum, the smallest for a minimum, so it wins, as it does in torch's own `amax`.

Flags. A bool is a byte that holds 0 or 1: its sum is the maximum, its product the minimum.

Averages and complex numbers. A sum that is divided afterwards; pairs of real numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from effnn.base import InvalidInput

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int8, torch.uint8, torch.int32, torch.int64)
COMPLEX = (torch.complex32, torch.complex64, torch.complex128)

REDUCED_TYPES = (*FLOATS, *INTEGERS)
"""Types that may be summed, multiplied and compared: what gloo knows. bool and complex numbers are made of them."""

OPERATIONS = ("sum", "product", "min", "max", "avg", "band", "bor", "bxor")

_ORDERED = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a float -> what it is compared as
_BLOCK = 1 << 15  # elements
_OF_FLAGS = {
    "sum": "max", "product": "min", "min": "min", "max": "max", "band": "min", "bor": "max", "bxor": "sum",
}  # fmt: skip


@dataclass(frozen=True)
class Reduction:
    """One reduction of tensors of one type.

    operation: what the library is asked for (never "avg").
    as_numbers: gives the same memory, of a type that the library knows.
    encode: gives a copy that the library reduces instead.
    decode: puts such a copy into the tensor.
    afterwards: changes the result, in place.
    """

    operation: str
    as_numbers: Callable[[Tensor], Tensor] | None = None
    encode: Callable[[Tensor], Tensor] | None = None
    decode: Callable[[Tensor, Tensor], None] | None = None
    afterwards: Callable[[Tensor], object] | None = None

    def carry(self, flat: Tensor) -> Tensor:
        """Return what the library reduces in place of `flat`; where possible the same memory."""
        numbers = self.as_numbers(flat) if self.as_numbers else flat
        return self.encode(numbers) if self.encode else numbers

    def restore(self, carried: Tensor, flat: Tensor) -> None:
        """Put the library's result into `flat`; `carried` is used up."""
        numbers = self.as_numbers(flat) if self.as_numbers else flat
        if self.decode:
            self.decode(carried, numbers)
        elif carried.data_ptr() != numbers.data_ptr():
            numbers.copy_(carried)
        if self.afterwards:
            self.afterwards(numbers)


def operation_of(asked: object) -> str | None:
    """Name of a torch.distributed.ReduceOp; None for one that is not in OPERATIONS."""
    return next((known for known in OPERATIONS if asked == getattr(dist.ReduceOp, known.upper())), None)


def reduction(call: str, backend: str, asked: object, dtype: torch.dtype, size: int, int16: bool) -> Reduction:
    """Return how to make a reduction.

    call, backend: their names, for messages.
    asked: a torch.distributed.ReduceOp.
    dtype: of the tensors.
    size: number of ranks.
    int16: whether the library compares such integers.

    Raises InvalidInput for a pair of operation and type that has no meaning, and for what no backend of the CPU sums.
    """
    operation = operation_of(asked)
    if operation is None:
        raise InvalidInput(f"{call} over {backend} knows {', '.join(OPERATIONS)}; another operation was asked for")
    if dtype is torch.bool:
        return _of_flags(call, operation)
    if dtype in COMPLEX:
        return _of_complex(call, operation, size)
    if dtype not in REDUCED_TYPES:
        known = ", ".join(str(kind).removeprefix("torch.") for kind in (*REDUCED_TYPES, torch.bool, *COMPLEX))
        raise InvalidInput(f"{call} over {backend} takes {known}, not {dtype}; send it as one of these")
    if operation in ("band", "bor", "bxor") and dtype not in INTEGERS:
        raise InvalidInput(f"{call}: {operation} is made of the bits of integers and bools, not of {dtype}")
    if operation == "avg":
        if dtype in INTEGERS:
            raise InvalidInput(f"{call}: avg needs a floating type, not {dtype}; take sum and divide")
        return Reduction("sum", afterwards=lambda result: result.div_(size))
    if operation in ("min", "max") and dtype in FLOATS:
        return _of_floats(operation, dtype, int16)
    return Reduction(operation)


def _of_flags(call: str, operation: str) -> Reduction:
    if operation == "avg":
        raise InvalidInput(f"{call}: avg needs a floating type, not torch.bool; take sum and divide")
    odd = (lambda result: result.bitwise_and_(1)) if operation == "bxor" else None
    return Reduction(_OF_FLAGS[operation], lambda flat: flat.view(torch.uint8), afterwards=odd)


def _of_complex(call: str, operation: str, size: int) -> Reduction:
    if operation not in ("sum", "avg"):
        raise InvalidInput(f"{call} of complex tensors knows sum and avg, not {operation}")
    share = (lambda result: result.div_(size)) if operation == "avg" else None
    return Reduction("sum", lambda flat: torch.view_as_real(flat).view(-1), afterwards=share)


def _of_floats(operation: str, dtype: torch.dtype, int16: bool) -> Reduction:
    widened = dtype.itemsize == 2 and not int16
    kind = torch.int32 if widened else _ORDERED[dtype.itemsize]
    winner = torch.iinfo(kind).max if operation == "max" else torch.iinfo(kind).min

    def encode(flat: Tensor) -> Tensor:
        carried = torch.empty(flat.shape, dtype=kind)
        for values, place in _in_blocks(flat, carried):
            wide = values.float() if widened else values
            _invert(wide.view(kind), place)
            if wide.numel() and wide.amax().isnan():  # the common case is that there is none
                place.masked_fill_(wide.isnan(), winner)
        return carried

    def decode(carried: Tensor, flat: Tensor) -> None:
        for bits, place in _in_blocks(carried, flat):
            if widened:
                place.copy_(_invert(bits, bits).view(torch.float32))
            else:
                _invert(bits, place.view(kind))

    return Reduction(operation, encode=encode, decode=decode)


def _in_blocks(source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in pieces that stay in the cache over several passes."""
    return zip(source.split(_BLOCK), target.split(_BLOCK), strict=True)


def _invert(bits: Tensor, target: Tensor) -> Tensor:
    """Invert the bits below the sign where the sign is set; twice gives them back. The target may be `bits`."""
    below = torch.bitwise_right_shift(bits, 8 * bits.itemsize - 1).bitwise_and_(torch.iinfo(bits.dtype).max)
    return torch.bitwise_xor(bits, below, out=target)
