"""Atomic writes: a reader sees the old file or the new one, never a half of either.

The text goes to a temporary name in the same folder, is flushed to the disk, and is then renamed over the target.
A killed process leaves at most a `.tmp-*` file, which nothing ever reads.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from effnn.base.writing import writing


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the target's folder; on success it replaces `target`, on an error it is removed.

    The folder is made if it is missing. The temporary name keeps the target's suffix, since some writers go by it.
    Raises CannotWrite where the disk takes no more.
    """
    target = Path(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".tmp-", suffix=target.suffix)
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


def write_text(target: str | Path, text: str) -> Path:
    """Write `text` (UTF-8) to `target` atomically; returns the path."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(target)


def write_json(target: str | Path, value: object) -> Path:
    """Write `value` as indented JSON, keys in their given order; NaN and infinity are refused. Returns the path."""
    return write_text(target, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
