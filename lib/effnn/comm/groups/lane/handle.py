"""The handle of a call on a lane, which torch.distributed hands to whoever waits, and the futures that it gives.

For Python a future is completed on a thread of its own; for C++ it has the type that C++ expects. A future made in
Python holds a Python object, whatever is put into it. Most of torch's C++ takes that; the built-in FP16 hook of DDP
insists on a list of tensors. Such a future comes out of TorchScript, from a function that waits for another future and
then returns tensors that it was given.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from effnn.comm.groups.lane.call import Call, CollectiveFailed, CollectiveTimeout

_COMPLETERS = 64  # threads that run callbacks of futures; a callback may wait for other collectives
_LONGEST_SETTLING = 1.0  # seconds; longer only if every thread above is taken

_RETURNS_TENSORS = """
def after(ended: Future[int], tensors: List[Tensor]) -> List[Tensor]:
    ended.wait()
    return tensors

def begin(ended: Future[int], tensors: List[Tensor]) -> Future[List[Tensor]]:
    return fork(after, ended, tensors)
"""

_pool: ThreadPoolExecutor | None = None
_pool_guard = threading.Lock()


class LaneWork(dist.Work):
    """Handle of one call: what torch.distributed returns for async_op=True, and what DDP waits for."""

    def __init__(self, call: Call):
        super().__init__()
        self._call = call
        self._inference = torch.is_inference_mode_enabled()  # of the thread that issued it: the lane goes on in it
        self._error: Exception | None = None
        self._finished = False
        self._signal = threading.Lock()  # held until the call has ended; cheaper than an Event
        self._signal.acquire()
        self._guard = threading.Lock()
        self._base: Future | None = None
        self._future: Future | None = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until the call has ended; returns True, raises its error. timeout: None or 0 for the group's own."""
        limit = timeout.total_seconds() if timeout else 0.0
        if not self._signal.acquire(timeout=limit if limit > 0 else -1):
            raise CollectiveTimeout(f"{self._call.name} did not end within the {limit:g} s that wait() was given")
        self._signal.release()
        if self._future is not None:
            _settle(self._future)  # who waits may look at the future next
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

    def get_future(self) -> Future:
        """Future of `result()`; its callbacks run on threads of their own, so they may wait for other collectives."""
        for_cpp = _asked_by_cpp("get_future")
        with self._guard:
            if self._future is None:
                self._base = Future()
                # An exception set on a future directly is not seen by C++ (DDP would go on and crash); one that is
                # raised in a callback is.
                self._future = self._base.then(self._value)
                if self._finished:
                    self._base.set_result(None)  # nothing else can be attached to it yet
            return _of_tensors(self._future, self._call.result) if for_cpp else self._future

    def mode(self) -> contextlib.AbstractContextManager:
        """inference_mode() on the lane if the call was issued in it: only there may its tensors be written to."""
        return torch.inference_mode() if self._inference else contextlib.nullcontext()

    def _value(self, _: Future) -> list[Tensor]:
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
            _complete(base)


def _complete(future: Future) -> None:
    """Set a future's result, and so run its callbacks, on a thread of its own."""
    with contextlib.suppress(RuntimeError):  # the process is ending: nothing runs callbacks any more
        _completers().submit(future.set_result, None)


def _settle(future: Future) -> None:
    """Wait until a future that is being completed is; its callbacks may still run."""
    end = time.monotonic() + _LONGEST_SETTLING
    while not future.done() and time.monotonic() < end:
        time.sleep(1e-5)


def _asked_by_cpp(name: str) -> bool:
    """Whether the method of this name that asks was called by torch's C++, not by a line of Python that names it.

    C++ gives no sign of itself; the code of the calling frame is then what called into C++, such as `backward`. A
    Python caller that is taken for C++ (`getattr`) gets a future that works as well.
    """
    caller = sys._getframe(2)
    return name not in caller.f_code.co_names


def _of_tensors(ended: Future, tensors: Sequence[Tensor]) -> Future:
    """A future that holds the tensors in C++'s own type once `ended` has ended; where that failed, it fails too."""
    return _script().begin(ended, list(tensors))


@cache
def _script() -> torch.jit.CompilationUnit:
    fork = torch.jit.fork  # noqa: F841  (the text finds it among the names of this frame)
    return torch.jit.CompilationUnit(_RETURNS_TENSORS)


def _completers() -> ThreadPoolExecutor:
    global _pool
    with _pool_guard:
        if _pool is None:
            _pool = ThreadPoolExecutor(_COMPLETERS, "future callbacks")
        return _pool
