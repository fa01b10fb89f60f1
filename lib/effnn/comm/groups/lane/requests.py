"""Requests made of requests: several at once, and several one after another."""

from collections.abc import Iterator

from effnn.comm.groups.lane.lane import Request


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
