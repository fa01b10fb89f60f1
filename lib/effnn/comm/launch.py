"""Start a function in several real processes, one a rank, and bring back what each returned.

Every rank is a process of its own (`effnn.comm.worker`) with a process group of torch.distributed around the call. The
ranks meet through a file in a private folder, so no port is chosen and launches side by side cannot clash. This starts
ranks on one machine, also in several network namespaces of it; across machines the same functions run under torchrun
or mpiexec.

A function should end with its last collective complete on all ranks (a barrier, or a result that needs everyone): a
rank that returns leaves the group at once, and a peer that still waits for it gets a lost connection.
"""

import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from effnn.base import EffnnError, InvalidInput, NotAvailable
from effnn.comm import mpi, worker
from effnn.comm.interfaces import loopback
from effnn.comm.network import Node
from effnn.comm.worker import Job, Report

logger = logging.getLogger(__name__)

POLL = 0.05  # seconds between two looks at the ranks: short against their start (a second), free of charge to them
LINGER = 5.0  # seconds that a rank has to end once every rank has its result
TERMINATE = 2.0  # seconds between SIGTERM and SIGKILL
STDERR_TAIL = 4000  # bytes

STILL_RUNNING = "still running when the time limit ended it"
NOT_INHERITED = {"RANK", "LOCAL_RANK", "MASTER_PORT", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE"}
NOT_INHERITED_PREFIXES = ("TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_")
"""What an outer torchrun or mpiexec has set for its own ranks."""


@dataclass(frozen=True)
class Outcome:
    """What one rank left."""

    rank: int
    result: object = None
    error: str | None = None  # one line
    traceback: str | None = None  # the worker's, in full
    exit_code: int | None = None  # negative for a signal
    finished: float | None = None  # seconds after the start at which it returned, failed or was ended
    stderr: str = ""  # the last 4000 bytes or so

    @property
    def ok(self) -> bool:
        """Whether the function returned and its result arrived."""
        return self.error is None


class WorkerFailed(EffnnError, RuntimeError):
    """A rank failed. `rank` is the first one by time, `outcomes` holds all of them in rank order."""

    def __init__(self, outcomes: Sequence[Outcome]):
        super().__init__(outcomes)
        self.outcomes = tuple(outcomes)
        self.rank = _first_failure(outcomes).rank

    def __str__(self) -> str:
        first = self.outcomes[self.rank]
        others = [f"rank {one.rank}: {one.error}" for one in self.outcomes if not one.ok and one is not first]
        head = f"rank {self.rank} of {len(self.outcomes)} failed after {first.finished:.1f} s: {first.error}"
        return "\n".join([head, (first.traceback or _last_lines(first.stderr)).rstrip(), *others])


class LaunchTimeout(EffnnError, TimeoutError):
    """The time limit passed before every rank had returned. `outcomes` holds all of them in rank order."""

    def __init__(self, outcomes: Sequence[Outcome]):
        super().__init__(outcomes)
        self.outcomes = tuple(outcomes)

    def __str__(self) -> str:
        late = [one for one in self.outcomes if not one.ok]
        return (
            f"rank {', '.join(str(one.rank) for one in late)} of {len(self.outcomes)} still running after "
            f"{late[0].finished:.1f} s: pass a longer timeout, or look for a collective that not every rank calls. "
            f"The last that rank {late[0].rank} wrote to stderr (on being ended, where it was):\n"
            f"{_last_lines(late[0].stderr)}"
        )


def run(fn: Callable | str, world_size: int, backend: str | None = "gloo", **options) -> list:
    """Return what `fn` returned in each rank, in rank order. The options are those of `run_outcomes`.

    Raises what `run_outcomes` raises, WorkerFailed with the first failing rank's traceback, and LaunchTimeout.
    """
    outcomes = run_outcomes(fn, world_size, backend, **options)
    if not all(one.ok for one in outcomes):
        raise LaunchTimeout(outcomes) if _first_failure(outcomes).error == STILL_RUNNING else WorkerFailed(outcomes)
    return [one.result for one in outcomes]


def run_outcomes(
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
) -> list[Outcome]:
    """Call fn(*args, **kwargs) in `world_size` processes; return the outcome of each, in rank order.

    fn: a top-level function of a module, or "package.module:function". It finds its rank in torch.distributed, or in
    RANK and WORLD_SIZE of the environment. backend: a name of `effnn.comm.backends`, or None for no process group;
    "mpi4py" starts the ranks through mpiexec. nodes: the ranks are spread over them in equal consecutive blocks. env:
    more variables for the ranks; they win over those set here. timeout: seconds for everything. group_timeout: seconds
    after which a collective that cannot complete is an error. threads: torch threads of a rank. grace: seconds that
    the others have to end by themselves once a rank has failed; the rest is ended, and so are all when this raises.

    What a rank prints goes to the log `effnn.comm.launch`, level INFO. Raises InvalidInput for arguments that do not
    fit or cannot be sent to another process, and NotAvailable where there is no mpiexec.
    """
    nodes = None if nodes is None else list(nodes)
    _check(world_size, backend, nodes, timeout, threads)
    job = _job(fn, tuple(args), dict(kwargs or {}), backend, group_timeout)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="effnn-launch-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "job").write_bytes(pickle.dumps(job))
        output = _Output(folder, world_size)
        ranks = (_MpiRanks if backend == "mpi4py" else _Ranks)(folder, world_size)
        try:
            ranks.start(nodes, threads, env or {})
            reports = _wait(ranks, output, started, timeout, grace)
        finally:
            ranks.end()
            output.pass_on(last=True)
        return [_outcome(rank, reports[rank], ranks, started) for rank in range(world_size)]


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


def _environment(rank: int | None, size: int, nodes: list[Node] | None, threads: int, env: Mapping) -> dict[str, str]:
    """Variables of one rank; with rank None those that hold for every rank (mpiexec hands out the ranks itself)."""
    result = {
        name: value
        for name, value in os.environ.items()
        if name not in NOT_INHERITED and not name.startswith(NOT_INHERITED_PREFIXES)
    }
    per_node = size // len(nodes or [None])
    node = None if nodes is None else nodes[rank // per_node]
    here = str(Path(__file__).resolve().parents[2])  # effnn must be found before the job, with its sys.path, is read
    result |= {
        "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])),
        "MASTER_ADDR": nodes[0].address if nodes else "127.0.0.1",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(per_node),
        "GROUP_RANK": str((rank or 0) // per_node),
        "GLOO_SOCKET_IFNAME": node.interface if node else loopback(),
        "EFFNN_INTERFACE": node.interface if node else loopback(),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # ranks share cores: one that waits must not spin
    }
    if rank is not None:
        result |= {"RANK": str(rank), "LOCAL_RANK": str(rank % per_node)}
    return result | {name: str(value) for name, value in env.items()}


def _wait(ranks: "_Ranks", output: "_Output", started: float, timeout: float, grace: float) -> dict[int, Report]:
    """Watch until every rank has a report or the time is up; those that have none by then get one from here."""
    reports: dict[int, Report] = {}
    first_failure, deadline, looked = None, started + timeout, started
    while len(reports) < ranks.size and looked < deadline:
        time.sleep(POLL)
        before, looked = looked, time.monotonic()
        for rank in set(range(ranks.size)) - set(reports):
            code = ranks.exit_code(rank)  # before its report: a rank writes that, then ends
            report = ranks.report(rank)
            if report is None and code is not None:
                # Died in between. The earlier time, as its death may have made the others fail since, not vice versa.
                report = Report(before, error=_death(code))
            if report is not None:
                reports[rank] = report
        output.pass_on()
        failures = [rank for rank in reports if reports[rank].error is not None]
        if failures and first_failure is None:
            first_failure = min(failures, key=lambda rank: reports[rank].time)
            deadline = min(deadline, looked + grace)
    while len(reports) == ranks.size and ranks.running() and time.monotonic() < looked + LINGER:
        time.sleep(POLL)
    ended = STILL_RUNNING if first_failure is None else f"ended by the launcher after rank {first_failure} failed"
    return {rank: reports.get(rank) or Report(looked, error=ended) for rank in range(ranks.size)}


class _Ranks:
    """The processes of a launch: each rank leads a process group, so that its own children end with it."""

    def __init__(self, folder: Path, size: int):
        self._folder, self.size = folder, size
        self._command = [sys.executable, "-m", "effnn.comm.worker", str(folder)]
        self._processes: list[subprocess.Popen] = []
        self._started = 0

    def start(self, nodes: list[Node] | None, threads: int, env: Mapping[str, str]) -> None:
        for rank in range(self.size):
            prefix = nodes[rank * len(nodes) // self.size].prefix if nodes else ()
            self._open([*prefix, *self._command], _environment(rank, self.size, nodes, threads, env), f"-{rank}")
            self._started = rank + 1

    def _open(self, command: list[str], environment: dict[str, str], suffix: str) -> None:
        with open(self._folder / f"stdout{suffix}", "wb") as out, open(self._folder / f"stderr{suffix}", "wb") as err:
            self._processes.append(
                subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
                )
            )

    def report(self, rank: int) -> Report | None:
        """What the rank has written, None as long as it has not."""
        path = self._folder / f"report-{rank}"
        return pickle.loads(path.read_bytes()) if path.exists() else None

    def stderr(self, rank: int) -> str:
        return _tail(self._folder / f"stderr-{rank}")

    def exit_code(self, rank: int) -> int | None:
        """None while the rank runs. Children that it leaves behind are ended."""
        process = self._processes[rank]
        if process.returncode is None and process.poll() is not None:
            self._signal(rank, signal.SIGKILL)
        return process.returncode

    def running(self) -> list[int]:
        return [rank for rank in range(self._started) if self.exit_code(rank) is None]

    def end(self) -> None:
        """End whatever runs: SIGTERM, a short wait, SIGKILL."""
        try:
            for rank in self.running():
                self._signal(rank, signal.SIGTERM)
            limit = time.monotonic() + TERMINATE
            while self.running() and time.monotonic() < limit:
                time.sleep(POLL)
        finally:  # also when the wait is interrupted
            for rank in self.running():
                self._signal(rank, signal.SIGKILL)
            for process in self._processes:
                try:
                    process.wait(TERMINATE)
                except subprocess.TimeoutExpired:
                    process.kill()

    def _group(self, rank: int) -> int:
        return self._processes[rank].pid

    def _signal(self, rank: int, number: signal.Signals) -> None:
        try:
            os.killpg(self._group(rank), number)
        except (ProcessLookupError, PermissionError):  # nobody is left in it (macOS says permission)
            pass


class _MpiRanks(_Ranks):
    """The ranks below one mpiexec. A shell around each leaves its process group and its exit code in the folder."""

    # The trap keeps the shell alive on SIGTERM, so that it can write what became of the rank.
    SHELL = (
        'trap : TERM; rank=${PMI_RANK:-$OMPI_COMM_WORLD_RANK}; echo $$ >"$0/group-$rank"; '
        '"$@" >"$0/stdout-$rank" 2>"$0/stderr-$rank"; echo $? >"$0/exit-$rank"'
    )

    def start(self, nodes: None, threads: int, env: Mapping[str, str]) -> None:
        program = str(mpi.launcher())
        # Hydra (Intel MPI, MPICH) kills all ranks when one dies, unless told not to: they must be able to report it.
        options = subprocess.run([program, "-help"], stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
        keep = ["-disable-auto-cleanup"] if "-disable-auto-cleanup" in options else []
        intel = {
            "I_MPI_FABRICS": "shm",  # one machine
            "I_MPI_PIN": "0",  # launches side by side would all be pinned to the same first cores
        }
        self._open(
            [program, *keep, "-n", str(self.size), "sh", "-c", self.SHELL, str(self._folder), *self._command],
            _environment(None, self.size, None, threads, intel | dict(env)),
            "-mpiexec",
        )
        self._started = self.size
        self._codes: dict[int, int] = {}

    def stderr(self, rank: int) -> str:
        return super().stderr(rank) or _tail(self._folder / "stderr-mpiexec")

    def exit_code(self, rank: int) -> int | None:
        """As above; for a rank that left no code it is mpiexec's own."""
        if rank not in self._codes:
            ended = self._processes[0].poll()  # before the file: the shell writes it, then mpiexec ends
            code = self._number("exit", rank)
            if code is not None:
                self._codes[rank] = 128 - code if code > 128 else code  # 128 + n is the shell's word for signal n
                self._signal(rank, signal.SIGKILL)
            elif ended is not None:
                self._codes[rank] = ended
        return self._codes.get(rank)

    def _group(self, rank: int) -> int:
        group = self._number("group", rank)
        if group is None:
            raise ProcessLookupError
        return group

    def _number(self, name: str, rank: int) -> int | None:
        path = self._folder / f"{name}-{rank}"
        text = path.read_text() if path.exists() else ""
        return int(text) if text.endswith("\n") else None


class _Output:
    """Passes on what the ranks print, line by line, to the log."""

    def __init__(self, folder: Path, size: int):
        self._paths = [folder / f"stdout-{rank}" for rank in range(size)]
        self._at, self._rest = [0] * size, [b""] * size

    def pass_on(self, last: bool = False) -> None:
        for rank, path in enumerate(self._paths):
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(self._at[rank])
                text = file.read()
            self._at[rank] += len(text)
            *lines, self._rest[rank] = (self._rest[rank] + text).split(b"\n")
            for line in [*lines, *([self._rest[rank]] if last and self._rest[rank] else [])]:
                logger.info("rank %d: %s", rank, line.decode(errors="replace"))


def _outcome(rank: int, report: Report, ranks: _Ranks, started: float) -> Outcome:
    result, error, text = None, report.error, report.traceback
    if report.result is not None:
        try:
            result = pickle.loads(report.result)
        except Exception as failure:
            error = f"{type(failure).__name__}: the result cannot be unpickled here: {failure}"
    finished = report.time - started
    return Outcome(rank, result, error, text, ranks.exit_code(rank), finished, ranks.stderr(rank))


def _death(code: int) -> str:
    if code >= 0:
        return f"exit code {code} without a result"
    names = {number.value: number.name for number in signal.Signals}
    return f"killed by {names.get(-code, f'signal {-code}')}"


def _first_failure(outcomes: Iterable[Outcome]) -> Outcome:
    return min((one for one in outcomes if not one.ok), key=lambda one: one.finished)


def _last_lines(text: str, count: int = 30) -> str:
    return "\n".join(text.rstrip().splitlines()[-count:])


def _tail(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - STDERR_TAIL))
        return file.read().decode(errors="replace")
