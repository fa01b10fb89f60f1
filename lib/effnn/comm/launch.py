"""Start a function in several real processes, one per rank, and bring back what each returned.

Every rank is a process of its own (launching/worker.py) with a process group of torch.distributed around the call. The
ranks meet through a file in a private folder, so no port is chosen and launches side by side cannot clash. This starts
ranks on one machine, also in several network namespaces of it; across machines the same functions run under torchrun
or mpiexec.

A function should end with its last collective complete on all ranks (a barrier, or a result that needs everyone): a
rank that returns leaves the group at once, and a peer that still waits for it gets a lost connection.
"""

import dataclasses
import math
import os
import pickle
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from effnn.base import EffnnError, InvalidInput, NotAvailable
from effnn.comm.emulation.network import Node
from effnn.comm.groups import mpi
from effnn.comm.launching import worker
from effnn.comm.launching.ranks import POLL, MpiRanks, Output, Ranks
from effnn.comm.launching.worker import Job, Report

LINGER = 5.0  # seconds that a rank has to end once every rank has its result
TERMINATE = 2.0  # seconds between SIGTERM and SIGKILL
CAUSE = 5.0  # seconds in which the end of a rank, of which the others have only heard, must show

PATIENT = {"timeout": 1800.0, "group_timeout": 600.0}
"""Limits of `run_ranks` where times or verdicts come of what the ranks do: they end what hangs, and nothing that a busy
machine slows down."""

STILL_RUNNING = "still running when the time limit ended it"


@dataclass(frozen=True)
class RankResult:
    """What one rank left."""

    rank: int
    result: object = None
    error: str | None = None  # one line
    traceback: str | None = None  # the worker's, in full
    exit_code: int | None = None  # negative for a signal
    finished: float | None = None  # seconds after the start at which it returned, failed or was ended
    stderr: str = ""  # the last 4000 bytes or so
    still_running: bool = False  # when the time limit ended it
    of_communication: bool = False  # the error may come of a peer's end

    @property
    def ok(self) -> bool:
        """Whether the function returned and its result arrived."""
        return self.error is None


class WorkerFailed(EffnnError, RuntimeError):
    """A rank failed. `rank` is the first one by time, `results` holds all of them in rank order.

    A rank that died comes before those that then lost their connection to it.
    """

    def __init__(self, results: Sequence[RankResult]):
        super().__init__(results)
        self.results = tuple(results)
        self.rank = _first_failure(results).rank

    def __str__(self) -> str:
        first = self.results[self.rank]
        others = [f"rank {one.rank}: {one.error}" for one in self.results if not one.ok and one is not first]
        head = f"rank {self.rank} of {len(self.results)} failed after {first.finished:.1f} s: {first.error}"
        return "\n".join([head, (first.traceback or _last_lines(first.stderr)).rstrip(), *others])


class LaunchTimeout(EffnnError, TimeoutError):
    """The time limit passed before every rank had returned. `results` holds all of them in rank order."""

    def __init__(self, results: Sequence[RankResult]):
        super().__init__(results)
        self.results = tuple(results)

    def __str__(self) -> str:
        late = [one for one in self.results if not one.ok]
        return (
            f"rank {', '.join(str(one.rank) for one in late)} of {len(self.results)} still running after "
            f"{late[0].finished:.1f} s: pass a longer timeout, or look for a collective that not every rank calls. "
            f"The last that rank {late[0].rank} wrote to stderr (on being ended, where it was):\n"
            f"{_last_lines(late[0].stderr)}"
        )


def run(fn: Callable | str, world_size: int, backend: str | None = "gloo", **options) -> list:
    """Return what `fn` returned in each rank, in rank order. The options are those of `run_ranks`.

    Raises what `run_ranks` raises, WorkerFailed with the first failing rank's traceback, and LaunchTimeout.
    """
    results = run_ranks(fn, world_size, backend, **options)
    if not all(one.ok for one in results):
        raise LaunchTimeout(results) if _first_failure(results).still_running else WorkerFailed(results)
    return [one.result for one in results]


def run_ranks(
    fn: Callable | str,
    world_size: int,
    backend: str | None = "gloo",
    *,
    args: Sequence = (),
    kwargs: Mapping[str, object] | None = None,
    nodes: Sequence[Node] | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300.0,
    group_timeout: float = 60.0,
    threads: int = 1,
    grace: float = 0.0,
) -> list[RankResult]:
    """Call a function in `world_size` processes; return the `RankResult` of each, in rank order.

    fn: a top-level function of a module, or "package.module:function". It finds its rank in torch.distributed, or in
      RANK and WORLD_SIZE of the environment.
    world_size: number of ranks.
    backend: a name of `effnn.comm.backends`, or None for no process group; "mpi4py" starts the ranks through mpiexec.
    args, kwargs: what the function is called with.
    nodes: the ranks are spread over them in equal consecutive blocks.
    env: more variables for the ranks; they win over those set here.
    timeout: seconds for everything.
    group_timeout: seconds after which a collective that cannot complete is an error.
    threads: torch threads per rank.
    grace: seconds that the others have to end by themselves once a rank has failed. Ranks that still run after that
      are ended, and all of them are where this function raises.

    What a rank prints goes to the log `effnn.comm.launch`, level INFO. Raises InvalidInput for arguments that do not
    fit or cannot be sent to another process, and NotAvailable where there is no mpiexec.
    """
    nodes = None if nodes is None else list(nodes)
    _check(world_size, backend, nodes, timeout, threads)
    job = _job(fn, tuple(args), dict(kwargs or {}), backend, group_timeout)
    started = time.monotonic()
    with _private_folder() as name:
        folder = Path(name)
        (folder / "job").write_bytes(pickle.dumps(job))
        output = Output(folder, world_size)
        ranks = (MpiRanks if backend == "mpi4py" else Ranks)(folder, world_size)
        try:
            ranks.start(nodes, threads, env or {})
            reports = _wait(ranks, output, started, timeout, grace)
        finally:
            ranks.end(TERMINATE)
            output.pass_on(last=True)
        return [_rank_result(rank, reports[rank], ranks, started) for rank in range(world_size)]


def _check(world_size: int, backend: str | None, nodes: list[Node] | None, timeout: float, threads: int) -> None:
    if worker.importing_main:
        raise InvalidInput("a script that launches is imported by its workers: put the call under a main guard")
    if world_size < 1 or threads < 1 or not timeout > 0:
        raise InvalidInput(
            f"world_size, threads and timeout must be positive, got {world_size}, {threads} and {timeout}"
        )
    if nodes is not None and (not nodes or world_size % len(nodes)):
        raise InvalidInput(f"{world_size} ranks do not spread evenly over {len(nodes)} nodes")
    if backend == "mpi4py":
        if nodes is not None:
            raise InvalidInput("nodes are not supported with mpi4py: mpiexec starts its ranks on this machine")
        if (reason := mpi.unavailable()) is not None:
            raise NotAvailable(reason)


def _job(fn: Callable | str, args: tuple, kwargs: dict, backend: str | None, group_timeout: float) -> Job:
    if isinstance(fn, str) and not all(fn.partition(":")):
        raise InvalidInput(f"a function given as text is written package.module:function, got {fn!r}")
    try:
        call = pickle.dumps((fn, args, kwargs))
    except Exception as error:
        raise InvalidInput(
            f"the call cannot be sent to another process ({error}): fn must be a top-level function of a module, no "
            "lambda and no function within a function, and its arguments must be picklable"
        ) from error
    main = None
    if b"__main__" in call:  # a function or an argument is defined in the script that runs
        module = sys.modules["__main__"]
        main = getattr(getattr(module, "__spec__", None), "name", None), getattr(module, "__file__", None)
        if main[1] is None or not os.path.exists(main[1]):
            raise InvalidInput(
                "a function or class defined in a notebook cell or typed at a prompt cannot be found by another "
                "process: put it into a module and import it"
            )
    launcher = (os.getpid(), worker.start_time(os.getpid()))
    return Job(call, main, backend, group_timeout, launcher, tuple(sys.path))


def _private_folder() -> tempfile.TemporaryDirectory:
    """Make a folder that is removed at the end. A launcher that was killed leaves its own; the next start removes it.

    The name tells the owner: a mark of the place where process ids mean what they mean here, for folders that several
    machines or containers share, and the process id with its start time, which tells it from a later one.
    """
    namespace = Path("/proc/self/ns/pid")
    place = f"{platform.node()} {os.readlink(namespace) if namespace.is_symlink() else ''}"
    prefix = f"effnn-launch-{zlib.crc32(place.encode()):08x}-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        owner = re.match(r"(\d+)-(\w+)-", left.name.removeprefix(prefix))
        if owner and worker.start_time(int(owner[1])) != owner[2]:
            shutil.rmtree(left, ignore_errors=True)
    mine = f"{prefix}{os.getpid()}-{worker.start_time(os.getpid())}-"
    return tempfile.TemporaryDirectory(prefix=mine, ignore_cleanup_errors=True)


def _wait(ranks: Ranks, output: Output, started: float, timeout: float, grace: float) -> dict[int, Report]:
    """Watch until every rank has a report or the time is up; those that have none by then get one from here."""
    reports: dict[int, Report] = {}
    died: set[int] = set()
    failed_at, deadline, looked = None, started + timeout, started
    while len(reports) < ranks.size and looked < deadline:
        time.sleep(POLL)
        before, looked = looked, time.monotonic()
        for rank in set(range(ranks.size)) - set(reports):
            code = ranks.exit_code(rank)  # before its report: a rank writes that, then ends
            report = ranks.report(rank)
            if report is None and code is not None:
                # Died in between. The earlier time, as its death may have made the others fail since, not vice versa.
                report = Report(before, error=_death(code))
                died.add(rank)
            if report is not None:
                reports[rank] = report
        output.pass_on()
        failures = [report for report in reports.values() if report.error is not None]
        if failures:
            failed_at = failed_at or looked
            explained = died or not all(report.of_communication for report in failures)
            deadline = min(deadline, failed_at + (grace if explained else max(grace, CAUSE)))
    _date_deaths(reports, died)
    while len(reports) == ranks.size and ranks.running() and time.monotonic() < looked + LINGER:
        time.sleep(POLL)
    failed = [rank for rank in reports if reports[rank].error is not None]
    ended = STILL_RUNNING
    if failed:
        ended = f"ended by the launcher after rank {min(failed, key=lambda rank: reports[rank].time)} failed"
    late = Report(looked, error=ended, still_running=not failed)
    return {rank: reports.get(rank) or late for rank in range(ranks.size)}


def _date_deaths(reports: dict[int, Report], died: Iterable[int]) -> None:
    """Date the ranks that died before the others' loss of connection.

    The system closes the connections of a process before it shows its end, on a busy machine long before.
    """
    lost = min((report.time for report in reports.values() if report.of_communication), default=math.inf)
    for rank in died:
        time_of_death = min(reports[rank].time, math.nextafter(lost, 0.0))
        reports[rank] = dataclasses.replace(reports[rank], time=time_of_death)


def _rank_result(rank: int, report: Report, ranks: Ranks, started: float) -> RankResult:
    result, error, text = None, report.error, report.traceback
    if report.result is not None:
        try:
            result = pickle.loads(report.result)
        except Exception as failure:
            error = f"{type(failure).__name__}: the result cannot be unpickled here: {failure}"
    finished = report.time - started
    return RankResult(
        rank,
        result,
        error,
        text,
        ranks.exit_code(rank),
        finished,
        ranks.stderr(rank),
        report.still_running,
        report.of_communication,
    )


def _death(code: int) -> str:
    if code >= 0:
        return f"exit code {code} without a result"
    names = {number.value: number.name for number in signal.Signals}
    return f"killed by {names.get(-code, f'signal {-code}')}"


def _first_failure(results: Iterable[RankResult]) -> RankResult:
    return min((one for one in results if not one.ok), key=lambda one: one.finished)


def _last_lines(text: str, count: int = 30) -> str:
    return "\n".join(text.rstrip().splitlines()[-count:])
