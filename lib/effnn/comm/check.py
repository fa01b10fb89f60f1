"""A first look at a machine or a cluster: make a process group and run the eleven operations, with their value checks.

    python -m effnn.comm.check                               two processes here, for every backend that can be had
    python -m effnn.comm.check ccl                           the same for one backend
    torchrun --nproc-per-node 2 -m effnn.comm.check gloo     as torchrun's ranks, on one machine or several
    mpiexec -n 2 python -m effnn.comm.check mpi4py           as MPI's ranks

Rank 0 prints one line an operation. Exit code 0: every value is right; 1: something failed; 2: no such backend.
torchrun makes 1 of every code but 0, and mpiexec has codes of its own for ranks that were lost.
"""

import argparse
import json
import os
import re
import socket
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from effnn.base import EffnnError, InvalidInput, NotAvailable
from effnn.comm import backends, launch
from effnn.comm.probing import matrix, operations

SECONDS = 30.0  # until a call that cannot complete is an error; what works takes about one second in all
RANKS = 2  # of a check that starts its processes itself
_LAST_WAIT = 2.0  # seconds, at the end of a check, for ranks that have answered until then

_TORCHRUN = ("RANK", "WORLD_SIZE")
_STARTERS = (_TORCHRUN, ("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))
"""Rank and world size, as set by torchrun, by Hydra (Intel MPI, MPICH) and by Open MPI."""

_NOT_OVER_MPI = "groups of torch's own MPI have no store, which this check needs; take mpi4py instead"

OK = "ok"
NO_ANSWER = "no answer: the process has ended or is stuck"


def main(arguments: list[str] | None = None) -> int:
    """Check as the command line says; returns the exit code. Raises SystemExit(2) for an unknown backend."""
    parser = argparse.ArgumentParser(
        prog="python -m effnn.comm.check", description="Run the eleven operations over a backend, with value checks."
    )
    parser.add_argument(
        "backend",
        nargs="?",
        choices=backends.BACKENDS,
        help="default: every one that can be had here; in torchrun's ranks gloo, in mpiexec's mpi4py",
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="until a call that cannot complete is an error (default: 30)"
    )
    asked = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")  # names that its next release drops
    starter = next((names for names in _STARTERS if all(name in os.environ for name in names)), None)
    if starter is None:
        return _check_here(asked.backend, asked.seconds)
    return _check_as_rank(asked.backend or ("gloo" if starter is _TORCHRUN else "mpi4py"), asked.seconds, starter)


def check_group(seconds: float, say: Callable[[str], None]) -> bool:
    """In every rank of the default group: run the operations; rank 0 says a line for each. True if all went well.

    After the first failure ranks may be out of step, so the operations behind it are not run. Raises NotAvailable where
    a rank no longer answers: leave the process at once then, as leaving the group could wait for that rank.
    """
    say = say if dist.get_rank() == 0 else _nothing
    board = _Board(2 * seconds + 5)
    say(_heading(board.collect("host", socket.gethostname())))
    names, device = list(operations.OPERATIONS), _device(dist.get_backend())
    for position, name in enumerate(names):
        words = board.collect(name, _attempt(name, device))
        wrong = _first_wrong(words)
        say(f"  {name:16}{wrong or OK}")
        if wrong:
            for rest in names[position + 1 :]:
                say(f"  {rest:16}not run")
            board.close()
            if NO_ANSWER in words:
                raise NotAvailable(f"{name}: {wrong}")
            return False
    board.close()
    return True


def in_launch(seconds: float) -> tuple[bool, list[str]]:
    """`check_group` for `effnn.comm.launch`: returns whether all went well, and what rank 0 has to say."""
    lines: list[str] = []
    try:
        return check_group(seconds, lines.append), lines
    except NotAvailable:
        return False, lines


def _check_here(asked: str | None, seconds: float) -> int:
    """Start the ranks on this machine, for one backend or all of them."""
    failed = False
    for name in [asked] if asked else backends.BACKENDS:
        reason = backends.unavailable(name) or _not_startable(name)
        if reason is not None:
            print(f"{name}: {reason}", flush=True)
            failed = failed or asked is not None
            continue
        outcomes = launch.run_outcomes(
            "effnn.comm.check:in_launch",
            RANKS,
            name,
            args=(seconds,),
            timeout=6 * seconds + 30,
            group_timeout=seconds,
            grace=3 * seconds + 10,
        )
        well, lines = outcomes[0].result if outcomes[0].ok else (False, [])
        print(*lines or [f"{name}: no check was made"], sep="\n")
        if not all(outcome.ok for outcome in outcomes):
            first = outcomes[launch.WorkerFailed(outcomes).rank]
            print(f"  rank {first.rank}: {first.error}")
            well = False
        sys.stdout.flush()
        failed = failed or not well
    return int(failed)


def _check_as_rank(backend: str, seconds: float, starter: tuple[str, str]) -> int:
    """Be one of the ranks that torchrun or mpiexec has started."""
    rank, size = (int(os.environ[name]) for name in starter)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    try:
        if size < 2:
            raise InvalidInput("a check needs at least two ranks; ask torchrun or mpiexec for more")
        if backend == "mpi":
            raise NotAvailable(_NOT_OVER_MPI)
        if starter is not _TORCHRUN and backend != "mpi4py" and "MASTER_ADDR" not in os.environ:
            raise InvalidInput(
                "mpiexec does not say where rank 0 is: add -genv MASTER_ADDR <its host> -genv MASTER_PORT 29500, or "
                "start with torchrun"
            )
        _device(backend)
        _check_interfaces()
        backends.init_process_group(backend, timeout=timedelta(seconds=seconds))
    except Exception as error:
        clear = isinstance(error, (InvalidInput, NotAvailable))
        words = _sentence(error).removeprefix(f"{backend}: ")
        _end_at_once(f"rank {rank}: {backend}: {words}{'' if clear else _where_to_look()}")
    try:
        well = check_group(seconds, lambda line: print(line, flush=True))
    except NotAvailable as error:
        _end_at_once("" if rank == 0 else f"rank {rank}: {error}")
    dist.destroy_process_group()
    return int(not well)


class _Board:
    """What each rank says to each step, through the store that the group met in: it needs no collective to work."""

    def __init__(self, seconds: float):
        self._store = dist.PrefixStore("effnn-check", dist.distributed_c10d._get_default_store())
        self._rank, self._size, self._seconds = dist.get_rank(), dist.get_world_size(), seconds
        self._silent: set[int] = set()

    def collect(self, step: str, word: str) -> list[str]:
        """Return every rank's word, the same list on all ranks; NO_ANSWER for those that have not come in time."""
        if self._rank == 0:
            limit = time.monotonic() + self._seconds
            words = [word, *(self._read(f"{step}/{rank}", limit) or NO_ANSWER for rank in range(1, self._size))]
            self._silent = {rank for rank, given in enumerate(words) if given == NO_ANSWER}
            self._store.set(f"{step}/all", json.dumps(words))
            return words
        self._store.set(f"{step}/{self._rank}", word)
        words = self._read(f"{step}/all", time.monotonic() + 2 * self._seconds)  # rank 0 may wait for others first
        return [NO_ANSWER] if words is None else json.loads(words)

    def close(self) -> None:
        """Wait until rank 0 has said everything, and rank 0, which may serve the store, until the others have heard.

        torchrun ends all ranks as soon as one has ended with an error.
        """
        if self._rank == 0:
            self._store.set("said", "")
            for rank in range(1, self._size):
                self._read(f"heard/{rank}", time.monotonic() + (0 if rank in self._silent else _LAST_WAIT))
        else:
            self._read("said", time.monotonic() + self._seconds)
            self._store.set(f"heard/{self._rank}", "")

    def _read(self, key: str, limit: float) -> str | None:
        pause = 1e-3  # the store's own wait would report a time-out on stderr
        try:
            while not self._store.check([key]):
                if time.monotonic() > limit:
                    return None
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
            return self._store.get(key).decode()
        except RuntimeError:  # the process that serves the store is gone
            return None


def _first_wrong(words: list[str]) -> str | None:
    """The rank that no longer answers, else the first that failed, and how many more there are; None if all is well."""
    wrong = [rank for rank, word in enumerate(words) if word != OK]
    if not wrong:
        return None
    rank = words.index(NO_ANSWER) if NO_ANSWER in words else wrong[0]
    more = f" ({len(wrong) - 1} more of {len(words)} ranks failed)" if wrong[1:] else ""
    return f"rank {rank}: {words[rank]}{more}"


def _attempt(name: str, device: torch.device) -> str:
    try:
        operations.OPERATIONS[name](device)
        return OK
    except operations.WrongResult as error:
        return f"wrong result: {error}"
    except Exception as error:
        return _sentence(error)


def _heading(hosts: list[str]) -> str:
    backend = dist.get_backend()
    through = f" through {backends.ccl_provider()}" if backend == "ccl" else ""
    places = ", ".join(f"{host} ({count})" for host, count in Counter(hosts).items())
    versions = ", ".join(f"{package} {version}" for package, version in matrix.versions([backend]).items())
    return f"{backend}{through}: {len(hosts)} ranks on {places}; {versions}"


def _device(backend: str) -> torch.device:
    """Where a rank's tensors are. Raises NotAvailable where there are fewer GPUs than ranks that need one."""
    if backend != "nccl":
        return torch.device("cpu")
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= gpus:
        raise NotAvailable(f"nccl wants a GPU for each rank of a machine; this one has {gpus}")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _check_interfaces() -> None:
    here = [name for _, name in socket.if_nameindex()]
    for variable in ("EFFNN_INTERFACE", "GLOO_SOCKET_IFNAME"):
        for name in filter(None, os.environ.get(variable, "").split(",")):
            if name not in here:
                raise InvalidInput(f"{variable} names {name}; the network interfaces of this host: {', '.join(here)}")


def _not_startable(backend: str) -> str | None:
    if backend == "mpi":
        return _NOT_OVER_MPI
    if backend == "nccl" and torch.cuda.device_count() < RANKS:
        return f"nccl wants a GPU for each of {RANKS} ranks; this machine has {torch.cuda.device_count()}"
    return None


def _sentence(error: Exception) -> str:
    """The first line of an error, without the places in C++ files that it came from."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    text = re.sub(r"\[[^][]*\.(cc|cpp|h|hpp):\d+\]\s*", "", text)[:300]
    return text if isinstance(error, EffnnError) else f"{type(error).__name__}: {text}"


def _where_to_look() -> str:
    address, interface = (os.environ.get(name) or "not set" for name in ("MASTER_ADDR", "GLOO_SOCKET_IFNAME"))
    return (
        f" (is MASTER_ADDR, {address}, an address of rank 0 that all machines reach, and is the network interface "
        f"between them named in GLOO_SOCKET_IFNAME, {interface}?)"
    )


def _end_at_once(message: str) -> None:
    """Leave without the group's own end, which could wait for ranks that are gone."""
    if message:
        sys.stderr.write(f"{message}\n")  # at once, as other ranks write there too
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _nothing(line: str) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
