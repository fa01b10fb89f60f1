"""Errors of a write that the disk refuses, in one sentence, whichever library did the writing.

torch and safetensors report a full disk as errors of their own (a broken archive, "os error 28"); what the system said
is found in the chain of the errors or in their text.
"""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from effnn.base.errors import CannotWrite

_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_IN_RUST = re.compile(r"\(os error (\d+)\)")


@contextmanager
def writing(target: str | Path, way_out: str = "free some space there, or write elsewhere") -> Iterator[None]:
    """Raise `CannotWrite` for `target` where the block fails because the disk takes no more; other errors pass.

    Counts as such: no space left, a quota, the limit on the size of a file, a read-only or failing disk. A block within
    another takes the outer one's target and way out. Give torch.save an open file: with a path it hides the reason.
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
