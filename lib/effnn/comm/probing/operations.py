"""The talk's eleven operations and the two sparse ones, each with a check of what it computed.

Every function runs on all ranks of the default group, on tensors of one device, and raises `WrongResult` where a value
is not what the definition says. Values depend on the rank, so that an operation that does nothing, or mixes up the
ranks, is found out.
"""

import itertools
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from effnn.base import EffnnError
from effnn.comm.groups.tensors import sparse

ELEMENTS = 1027  # of each tensor: odd, so that nothing divides evenly

_LATE = 0.2  # seconds that one rank keeps the others waiting in a barrier
_barriers = itertools.count()  # checks of the barrier so far: each counts the ranks under a key of its own


class WrongResult(EffnnError):
    """An operation ended without an error but computed something else."""


def send(device: torch.device) -> None:
    """Every rank but the last sends to the next one, which checks what came."""
    rank, size = _place()
    if rank > 0:
        received = torch.zeros(ELEMENTS, device=device)
        dist.recv(received, src=rank - 1)
        _expect(received, _values(rank - 1, device))
    if rank + 1 < size:
        dist.send(_values(rank, device), dst=rank + 1)


def recv(device: torch.device) -> None:
    """Non-blocking receives, posted before the sends, around a ring."""
    rank, size = _place()
    received = torch.zeros(ELEMENTS, device=device)
    sent = _values(rank, device)
    pending = [dist.irecv(received, src=(rank - 1) % size), dist.isend(sent, dst=(rank + 1) % size)]
    for work in pending:
        work.wait()
    _expect(received, _values((rank - 1) % size, device))


def broadcast(device: torch.device) -> None:
    """From every rank in turn."""
    rank, size = _place()
    for root in range(size):
        tensor = _values(rank, device)
        dist.broadcast(tensor, src=root)
        _expect(tensor, _values(root, device))


def all_reduce(device: torch.device) -> None:
    """Sum, product, minimum and maximum."""
    rank, size = _place()
    for operation, combined in _REDUCTIONS.items():
        values = _factors if operation == "PRODUCT" else _values
        tensor = values(rank, device)
        dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
        _expect(tensor, combined(torch.stack([values(r, device) for r in range(size)])))


def reduce(device: torch.device) -> None:
    """Sum to every rank in turn."""
    rank, size = _place()
    total = torch.stack([_values(r, device) for r in range(size)]).sum(0)
    for root in range(size):
        tensor = _values(rank, device)
        dist.reduce(tensor, dst=root)
        if rank == root:
            _expect(tensor, total)


def all_gather(device: torch.device) -> None:
    """Into a list and into one tensor."""
    rank, size = _place()
    parts = [torch.zeros(ELEMENTS, device=device) for _ in range(size)]
    dist.all_gather(parts, _values(rank, device))
    flat = torch.zeros(size * ELEMENTS, device=device)
    dist.all_gather_single(flat, _values(rank, device))
    for r in range(size):
        _expect(parts[r], _values(r, device))
    _expect(flat, torch.cat([_values(r, device) for r in range(size)]))


def gather(device: torch.device) -> None:
    """To every rank in turn."""
    rank, size = _place()
    for root in range(size):
        parts = [torch.zeros(ELEMENTS, device=device) for _ in range(size)] if rank == root else None
        dist.gather(_values(rank, device), parts, dst=root)
        for r in range(size if rank == root else 0):
            _expect(parts[r], _values(r, device))


def scatter(device: torch.device) -> None:
    """From every rank in turn."""
    rank, size = _place()
    for root in range(size):
        parts = [_values(10 * root + r, device) for r in range(size)] if rank == root else None
        tensor = torch.zeros(ELEMENTS, device=device)
        dist.scatter(tensor, parts, src=root)
        _expect(tensor, _values(10 * root + rank, device))


def reduce_scatter(device: torch.device) -> None:
    """Sum, from a list and from one tensor."""
    rank, size = _place()
    expected = torch.stack([_values(10 * r + rank, device) for r in range(size)]).sum(0)
    tensor = torch.zeros(ELEMENTS, device=device)
    dist.reduce_scatter(tensor, [_values(10 * rank + part, device) for part in range(size)])
    _expect(tensor, expected)
    tensor.zero_()
    dist.reduce_scatter_single(tensor, torch.cat([_values(10 * rank + part, device) for part in range(size)]))
    _expect(tensor, expected)


def all_to_all(device: torch.device) -> None:
    """Equal parts in one tensor, and parts of different sizes."""
    rank, size = _place()
    received = torch.zeros(size * ELEMENTS, device=device)
    sent = torch.cat([_values(10 * rank + part, device) for part in range(size)])
    dist.all_to_all_single(received, sent)
    _expect(received, torch.cat([_values(10 * r + rank, device) for r in range(size)]))
    sizes_in, sizes_out = [rank + part + 1 for part in range(size)], [r + rank + 1 for r in range(size)]
    received = torch.zeros(sum(sizes_out), device=device)
    sent = torch.cat([_values(10 * rank + part, device)[:n] for part, n in enumerate(sizes_in)])
    dist.all_to_all_single(received, sent, sizes_out, sizes_in)
    _expect(received, torch.cat([_values(10 * r + rank, device)[:n] for r, n in enumerate(sizes_out)]))


def barrier(device: torch.device) -> None:
    """No rank leaves before the last has come: each one's mark is there for all afterwards."""
    rank, size = _place()
    store = dist.PrefixStore("barrier-check", dist.distributed_c10d._get_default_store())
    arrived = f"arrived-{next(_barriers)}"
    if rank == size - 1:  # late, or a barrier that does nothing would let all ranks pass at the same time
        time.sleep(_LATE)
    store.add(arrived, 1)
    dist.barrier()
    if store.add(arrived, 0) != size:
        raise WrongResult(f"barrier let rank {rank} pass before all {size} ranks had come")


def _sparse_all_reduce(dtype: torch.dtype, device: torch.device) -> None:
    """torch's own all_reduce of sparse COO tensors whose rows overlap."""
    rank, size = _place()
    tensor = _rows(rank, dtype, device)
    dist.all_reduce(tensor)
    _expect(tensor.to_dense(), sum(_rows(r, dtype, device).to_dense() for r in range(size)))


def padded_pairs(device: torch.device) -> None:
    """all_gather of padded (ids, values), and the sum made of it; ranks hold different numbers of rows."""
    rank, size = _place()
    expected = sum(_rows(r, torch.float32, device).to_dense() for r in range(size))
    _expect(sparse.all_reduce(_rows(rank, torch.float32, device)).to_dense(), expected)


OPERATIONS: dict[str, Callable[[torch.device], None]] = {
    "send": send,
    "recv": recv,
    "broadcast": broadcast,
    "all_reduce": all_reduce,
    "reduce": reduce,
    "all_gather": all_gather,
    "gather": gather,
    "scatter": scatter,
    "reduce_scatter": reduce_scatter,
    "all_to_all": all_to_all,
    "barrier": barrier,
}
"""The talk's rows, in its order."""

SPARSE_SUMS = ("sparse all_reduce, float32", "sparse all_reduce, int8")
PAIRS = "all_gather of (ids, values)"
SPARSE: dict[str, Callable[[torch.device], None]] = {
    SPARSE_SUMS[0]: partial(_sparse_all_reduce, torch.float32),
    SPARSE_SUMS[1]: partial(_sparse_all_reduce, torch.int8),
    PAIRS: padded_pairs,
}
"""What the talk remarks on sparse gradients."""

_REDUCTIONS = {
    "SUM": lambda every: every.sum(0),
    "PRODUCT": lambda every: every.prod(0),
    "MIN": lambda every: every.amin(0),
    "MAX": lambda every: every.amax(0),
}


def _place() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def _values(rank: int, device: torch.device) -> Tensor:
    """Small whole numbers that differ by rank and position: their sums are exact."""
    return ((torch.arange(ELEMENTS, device=device) * (2 * rank + 3)) % 1009 - 504).float()


def _factors(rank: int, device: torch.device) -> Tensor:
    """Powers of two with signs, which differ by rank and position: products of a hundred ranks are exact."""
    positions = torch.arange(ELEMENTS, device=device) * (2 * rank + 3)
    return torch.where(positions % 5 == 0, 2.0, 1.0) * torch.where(positions % 7 < 3, -1.0, 1.0)


def _rows(rank: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A sparse gradient [16, 4] of rank + 2 rows, some shared with other ranks."""
    ids = torch.arange(rank, 2 * rank + 2, device=device)
    values = torch.stack([torch.full((4,), rank + int(row) + 1, device=device) for row in ids]).to(dtype)
    return torch.sparse_coo_tensor(ids[None], values, (16, 4), check_invariants=False)


def _expect(got: Tensor, wanted: Tensor) -> None:
    if not torch.equal(got, wanted):
        place = (got != wanted).flatten().nonzero()[0].item()
        raise WrongResult(f"element {place} is {got.flatten()[place]}, expected {wanted.flatten()[place]}")
