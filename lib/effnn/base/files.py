"""Writing files completely or not at all, with one clear error where the disk refuses.

What is written goes to a temporary name in the same folder and is then renamed over the target, so a reader sees the
old content or the new one. A killed process leaves at most a `.tmp-*`, which nothing reads. A full disk gives the same
error whichever library writes: torch and safetensors raise errors of their own (a broken archive, "os error 28"), so
the system's error is looked for in the chain of errors and in their texts.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from effnn.base.errors import CannotWrite

TEMPORARY = ".tmp-"
"""What temporary names begin with."""

_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_IN_RUST = re.compile(r"\(os error (\d+)\)")


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the target's folder; on success it replaces `target`, on an error it is removed.

    The folder is made if it is missing. The temporary name keeps the target's suffix, since some writers go by it.
    Raises CannotWrite where the disk refuses.
    """
    target = Path(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=TEMPORARY, suffix=target.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `target` on success and is removed on an error.

    It is made in the same parent folder; an earlier `target` is replaced. Raises CannotWrite where the disk refuses.
    """
    target = Path(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target.parent) as temporary:
            yield temporary
            temporary.chmod(0o755)
            if target.exists():
                shutil.rmtree(target)
            temporary.rename(target)


@contextmanager
def temporary_folder(parent: Path, prefix: str = TEMPORARY) -> Iterator[Path]:
    """Yield a new hidden folder in `parent`; at the end it is gone, unless it was renamed."""
    temporary = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(target: str | Path, text: str) -> Path:
    """Write `text` (UTF-8) to `target` atomically; returns the path."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(target)


def write_json(target: str | Path, value: object) -> Path:
    """Write `value` as indented JSON, keys in their given order; NaN and infinity are refused. Returns the path."""
    return write_text(target, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sha256_file(path: str | Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(target: str | Path, way_out: str = "free some space there, or write elsewhere") -> Iterator[None]:
    """Raise `CannotWrite` for `target` where the block fails because the disk refuses; other errors pass.

    A disk refuses when there is no space, at a quota or a limit on file sizes, when it is read-only, or when it fails.
    Inside another such block the outer target and way out are named. Give torch.save an open file: with a path it hides
    the reason.
    """
    handled = sys.exception()  # of a caller that writes while it deals with another error
    try:
        yield
    except Exception as error:
        if (reason := _refusal(error, handled)) is None:
            raise
        raise CannotWrite(f"{target} could not be written ({reason}): {way_out}", reason) from error


def _refusal(error: BaseException | None, before: BaseException | None) -> str | None:
    """What the system said when it refused a write, in the chain of `error` down to `before`; None for other errors."""
    while error is not None and error is not before:
        if isinstance(error, CannotWrite):
            return error.reason
        number = error.errno if isinstance(error, OSError) else None
        if number is None and (found := _IN_RUST.search(str(error))):
            number = int(found[1])
        if number in _REFUSED:
            return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
