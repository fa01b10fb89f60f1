"""The "mpi4py" backend: a process group over MPI through mpi4py, for a torch that was built without MPI.

The ranks are started by MPI's own launcher (`mpiexec -n 4 python ...`). Every collective is MPI's own non-blocking one,
driven on by the lane, so nothing waits inside MPI: a peer that dies becomes an error within the group's time-out, and a
receive that waits does not hold up the calls issued after it. Half-precision sums are made in float32 and rounded once,
since MPI has no such types.
"""

import atexit
import importlib.util
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from effnn.base import InvalidInput, NotAvailable
from effnn.comm.groups.lane.call import AllOf, Call, LibraryError, Request
from effnn.comm.groups.lane.handle import LaneWork
from effnn.comm.groups.lane.lane import Lane
from effnn.comm.groups.process_group import LaneProcessGroup
from effnn.comm.groups.tensors import pieces
from effnn.comm.groups.tensors.layout import as_bytes, flat_in_place, flat_view
from effnn.comm.groups.tensors.pieces import by_columns, in_pieces

INSTALL = "pip install 'effnn[ccl]' (in this repository: make env), which has mpi4py and Intel MPI"

_CALLS = "send recv broadcast all_reduce reduce all_gather gather scatter reduce_scatter all_to_all barrier"
SUPPORT = dict.fromkeys(_CALLS.split(), "native")

_LARGEST_TAG = 32767  # the least that MPI promises


def unavailable() -> str | None:
    """One sentence that says why mpi4py cannot be used here, None if it can. Does not start MPI."""
    if importlib.util.find_spec("mpi4py") is None:
        return f"the mpi4py package is not installed: {INSTALL}"
    if launcher() is None:
        return f"no mpiexec beside this Python or on the PATH: {INSTALL}"
    return None


def launcher() -> Path | None:
    """MPI's own launcher: that of this environment, else the PATH's."""
    own = Path(sys.executable).parent / "mpiexec"
    if own.exists():
        return own
    found = shutil.which("mpiexec")
    return Path(found) if found else None


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks, as MPI has them."""
    world = _mpi().COMM_WORLD
    return world.Get_rank(), world.Get_size()


def shared_store(timeout: timedelta) -> dist.Store:
    """A store that all ranks of MPI's world share; rank 0 serves it on a port of the system's choice."""
    world = _mpi().COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    if rank == 0:
        host = socket.gethostname() if _several_hosts() else "127.0.0.1"
        store = dist.TCPStore(host, 0, size, True, timeout, wait_for_workers=False)
        world.bcast((host, store.port))
        return store
    _several_hosts()
    host, port = world.bcast(None)
    return dist.TCPStore(host, port, size, False, timeout)


def _several_hosts() -> bool:
    return len(set(_mpi().COMM_WORLD.allgather(socket.gethostname()))) > 1


@cache
def _mpi():
    """mpi4py.MPI; importing it starts MPI."""
    reason = unavailable()
    if reason is not None:
        raise NotAvailable(reason)
    try:
        import mpi4py

        if "mpi4py.MPI" not in sys.modules:
            mpi4py.rc.finalize = False  # by itself it would wait at exit, for ever, for peers that died
        from mpi4py import MPI
    except Exception as error:
        raise NotAvailable(f"mpi4py does not find a working MPI library ({error}): {INSTALL}") from None
    sys.excepthook = partial(_note_crash, before=sys.excepthook)
    atexit.register(_finalize, MPI)
    return MPI


def _note_crash(kind: type, error: BaseException, trace: object, before: Callable) -> None:
    _crashed.append(error)
    before(kind, error, trace)


def _finalize(mpi) -> None:
    """MPI's end waits for every rank. After an error it is left out, so that mpiexec sees it and ends the others."""
    lane().stop()
    if not _crashed and lane().failure is None and not mpi.Is_finalized():
        mpi.Finalize()


_crashed: list[BaseException] = []


@cache
def lane() -> Lane:
    """The one lane of this process: all calls of MPI come from it."""
    return Lane("MPI")


class MPIProcessGroup(LaneProcessGroup):
    """See the module's text. Raises InvalidInput when the processes were not started by MPI's launcher."""

    NAME = "mpi4py"
    SUPPORT = SUPPORT
    _may_alias = False
    _compares_int16 = True

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta):
        super().__init__(lane(), store, rank, size, timeout)
        self._mpi = _mpi()
        world = self._mpi.COMM_WORLD
        if size > world.Get_size():
            raise InvalidInput(
                f"mpi4py: a group of {size} ranks was asked for, but MPI knows {world.Get_size()}. Start the processes "
                f"with MPI's launcher: mpiexec -n {size} python ..."
            )
        self._store.set(f"mpi_rank_{rank}", str(world.Get_rank()))
        members = [int(self._store.get(f"mpi_rank_{other}")) for other in range(size)]
        names = {"sum": "SUM", "product": "PROD"} | {
            name: name.upper() for name in ("min", "max", "band", "bor", "bxor")
        }
        self._operations = {name: getattr(self._mpi, constant) for name, constant in names.items()}
        group = world.Get_group().Incl(members)
        # A tag that the members agree on, so that groups of other ranks may be made at the same time.
        tag = sum(members) % _LARGEST_TAG
        self._lane.run(Call(f"joining a group of {size} ranks", lambda: self._join(group, tag), timeout=self._timeout))

    def _join(self, group: object, tag: int) -> None:
        self._communicator = self._mpi.COMM_WORLD.Create_group(group, tag)
        self._communicator.Set_errhandler(self._mpi.ERRORS_RETURN)
        group.Free()
        self._own_tag = self._mpi.COMM_WORLD.Get_attr(self._mpi.TAG_UB)  # of the messages that this class makes itself
        self._validator.largest_tag = self._own_tag - 1

    def _run_all_reduce(self, flat: Tensor, operation: str) -> Request:
        def start(piece: Tensor) -> Request:
            wide, narrow = _widened(piece)
            operands = self._mpi.IN_PLACE, _buffer(wide, self._mpi), self._operations[operation]
            return _Wait(self._communicator.Iallreduce(*operands), narrow)

        return in_pieces(start, flat)

    def _run_broadcast(self, flat: Tensor, root: int) -> Request:
        return in_pieces(lambda piece: _Wait(self._communicator.Ibcast(_buffer(piece, self._mpi), root)), flat)

    def _run_reduce(self, flat: Tensor, root: int, operation: str) -> Request:
        here = self._rank == root

        def start(piece: Tensor) -> Request:
            wide, narrow = _widened(piece)
            memory = _buffer(wide, self._mpi)
            operands = (self._mpi.IN_PLACE, memory) if here else (memory, None)
            request = self._communicator.Ireduce(*operands, self._operations[operation], root)
            return _Wait(request, narrow if here else None, keep=wide)

        return in_pieces(start, flat)

    def _run_all_gather(self, output: Tensor, flat: Tensor) -> Request:
        return self._move(self._communicator.Iallgather, output, flat, flat.numel(), self._size, 1)

    def _run_gather(self, output: Tensor, flat: Tensor, root: int) -> Request:
        into = self._size if self._rank == root else 0
        return self._move(partial(self._communicator.Igather, root=root), output, flat, flat.numel(), into, 1)

    def _run_scatter(self, flat: Tensor, source: Tensor, root: int) -> Request:
        out_of = self._size if self._rank == root else 0
        return self._move(partial(self._communicator.Iscatter, root=root), flat, source, flat.numel(), 1, out_of)

    def _run_all_to_all(self, output: Tensor, flat: Tensor) -> Request:
        share = flat.numel() // self._size
        return self._move(self._communicator.Ialltoall, output, flat, share, self._size, self._size)

    def _move(self, call: Callable, output: Tensor, source: Tensor, columns: int, into: int, out_of: int) -> Request:
        """Start a call that moves values.

        call: of MPI, with what is sent and what arrives.
        output, source: flat.
        columns: elements that go from one rank to one other.
        into, out_of: how many ranks' parts output and source hold; 0 where this rank has none.
        """

        def start(output: Tensor, source: Tensor) -> Request:
            sent = _buffer(source, self._mpi, out_of) if out_of else None
            arriving = _buffer(output, self._mpi, into) if into else None
            return _Wait(call(sent, arriving), keep=source)

        return by_columns(start, output, source, columns, self._size)

    def _run_reduce_scatter(self, output: Tensor, flat: Tensor, operation: str) -> Request:
        half = flat.dtype in (torch.float16, torch.bfloat16)

        def start(output: Tensor, source: Tensor) -> Request:
            wide, target = (source.float(), output.float()) if half else (source, output)
            operands = _buffer(wide, self._mpi, self._size), _buffer(target, self._mpi), self._operations[operation]
            request = self._communicator.Ireduce_scatter_block(*operands)
            return _Wait(request, (lambda: output.copy_(target)) if half else None, keep=wide)

        return by_columns(start, output, flat, output.numel(), self._size)

    def _uneven_all_to_all(
        self, output: Tensor, flat: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> Callable[[], Request]:
        item = flat.element_size()

        def counted(tensor: Tensor, parts: Sequence[int]) -> list:
            """The parts in one call; those that are too large for it are left out, at both of their ends."""
            counts = [part * item for part in parts]
            starts = [sum(counts[:rank]) for rank in range(len(counts))]
            counts = [count if count <= pieces.LARGEST // self._size else 0 for count in counts]
            return [_memory(tensor), (counts, starts), self._mpi.BYTE]

        def start() -> Request:
            requests = [_Wait(self._communicator.Ialltoallv(counted(flat, sent), counted(output, received)))]
            ends = zip(flat.split(list(sent)), output.split(list(received)), strict=True)
            for rank, (there, here) in enumerate(ends):
                if rank == self._rank and there.nbytes > pieces.LARGEST // self._size:
                    here.copy_(there)
                    continue
                for part, call in ((there, self._communicator.Isend), (here, self._communicator.Irecv)):
                    if part.nbytes > pieces.LARGEST // self._size:
                        requests += [
                            _Wait(call(_buffer(as_bytes(piece), self._mpi), rank, self._own_tag))
                            for piece in pieces.split(part)
                        ]
            return AllOf.of(requests)

        return start

    def _run_barrier(self) -> Request:
        return _Wait(self._communicator.Ibarrier())

    def _send(self, tensor: Tensor, rank: int, tag: int) -> LaneWork:
        flat = flat_view(tensor)

        def start() -> list[Request]:
            parts = pieces.split(as_bytes(flat))
            return [_Wait(self._communicator.Isend(_buffer(part, self._mpi), rank, tag)) for part in parts]

        return self._issue(f"send to rank {rank}", start, [tensor], alike="")

    def _receive(self, tensor: Tensor, rank: int | None, tag: int) -> LaneWork:
        source = self._mpi.ANY_SOURCE if rank is None else rank
        (flat,), finish = flat_in_place("recv", [tensor])
        parts = pieces.split(as_bytes(flat))
        if rank is None and len(parts) > 1:
            raise InvalidInput(
                f"recv over mpi4py from any rank takes {pieces.LARGEST} bytes at most, got {flat.nbytes}; name the rank"
            )
        status = self._mpi.Status()

        def start() -> list[Request]:
            calls = (self._communicator.Irecv(_buffer(part, self._mpi), source, tag) for part in parts)
            return [_Wait(request, status=status) for request in calls]

        return self._issue("recv", start, [tensor], finish, source=status.Get_source, alike="")

    def _close(self) -> None:
        self._lane.run(Call("leaving the group", self._communicator.Free, timeout=self._timeout))


class _Wait:
    """A request of MPI, and what is done once it has ended."""

    def __init__(
        self,
        request: object,
        finish: Callable[[], None] | None = None,
        status: object = None,
        keep: Tensor | None = None,
    ):
        self._request, self._finish, self._status = request, finish, status
        self._keep = keep  # memory that MPI still reads, and that nothing else may hold

    def test(self) -> bool:
        try:
            ended = self._request.Test(self._status)
        except Exception as error:
            raise LibraryError(f"MPI: {error}") from error
        if ended and self._finish is not None:
            self._finish()
        return ended


def _widened(flat: Tensor) -> tuple[Tensor, Callable[[], None] | None]:
    """A float32 copy of half-precision values, and what writes the result back."""
    if flat.dtype not in (torch.float16, torch.bfloat16):
        return flat, None
    wide = flat.float()
    return wide, lambda: flat.copy_(wide)


def _buffer(flat: Tensor, mpi, parts: int = 1) -> list:
    """What mpi4py takes for memory. parts: where it holds one part per rank, MPI wants the elements of one part."""
    names = {
        torch.uint8: "UINT8_T",
        torch.int8: "INT8_T",
        torch.int16: "INT16_T",
        torch.int32: "INT32_T",
        torch.int64: "INT64_T",
        torch.float32: "FLOAT",
        torch.float64: "DOUBLE",
    }
    return [_memory(flat), flat.numel() // parts, getattr(mpi, names[flat.dtype])]


def _memory(flat: Tensor):
    return _mpi().memory.fromaddress(flat.data_ptr(), flat.numel() * flat.element_size())
