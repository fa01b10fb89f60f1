"""A torch ProcessGroup in Python over a library of collectives: the part that every such library needs.

`LaneProcessGroup` takes the calls of torch.distributed (and of DDP's C++ reducer), checks them, lays tensors out flat
and contiguous, and puts one `Call` per collective on the lane. A library fills in the `_run_*` methods, which get flat,
contiguous, non-empty CPU tensors of supported types and run on the lane.

An all_reduce of ccl goes from `allreduce` here to `_run_all_reduce` in oneccl/group.py, and from there to
`Communicator.call` in oneccl/library.py, which makes the C call.

Names and argument order of the public methods are torch's own, which does not document them; nor are they documented
one by one here.

Tensors on other devices go to the backend that the group's configuration names for them ("cpu:ccl,cuda:nccl").
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from effnn.base import InvalidInput
from effnn.comm.groups.identity import NamedGroup, other_device_group
from effnn.comm.groups.lane.call import AllOf, Call, CollectiveFailed, LibraryError, Request, Steps
from effnn.comm.groups.lane.handle import LaneWork
from effnn.comm.groups.lane.lane import Lane
from effnn.comm.groups.store import Comparison, comparison_wanted, describe, monitored_barrier
from effnn.comm.groups.tensors.layout import (
    Finish,
    as_bytes,
    expect_own_memory,
    fill,
    flat_in_place,
    flat_view,
    overlaps,
    single,
    then,
)
from effnn.comm.groups.tensors.reductions import Reduction, operation_of
from effnn.comm.groups.tensors.sparse import gather_padded, sum_of_rows
from effnn.comm.groups.validation import Validator, guarded

logger = logging.getLogger(__name__)


class LaneProcessGroup(NamedGroup):
    """Base of the process groups of this room; see the module's text.

    SUPPORT: operation -> native (one call of the library), composed (of several) or delegated (to another library).
    """

    NAME: str
    SUPPORT: Mapping[str, str]

    def __init__(self, lane: Lane, store: dist.Store, rank: int, size: int, timeout: timedelta):
        super().__init__(store, rank, size, timeout)
        self._lane = lane
        self._validator = Validator(self.NAME, size, self._compares_int16, self._largest_tag)
        self._comparison = (
            Comparison(dist.PrefixStore("calls/", self._store), rank, size) if comparison_wanted() else None
        )
        self._closed = False
        self._barriers = 0
        self._others: dict[str, dist.ProcessGroup] = {}  # device type -> group for tensors that are not on the CPU

    def _get_backend(self, device: torch.device) -> dist.ProcessGroup:
        """What serves a device's tensors: this group itself for the CPU's."""
        device = torch.device(device)
        return self if device.type == "cpu" else self._group_for(device.type)._get_backend(device)

    def shutdown(self) -> None:
        """Finish what was issued and leave the group; called by destroy_process_group. Errors are not raised again."""
        if not self._closed:
            self._closed = True
            if self._lane.usable:
                try:
                    self._close()
                except CollectiveFailed as error:
                    logger.warning("leaving a %s group: %s", self.NAME, error)

    def abort(self) -> None:
        """Give up what was issued, on every group of the library in this process; nothing is waited for."""
        self._closed = True
        self._lane.fail(CollectiveFailed(f"a {self.NAME} group was aborted"))

    # Collectives, under torch's names.

    @guarded("all_reduce", sparse=True)
    def allreduce(self, tensors: list[Tensor], opts: object = None) -> LaneWork:
        (tensor,) = single("all_reduce", tensors)
        if tensor.layout is torch.sparse_coo:
            return self._sparse_all_reduce(tensor, opts)
        return self._all_reduce(tensors, opts)

    @guarded("all_reduce")
    def allreduce_coalesced(self, tensors: list[Tensor], opts: object = None) -> LaneWork:
        return self._all_reduce(tensors, opts)

    def _all_reduce(self, tensors: list[Tensor], opts: object) -> LaneWork:
        reduction = self._validator.reduction("all_reduce", opts, tensors)
        flats, finish = flat_in_place("all_reduce", tensors)
        flats = [flat for flat in flats if flat.numel()]
        start, restore = _reducing(reduction, flats, lambda one, _: self._run_all_reduce(one, reduction.operation))
        return self._issue("all_reduce", start, tensors, then(restore, finish), opts)

    @guarded("broadcast")
    def broadcast(self, tensors: list[Tensor], opts: object) -> LaneWork:
        (tensor,) = single("broadcast", tensors)
        root = self._validator.root("broadcast", opts.rootRank)
        (flat,), finish = flat_in_place("broadcast", [tensor], receives=self._rank != root)
        return self._issue("broadcast", lambda: self._run_broadcast(as_bytes(flat), root), [tensor], finish, opts, flat)

    @guarded("reduce")
    def reduce(self, tensors: list[Tensor], opts: object) -> LaneWork:
        (tensor,) = single("reduce", tensors)
        root = self._validator.root("reduce", opts.rootRank)
        reduction = self._validator.reduction("reduce", opts, tensors)
        (flat,), finish = flat_in_place("reduce", [tensor], receives=self._rank == root)
        operation = reduction.operation
        start, restore = _reducing(reduction, [flat], lambda one, _: self._run_reduce(one, root, operation))
        if self._rank == root and flat.numel():
            finish = then(restore, finish)
        return self._issue("reduce", start, [tensor], finish, opts, flat)

    @guarded("all_gather")
    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: object = None) -> LaneWork:
        (tensor,), (parts,) = single("all_gather", inputs), single("all_gather", outputs)
        self._validator.outputs("all_gather", parts, tensor, mine=self._rank)
        if len({part.numel() for part in parts}) > 1:
            return self._allgather_uneven(parts, tensor, opts)
        flat = flat_view(tensor)
        output = flat.new_empty(self._size * flat.numel())
        finish = partial(fill, parts, output.view(self._size, -1))
        return self._issue("all_gather", self._gathering([output], [flat]), parts, finish, opts, flat)

    @guarded("all_gather_coalesced")
    def allgather_coalesced(
        self, output_lists: list[list[Tensor]], inputs: list[Tensor], opts: object = None
    ) -> LaneWork:
        if len(output_lists) != self._size or any(len(parts) != len(inputs) for parts in output_lists):
            raise InvalidInput(
                f"all_gather_coalesced: expected {self._size} lists of {len(inputs)} tensors, one list per rank"
            )
        columns = list(zip(*output_lists, strict=True))
        for tensor, parts in zip(inputs, columns, strict=True):
            self._validator.outputs("all_gather", parts, tensor)
        flats = [flat_view(tensor) for tensor in inputs]
        outputs = [flat.new_empty(self._size * flat.numel()) for flat in flats]

        def finish() -> None:
            for parts, output in zip(columns, outputs, strict=True):
                fill(parts, output.view(self._size, -1))

        results = [part for parts in columns for part in parts]
        return self._issue("all_gather", self._gathering(outputs, flats), results, finish, opts)

    @guarded("all_gather_into_tensor")
    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: object = None) -> LaneWork:
        return self._all_gather_into([output], [tensor], opts)

    @guarded("all_gather_into_tensor")
    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: object = None) -> LaneWork:
        return self._all_gather_into(outputs, inputs, opts)

    def _all_gather_into(self, outputs: list[Tensor], inputs: list[Tensor], opts: object) -> LaneWork:
        self._validator.ratio("all_gather_into_tensor", outputs, inputs)
        targets, finish = flat_in_place("all_gather_into_tensor", outputs)
        flats = [self._apart(flat_view(tensor), targets) for tensor in inputs]
        return self._issue("all_gather", self._gathering(targets, flats), outputs, finish, opts)

    def _gathering(self, outputs: list[Tensor], flats: list[Tensor]) -> Callable[[], list[Request | None]]:
        pairs = [(as_bytes(out), as_bytes(flat)) for out, flat in zip(outputs, flats, strict=True) if flat.numel()]
        return lambda: [self._run_all_gather(output, flat) for output, flat in pairs]

    @guarded("gather")
    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: object) -> LaneWork:
        (tensor,) = single("gather", inputs)
        root = self._validator.root("gather", opts.rootRank)
        here = self._rank == root
        parts = single("gather", outputs)[0] if here else []
        if here:
            self._validator.outputs("gather", parts, tensor)
        flat = flat_view(tensor)
        output = flat.new_empty(self._size * flat.numel()) if here or self._gathers_everywhere else flat.new_empty(0)
        start = partial(self._run_gather, as_bytes(output), as_bytes(flat), root)
        finish = partial(fill, parts, output.view(self._size, -1)) if here else None
        return self._issue("gather", start, parts, finish, opts, flat)

    @guarded("scatter")
    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: object) -> LaneWork:
        (tensor,) = single("scatter", outputs)
        root = self._validator.root("scatter", opts.rootRank)
        (flat,), finish = flat_in_place("scatter", [tensor])
        if self._rank == root:
            parts = single("scatter", inputs)[0]
            self._validator.parts("scatter", parts, tensor)
            source = torch.cat([flat_view(part) for part in parts])
        else:
            source = flat.new_empty(self._size * flat.numel() if self._gathers_everywhere else 0)
        start = partial(self._run_scatter, as_bytes(flat), as_bytes(source), root)
        return self._issue("scatter", start, [tensor], finish, opts, flat)

    @guarded("reduce_scatter")
    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: object = None) -> LaneWork:
        (output,), (parts,) = single("reduce_scatter", outputs), single("reduce_scatter", inputs)
        self._validator.parts("reduce_scatter", parts, output, mine=self._rank)
        reduction = self._validator.reduction("reduce_scatter", opts, parts)
        targets, finish = flat_in_place("reduce_scatter", [output])
        if len({part.numel() for part in parts}) == 1:
            sources = [torch.cat([flat_view(part) for part in parts])]
            return self._reduce_scatter(targets, sources, reduction, [output], finish, opts)
        copies = [flat_view(part).clone() for part in parts]

        def run(one: Tensor, root: int) -> Request | None:  # parts of different sizes: one reduction per rank
            return self._run_reduce(one, root, reduction.operation) if one.numel() else None

        start, restore = _reducing(reduction, copies, run)
        finish = then(then(restore, lambda: targets[0].copy_(copies[self._rank])), finish)
        return self._issue("reduce_scatter", start, [output], finish, opts, alike="types")

    @guarded("reduce_scatter_tensor")
    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: object = None) -> LaneWork:
        return self._reduce_scatter_into([output], [tensor], opts)

    @guarded("reduce_scatter_tensor")
    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: object = None
    ) -> LaneWork:
        return self._reduce_scatter_into(outputs, inputs, opts)

    def _reduce_scatter_into(self, outputs: list[Tensor], inputs: list[Tensor], opts: object) -> LaneWork:
        self._validator.ratio("reduce_scatter_tensor", inputs, outputs)
        reduction = self._validator.reduction("reduce_scatter", opts, inputs)
        targets, finish = flat_in_place("reduce_scatter_tensor", outputs)
        sources = [self._apart(flat_view(tensor), targets) for tensor in inputs]
        return self._reduce_scatter(targets, sources, reduction, outputs, finish, opts)

    def _reduce_scatter(
        self,
        targets: list[Tensor],
        sources: list[Tensor],
        reduction: Reduction,
        result: list[Tensor],
        finish: Finish,
        opts: object,
    ) -> LaneWork:
        targets = [target for target in targets if target.numel()]
        sources = [source for source in sources if source.numel()]

        def run(one: Tensor, number: int) -> Request | None:
            return self._run_reduce_scatter(one, reduction.carry(sources[number]), reduction.operation)

        start, restore = _reducing(reduction, targets, run)
        return self._issue("reduce_scatter", start, result, then(restore, finish), opts)

    @guarded("all_to_all_single")
    def all_to_all_single(
        self,
        output: Tensor,
        tensor: Tensor,
        output_splits: Sequence[int] = (),
        input_splits: Sequence[int] = (),
        opts: object = None,
    ) -> LaneWork:
        if output.dtype != tensor.dtype:
            raise InvalidInput(f"all_to_all: output is {output.dtype}, input {tensor.dtype}; expected the same")
        (target,), finish = flat_in_place("all_to_all", [output])
        flat = self._apart(flat_view(tensor), [target])
        if not output_splits and not input_splits:
            if tensor.numel() % self._size or output.numel() != tensor.numel():
                raise InvalidInput(
                    f"all_to_all: without split sizes, input ({tensor.numel()} elements) and output ({output.numel()}) "
                    f"must be equal and divisible by the world size {self._size}"
                )
            start = partial(self._run_all_to_all, as_bytes(target), as_bytes(flat))
            return self._issue("all_to_all", start, [output], finish, opts, flat)
        received = self._validator.splits("output", output, output_splits)
        sent = self._validator.splits("input", tensor, input_splits)
        start = self._uneven_all_to_all(target, flat, received, sent)
        return self._issue("all_to_all", start, [output], finish, opts, alike="types")

    @guarded("all_to_all")
    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: object = None) -> LaneWork:
        if len(outputs) != self._size or len(inputs) != self._size:
            raise InvalidInput(
                f"all_to_all: expected lists of {self._size} tensors, got {len(outputs)} and {len(inputs)}"
            )
        if len({tensor.dtype for tensor in [*outputs, *inputs]}) > 1:
            raise InvalidInput("all_to_all: all tensors must be of one type")
        expect_own_memory("all_to_all", outputs)
        flat = torch.cat([flat_view(tensor) for tensor in inputs])
        received, sent = [t.numel() for t in outputs], [t.numel() for t in inputs]
        target = flat.new_empty(sum(received))
        start = self._uneven_all_to_all(target, flat, received, sent)
        finish = partial(fill, outputs, target.split(received))
        return self._issue("all_to_all", start, outputs, finish, opts, alike="types")

    def barrier(self, opts: object = None) -> LaneWork:
        return self._issue("barrier", self._run_barrier, [], None, opts)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        self._expect_open("monitored_barrier")
        self._barriers += 1
        store = dist.PrefixStore(f"barrier_{self._barriers}/", self._store)
        limit = self._timeout if timeout is None else timeout.total_seconds()
        monitored_barrier(store, self._rank, self._size, limit, wait_all_ranks)

    @guarded("send")
    def send(self, tensors: list[Tensor], rank: int, tag: int = 0) -> dist.Work:
        (tensor,) = single("send", tensors)
        self._validator.peer("send", rank, self._rank, tag)
        return self._send(tensor, rank, tag)

    @guarded("recv")
    def recv(self, tensors: list[Tensor], rank: int, tag: int = 0) -> dist.Work:
        (tensor,) = single("recv", tensors)
        self._validator.peer("recv", rank, self._rank, tag)
        return self._receive(tensor, rank, tag)

    @guarded("recv")
    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> dist.Work:
        (tensor,) = single("recv", tensors)
        self._validator.peer("recv", None, self._rank, tag)
        return self._receive(tensor, None, tag)

    # The names that older releases and the C++ side use for the same calls.

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    # What a library fills in (an abstract base class is not possible: torch's has a metaclass of its own). All run on
    # the lane; None means finished, a request that it goes on.

    _gathers_everywhere = False
    """Whether gather and scatter need a buffer for all ranks' parts on every rank, not on the root alone."""

    _may_alias = True
    """Whether input and output of a call may share memory."""

    _compares_int16 = False
    """Whether reductions take int16 as well as the types of REDUCED_TYPES."""

    _largest_tag = 2**31 - 1
    """Of a message between two ranks."""

    _run_all_reduce: Callable[[Tensor, str], Request | None]  # flat, operation
    _run_broadcast: Callable[[Tensor, int], Request | None]  # flat, root
    _run_reduce: Callable[[Tensor, int, str], Request | None]  # flat, root, operation
    _run_all_gather: Callable[[Tensor, Tensor], Request | None]  # output, flat
    _run_gather: Callable[[Tensor, Tensor, int], Request | None]  # output, flat, root
    _run_scatter: Callable[[Tensor, Tensor, int], Request | None]  # flat, source, root
    _run_reduce_scatter: Callable[[Tensor, Tensor, str], Request | None]  # output, flat, operation
    _run_all_to_all: Callable[[Tensor, Tensor], Request | None]  # output, flat
    _run_barrier: Callable[[], Request | None]

    _uneven_all_to_all: Callable[[Tensor, Tensor, Sequence[int], Sequence[int]], Callable[[], Request | None]]
    """Of output, flat, received, sent: what starts an all_to_all of parts of those sizes, some of which may be 0."""

    _send: Callable[[Tensor, int, int], dist.Work]  # tensor, rank, tag
    _receive: Callable[[Tensor, int | None, int], dist.Work]  # into the tensor, from a rank (None: any), tag
    _close: Callable[[], None]

    # Checks and plumbing.

    def _issue(
        self,
        name: str,
        start: Callable[[], Request | None | list[Request | None]],
        result: Sequence[Tensor],
        finish: Finish = None,
        opts: object = None,
        flat: Tensor | None = None,
        source: Callable[[], int] | None = None,
        alike: str = "sizes",
    ) -> LaneWork:
        """Put a call on the lane, and return its handle.

        name: of the call, for messages.
        start: makes the library's calls, on the lane.
        result: the tensors that the call fills.
        finish: what is done on the lane once the library's calls have ended.
        opts: torch's options, for a time-out of this call.
        flat: what is sent; where it is empty there is nothing to do (on any rank).
        source: of a receive from any rank, tells which it was.
        alike: what all ranks have in common of the tensors: "sizes" (and types), "types", or "" (not a collective).
        """
        self._expect_open(name)

        text = describe(name, [flat] if flat is not None else result, alike == "sizes") if self._comparison else ""

        def run() -> Request | None:
            if self._comparison is not None and alike:
                self._comparison.check(text)
            if flat is not None and not flat.numel():
                return None
            try:
                begun = start()
            except LibraryError:
                raise
            except Exception as error:  # peers may have begun: what they and we call next would not fit together
                raise LibraryError(f"{name} over {self.NAME}: {error}") from error
            return AllOf.of(begun) if isinstance(begun, list) else begun

        call = Call(f"{name} of {self._size} ranks", run, result, finish, self._limit(opts), source, bool(alike))
        return self._lane.submit(call)

    def _expect_open(self, name: str) -> None:
        if self._closed:
            raise InvalidInput(f"{name}: this {self.NAME} group was destroyed")

    def _limit(self, opts: object) -> float | None:
        """Seconds: what the call asks for, else the group's. torch fills in its own default, which is negative."""
        asked = getattr(opts, "timeout", None)
        asked = asked.total_seconds() if asked is not None else 0.0
        return asked if asked > 0 else self._timeout

    def _allgather_uneven(self, parts: Sequence[Tensor], tensor: Tensor, opts: object) -> LaneWork:
        """Parts of different sizes, known on every rank: one broadcast per rank."""
        flat = flat_view(tensor)
        buffers = [flat if rank == self._rank else flat_view(part).clone() for rank, part in enumerate(parts)]

        def start() -> list[Request | None]:
            return [self._run_broadcast(as_bytes(part), root) for root, part in enumerate(buffers) if part.numel()]

        return self._issue("all_gather", start, parts, partial(fill, parts, buffers), opts)

    def _sparse_all_reduce(self, tensor: Tensor, opts: object) -> LaneWork:
        """Sum of sparse COO tensors: all_gather of padded indices and values, then a sum in rank order everywhere."""
        operation = operation_of(opts.reduceOp) if opts is not None else "sum"
        if operation not in ("sum", "avg"):
            raise InvalidInput(f"all_reduce of sparse tensors over {self.NAME} knows sum and avg, not {operation}")
        self._validator.reduction("all_reduce", opts, [tensor])
        mine = tensor.detach().coalesce()

        def gather(part: Tensor) -> tuple[Tensor, Request | None]:
            every = part.new_empty(self._size, *part.shape)
            return every, self._run_all_gather(as_bytes(every.view(-1)), as_bytes(part.view(-1)))

        def steps() -> Iterator[Request | None]:
            indices, values = yield from gather_padded([mine.indices().t(), mine.values()], gather)
            total = sum_of_rows(indices, values, tensor.shape)
            with torch.no_grad():  # a sparse tensor's detach() would keep the new indices to itself
                tensor.copy_(total / self._size if operation == "avg" else total)

        return self._issue("sparse all_reduce", lambda: Steps.of(steps()), [tensor], opts=opts)

    def _apart(self, flat: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """The input, copied where it shares memory with an output and the library forbids that."""
        if self._may_alias or not any(overlaps(flat, target) for target in targets):
            return flat
        return flat.clone()

    def _group_for(self, device: str) -> dist.ProcessGroup:
        """The group that the configuration ("cpu:ccl,cuda:nccl") names for another device, made when first needed."""
        if device not in self._others:
            timeout = timedelta(seconds=self._timeout)
            self._others[device] = other_device_group(self, device, self._store, self._rank, self._size, timeout)
        return self._others[device]


def _reducing(
    reduction: Reduction, flats: list[Tensor], run: Callable[[Tensor, int], Request | None]
) -> tuple[Callable[[], list[Request | None]], Callable[[], None]]:
    """What starts `run` on what the library reduces in place of each flat (and its number), and what restores those."""
    carried = []

    def start() -> list[Request | None]:
        carried.extend(map(reduction.carry, flats))
        return [run(one, number) for number, one in enumerate(carried)]

    def restore() -> None:
        for one, flat in zip(carried, flats, strict=True):
            reduction.restore(one, flat)

    return start, restore
