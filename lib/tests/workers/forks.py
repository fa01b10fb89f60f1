"""Starts ranks as forks of a process that has imported torch once; see helpers/forks.py.

python forks.py SOCKET, and then requests of two kinds: the arguments of `start`, or the number of a process, which is
answered with its exit code, None as long as it runs.
"""

import atexit
import os
import sys
from multiprocessing.connection import Client
from pathlib import Path

from effnn.comm import backends  # noqa: F401 (here, once, so that no rank needs to)
from effnn.comm.launching import worker


def main(address: str) -> None:
    codes: dict[int, int | None] = {}
    line = Client(address, "AF_UNIX")
    while True:
        try:
            request = line.recv()
        except EOFError:
            return
        if isinstance(request, int):
            if codes[request] is None:
                pid, status = os.waitpid(request, os.WNOHANG)
                codes[request] = os.waitstatus_to_exitcode(status) if pid else None
            line.send(codes[request])
        elif pid := os.fork():
            codes[pid] = None
            line.send(pid)
        else:
            line.close()
            start(*request)
            atexit._run_exitfuncs()
            os._exit(0)  # as multiprocessing ends its forks; Python's own end waits for what the fork does not have


def start(folder: str, variables: dict[str, str], out: str, err: str, cores: set[int]) -> None:
    """Become the rank that `python -m effnn.comm.launching.worker FOLDER` would be."""
    os.setsid()
    os.sched_setaffinity(0, cores)
    os.environ.clear()
    os.environ.update(variables)
    for number, path in ((0, os.devnull), (1, out), (2, err)):
        file = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    worker.main(Path(folder))


if __name__ == "__main__":
    main(sys.argv[1])
