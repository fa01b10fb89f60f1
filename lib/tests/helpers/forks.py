"""Ranks that start as forks, for tests that are about what ranks do and not about how they start.

A rank that `launch` starts imports torch, which takes longer than what most tests ask of it. With `server` these
ranks are forks of one process that has done so. Ranks below mpiexec or in a network namespace start as ever.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path

from workers import forks

from effnn import paths

RANK = [sys.executable, "-m", "effnn.comm.launching.worker"]


class Forked:
    """A rank's process, with what `launch` uses of subprocess.Popen."""

    def __init__(self, ask, pid: int):
        self._ask, self.pid, self.returncode = ask, pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._ask(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        limit = time.monotonic() + (timeout or 1e9)
        while self.poll() is None:
            if time.monotonic() > limit:
                raise subprocess.TimeoutExpired(RANK, timeout)
            time.sleep(0.02)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, 9)


@contextmanager
def server() -> Iterator[Callable]:
    """Yield what stands in for subprocess.Popen: it forks ranks, and starts everything else."""
    alone, popen = threading.Lock(), subprocess.Popen
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(paths.LIB), str(paths.TESTS)])}
    with connection.Listener(family="AF_UNIX") as listener:
        process = popen([sys.executable, str(Path(forks.__file__)), listener.address], env=environment)
        line = listener.accept()

    def ask(request: object) -> int | None:
        with alone:
            line.send(request)
            return line.recv()

    def start(command, *arguments, **options):
        if list(command)[:-1] != RANK:
            return popen(command, *arguments, **options)
        out, err = (options[name].name for name in ("stdout", "stderr"))
        return Forked(ask, ask((command[-1], dict(options["env"]), out, err, os.sched_getaffinity(0))))

    yield start
    line.close()
    process.wait()
