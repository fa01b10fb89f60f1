"""A lock on a folder, for one process at a time; the system releases it when the process ends in any way.

The lock is `flock` on a file in the folder. The file says who holds the lock and is deleted afterwards. That of a
killed process stays, without a lock, and blocks nobody.
"""

import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from effnn.base.errors import CannotWrite, InvalidInput

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

log = logging.getLogger(__name__)
_NAME = ".lock"
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_held: set[int] = set()


@contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Hold `folder`, which must exist, within the block.

    Raises InvalidInput where another process (or another thread) holds it, naming both, and CannotWrite where the
    folder cannot be written to. On a file system or an operating system without such locks it only warns.
    """
    path = Path(folder) / _NAME
    handle = _acquire(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # still locked: a process that opened it meanwhile sees that it is gone, and makes a new one
        _held.discard(handle)
        os.close(handle)


def _acquire(path: Path) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            reason = os.strerror(error.errno)
            raise CannotWrite(
                f"{path.parent} cannot be written to ({reason}): give a folder of your own with space left", reason
            ) from error
        try:
            _flock(handle, path)
            if _is_at(handle, path):
                with suppress(OSError):  # a full disk: the holder's name is then unknown
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                _held.add(handle)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _flock(handle: int, path: Path) -> None:
    if fcntl is None:
        log.warning("this system has no file locks: nothing keeps two processes apart in %s", path.parent)
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _said(handle) or "another process"
        raise InvalidInput(
            f"{path.parent} is in use by {holder}: wait until that has ended, or give each run a folder of its own"
        ) from None
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        log.warning("no file locks in %s (%s): nothing keeps two processes apart there", path.parent, error.strerror)


def _said(handle: int) -> str:
    """Who holds the lock, from its file; a holder that has just taken it needs a moment to write that."""
    for _ in range(10):
        if said := os.pread(handle, 1000, 0):
            return said.decode("utf-8", "replace")
        time.sleep(0.02)
    return ""


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`, which its former holder may have removed."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _release_in_child() -> None:
    """A forked process must not keep the lock of its parent."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)
