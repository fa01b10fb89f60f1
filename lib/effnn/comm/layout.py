"""How tensors are laid out for a library of collectives: flat, contiguous, or as bytes, and back again."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from effnn.base import InvalidInput

Finish = Callable[[], None] | None
"""What is left to do when a call has ended."""


def single(name: str, values: Sequence) -> Sequence:
    """The values, of which there is one: torch hands over a list, for devices that a rank once had several of."""
    if len(values) != 1:
        raise InvalidInput(f"{name}: expected one tensor (or list of them) a rank, got {len(values)}")
    return values


def flat_view(tensor: Tensor) -> Tensor:
    """The values in order, contiguous: a view where that is possible."""
    return tensor.detach().contiguous().view(-1)


def flat_in_place(tensors: Sequence[Tensor], receives: bool = True) -> tuple[list[Tensor], Finish]:
    """Flat buffers for tensors that a call overwrites, and what copies back those that could not be used in place."""
    flats = [flat_view(tensor) for tensor in tensors]
    copied = [
        (tensor, flat) for tensor, flat in zip(tensors, flats, strict=True) if not tensor.is_contiguous() and receives
    ]

    def copy_back() -> None:
        for tensor, flat in copied:
            tensor.detach().copy_(flat.view(tensor.shape))

    return flats, copy_back if copied else None


def overlaps(one: Tensor, other: Tensor) -> bool:
    """Whether two flat tensors share memory."""
    first, second = one.data_ptr(), other.data_ptr()
    return first < second + other.nbytes and second < first + one.nbytes


def as_bytes(flat: Tensor) -> Tensor:
    """The same memory as bytes: movement needs no type."""
    return flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)


def fill(parts: Sequence[Tensor], flat: Tensor) -> None:
    """Copy equal shares of `flat` into the parts."""
    for part, values in zip(parts, flat.view(len(parts), -1), strict=True):
        part.detach().copy_(values.view(part.shape))


def divide(flats: Sequence[Tensor], operation: str, size: int) -> Finish:
    """An average is a sum, then divided."""
    if operation != "avg":
        return None

    def divide() -> None:
        for flat in flats:
            flat.div_(size)

    return divide


def then(first: Finish, second: Finish) -> Finish:
    """Both, one after the other; either may be None."""
    if first is None or second is None:
        return first or second

    def both() -> None:
        first()
        second()

    return both
