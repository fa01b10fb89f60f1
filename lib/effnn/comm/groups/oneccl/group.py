"""The "ccl" backend: a process group over the oneCCL library, for torch releases that Intel's bindings do not cover.

The C API has all_reduce, broadcast, reduce, reduce_scatter, all_gather and all_to_all for host memory; they are
native. Gather, scatter, barrier and transfers of unequal parts are composed of them. Send and receive are delegated to
a gloo group beside this one (the library's own do not work on host memory). All calls of a process run on one lane, in
the order of their issue, which must be the same on every rank.

Sums: with two ranks every sum is the same, bit by bit, as gloo's. With more, floating-point sums depend on the order of
the additions, and the library's own order is not gloo's (and changes with the message size). EFFNN_CCL_SUM=gloo, or
`sum_order="gloo"`, adds in the order of gloo's ring instead: bit-equal, at the price of an all_to_all, a sum and an
all_gather instead of one native call.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from math import ceil

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PythonCallbackWork

from effnn.base import InvalidInput
from effnn.comm.groups.interfaces import communication_interface
from effnn.comm.groups.lane.call import Call
from effnn.comm.groups.lane.lane import Lane, skip_destructors
from effnn.comm.groups.oneccl import waiting
from effnn.comm.groups.oneccl.library import OPERATIONS, TYPES, Communicator, library
from effnn.comm.groups.process_group import LaneProcessGroup
from effnn.comm.groups.tensors.layout import as_bytes, flat_in_place, flat_view

SUPPORT = (
    dict.fromkeys(("send", "recv"), "delegated")
    | dict.fromkeys(("broadcast", "all_reduce", "reduce", "all_gather", "reduce_scatter", "all_to_all"), "native")
    | dict.fromkeys(("gather", "scatter", "barrier"), "composed")
)

_BITWISE = ("band", "bor", "bxor")  # not in the library's API

_COMBINE = {
    "sum": Tensor.add_,
    "product": Tensor.mul_,
    "band": Tensor.bitwise_and_,
    "bor": Tensor.bitwise_or_,
    "bxor": Tensor.bitwise_xor_,
}

logger = logging.getLogger(__name__)

_LEAVING = 5.0  # seconds that a rank which leaves a group waits for the others

SUM_ORDERS = ("native", "gloo")

_GLOO_SEGMENT = 1 << 20  # bytes; gloo's ring cuts a message into segments of at most this size


@cache
def lane() -> Lane:
    """The one lane of this process: every communicator of the library is entered from it alone."""
    return Lane("oneCCL")


class OneCCLProcessGroup(LaneProcessGroup):
    """See the module's text. Raises NotAvailable without the library, CollectiveTimeout when a rank stays away.

    sum_order: "native", "gloo", or None for the environment's EFFNN_CCL_SUM (default native).
    """

    NAME = "ccl"
    SUPPORT = SUPPORT
    _gathers_everywhere = True

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta, sum_order: str | None = None):
        super().__init__(lane(), store, rank, size, timeout)
        self._sum_order = sum_order or os.environ.get("EFFNN_CCL_SUM") or "native"
        if self._sum_order not in SUM_ORDERS:
            raise InvalidInput(
                f"sum order {self._sum_order!r} (EFFNN_CCL_SUM): expected one of {', '.join(SUM_ORDERS)}"
            )
        self._communicator: Communicator | None = None
        self._messages: dist.ProcessGroupGloo | None = None
        self._lane.run(Call(f"joining a group of {size} ranks", self._join, timeout=self._timeout))
        if size > 1:
            self._messages = _gloo_beside(dist.PrefixStore("messages/", self._store), rank, size, timeout)

    def _join(self) -> None:
        self._store.set(f"host_{self._rank}", waiting.host())
        if library().place is None:
            library().place = self._place()
        if self._rank == 0:
            self._store.set("id", library().unique_id().hex())
        shared = bytes.fromhex(self._store.get("id").decode())
        library().on_worker_failure = self._lane.fail
        self._communicator = library().communicator(shared, self._rank, self._size)

    def _place(self) -> waiting.Place:
        """Of this rank on its machine, from what all ranks of the group have said of theirs."""
        hosts = [self._store.get(f"host_{rank}").decode() for rank in range(self._size)]
        in_world = self._rank, self._size
        if dist.is_initialized() and dist.get_world_size() > self._size:  # not yet while the whole is being made
            in_world = dist.get_rank(), dist.get_world_size()
        return waiting.place(self._rank, hosts, *in_world, os.environ)

    # Native calls.

    def _run_all_reduce(self, flat: Tensor, operation: str) -> None:
        in_gloos_order = self._sum_order == "gloo" and self._size > 2 and operation in ("sum", "product")
        if in_gloos_order or operation in _BITWISE:
            self._all_reduce_by_exchange(flat, operation)
        else:
            pointer = flat.data_ptr()
            self._call("AllReduce", pointer, pointer, flat.numel(), *_kind(flat, operation))

    def _run_broadcast(self, flat: Tensor, root: int) -> None:
        self._call("Broadcast", flat.data_ptr(), flat.data_ptr(), flat.numel(), TYPES[torch.uint8], root)

    def _run_reduce(self, flat: Tensor, root: int, operation: str) -> None:
        result = flat if self._rank == root else torch.empty_like(flat)  # the library writes into it on every rank
        if operation in _BITWISE:
            self._all_reduce_by_exchange(result.copy_(flat), operation)
            return
        self._call("Reduce", flat.data_ptr(), result.data_ptr(), flat.numel(), *_kind(flat, operation), root)

    def _run_all_gather(self, output: Tensor, flat: Tensor) -> None:
        self._call("AllGather", flat.data_ptr(), output.data_ptr(), flat.numel(), TYPES[torch.uint8])

    def _run_reduce_scatter(self, output: Tensor, flat: Tensor, operation: str) -> None:
        if operation in _BITWISE:
            arrived = torch.empty_like(flat)
            self._run_all_to_all(as_bytes(arrived), as_bytes(flat))
            output.copy_(self._combined(arrived.view(self._size, -1), operation))
            return
        kind = _kind(flat, operation)
        self._call("ReduceScatter", flat.data_ptr(), output.data_ptr(), output.numel(), *kind)

    def _run_all_to_all(self, output: Tensor, flat: Tensor) -> None:
        count = flat.numel() // self._size
        self._call("AllToAll", flat.data_ptr(), output.data_ptr(), count, TYPES[torch.uint8])

    # Composed calls.

    def _run_gather(self, output: Tensor, flat: Tensor, root: int) -> None:
        self._run_all_gather(output, flat)

    def _run_scatter(self, flat: Tensor, source: Tensor, root: int) -> None:
        self._run_broadcast(source, root)
        flat.copy_(source.view(self._size, -1)[self._rank])

    def _run_barrier(self) -> None:
        self._run_all_reduce(torch.ones(1, dtype=torch.int32), "max")

    def _uneven_all_to_all(
        self, output: Tensor, flat: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> Callable[[], None]:
        def start() -> None:
            # Padded to the largest part of any rank, which the ranks agree on first.
            largest = torch.tensor([max(*received, *sent)])
            self._run_all_reduce(largest, "max")
            width = int(largest)
            if not width:
                return
            padded, arrived = flat.new_zeros(self._size, width), flat.new_empty(self._size, width)
            for row, part in zip(padded, flat.split(list(sent)), strict=True):
                row[: part.numel()] = part
            self._run_all_to_all(arrived.view(-1).view(torch.uint8), padded.view(-1).view(torch.uint8))
            for row, part in zip(arrived, output.split(list(received)), strict=True):
                part.copy_(row[: part.numel()])

        return start

    def _all_reduce_by_exchange(self, flat: Tensor, operation: str) -> None:
        """Every rank combines one chunk and hands it to all: for what the library does not know, or not in this order.

        Chunk c is combined at one rank in the order c-1, c-2, ..., c (modulo W), as gloo's ring does.
        """
        size, width = self._size, _gloo_chunk(flat, self._size)
        padded, arrived = flat.new_zeros(size * width), flat.new_empty(size * width)
        padded[: flat.numel()] = flat
        self._run_all_to_all(as_bytes(arrived), as_bytes(padded))
        total = self._combined(arrived.view(size, width), operation)
        self._run_all_gather(as_bytes(padded), as_bytes(total))
        flat.copy_(padded[: flat.numel()])

    def _combined(self, parts: Tensor, operation: str) -> Tensor:
        """parts: row r is what rank r holds of this rank's chunk."""
        total = parts[(self._rank - 1) % self._size].clone()
        for step in range(2, self._size + 1):
            total = _COMBINE[operation](total, parts[(self._rank - step) % self._size])
        return total

    # Messages between two ranks.

    def _send(self, tensor: Tensor, rank: int, tag: int) -> dist.Work:
        return self._gloo().send([as_bytes(flat_view(tensor))], rank, tag)

    def _receive(self, tensor: Tensor, rank: int | None, tag: int) -> dist.Work:
        (flat,), copy_back = flat_in_place("recv", [tensor])
        buffer = [as_bytes(flat)]
        gloo = self._gloo()
        work = gloo.recv_anysource(buffer, tag) if rank is None else gloo.recv(buffer, rank, tag)
        if copy_back is None:
            return work

        def wait(timeout: timedelta) -> bool:
            work.wait(timeout) if timeout else work.wait()
            copy_back()
            return True

        return PythonCallbackWork(wait)

    def _gloo(self) -> dist.ProcessGroupGloo:
        if self._messages is None:
            raise InvalidInput("send and recv need a second rank; this group has one")
        return self._messages

    def _call(self, name: str, *arguments: int) -> None:
        self._communicator.call(name, *arguments)

    def _close(self) -> None:
        """Wait for what was issued, meet the others, and free the communicator.

        The library's own end is collective and ends a process whose peers are gone. If not all ranks have come within a
        few seconds, it is left out, here and at the end of the process.
        """
        self._messages = None
        self._lane.run(Call("leaving the group", lambda: None, timeout=self._timeout))  # after all that was issued
        if self._all_leave():
            self._lane.run(Call("leaving the group", self._communicator.destroy, timeout=self._timeout))
        else:
            skip_destructors()
            logger.warning("not every rank has left this ccl group; its communicator is not freed")

    def _all_leave(self) -> bool:
        """Whether every rank has come to leave; the first that knows, or that tires of waiting, decides it for all."""
        end, place = time.monotonic() + min(self._timeout, _LEAVING), "left"
        try:
            self._store.add(place, 1)
            while self._store.add(place, 0) < self._size and time.monotonic() < end:
                time.sleep(0.005)
            answer = "all" if self._store.add(place, 0) == self._size else "not all"
            return self._store.compare_set(f"{place}_decided", "", answer) == b"all"
        except Exception:  # the rank that serves the store is gone
            return False


@cache
def _device(interface: str) -> object:
    """gloo's device of an interface: its threads are shared by all groups."""
    return dist.ProcessGroupGloo.create_device(interface=interface)


def _gloo_beside(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroupGloo:
    """A gloo group on the interface that oneCCL uses; left to itself gloo takes what the host's name resolves to."""
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timeout
    options._devices = [_device(communication_interface())]
    return dist.ProcessGroupGloo(store, rank, size, options)


def _kind(flat: Tensor, operation: str) -> tuple[int, int]:
    """Numbers of the type and the reduction."""
    return TYPES[flat.dtype], OPERATIONS[operation]


def _gloo_chunk(flat: Tensor, size: int) -> int:
    """Elements of a rank's share in gloo's ring: its segments are at most 1 MiB, at least two per rank, all equal."""
    item = flat.element_size()
    message = flat.numel() * item
    segments = max(ceil(message / (item * max(1, _GLOO_SEGMENT // item))), 2 * size)
    segments = size * ceil(segments / size)
    segment = ceil(ceil(message / segments) / item)  # whole elements
    return segment * (segments // size)
