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
        raise InvalidInput(f"{name}: expected one tensor (or list of them) per rank, got {len(values)}")
    return values


def flat_view(tensor: Tensor) -> Tensor:
    """The values in order, contiguous: a view where that is possible.

    torch calls one element contiguous whatever its stride, and a conjugate or negated view contiguous although its
    memory holds other values than it shows.
    """
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.as_strided((plain.numel(),), (1,))


def is_view(flat: Tensor, tensor: Tensor) -> bool:
    """Whether `flat_view` gave the tensor's own memory, so that writing there is writing to the tensor."""
    return flat.data_ptr() == tensor.data_ptr()


def flat_in_place(name: str, tensors: Sequence[Tensor], receives: bool = True) -> tuple[list[Tensor], Finish]:
    """Flat buffers for tensors that a call overwrites, and what copies back those that could not be used in place.

    receives: False on a rank whose tensors are only read. Raises InvalidInput for a tensor that cannot be written to.
    """
    flats = [flat_view(tensor) for tensor in tensors]
    if not receives:
        return flats, None
    expect_own_memory(name, tensors)
    copied = [(tensor, flat) for tensor, flat in zip(tensors, flats, strict=True) if not is_view(flat, tensor)]

    return flats, (lambda: fill(*zip(*copied, strict=True))) if copied else None


def expect_own_memory(name: str, outputs: Sequence[Tensor]) -> None:
    """Refuse, with InvalidInput, to write into tensors of which two elements are the same memory."""
    for output in outputs:
        if not output.is_contiguous() and _overlaps_itself(output):
            raise InvalidInput(
                f"{name}: an output of shape {tuple(output.shape)} and strides {output.stride()} has elements that "
                "share memory, as expand() makes them; pass output.contiguous()"
            )


def _overlaps_itself(tensor: Tensor) -> bool:
    """Exact: where the strides alone do not tell, the places of all elements are counted."""
    steps = sorted((stride, n) for stride, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1)
    reach = 0
    for stride, length in steps:
        if length == 0:
            return False
        if stride <= reach:
            break
        reach += stride * (length - 1)
    else:
        return False
    if tensor.numel() == 0:
        return False
    places = torch.arange(1 + sum(stride * (length - 1) for stride, length in steps))
    return places.as_strided(tensor.shape, tensor.stride()).unique().numel() < tensor.numel()


def overlaps(one: Tensor, other: Tensor) -> bool:
    """Whether two flat tensors share memory."""
    first, second = one.data_ptr(), other.data_ptr()
    return first < second + other.nbytes and second < first + one.nbytes


def as_bytes(flat: Tensor) -> Tensor:
    """The same memory as bytes: movement needs no type."""
    return flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)


def fill(tensors: Sequence[Tensor], flats: Sequence[Tensor]) -> None:
    """Copy flat values into the tensors that they belong to."""
    for tensor, flat in zip(tensors, flats, strict=True):
        tensor.detach().copy_(flat.view(tensor.shape))


def then(first: Finish, second: Finish) -> Finish:
    """Both, one after the other; either may be None."""
    if first is None or second is None:
        return first or second

    def both() -> None:
        first()
        second()

    return both
