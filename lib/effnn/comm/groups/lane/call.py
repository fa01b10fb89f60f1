"""What a lane runs: a call, the requests that it leaves behind until it has ended, and the errors it ends with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from effnn.base import EffnnError


class CollectiveFailed(EffnnError, RuntimeError):
    """A communication call failed; the message says which, why, and what still works."""


class CollectiveTimeout(CollectiveFailed):
    """A communication call did not end within its group's time-out: a peer is gone, stuck, or called something else."""


class LibraryError(CollectiveFailed):
    """The library under a group reported an error; after one its lane is not used again."""


def is_of_communication(error: BaseException) -> bool:
    """Whether an error comes of communication, so that the end of a peer may be all that is behind it.

    gloo's errors have no type of their own; its source file in their text tells them.
    """
    while error is not None:
        if isinstance(error, (CollectiveFailed, dist.DistError)) or "gloo/" in str(error):
            return True
        error = error.__context__  # what it was raised from
    return False


class Request(Protocol):
    """What a call leaves behind that is not finished yet."""

    def test(self) -> bool:
        """Drive the call on; True once it is finished."""


@dataclass
class Call:
    """One communication call. `start` and `finish` run on the lane, `finish` after the call has ended without error."""

    name: str
    start: Callable[[], Request | None]
    result: Sequence[Tensor] = ()
    finish: Callable[[], None] | None = None
    timeout: float | None = None  # seconds from its start; None: no limit
    source: Callable[[], int] | None = None  # of a receive from any source: the rank that sent, known at its end
    collective: bool = False  # all ranks begin such calls in the same order


class AllOf:
    """Several requests as one."""

    def __init__(self, requests: list[Request]):
        self._requests = requests

    @staticmethod
    def of(requests: list[Request | None]) -> Request | None:
        waiting = [request for request in requests if request is not None]
        return AllOf(waiting) if waiting else None

    def test(self) -> bool:
        self._requests = [request for request in self._requests if not request.test()]
        return not self._requests


class Steps:
    """A call of several steps, each of which begins when the one before has ended.

    begins_more: whether a step may be a collective that is yet to begin. The lane then starts no other before the end.
    """

    begins_more = True

    def __init__(self, steps: Iterator[Request | None]):
        self._steps, self._request = steps, None

    @staticmethod
    def of(steps: Iterator[Request | None]) -> Request | None:
        call = Steps(steps)
        return None if call.test() else call

    @staticmethod
    def begun(steps: Iterator[Request]) -> Request:
        """Of one request, which begins now, and of what is done at its end."""
        call = Steps(steps)
        call._request, call.begins_more = next(steps), False
        return call

    def test(self) -> bool:
        while self._request is None or self._request.test():
            try:
                self._request = next(self._steps)
            except StopIteration:
                return True
        return False
