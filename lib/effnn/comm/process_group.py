"""A torch ProcessGroup in Python over a library of collectives: the part that every such library needs.

`LaneProcessGroup` takes the calls of torch.distributed (and of DDP's C++ reducer), checks them, lays tensors out flat
and contiguous, and puts one `Call` a collective on the lane. A library fills in the `_run_*` methods, which get flat,
contiguous, non-empty CPU tensors of supported types and run on the lane. Names and argument order of the public methods
are torch's own; PyTorch has no documentation of its own for them, so they are not documented one by one here.

Tensors on other devices go to the backend that the group's configuration names for them ("cpu:ccl,cuda:nccl").
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from effnn.base import InvalidInput
from effnn.comm.agreement import Agreement, describe, wanted
from effnn.comm.arguments import Checks
from effnn.comm.layout import Finish, as_bytes, divide, fill, flat_in_place, flat_view, overlaps, single, then
from effnn.comm.other_devices import other_device_group
from effnn.comm.requests import AllOf, Steps
from effnn.comm.sparse import sum_of_rows
from effnn.comm.work import Call, CollectiveFailed, Lane, LaneWork, LibraryError, Request

logger = logging.getLogger(__name__)


class LaneProcessGroup(dist.ProcessGroup):
    """Base of the process groups of this room; see the module's text.

    SUPPORT: operation -> native (one call of the library), composed (of several) or delegated (to another library).
    """

    NAME: str
    SUPPORT: Mapping[str, str]

    def __init__(self, lane: Lane, store: dist.Store, rank: int, size: int, timeout: timedelta):
        super().__init__(rank, size)
        self._lane, self._store, self._rank, self._size = lane, store, rank, size
        self._timeout = timeout.total_seconds()
        self._checks = Checks(self.NAME, size)
        self._agreement = Agreement(dist.PrefixStore("calls/", store), rank, size) if wanted() else None
        self._closed = False
        self._name = self._description = ""
        self._others: dict[str, dist.ProcessGroup] = {}  # device type -> group for tensors that are not on the CPU

    # What torch asks a group about itself.

    def getBackendName(self) -> str:  # noqa: N802
        return self.NAME

    def _get_backend_name(self) -> str:
        return self.NAME

    def getRank(self) -> int:  # noqa: N802
        return self._rank

    def getSize(self) -> int:  # noqa: N802
        return self._size

    def setGroupName(self, name: str) -> None:  # noqa: N802
        self._name = name

    def getGroupName(self) -> str:  # noqa: N802
        return self._name

    def setGroupDesc(self, description: str) -> None:  # noqa: N802
        self._description = description

    def getGroupDesc(self) -> str:  # noqa: N802
        return self._description

    def get_group_store(self) -> dist.Store:
        return self._store

    @property
    def timeout(self) -> timedelta:
        """Time-out of a call that brings none of its own."""
        return timedelta(seconds=self._timeout)

    def set_timeout(self, timeout: timedelta) -> None:
        """Time-out of calls issued from now on."""
        self._timeout = timeout.total_seconds()

    def _set_default_timeout(self, timeout: timedelta) -> None:
        self.set_timeout(timeout)

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

    def allreduce(self, tensors: list[Tensor], opts: object = None) -> LaneWork:
        (tensor,) = single("all_reduce", tensors)
        other = self._other("allreduce", tensors, tensors, opts)
        if other is not None:
            return other
        if tensor.layout is torch.sparse_coo:
            return self._sparse_all_reduce(tensor, opts)
        return self.allreduce_coalesced(tensors, opts)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: object = None) -> LaneWork:
        other = self._other("allreduce_coalesced", tensors, tensors, opts)
        if other is not None:
            return other
        operation = self._checks.operation("all_reduce", opts, tensors)

        def start() -> list[Request | None]:
            return [self._run_all_reduce(flat, operation) for flat in buffers if flat.numel()]

        buffers, finish = flat_in_place(tensors)
        return self._issue("all_reduce", start, tensors, then(divide(buffers, operation, self._size), finish), opts)

    def broadcast(self, tensors: list[Tensor], opts: object) -> LaneWork:
        (tensor,) = single("broadcast", tensors)
        root = self._checks.root("broadcast", opts.rootRank)
        other = self._other("broadcast", tensors, tensors, opts)
        if other is not None:
            return other
        (flat,), finish = flat_in_place([tensor], receives=self._rank != root)
        return self._issue("broadcast", lambda: self._run_broadcast(as_bytes(flat), root), [tensor], finish, opts, flat)

    def reduce(self, tensors: list[Tensor], opts: object) -> LaneWork:
        (tensor,) = single("reduce", tensors)
        root = self._checks.root("reduce", opts.rootRank)
        other = self._other("reduce", tensors, tensors, opts)
        if other is not None:
            return other
        operation = self._checks.operation("reduce", opts, tensors)
        (flat,), finish = flat_in_place([tensor], receives=self._rank == root)
        if self._rank == root:
            finish = then(divide([flat], operation, self._size), finish)
        return self._issue("reduce", lambda: self._run_reduce(flat, root, operation), [tensor], finish, opts, flat)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: object = None) -> LaneWork:
        (tensor,), (parts,) = single("all_gather", inputs), single("all_gather", outputs)
        other = self._other("allgather", [tensor, *parts], outputs, inputs, opts)
        if other is not None:
            return other
        self._checks.parts("all_gather", parts, tensor, mine=self._rank)
        if len({part.numel() for part in parts}) > 1:
            return self._allgather_uneven(parts, tensor, opts)
        flat = flat_view(tensor)
        output = flat.new_empty(self._size * flat.numel())
        return self._issue(
            "all_gather",
            lambda: self._run_all_gather(as_bytes(output), as_bytes(flat)),
            parts,
            lambda: fill(parts, output),
            opts,
            flat,
        )

    def allgather_coalesced(
        self, output_lists: list[list[Tensor]], inputs: list[Tensor], opts: object = None
    ) -> LaneWork:
        other = self._other("allgather_coalesced", inputs, output_lists, inputs, opts)
        if other is not None:
            return other
        if len(output_lists) != self._size or any(len(parts) != len(inputs) for parts in output_lists):
            raise InvalidInput(
                f"all_gather_coalesced: expected {self._size} lists of {len(inputs)} tensors, one list a rank"
            )
        columns = list(zip(*output_lists, strict=True))
        for tensor, parts in zip(inputs, columns, strict=True):
            self._checks.parts("all_gather", parts, tensor)
        flats = [flat_view(tensor) for tensor in inputs]
        outputs = [flat.new_empty(self._size * flat.numel()) for flat in flats]

        def start() -> list[Request | None]:
            pairs = zip(outputs, flats, strict=True)
            return [self._run_all_gather(as_bytes(out), as_bytes(flat)) for out, flat in pairs if flat.numel()]

        def finish() -> None:
            for parts, output in zip(columns, outputs, strict=True):
                fill(parts, output)

        return self._issue("all_gather", start, [part for parts in columns for part in parts], finish, opts)

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: object = None) -> LaneWork:
        other = self._other("all_gather_single", [output, tensor], output, tensor, opts)
        return other if other is not None else self.all_gather_single_coalesced([output], [tensor], opts)

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: object = None) -> LaneWork:
        other = self._other("all_gather_single_coalesced", [*outputs, *inputs], outputs, inputs, opts)
        if other is not None:
            return other
        self._checks.ratio("all_gather_into_tensor", outputs, inputs)
        targets, finish = flat_in_place(outputs)
        flats = [self._apart(flat_view(tensor), targets) for tensor in inputs]

        def start() -> list[Request | None]:
            pairs = zip(targets, flats, strict=True)
            return [self._run_all_gather(as_bytes(out), as_bytes(flat)) for out, flat in pairs if flat.numel()]

        return self._issue("all_gather", start, outputs, finish, opts)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: object) -> LaneWork:
        (tensor,) = single("gather", inputs)
        root = self._checks.root("gather", opts.rootRank)
        other = self._other("gather", inputs, outputs, inputs, opts)
        if other is not None:
            return other
        here = self._rank == root
        parts = single("gather", outputs)[0] if here else []
        if here:
            self._checks.parts("gather", parts, tensor)
        flat = flat_view(tensor)
        output = flat.new_empty(self._size * flat.numel()) if here or self._gathers_everywhere else flat.new_empty(0)
        return self._issue(
            "gather",
            lambda: self._run_gather(as_bytes(output), as_bytes(flat), root),
            parts,
            (lambda: fill(parts, output)) if here else None,
            opts,
            flat,
        )

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: object) -> LaneWork:
        (tensor,) = single("scatter", outputs)
        root = self._checks.root("scatter", opts.rootRank)
        other = self._other("scatter", outputs, outputs, inputs, opts)
        if other is not None:
            return other
        here = self._rank == root
        (flat,), finish = flat_in_place([tensor])
        if here:
            parts = single("scatter", inputs)[0]
            self._checks.parts("scatter", parts, tensor)
            source = torch.cat([flat_view(part) for part in parts])
        else:
            source = flat.new_empty(self._size * flat.numel() if self._gathers_everywhere else 0)
        return self._issue(
            "scatter",
            lambda: self._run_scatter(as_bytes(flat), as_bytes(source), root),
            [tensor],
            finish,
            opts,
            flat,
        )

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: object = None) -> LaneWork:
        (output,), (parts,) = single("reduce_scatter", outputs), single("reduce_scatter", inputs)
        other = self._other("reduce_scatter", [output, *parts], outputs, inputs, opts)
        if other is not None:
            return other
        self._checks.parts("reduce_scatter", parts, output, mine=self._rank)
        operation = self._checks.operation("reduce_scatter", opts, parts)
        (target,), finish = flat_in_place([output])
        finish = then(divide([target], operation, self._size), finish)
        if len({part.numel() for part in parts}) == 1:
            flat = torch.cat([flat_view(part) for part in parts])
            return self._issue(
                "reduce_scatter",
                lambda: self._run_reduce_scatter(target, flat, operation),
                [output],
                finish,
                opts,
                target,
            )
        copies = [flat_view(part).clone() for part in parts]

        def start() -> list[Request | None]:
            # Parts of different sizes: one reduction a rank.
            return [self._run_reduce(part, root, operation) for root, part in enumerate(copies) if part.numel()]

        return self._issue(
            "reduce_scatter",
            start,
            [output],
            then(lambda: target.copy_(copies[self._rank]), finish),
            opts,
            alike="types",
        )

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: object = None) -> LaneWork:
        other = self._other("reduce_scatter_single", [output, tensor], output, tensor, opts)
        return other if other is not None else self.reduce_scatter_single_coalesced([output], [tensor], opts)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: object = None
    ) -> LaneWork:
        other = self._other("reduce_scatter_single_coalesced", [*outputs, *inputs], outputs, inputs, opts)
        if other is not None:
            return other
        self._checks.ratio("reduce_scatter_tensor", inputs, outputs)
        operation = self._checks.operation("reduce_scatter", opts, inputs)
        targets, finish = flat_in_place(outputs)
        flats = [self._apart(flat_view(tensor), targets) for tensor in inputs]

        def start() -> list[Request | None]:
            pairs = zip(targets, flats, strict=True)
            return [self._run_reduce_scatter(out, flat, operation) for out, flat in pairs if flat.numel()]

        finish = then(divide(targets, operation, self._size), finish)
        return self._issue("reduce_scatter", start, outputs, finish, opts)

    def all_to_all_single(
        self,
        output: Tensor,
        tensor: Tensor,
        output_splits: Sequence[int] = (),
        input_splits: Sequence[int] = (),
        opts: object = None,
    ) -> LaneWork:
        other = self._other(
            "all_to_all_single", [output, tensor], output, tensor, [*output_splits], [*input_splits], opts
        )
        if other is not None:
            return other
        if output.dtype != tensor.dtype:
            raise InvalidInput(f"all_to_all: output is {output.dtype}, input {tensor.dtype}; expected the same")
        (target,), finish = flat_in_place([output])
        flat = self._apart(flat_view(tensor), [target])
        if not output_splits and not input_splits:
            if tensor.numel() % self._size or output.numel() != tensor.numel():
                raise InvalidInput(
                    f"all_to_all: without split sizes, input ({tensor.numel()} elements) and output ({output.numel()}) "
                    f"must be equal and divisible by the world size {self._size}"
                )
            return self._issue(
                "all_to_all",
                lambda: self._run_all_to_all(as_bytes(target), as_bytes(flat)),
                [output],
                finish,
                opts,
                flat,
            )
        received = self._checks.splits("output", output, output_splits)
        sent = self._checks.splits("input", tensor, input_splits)
        start = self._uneven_all_to_all(target, flat, received, sent)
        return self._issue("all_to_all", start, [output], finish, opts, alike="types")

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: object = None) -> LaneWork:
        other = self._other("alltoall", [*outputs, *inputs], outputs, inputs, opts)
        if other is not None:
            return other
        if len(outputs) != self._size or len(inputs) != self._size:
            raise InvalidInput(
                f"all_to_all: expected lists of {self._size} tensors, got {len(outputs)} and {len(inputs)}"
            )
        if len({tensor.dtype for tensor in [*outputs, *inputs]}) > 1:
            raise InvalidInput("all_to_all: all tensors must be of one type")
        flat = torch.cat([flat_view(tensor) for tensor in inputs])
        received, sent = [t.numel() for t in outputs], [t.numel() for t in inputs]
        target = flat.new_empty(sum(received))
        start = self._uneven_all_to_all(target, flat, received, sent)

        def finish() -> None:
            for output, part in zip(outputs, target.split(received), strict=True):
                output.detach().copy_(part.view(output.shape))

        return self._issue("all_to_all", start, outputs, finish, opts, alike="types")

    def barrier(self, opts: object = None) -> LaneWork:
        return self._issue("barrier", self._run_barrier, [], None, opts)

    def send(self, tensors: list[Tensor], rank: int, tag: int = 0) -> dist.Work:
        (tensor,) = single("send", tensors)
        self._expect_open("send")
        return self._other("send", tensors, tensors, rank, tag) or self._send(tensor, rank, tag)

    def recv(self, tensors: list[Tensor], rank: int, tag: int = 0) -> dist.Work:
        (tensor,) = single("recv", tensors)
        self._expect_open("recv")
        return self._other("recv", tensors, tensors, rank, tag) or self._receive(tensor, rank, tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> dist.Work:
        (tensor,) = single("recv", tensors)
        self._expect_open("recv")
        return self._other("recv_anysource", tensors, tensors, tag) or self._receive(tensor, None, tag)

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

    def _run_all_reduce(self, flat: Tensor, operation: str) -> Request | None:
        raise NotImplementedError

    def _run_broadcast(self, flat: Tensor, root: int) -> Request | None:
        raise NotImplementedError

    def _run_reduce(self, flat: Tensor, root: int, operation: str) -> Request | None:
        raise NotImplementedError

    def _run_all_gather(self, output: Tensor, flat: Tensor) -> Request | None:
        raise NotImplementedError

    def _run_gather(self, output: Tensor, flat: Tensor, root: int) -> Request | None:
        raise NotImplementedError

    def _run_scatter(self, flat: Tensor, source: Tensor, root: int) -> Request | None:
        raise NotImplementedError

    def _run_reduce_scatter(self, output: Tensor, flat: Tensor, operation: str) -> Request | None:
        raise NotImplementedError

    def _run_all_to_all(self, output: Tensor, flat: Tensor) -> Request | None:
        raise NotImplementedError

    def _uneven_all_to_all(
        self, output: Tensor, flat: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> Callable[[], Request | None]:
        """Return what starts an all_to_all of parts of different sizes (in elements), of which some may be empty."""
        raise NotImplementedError

    def _run_barrier(self) -> Request | None:
        raise NotImplementedError

    def _send(self, tensor: Tensor, rank: int, tag: int) -> dist.Work:
        raise NotImplementedError

    def _receive(self, tensor: Tensor, rank: int | None, tag: int) -> dist.Work:
        """Receive into the tensor; rank None: from any."""
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError

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
        """Put a call on the lane. flat: what is sent; where it is empty there is nothing to do (on any rank).

        alike: what all ranks have in common of the tensors: "sizes" (and types), "types", or "" (not a collective).
        """
        self._expect_open(name)

        text = describe(name, [flat] if flat is not None else result, alike == "sizes") if self._agreement else ""

        def run() -> Request | None:
            if self._agreement is not None and alike:
                self._agreement.check(text)
            if flat is not None and not flat.numel():
                return None
            try:
                begun = start()
            except LibraryError:
                raise
            except Exception as error:  # peers may have begun: what they and we call next would not fit together
                raise LibraryError(f"{name} over {self.NAME}: {error}") from error
            return AllOf.of(begun) if isinstance(begun, list) else begun

        call = Call(f"{name} of {self._size} ranks", run, result, finish, self._limit(opts), source)
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
        """Parts of different sizes, known on every rank: one broadcast a rank."""
        flat = flat_view(tensor)
        buffers = [flat if rank == self._rank else flat_view(part).clone() for rank, part in enumerate(parts)]

        def start() -> list[Request | None]:
            return [self._run_broadcast(as_bytes(part), root) for root, part in enumerate(buffers) if part.numel()]

        def finish() -> None:
            for part, buffer in zip(parts, buffers, strict=True):
                part.detach().copy_(buffer.view(part.shape))

        return self._issue("all_gather", start, parts, finish, opts)

    def _sparse_all_reduce(self, tensor: Tensor, opts: object) -> LaneWork:
        """Sum of sparse COO tensors: all_gather of padded indices and values, then a sum in rank order everywhere."""
        operation = self._checks.operation("all_reduce", opts, [tensor])
        if operation not in ("sum", "avg"):
            raise InvalidInput(f"all_reduce of sparse tensors over {self.NAME} knows sum and avg, not {operation}")
        mine = tensor.detach().coalesce()
        rows = torch.cat(
            [mine.indices().t(), mine.indices().new_zeros(1, mine.sparse_dim())]
        )  # a row more: never empty
        values = torch.cat([mine.values(), mine.values().new_zeros(1, *mine.values().shape[1:])])

        sent = []  # kept until the end: a request does not keep its memory

        def gather(part: Tensor, longest: int) -> tuple[Tensor, Request | None]:
            padded = part.new_zeros(longest, *part.shape[1:])
            padded[: len(part)] = part
            sent.append(padded)
            every = part.new_empty(self._size, *padded.shape)
            return every, self._run_all_gather(as_bytes(every.view(-1)), as_bytes(padded.view(-1)))

        def steps() -> Iterator[Request | None]:
            lengths, request = gather(torch.tensor([len(rows)]), 1)
            yield request
            longest = int(lengths.max())
            every_row, request = gather(rows, longest)
            yield request
            every_value, request = gather(values, longest)
            yield request
            counts = (lengths.flatten() - 1).tolist()
            indices = [part[:count] for part, count in zip(every_row, counts, strict=True)]
            gathered = [part[:count] for part, count in zip(every_value, counts, strict=True)]
            total = sum_of_rows(indices, gathered, tensor.shape)
            with torch.no_grad():  # a sparse tensor's detach() would keep the new indices to itself
                tensor.copy_(total / self._size if operation == "avg" else total)

        return self._issue("sparse all_reduce", lambda: Steps.of(steps()), [tensor], opts=opts)

    def _apart(self, flat: Tensor, targets: Sequence[Tensor]) -> Tensor:
        """The input, copied where it shares memory with an output and the library forbids that."""
        if self._may_alias or not any(overlaps(flat, target) for target in targets):
            return flat
        return flat.clone()

    def _other(self, method: str, tensors: Sequence[Tensor], *arguments: object) -> dist.Work | None:
        """Run the call elsewhere if its tensors are not on the CPU; None if they are."""
        kinds = {tensor.device.type for tensor in tensors}
        if kinds <= {"cpu"}:
            return None
        if len(kinds) > 1:
            raise InvalidInput(f"{method}: tensors on {', '.join(sorted(kinds))}; expected one device")
        group = self._group_for(kinds.pop())
        return getattr(group, method)(*[argument for argument in arguments if argument is not None])

    def _group_for(self, device: str) -> dist.ProcessGroup:
        """The group that the configuration ("cpu:ccl,cuda:nccl") names for another device, made when first needed."""
        if device not in self._others:
            timeout = timedelta(seconds=self._timeout)
            self._others[device] = other_device_group(self, device, self._store, self._rank, self._size, timeout)
        return self._others[device]
