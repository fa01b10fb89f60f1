"""The lane: one thread of this process runs communication calls in the order of issue; `LaneWork` awaits them.

A library that is not thread safe (oneCCL, MPI in one thread) is only ever entered from its lane. A `Call` starts on the
lane; it is finished when `start` returns None, or when the request that it returned says so (MPI's non-blocking calls),
so that a receive that waits does not stop the calls issued after it. What a library cannot do, the lane adds: a
time-out for every call, errors that reach every waiting caller, and an end of the process that is not held up by a call
that never returns.
"""

import atexit
import contextlib
import ctypes
import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from effnn.base import EffnnError
from effnn.comm.groups.lane import futures

_POLLS_BEFORE_SLEEP = 200  # of outstanding requests; then the lane sleeps between polls, longer and longer
_LONGEST_SLEEP = 1e-3  # seconds
_WATCH = 0.2  # seconds between two looks of the watchdog
_STOP = 1.0  # seconds that the threads get to end


class CollectiveFailed(EffnnError, RuntimeError):
    """A communication call failed; the message says which, why, and what still works."""


class CollectiveTimeout(CollectiveFailed):
    """A communication call did not end within its group's time-out: a peer is gone, stuck, or called something else."""


class LibraryError(CollectiveFailed):
    """The library under a group reported an error; after one its lane is not used again."""


class Request(Protocol):
    """What a call leaves behind that is not finished yet."""

    def test(self) -> bool:
        """Drive the call on; True once it is finished."""


@dataclass
class Call:
    """One communication call. `start` and `finish` run on the lane, `finish` after the call has ended without error."""

    name: str
    start: Callable[[], Request | None]
    result: Sequence[Tensor] = ()
    finish: Callable[[], None] | None = None
    timeout: float | None = None  # seconds from its start; None: no limit
    source: Callable[[], int] | None = None  # of a receive from any source: the rank that sent, known at its end
    collective: bool = False  # all ranks begin such calls in the same order


class LaneWork(dist.Work):
    """Handle of one call: what torch.distributed returns for async_op=True, and what DDP waits for."""

    def __init__(self, lane: "Lane", call: Call):
        super().__init__()
        self._lane, self._call = lane, call
        self._inference = torch.is_inference_mode_enabled()  # of the thread that issued it: the lane goes on in it
        self._error: Exception | None = None
        self._finished = False
        self._signal = threading.Lock()  # held until the call has ended; cheaper than an Event
        self._signal.acquire()
        self._guard = threading.Lock()
        self._base: torch.futures.Future | None = None
        self._future: torch.futures.Future | None = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until the call has ended; returns True, raises its error. timeout: None or 0 for the group's own."""
        limit = timeout.total_seconds() if timeout else 0.0
        if not self._signal.acquire(timeout=limit if limit > 0 else -1):
            raise CollectiveTimeout(f"{self._call.name} did not end within the {limit:g} s that wait() was given")
        self._signal.release()
        if self._future is not None:
            futures.settle(self._future)  # who waits may look at the future next
        if self._error is not None:
            raise self._error
        return True

    def is_completed(self) -> bool:
        """Whether the call has ended, well or not."""
        return self._finished

    def is_success(self) -> bool:
        """Whether the call has ended without error."""
        return self._finished and self._error is None

    def exception(self) -> Exception | None:
        """The error of an ended call."""
        return self._error

    def result(self) -> list[Tensor]:
        """The tensors that the call fills."""
        return list(self._call.result)

    def synchronize(self) -> None:
        """The same as wait(): there is no stream on a CPU."""
        self.wait()

    def source_rank(self) -> int:
        """The rank that sent, of a receive that has ended."""
        if self._call.source is None:
            raise CollectiveFailed(f"{self._call.name} has no source rank; a receive has")
        self.wait()
        return self._call.source()

    _source_rank = source_rank

    def get_future(self) -> torch.futures.Future:
        """Future of `result()`; its callbacks run on threads of their own, so they may wait for other collectives."""
        for_cpp = futures.asked_by_cpp("get_future")
        with self._guard:
            if self._future is None:
                self._base = torch.futures.Future()
                # An exception set on a future directly is not seen by C++ (DDP would go on and crash); one that is
                # raised in a callback is.
                self._future = self._base.then(self._value)
                if self._finished:
                    self._base.set_result(None)  # nothing else can be attached to it yet
            return futures.of_tensors(self._future, self._call.result) if for_cpp else self._future

    def mode(self) -> contextlib.AbstractContextManager:
        """inference_mode() on the lane if the call was issued in it: only there may its tensors be written to."""
        return torch.inference_mode() if self._inference else contextlib.nullcontext()

    def _value(self, _: torch.futures.Future) -> list[Tensor]:
        if self._error is not None:
            raise self._error
        return self.result()

    def _end(self, error: Exception | None = None) -> None:
        """Called once, by the lane or by what gives it up; later calls change nothing."""
        with self._guard:
            if self._finished:
                return
            self._error, self._finished = error, True
            base = self._base
        self._call.start = self._call.finish = None  # a handle that is kept must not keep inputs and buffers
        self._signal.release()
        if base is not None:
            futures.complete(base)


class Lane:
    """A thread that runs calls one after another; `failure` is set for good once its library cannot be used any more.

    name: of the library, for messages.
    """

    def __init__(self, name: str):
        self.name = name
        self.failure: Exception | None = None
        self._queue: queue.SimpleQueue[LaneWork | None] = queue.SimpleQueue()
        self._running: dict[LaneWork, tuple[Request | None, float]] = {}  # work -> request, deadline
        self._guard = threading.Lock()
        self._waiting: set[LaneWork] = set()
        self._held: deque[LaneWork] = deque()  # collectives, while one that runs is yet to begin more of its own
        self._inside = False  # in a call of the library that may never return
        self._process = os.getpid()
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=f"{name} {role}", daemon=True)
            for target, role in ((self._run, "lane"), (self._watch, "watchdog"))
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.stop)

    def submit(self, call: Call) -> LaneWork:
        """Queue a call; returns its handle at once. Raises CollectiveFailed after a fork, a failure or stop()."""
        if os.getpid() != self._process:
            raise CollectiveFailed(
                f"{call.name}: this process was forked from one that uses {self.name}, whose threads and connections "
                "do not survive a fork. Start processes with the 'spawn' method, or communicate in the parent only."
            )
        work = LaneWork(self, call)
        with self._guard:
            if self.failure is not None:
                raise self._after_failure(call)
            if self._stopped.is_set():
                raise self._after_stop(call)
            self._waiting.add(work)
            self._queue.put(work)
        return work

    @property
    def usable(self) -> bool:
        """Whether calls are still taken."""
        return self.failure is None and not self._stopped.is_set()

    def run(self, call: Call) -> None:
        """Queue a call and wait for it."""
        self.submit(call).wait()

    def fail(self, error: Exception) -> None:
        """Give the lane up: every call that has not ended gets `error`, later ones are refused."""
        with self._guard:
            if self.failure is not None:
                return
            self.failure = error
            given_up = [*self._running, *self._waiting]
        if self._inside:
            skip_destructors()
        for work in given_up:
            work._end(error if work in self._running else self._after_failure(work._call))

    def _after_failure(self, call: Call) -> CollectiveFailed:
        return CollectiveFailed(
            f"{call.name}: {self.name} is not used any more in this process, since an earlier call failed: "
            f"{str(self.failure).rstrip('.')}. Start the processes again."
        )

    def _after_stop(self, call: Call) -> CollectiveFailed:
        return CollectiveFailed(f"{call.name}: {self.name} is not used any more, since this process is ending")

    def _run(self) -> None:
        polls = 0
        while self.failure is None and not self._stopped.is_set():
            try:
                work = self._queue.get(block=not self._running)
            except queue.Empty:
                work = None
            idle = work is None
            if not idle:
                if work._call.collective and (self._held or self._begins_more()):
                    self._held.append(work)
                else:
                    self._start(work)
                polls = 0
            work = None  # its tensors must not live on here while the lane waits for the next call
            self._poll()
            while self._held and self.failure is None and not self._begins_more():
                self._start(self._held.popleft())
            if self._running and idle:
                polls += 1
                if polls > _POLLS_BEFORE_SLEEP:
                    time.sleep(min(_LONGEST_SLEEP, 1e-5 * (polls - _POLLS_BEFORE_SLEEP)))

    def _start(self, work: LaneWork) -> None:
        call = work._call
        deadline = time.monotonic() + call.timeout if call.timeout else float("inf")
        with self._guard:
            if self.failure is not None:  # in the meantime; fail() has ended this work
                return
            self._waiting.discard(work)
            self._running[work] = (None, deadline)
        self._inside = True
        try:
            with work.mode():
                request = call.start()
            if request is None:
                self._finish(work)
            else:
                self._running[work] = (request, deadline)
        except Exception as error:
            self._error(work, error)
        finally:
            self._inside = False

    def _begins_more(self) -> bool:
        return any(getattr(request, "begins_more", False) for request, _ in self._running.values())

    def _poll(self) -> None:
        for work, (request, _) in list(self._running.items()):
            try:
                with work.mode():
                    ended = request is not None and request.test()
                if ended:
                    self._finish(work)
            except Exception as error:
                self._error(work, error)

    def _finish(self, work: LaneWork) -> None:
        if work._call.finish is not None:
            with work.mode():
                work._call.finish()
        self._forget(work)
        work._end()

    def _error(self, work: LaneWork, error: Exception) -> None:
        if isinstance(error, LibraryError):
            self.fail(error)
        self._forget(work)
        work._end(error)

    def _forget(self, work: LaneWork) -> None:
        with self._guard:
            self._running.pop(work, None)

    def _watch(self) -> None:
        while self.failure is None and not self._stopped.wait(_WATCH):
            now = time.monotonic()
            with self._guard:
                running = list(self._running.items())
            for work, (_, deadline) in running:
                if now > deadline:
                    self.fail(self._timed_out(work._call))
                    return

    def _timed_out(self, call: Call) -> CollectiveTimeout:
        return CollectiveTimeout(
            f"{call.name} over {self.name} did not end within the group's timeout of {call.timeout:g} s. A peer has "
            "ended, is stuck, or makes its calls in another order."
        )

    def stop(self) -> None:
        """End the threads, at the end of the process; a call that never returned must not meet the destructors.

        Calls that have not ended by then are given up, and later ones refused: nobody waits for them for ever.
        """
        if os.getpid() != self._process:
            return
        with self._guard:
            self._stopped.set()
        self._queue.put(None)  # wakes the lane
        if self._inside or self.failure is not None:
            skip_destructors()
        else:
            for thread in self._threads:
                thread.join(_STOP)
        with self._guard:
            given_up = [*self._running, *self._waiting]
        for work in given_up:
            work._end(self._after_stop(work._call))


_skipped = False


def skip_destructors() -> None:
    """End the process, when it ends, with its own status but without the C++ destructors of a library in use.

    glibc runs such handlers in reverse order of registration: `_exit` comes before those of libraries loaded earlier.
    """
    global _skipped
    if _skipped or not sys.platform.startswith("linux"):
        return
    _skipped = True
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.on_exit(ctypes.cast(libc._exit, ctypes.c_void_p), None)
