"""A first look at a machine or a cluster: make a process group and run the eleven operations, with their value checks.

    python -m effnn.comm.check                               two processes here, for every backend that is available
    python -m effnn.comm.check ccl                           the same for one backend
    torchrun --nproc-per-node 2 -m effnn.comm.check gloo     as torchrun's ranks, on one machine or several
    mpiexec -n 2 python -m effnn.comm.check mpi4py           as MPI's ranks

Rank 0 prints one line per operation. Exit code 0: every value is right; 1: something failed; 2: no such backend.
torchrun makes 1 of every code but 0, and mpiexec has codes of its own for ranks that were lost.
"""

import argparse
import os
import socket
import sys
import warnings
from collections import Counter
from datetime import timedelta

import torch.distributed as dist

from effnn.base import InvalidInput, NotAvailable
from effnn.comm import backends
from effnn.comm.groups.interfaces import expect_interfaces
from effnn.comm.probing import answers, matrix, operations

SECONDS = 30.0  # until a call that cannot complete is an error; what works takes about one second in all
RANKS = 2  # of a check that starts its processes itself

_TORCHRUN = ("RANK", "WORLD_SIZE")
_STARTERS = (_TORCHRUN, ("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"))
"""Rank and world size, as set by torchrun, by Hydra (Intel MPI, MPICH) and by Open MPI."""

_NOT_OVER_MPI = "groups of torch's own MPI have no store, which this check needs; take mpi4py instead"


def main(arguments: list[str] | None = None) -> int:
    """Check as the command line says; returns the exit code. Raises SystemExit(2) for an unknown backend."""
    parser = argparse.ArgumentParser(
        prog="python -m effnn.comm.check", description="Run the eleven operations over a backend, with value checks."
    )
    parser.add_argument(
        "backend",
        nargs="?",
        choices=backends.BACKENDS,
        help="default: every one that is available here; in torchrun's ranks gloo, in mpiexec's mpi4py",
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


def _check_here(asked: str | None, seconds: float) -> int:
    """Start the ranks on this machine, for one backend or all of them."""
    failed = False
    for name in [asked] if asked else backends.BACKENDS:
        refusal = backends.refusal(name, ranks=RANKS)
        reason = refusal.reason if refusal else _NOT_OVER_MPI if name == "mpi" else None
        if reason is not None:
            print(f"{name}: {reason}", flush=True)
            failed = failed or asked is not None
            continue
        names, device = list(operations.OPERATIONS), backends.DEVICES[name][0]
        limits = {"timeout": 6 * seconds + 30, "group_timeout": seconds}
        found = answers.in_new_processes(name, device, names, RANKS, f"{operations.__name__}:OPERATIONS", **limits)
        print(_heading(name, [socket.gethostname()] * RANKS))
        for operation, answer in found.items():
            _say(operation, answer)
            if not answer.ok:
                failed = True
                break
    return int(failed)


def _say(name: str, answer: answers.Answer) -> None:
    """A line for one operation; after a failure one for each operation that was not run."""
    names = list(operations.OPERATIONS)
    print(f"  {name:16}{answer.sentence}")
    for rest in names[names.index(name) + 1 :] if not answer.ok else ():
        print(f"  {rest:16}not run")
    sys.stdout.flush()


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
        expect_interfaces()
        _check_gpus(backend)
        backends.init_process_group(backend, timeout=timedelta(seconds=seconds))
    except Exception as error:
        clear = isinstance(error, (InvalidInput, NotAvailable))
        words = answers.sentence(error).removeprefix(f"{backend}: ")
        _end_at_once(f"rank {rank}: {backend}: {words}{'' if clear else _where_to_look()}")
    device = answers.rank_device(backends.DEVICES[backend][0])
    board = answers.Board(2 * seconds + 5)
    board.post("host", socket.gethostname())
    if rank == 0:
        print(
            _heading(backend, [host or "a host that does not answer" for host in board.collect("host", board.seconds)]),
            flush=True,
        )
    try:
        well = answers.in_group(list(operations.OPERATIONS), device, operations.OPERATIONS, board, _say)
    except NotAvailable as error:
        board.close()
        _end_at_once("" if rank == 0 else f"rank {rank}: {error}")
    board.close()
    dist.destroy_process_group()
    return int(not well)


def _heading(backend: str, hosts: list[str]) -> str:
    through = f" through {backends.ccl_provider()}" if backend == "ccl" else ""
    places = ", ".join(f"{host} ({count})" for host, count in Counter(hosts).items())
    versions = ", ".join(f"{package} {version}" for package, version in matrix.versions([backend]).items())
    return f"{backend}{through}: {len(hosts)} ranks on {places}; {versions}"


def _check_gpus(backend: str) -> None:
    """Raise NotAvailable where there are fewer GPUs than ranks that need one."""
    here = backends.refusal(backend, ranks=int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if here is not None and here.built:
        raise NotAvailable(here.reason)


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


if __name__ == "__main__":
    sys.exit(main())
