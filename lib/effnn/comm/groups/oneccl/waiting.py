"""How oneCCL waits for its peers: actively while every rank has a core of its own, asleep where ranks share cores.

Left to itself the binding waits actively: the calling thread asks the network again and again until the call has ended.
That is the fastest way on a core of one's own. With more ranks than cores it takes the core from the very rank that it
waits for, until the scheduler ends the time slice; a call then takes milliseconds, whatever its size and algorithm.
There the library's worker thread does the work instead (CCL_WORKER_OFFLOAD=1), and both threads sleep for some
50 microseconds whenever nothing has arrived (CCL_YIELD=sleep), the worker until the next call when there is none
(CCL_WORKER_WAIT=1). Algorithms and results are the same either way, so the ranks need not agree on it.

The library reads its environment once in a process, at the first id or communicator.
"""

import os
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from math import ceil
from pathlib import Path

LOCAL_RANKS = (
    "EFFNN_LOCAL_RANKS",
    "LOCAL_WORLD_SIZE",  # torchrun
    "MPI_LOCALNRANKS",  # Intel MPI, MPICH
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "SLURM_NTASKS_PER_NODE",
)
"""Variables that tell how many ranks of the job are on this machine; the first that is set to a number counts."""

_LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")

_CGROUPS = Path("/sys/fs/cgroup")


def variables(rank: int, size: int, allowed: Set[int], cores: int, user: Mapping[str, str]) -> dict[str, str]:
    """What the library has to be told so that it waits the right way.

    rank, size: of the first group, for launchers that do not tell the place on this machine.
    allowed: cores that this process may run on.
    cores: how many the ranks of this machine have together.
    user: the environment; a variable that it has is not among the answers, and one that decides about worker threads
      leaves all to the user.
    """
    if not _crowded(size, cores, user):
        return _new({"CCL_WORKER_OFFLOAD": "0"}, user)
    if "CCL_WORKER_OFFLOAD" in user:
        return {}
    wanted = {"CCL_WORKER_OFFLOAD": "1", "CCL_WORKER_WAIT": "1", "CCL_YIELD": "sleep"}
    if not {"CCL_WORKER_COUNT", "CCL_WORKER_AFFINITY", "CCL_LOCAL_RANK", "CCL_LOCAL_SIZE"} & set(user):
        # The library ties the worker to one core. It takes the machine's last ones, allowed or not; here each process
        # names a core of its own choice, which the library takes if the process is said to be the only one.
        place = _number(_LOCAL_RANK, user)
        core = sorted(allowed)[(rank if place is None else place) % len(allowed)]
        wanted |= {"CCL_LOCAL_RANK": "0", "CCL_LOCAL_SIZE": "1", "CCL_WORKER_AFFINITY": str(core)}
    return _new(wanted, user)


@contextmanager
def told(rank: int, size: int) -> Iterator[None]:
    """Around the call in which the library reads its environment: those variables are set in it, and gone after it.

    Programs that this process starts must not take them for the user's.
    """
    linux = hasattr(os, "sched_getaffinity")  # as is the library
    wanted = variables(rank, size, os.sched_getaffinity(0), available_cores(), os.environ) if linux else {}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted:
            os.environ.pop(name, None)


def is_worker(thread: int) -> bool:
    """Whether a thread that making a group has added is a worker of the library: they alone are tied to one core."""
    try:
        return len(os.sched_getaffinity(thread)) == 1
    except OSError:  # it has ended
        return False


def available_cores() -> int:
    """Cores that this process and its siblings may use: by affinity, and by the quota of a container."""
    cores = set(os.sched_getaffinity(0))
    try:
        # A launcher may give each rank cores of its own; what it has itself is what its ranks have together.
        cores |= os.sched_getaffinity(os.getppid())
    except OSError:  # another user's process, or none
        pass
    quota = _quota()
    return len(cores) if quota is None else max(1, min(len(cores), ceil(quota)))


def _crowded(size: int, cores: int, user: Mapping[str, str]) -> bool:
    here = _number(LOCAL_RANKS, user)
    return (size if here is None else here) > cores


def _number(names: tuple[str, ...], variables: Mapping[str, str]) -> int | None:
    return next((int(variables[name]) for name in names if variables.get(name, "").isdecimal()), None)


def _new(wanted: dict[str, str], user: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in wanted.items() if name not in user}


def _quota(root: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that the control groups of this process grant, the least of them; None without a limit."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return None
    limits = []
    for _, controllers, path in lines:
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "cpu" if controllers else root  # version 1 has a tree per controller, version 2 one for all
        inside = base / path.lstrip("/")
        for folder in (inside, *inside.parents):
            limits.append(_limit(folder))
            if folder == base:
                break
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # no such file; "max" or -1 where there is no limit
        return None
