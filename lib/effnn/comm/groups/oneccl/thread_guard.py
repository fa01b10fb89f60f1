"""Errors on a thread of a C++ library, which would end the process, become a call of Python.

An exception that leaves a C++ thread calls std::terminate, and that aborts the process: so it is with oneCCL's worker
thread when a transfer fails. Here the handler of std::terminate tells whoever waits for such a thread, and lets the
thread sleep for good. Other threads keep the handler that was there.
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable
from functools import cache

_Handler = ctypes.CFUNCTYPE(None)
_FOREVER = 1e6  # seconds

_guarded: dict[int, Callable[[], None]] = {}  # native thread id -> what is called when it ends by an exception


def threads() -> set[int]:
    """Native ids of the threads of this process; none where the system does not list them."""
    folder = "/proc/self/task"
    return {int(name) for name in os.listdir(folder)} if os.path.isdir(folder) else set()


def guard(thread: int, failed: Callable[[], None]) -> None:
    """From now on an exception that leaves `thread` (a native id) calls `failed` there; the process goes on.

    The thread never goes on: the library must not be used any more, nor wait for it at the end of the process.
    """
    _guarded[thread] = failed
    _install()


@cache
def _install() -> tuple[object, ...]:
    library = ctypes.CDLL("libstdc++.so.6")
    set_terminate = library._ZSt13set_terminatePFvvE
    set_terminate.argtypes, set_terminate.restype = [_Handler], ctypes.c_void_p
    previous: list[Callable[[], None]] = []

    @_Handler
    def handler() -> None:
        failed = _guarded.get(threading.get_native_id())
        if failed is None:
            previous[0]()
            return
        failed()
        while True:
            time.sleep(_FOREVER)

    previous.append(_Handler(set_terminate(handler)))
    return handler, previous  # kept: the library holds a bare pointer
