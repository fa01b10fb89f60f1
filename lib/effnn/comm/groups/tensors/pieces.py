"""Large messages in pieces: an MPI library may count the bytes of one call in 32 bits, and fail beyond 2 GiB.

All ranks cut alike, since the sizes of a call are alike on all of them. All pieces are started at once: a piece
that is started later could come after another call on one rank and before it on another.
"""

from collections.abc import Callable, Iterator

from torch import Tensor

from effnn.comm.groups.lane.call import AllOf, Request, Steps

LARGEST = 1 << 30
"""Bytes of the memory that one call of the library gets at most."""


def split(flat: Tensor) -> tuple[Tensor, ...]:
    """Return the tensor, [n], in pieces that are small enough; one empty piece of an empty tensor."""
    return flat.split(_width(flat, 1))


def in_pieces(start: Callable[[Tensor], Request], flat: Tensor) -> Request:
    """Start a call on each piece of the tensor."""
    pieces = split(flat)
    return start(flat) if len(pieces) == 1 else AllOf([start(piece) for piece in pieces])


def by_columns(
    start: Callable[[Tensor, Tensor], Request], output: Tensor, source: Tensor, columns: int, rows: int
) -> Request:
    """Start a call on some columns at a time of tensors that hold one row per rank.

    start: starts the call on such an output and source.
    output, source: flat, [rows x columns] or [columns]; the output is empty where nothing arrives.
    columns: elements of one row.
    rows: the number of ranks.

    A tensor that is sent in pieces is copied once more.
    """
    width = _width(source, rows)
    if columns <= width:
        return start(output, source)
    into, out_of = _matrix(output, columns), _matrix(source, columns)

    def piece(first: int) -> Iterator[Request]:
        sent = out_of[:, first : first + width].contiguous()
        place = into[:, first : first + width]
        arrived = place.new_empty(place.shape)
        yield start(arrived.view(-1), sent.view(-1))
        place.copy_(arrived)

    return AllOf([Steps.begun(piece(first)) for first in range(0, columns, width)])


def _width(flat: Tensor, rows: int) -> int:
    """Elements of a piece, where `rows` of them go in one call."""
    return max(1, LARGEST // (flat.element_size() * rows))


def _matrix(flat: Tensor, columns: int) -> Tensor:
    return flat.view(-1, columns) if flat.numel() else flat.view(1, 0)
