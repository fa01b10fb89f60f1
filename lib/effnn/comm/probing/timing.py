"""Times of all_reduce over the message size, every backend in turn within the same processes, and the copy limits.

The functions here run inside ranks (see `effnn.comm.launch`); they return plain dictionaries and lists.
"""

import select
import socket
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from effnn.base import LEAST, load_average

SIZES = tuple(4096 * 4**step for step in range(8))
"""4 kB to 64 MB, in bytes."""

MOST_CALLS = 10_000
"""In a row, however short the clock says that one is."""

_PIECE = 1 << 18


def all_reduce_rounds(
    names: Sequence[str], sizes: Sequence[int] = SIZES, rounds: int = 5, seconds: float = 0.05
) -> list[dict[str, float | int | str]]:
    """Time all_reduce of float32 over each backend: one row per backend, size and round.

    names: backends; those that are not the default group's get a group of their own. sizes: bytes per rank. seconds:
    about how long the calls of one backend last in one round.

    A row has backend, bytes, round, calls, ms (per call, the slowest rank's mean over the calls) and load (1 minute).
    """
    groups = {name: _group(name) for name in names}
    rows = []
    for size in sizes:
        tensor = torch.ones(size // 4)
        calls = {name: _calls(tensor, group, seconds) for name, group in groups.items()}
        for number in range(rounds):
            load = load_average()
            for name, group in groups.items():
                ms = 1e3 * _slowest(_seconds(tensor, group, calls[name])) / calls[name]
                place = {"backend": name, "bytes": size, "round": number}
                rows.append(place | {"calls": calls[name], "ms": ms, "load": load})
    dist.barrier()
    return rows


def all_reduce_ms(nbytes: int, calls: int = 5) -> float:
    """Milliseconds of one all_reduce of nbytes over the default group: the mean of `calls` in a row and a barrier.

    A single call can return before its last bytes are on the wire; calls that a barrier follows cannot.
    """
    tensor = torch.ones(nbytes // 4)
    dist.all_reduce(tensor)
    dist.barrier()
    started = time.perf_counter()
    for _ in range(calls):
        dist.all_reduce(tensor)
    dist.barrier()
    return 1e3 * _slowest(time.perf_counter() - started) / calls


def loopback_exchange(nbytes: int = 1 << 26, rounds: int = 5) -> float:
    """GB/s (1e9 bytes) each way when two ranks send each other nbytes at once through one TCP connection on loopback.

    The best of the rounds. An all_reduce of two ranks over sockets moves a message's bytes once in each direction, so
    this is about what it can reach.
    """
    store = dist.PrefixStore("loopback", dist.distributed_c10d._get_default_store())
    rank = dist.get_rank()
    if rank == 0:
        with socket.create_server(("127.0.0.1", 0)) as server:
            store.set("port", str(server.getsockname()[1]))
            connection, _ = server.accept()
    elif rank == 1:
        connection = socket.create_connection(("127.0.0.1", int(store.get("port"))))
    else:
        return 0.0
    times = []
    with connection:
        connection.setblocking(False)
        for _ in range(rounds + 1):
            started = time.perf_counter()
            _exchange(connection, nbytes)
            times.append(max(time.perf_counter() - started, LEAST))
    return nbytes / min(times) / 1e9


def _exchange(connection: socket.socket, nbytes: int) -> None:
    """Send and receive nbytes in turns, from and into buffers that stay in the cache: what is left is the kernel's."""
    outgoing, incoming = bytes(_PIECE), bytearray(_PIECE)
    to_send = to_receive = nbytes
    while to_send or to_receive:
        waiting_to_send = [connection] if to_send else []
        readable, writable, _ = select.select([connection] if to_receive else [], waiting_to_send, [])
        if writable:
            to_send -= connection.send(outgoing[: min(_PIECE, to_send)])
        if readable:
            to_receive -= connection.recv_into(incoming, min(_PIECE, to_receive))


def memory_copy(nbytes: int = 1 << 26, rounds: int = 7) -> float:
    """GB/s (1e9 bytes) at which one thread copies nbytes from one tensor to another, the best of the rounds."""
    source, target = torch.ones(nbytes // 4), torch.empty(nbytes // 4)
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        target.copy_(source)
        times.append(max(time.perf_counter() - started, LEAST))
    return nbytes / min(times) / 1e9


def limits() -> dict[str, float]:
    """GB/s of the loopback exchange and of a memory copy, each measured while nothing else runs in these ranks."""
    exchange = loopback_exchange()
    dist.barrier()
    copy = memory_copy() if dist.get_rank() == 0 else 0.0
    dist.barrier()
    return {"loopback exchange": exchange, "memory copy": copy}


def _group(name: str) -> dist.ProcessGroup:
    return dist.group.WORLD if dist.get_backend() == name else dist.new_group(backend=name)


def _calls(tensor: torch.Tensor, group: dist.ProcessGroup, seconds: float) -> int:
    """How many calls last about `seconds`, the same on all ranks."""
    _seconds(tensor, group, 2)
    return max(2, min(MOST_CALLS, round(seconds / (_slowest(_seconds(tensor, group, 3)) / 3))))


def _seconds(tensor: torch.Tensor, group: dist.ProcessGroup, calls: int) -> float:
    dist.barrier()
    started = time.perf_counter()
    for _ in range(calls):
        dist.all_reduce(tensor, group=group)
    return max(time.perf_counter() - started, LEAST)


def _slowest(seconds: float) -> float:
    every = torch.tensor([seconds])
    dist.all_reduce(every, dist.ReduceOp.MAX)
    return float(every)
