"""The processes of a launch: how one rank is started, watched through the files of its folder, and ended.

Used by `effnn.comm.launch` alone. `Ranks` starts each rank itself; `MpiRanks` starts mpiexec, which starts them.
"""

import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from effnn.comm.emulation.network import Node
from effnn.comm.groups import mpi
from effnn.comm.groups.interfaces import loopback
from effnn.comm.launching.worker import Report

logger = logging.getLogger("effnn.comm.launch")  # the name that `launch.run_ranks` gives for what ranks print

POLL = 0.05  # seconds between two looks at the ranks: short against their start (a second), free of charge to them
STDERR_TAIL = 4000  # bytes

NOT_INHERITED = {"RANK", "LOCAL_RANK", "MASTER_PORT", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE"}
NOT_INHERITED_PREFIXES = ("TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_")
"""What an outer torchrun or mpiexec has set for its own ranks."""


class Ranks:
    """The processes of a launch: each rank leads a process group, so that its own children end with it."""

    def __init__(self, folder: Path, size: int):
        self._folder, self.size = folder, size
        self._command = [sys.executable, "-m", "effnn.comm.launching.worker", str(folder)]
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

    def end(self, patience: float) -> None:
        """End whatever runs: SIGTERM, up to `patience` seconds, SIGKILL."""
        try:
            for rank in self.running():
                self._signal(rank, signal.SIGTERM)
            limit = time.monotonic() + patience
            while self.running() and time.monotonic() < limit:
                time.sleep(POLL)
        finally:  # also when the wait is interrupted
            for rank in self.running():
                self._signal(rank, signal.SIGKILL)
            for process in self._processes:
                try:
                    process.wait(patience)
                except subprocess.TimeoutExpired:
                    process.kill()

    def _group(self, rank: int) -> int:
        return self._processes[rank].pid

    def _signal(self, rank: int, number: signal.Signals) -> None:
        try:
            os.killpg(self._group(rank), number)
        except (ProcessLookupError, PermissionError):  # nobody is left in it (macOS says permission)
            pass


class MpiRanks(Ranks):
    """The ranks below one mpiexec. A shell around each leaves its process group and its exit code in the folder.

    mpiexec does not end with this process, and a rank that starts MPI holds Python's global lock for as long as its
    peers keep it waiting, so that no thread of its own can end it. The shell does: a process beside the rank waits for
    the end of a named pipe, which comes when this process ends in any way, and then kills the rank's process group.
    """

    # The traps keep the shell alive on SIGTERM, so that it can write what became of the rank, and shell and rank on
    # SIGUSR1, by which MPICH's Hydra tells the others that one rank has died.
    SHELL = (
        'trap : TERM; trap "" USR1; rank=${PMI_RANK:-$OMPI_COMM_WORLD_RANK}; echo $$ >"$0/group-$rank"; '
        '(trap "" TERM; read -r end <"$0/launcher"; kill -KILL 0) </dev/null >/dev/null 2>&1 & '
        '"$@" >"$0/stdout-$rank" 2>"$0/stderr-$rank"; code=$?; kill -KILL $!; echo $code >"$0/exit-$rank"'
    )

    def __init__(self, folder: Path, size: int):
        super().__init__(folder, size)
        self._codes: dict[int, int] = {}
        self._pipe: int | None = None

    def start(self, nodes: None, threads: int, env: Mapping[str, str]) -> None:
        program = str(mpi.launcher())
        os.mkfifo(self._folder / "launcher")
        self._pipe = os.open(self._folder / "launcher", os.O_RDWR)  # nothing is ever written
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

    def end(self, patience: float) -> None:
        try:
            super().end(patience)
        finally:
            if self._pipe is not None:
                os.close(self._pipe)

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


class Output:
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
        "EFFNN_LOCAL_RANKS": str(size),  # emulated nodes share this machine's cores
        "GROUP_RANK": str((rank or 0) // per_node),
        "GLOO_SOCKET_IFNAME": node.interface if node else loopback(),
        "EFFNN_INTERFACE": node.interface if node else loopback(),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # ranks share cores: one that waits must not spin
    }
    if rank is not None:
        result |= {"RANK": str(rank), "LOCAL_RANK": str(rank % per_node)}
    return result | {name: str(value) for name, value in env.items()}


def _tail(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - STDERR_TAIL))
        return file.read().decode(errors="replace")
