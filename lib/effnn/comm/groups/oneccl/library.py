"""The oneCCL library of the `oneccl` wheel: found, loaded and called through its C API with ctypes.

Nothing here knows torch's process groups. The library is not thread safe in the way it is used here: call it from one
thread only (see `effnn.comm.groups.lane.lane`). C API: oneapi/ccl.h of oneCCL 2022.1.
"""

import ctypes
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from effnn.base import NotAvailable
from effnn.comm.groups.interfaces import communication_interface
from effnn.comm.groups.lane.call import LibraryError
from effnn.comm.groups.oneccl import thread_guard, waiting

# Each needs the ones before it; loaded by absolute path, so LD_LIBRARY_PATH plays no part.
_LIBRARIES = (
    "libintlc.so.5",
    "libimf.so",
    "libsvml.so",
    "libirng.so",
    "libur_loader.so.0",
    "libsycl.so.9",
    "libccl.so.2",
    "libccl.so.1",
    "libccl_legacy_cpu.so",
)
_API = "libccl.so.2"
_FABRIC = "libfabric.so.1"  # of impi-rt; oneCCL loads it itself
_ID_BYTES = 4096

INSTALL = "pip install 'effnn[ccl]' (in this repository: make env)"

TYPES = {
    torch.int8: 0, torch.uint8: 1, torch.int32: 2, torch.int64: 4,
    torch.float16: 6, torch.float32: 7, torch.float64: 8, torch.bfloat16: 9,
}  # fmt: skip
"""Type of the elements -> its number in the C API."""

OPERATIONS = {"sum": 0, "product": 1, "max": 2, "min": 3}
"""Reduction -> its number in the C API. The library refuses averages."""

_SUCCESS = 0


class UniqueId(ctypes.Structure):
    """What the ranks of a communicator share to find each other: made by one, handed to the others."""

    _fields_ = [("data", ctypes.c_char * _ID_BYTES)]


def unavailable() -> str | None:
    """One sentence that says why oneCCL cannot be loaded here; None if its files are here (nothing is loaded)."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"oneCCL exists for Linux on x86-64 only; this is {platform.system()} on {platform.machine()}"
    try:
        folder = library_folder()
    except NotAvailable as error:
        return str(error)
    missing = [name for name in (*_LIBRARIES, _FABRIC) if not (folder / name).exists()]
    return f"oneCCL is installed without {', '.join(missing)}: {INSTALL} again" if missing else None


def library_folder() -> Path:
    """Folder of the installed libraries, from the wheel's own list of files. Raises NotAvailable."""
    try:
        files = importlib.metadata.files("oneccl") or []
    except importlib.metadata.PackageNotFoundError:
        raise NotAvailable(f"the oneccl package is not installed: {INSTALL}") from None
    for file in files:
        if file.name == _API:
            return Path(file.locate()).resolve().parent
    raise NotAvailable(f"the oneccl package has no {_API}: {INSTALL} again")


class Library:
    """The loaded C API; every call raises LibraryError with the library's own words when it fails.

    place: of this rank on its machine, which decides how the library waits: set before the first id or communicator,
    as the library reads its environment there; None for a process that is alone.
    on_worker_failure: called with an error, on a thread of the library, when its worker thread fails; a call that waits
    for that thread does not return by itself.
    """

    place: waiting.Place | None = None
    on_worker_failure: Callable[[LibraryError], None] | None = None

    def __init__(self) -> None:
        reason = unavailable()
        if reason is not None:
            raise NotAvailable(reason)
        folder = library_folder()
        _set_environment(folder)
        try:
            handles = {name: ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for name in _LIBRARIES}
        except OSError as error:
            raise NotAvailable(f"oneCCL does not load ({error}): {INSTALL} again") from None
        self._api = handles[_API]
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        signatures = {
            "onecclGetUniqueId": [pointer],
            "onecclGetVersion": [pointer],
            "onecclCommInitRank": [pointer, size, UniqueId, number],
            "onecclCommFinalize": [pointer],
            "onecclCommDestroy": [pointer],
            "onecclAllReduce": [pointer, pointer, size, number, number, pointer, pointer],
            "onecclReduce": [pointer, pointer, size, number, number, number, pointer, pointer],
            "onecclReduceScatter": [pointer, pointer, size, number, number, pointer, pointer],
            "onecclBroadcast": [pointer, pointer, size, number, number, pointer, pointer],
            "onecclAllGather": [pointer, pointer, size, number, pointer, pointer],
            "onecclAllToAll": [pointer, pointer, size, number, pointer, pointer],
        }
        for name, arguments in signatures.items():
            function = getattr(self._api, name)
            function.argtypes, function.restype = arguments, number
        self._api.onecclGetErrorString.restype = ctypes.c_char_p
        self._api.onecclGetLastError.argtypes, self._api.onecclGetLastError.restype = [pointer], ctypes.c_char_p

    def version(self) -> str:
        """Version of the loaded library, such as 2022.1."""
        code = ctypes.c_int()
        self._check("onecclGetVersion", self._api.onecclGetVersion(ctypes.byref(code)))
        return f"{code.value // 10000}.{code.value // 100 % 100}"

    def unique_id(self) -> bytes:
        """A new id, for the ranks of one communicator."""
        made = UniqueId()
        with waiting.told(self.place or waiting.ALONE):
            status = self._api.onecclGetUniqueId(ctypes.byref(made))
        self._check("onecclGetUniqueId", status)
        return bytes(made)

    def communicator(self, shared: bytes, rank: int, size: int) -> "Communicator":
        """Join a communicator; returns when all of its ranks have."""
        handle = ctypes.c_void_p()
        identity = UniqueId.from_buffer_copy(shared)
        before = thread_guard.threads()
        with waiting.told(self.place or waiting.ALONE):
            status = self._api.onecclCommInitRank(ctypes.byref(handle), size, identity, rank)
        for thread in thread_guard.threads() - before:
            if waiting.is_worker(thread):
                thread_guard.guard(thread, self._worker_failed)
        self._check("onecclCommInitRank", status)
        return Communicator(self, handle)

    def _worker_failed(self) -> None:
        if self.on_worker_failure is not None:
            self.on_worker_failure(
                LibraryError(
                    "oneCCL: its worker thread failed, and has written why to the standard error. A peer has ended, or "
                    "the ranks bring different types or sizes."
                )
            )

    def _check(self, name: str, status: int, handle: ctypes.c_void_p | None = None) -> None:
        if status != _SUCCESS:
            words = self._api.onecclGetLastError(handle) or self._api.onecclGetErrorString(status) or b""
            raise LibraryError(f"oneCCL: {name} failed with status {status}: {words.decode(errors='replace').strip()}")


class Communicator:
    """The calls of one communicator. Buffers are addresses of host memory, counts are elements; each call blocks."""

    def __init__(self, library: Library, handle: ctypes.c_void_p):
        self._library, self._handle = library, handle

    def call(self, name: str, *arguments: int) -> None:
        """Call onecclName(arguments..., communicator, no stream)."""
        function = getattr(self._library._api, f"oneccl{name}")
        self._library._check(f"oneccl{name}", function(*arguments, self._handle, None), self._handle)

    def destroy(self) -> None:
        """Free what the library holds for this communicator."""
        api = self._library._api
        self._library._check("onecclCommFinalize", api.onecclCommFinalize(self._handle))
        self._library._check("onecclCommDestroy", api.onecclCommDestroy(self._handle))


@cache
def library() -> Library:
    """The one library of this process, loaded at the first call. Raises NotAvailable."""
    return Library()


def _set_environment(folder: Path) -> None:
    """What the library reads when it starts, but for how it waits (waiting.py). The user's values stay."""
    interface = communication_interface()
    wanted = {
        "CCL_PLUGIN": "ONECCL_LEGACY_CPU",  # the others want a SYCL device
        "CCL_ATL_TRANSPORT": "ofi",
        "FI_PROVIDER": "tcp",
        "CCL_LOG_LEVEL": "error",  # by default it reports each of these settings
        "CCL_PROCESS_LAUNCHER": "none",  # ranks come from the communicator's id, not from a launcher
        "CCL_KVS_IFACE": interface,
        "FI_TCP_IFACE": interface,
        "FI_PROVIDER_PATH": str(folder),
        "CCL_OFI_LIBRARY_PATH": str(folder / _FABRIC),
    }
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
