"""How oneCCL waits for its peers: actively while every rank has a core of its own, asleep where ranks share cores.

Left to itself the binding waits actively: the calling thread asks the network again and again until the call has ended.
That is the fastest way on a core of one's own. With more ranks than cores it takes the core from the very rank that it
waits for, until the scheduler ends the time slice; a call then takes milliseconds, whatever its size and algorithm.
There the library's worker thread does the work instead (CCL_WORKER_OFFLOAD=1), and both threads sleep for some
50 microseconds whenever nothing has arrived (CCL_YIELD=sleep), the worker until the next call when there is none
(CCL_WORKER_WAIT=1). Algorithms and results are the same either way, so the ranks need not agree on it.

The library reads its environment once in a process, at the first id or communicator. So what counts is how many ranks
of the whole job share this machine, and not how many of them are in that first group.
"""

import os
import platform
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path

LOCAL_RANKS = "EFFNN_LOCAL_RANKS"
"""The user's word on how many ranks are on this machine."""

LAUNCHERS = (
    ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"),  # torchrun
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),  # Intel MPI, MPICH
    (
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_NTASKS_PER_NODE", "SLURM_LOCALID"),
)
"""Variables of each launcher: ranks of the job, rank, ranks on this machine, rank among those."""

_CGROUPS = Path("/sys/fs/cgroup")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Place:
    """Where a rank is among the ranks of its machine."""

    index: int
    ranks: int


ALONE = Place(0, 1)


def host() -> str:
    """What the ranks of one machine, or of one container, have in common and no others: name and start of the system.

    The name alone may be that of several machines, the start that of several containers.
    """
    return f"{platform.node()} {_BOOT.read_text().strip() if _BOOT.exists() else ''}"


def place(
    rank: int,
    hosts: Sequence[str],
    world_rank: int,
    world_size: int,
    user: Mapping[str, str],
) -> Place:
    """Where this rank is on its machine.

    rank: in the group that is being made.
    hosts: `host()` of each rank of that group.
    world_rank, world_size: in the whole job.
    user: the environment. A launcher counts where it has started this very job: a task of Slurm that starts ranks of
      its own has variables that are about the task.

    Ranks that are not in the group, and of which no launcher tells, are taken to be on this machine.
    """
    mine = [other for other, name in enumerate(hosts) if name == hosts[rank]]
    whole = len(hosts) == world_size
    found = Place(mine.index(rank) if whole else world_rank, len(mine) + world_size - len(hosts))
    for launcher in LAUNCHERS:
        size, number, ranks, index = (_number(name, user) for name in launcher)
        if (size, number) == (world_size, world_rank) and ranks is not None:
            found = Place(found.index if index is None else index, max(ranks, len(mine)))
            break
    told_by_user = _number(LOCAL_RANKS, user)
    return found if told_by_user is None else Place(found.index, told_by_user)


def variables(here: Place, allowed: Set[int], cores: int, user: Mapping[str, str]) -> dict[str, str]:
    """What the library has to be told so that it waits the right way.

    here: the place of this rank on its machine.
    allowed: cores that this process may run on.
    cores: how many the ranks of this machine have together.
    user: the environment; a variable that it has is not among the answers, and one that decides about worker threads
      leaves all to the user.
    """
    if here.ranks <= cores:
        return _new({"CCL_WORKER_OFFLOAD": "0"}, user)
    if "CCL_WORKER_OFFLOAD" in user:
        return {}
    wanted = {"CCL_WORKER_OFFLOAD": "1", "CCL_WORKER_WAIT": "1", "CCL_YIELD": "sleep"}
    if not {"CCL_WORKER_COUNT", "CCL_WORKER_AFFINITY", "CCL_LOCAL_RANK", "CCL_LOCAL_SIZE"} & set(user):
        # The library ties the worker to one core. It takes the machine's last ones, allowed or not; here each process
        # names a core of its own choice, which the library takes if the process is said to be the only one.
        core = sorted(allowed)[here.index % len(allowed)]
        wanted |= {"CCL_LOCAL_RANK": "0", "CCL_LOCAL_SIZE": "1", "CCL_WORKER_AFFINITY": str(core)}
    return _new(wanted, user)


@contextmanager
def told(here: Place) -> Iterator[None]:
    """Around the call in which the library reads its environment: those variables are set in it, and gone after it.

    Programs that this process starts must not take them for the user's.
    """
    linux = hasattr(os, "sched_getaffinity")  # as is the library
    wanted = variables(here, os.sched_getaffinity(0), available_cores(), os.environ) if linux else {}
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


def _number(name: str, variables: Mapping[str, str]) -> int | None:
    return int(variables[name]) if variables.get(name, "").isdecimal() else None


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
