"""The lane: one thread of this process runs communication calls in the order of issue; `LaneWork` awaits them.

A library that is not thread safe (oneCCL, MPI in one thread) is only ever entered from its lane. A `Call` starts on the
lane; it is finished when `start` returns None, or when the request that it returned says so (MPI's non-blocking calls),
so that a receive that waits does not hold up later calls. What a library cannot do, the lane adds: a time-out for every
call, errors that reach every waiting caller, and an end of the process that is not held up by a call that never
returns.
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

from effnn.comm.groups.lane.call import Call, CollectiveFailed, CollectiveTimeout, LibraryError, Request
from effnn.comm.groups.lane.handle import LaneWork

_POLLS_BEFORE_SLEEP = 200  # of outstanding requests; then the lane sleeps between polls, longer and longer
_LONGEST_SLEEP = 1e-3  # seconds
_WATCH = 0.2  # seconds between two looks of the watchdog
_STOP = 1.0  # seconds that the threads get to end


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
        work = LaneWork(call)
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
