"""Ranks that stay: a start costs seconds, more than most of what the tests ask of them.

`ask` is `launch.run` over ranks that earlier tests have started. A function that fails ends its ranks, and the next
call starts new ones, so no test meets what another has broken. A test that needs variables, a time-out of its own or
a group that nobody has used before calls `launch.run`.
"""

import pickle
import threading
from contextlib import suppress
from multiprocessing import connection

from effnn.comm import launch

MOST = 3  # crews alive; ranks that wait take memory
GROUP_TIMEOUT = 30.0

_crews: dict[tuple[int, str], "Crew"] = {}


class Crew:
    """One launch whose ranks do what they are asked until they are let go or one of them fails."""

    def __init__(self, size: int, backend: str):
        self._failure: BaseException | None = None
        self._ranks: dict[int, connection.Connection] = {}
        with connection.Listener(family="AF_UNIX", backlog=size) as listener:
            arguments = size, backend, listener.address
            self._launch = threading.Thread(target=self._run, args=arguments, daemon=True)
            self._launch.start()
            try:
                while len(self._ranks) < size:
                    rank = listener.accept()
                    self._ranks[rank.recv()] = rank
            except EOFError:
                self.close()
                raise self._failure from None

    def _run(self, size: int, backend: str, address: str) -> None:
        options = {"timeout": 3600, "group_timeout": GROUP_TIMEOUT, "grace": 5}
        try:
            launch.run("workers.crew:serve", size, backend, args=(address,), **options)
        except BaseException as failure:
            self._failure = failure
            with suppress(OSError), connection.Client(address, "AF_UNIX"):
                pass  # in place of a rank that will not come

    def ask(self, function, args: tuple, timeout: float) -> list:
        """Return the ranks' results in rank order; raises what `launch.run` raises."""
        try:
            for rank in self._ranks.values():
                rank.send_bytes(pickle.dumps((function, args)))
            left, results = dict(self._ranks), {}
            while left:
                ready = connection.wait(left.values(), timeout)
                if not ready:
                    raise TimeoutError("the ranks did not answer in time")
                for number in [number for number, rank in left.items() if rank in ready]:
                    results[number] = pickle.loads(left.pop(number).recv_bytes())
        except BaseException as failure:
            self.close()
            raise self._failure or failure from None
        return [results[number] for number in sorted(results)]

    def close(self) -> None:
        """Cut the ranks' lines: those that wait end, and those that still work say where they are and fail."""
        for rank in self._ranks.values():
            rank.close()
        self._launch.join()


def ask(function, size: int, backend: str, *args, timeout: float = 120) -> list:
    """Call function(*args) in `size` ranks that a group of `backend` joins; returns the results in rank order.

    timeout: seconds in which at least one rank must answer.
    """
    crew = _crews.pop((size, backend), None) or Crew(size, backend)
    results = crew.ask(function, args, timeout)  # a crew that fails is not kept
    _crews[size, backend] = crew
    if len(_crews) > MOST:
        _crews.pop(next(iter(_crews))).close()  # the one that was not asked for longest
    return results


def let_go() -> None:
    """End all ranks."""
    while _crews:
        _crews.popitem()[1].close()
