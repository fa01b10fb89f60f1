"""The errors that a caller may want to distinguish. Every message says what was expected and what to do."""


class EffnnError(Exception):
    """Base of all errors that effnn raises on purpose."""


class InvalidInput(EffnnError, ValueError):
    """An argument, a file or a model is not what the function takes."""


class NotAvailable(EffnnError, RuntimeError):
    """Something that the function needs (a data set, a library, a device) is not available here."""


class CannotWrite(EffnnError, OSError):
    """A file could not be written: no space, a quota, a limit on file sizes, or a read-only disk.

    reason: the system's words for it; the message adds the path and the way out.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


def first_line(error: BaseException | str, length: int = 200) -> str:
    """The first line of an error's message, at most `length` characters; some libraries write pages."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else "no message")[:length]
