"""Futures of calls on a lane: for Python, completed on threads of their own; for C++, of the type that it expects.

A future made in Python holds a Python object, whatever is put into it. Most of torch's C++ takes that; the built-in
FP16 hook of DDP insists on a list of tensors. Such a future comes out of TorchScript, in a function that waits for
another one and then returns tensors that it was given.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor
from torch.futures import Future

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


def complete(future: Future) -> None:
    """Set a future's result, and so run its callbacks, on a thread of its own."""
    with contextlib.suppress(RuntimeError):  # the process is ending: nothing runs callbacks any more
        _completers().submit(future.set_result, None)


def settle(future: Future) -> None:
    """Wait until a future that is being completed is; its callbacks may still run."""
    end = time.monotonic() + _LONGEST_SETTLING
    while not future.done() and time.monotonic() < end:
        time.sleep(1e-5)


def asked_by_cpp(name: str) -> bool:
    """Whether the method of this name that asks was called by torch's C++, not by a line of Python that names it.

    C++ gives no sign of itself; the code of the calling frame is then what called into C++, such as `backward`. A
    Python caller that is taken for C++ (`getattr`) gets a future that works as well.
    """
    caller = sys._getframe(2)
    return name not in caller.f_code.co_names


def of_tensors(ended: Future, tensors: Sequence[Tensor]) -> Future:
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
