"""One rank of a launch: `python -m effnn.comm.launching.worker FOLDER`, started by ../launch.py alone.

It reads the job from the folder, joins the process group, calls the function and leaves a report in the folder.
"""

import ctypes
import faulthandler
import importlib
import logging
import os
import pickle
import runpy
import signal
import sys
import threading
import time
import traceback
import types
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from effnn.base import atomic_path, first_line
from effnn.comm.groups.lane.call import is_of_communication

logger = logging.getLogger(__name__)

importing_main = False
"""True while the launcher's script is imported here; a launch at that moment would start workers without end."""


@dataclass(frozen=True)
class Job:
    """What every rank of one launch is told; the rest (rank, sizes, threads, interface) is in the environment."""

    call: bytes  # pickle of (function or "module:function", args, kwargs)
    main: tuple[str | None, str | None] | None  # module name and file of the launcher's __main__, where `call` needs it
    backend: str | None
    group_timeout: float  # seconds
    launcher: tuple[int, str | None]  # process id and `start_time`
    sys_path: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What one rank leaves, or the launcher in its place."""

    time: float  # time.monotonic(), which is one clock for all processes of a machine
    result: bytes | None = None  # a pickle
    error: str | None = None
    traceback: str | None = None
    still_running: bool = False  # when the time limit ended it
    of_communication: bool = False  # the error may come of a peer's end


def start_time(pid: int) -> str | None:
    """When process `pid` started (ticks since boot; "unknown" without /proc), None if it has ended.

    With it a process is told from a later one of the same number.
    """
    if os.path.exists("/proc/self/stat"):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # from field 3 on
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] == "Z" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # it is there, and somebody else's
        pass
    return "unknown"


def main(folder: Path) -> None:
    """Run the job of `folder` as the rank that the environment names, and write the file `report-<rank>` there."""
    job: Job = pickle.loads((folder / "job").read_bytes())
    _end_with_launcher(*job.launcher)
    faulthandler.register(signal.SIGTERM, chain=True)  # a rank that is ended says in its stderr where it was
    sys.stdout.reconfigure(line_buffering=True)
    sys.path[:] = job.sys_path
    rank, exit_code = _rank(), 0
    try:
        result = _result(job, folder, rank)
        report = Report(time.monotonic(), result)
    except SystemExit as error:
        exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
        report = Report(time.monotonic(), None, f"exit code {exit_code} without a result", traceback.format_exc())
    except BaseException as error:
        exit_code = 1
        report = Report(
            time.monotonic(),
            error=f"{type(error).__name__}: {first_line(error, 1000)}",
            traceback=traceback.format_exc(),
            of_communication=is_of_communication(error),
        )
    with atomic_path(folder / f"report-{rank}") as temporary:
        temporary.write_bytes(pickle.dumps(report))
    sys.stdout.flush()
    sys.stderr.flush()
    if report.error is not None:
        os._exit(exit_code)  # leaving the group could hang, and the others learn of the end by a lost connection
    _leave_group()


def _rank() -> int:
    """This process's rank; below mpiexec, which starts all ranks alike, from the variables that it sets."""
    if "RANK" not in os.environ:
        os.environ["RANK"] = os.environ.get("PMI_RANK") or os.environ["OMPI_COMM_WORLD_RANK"]
        os.environ["LOCAL_RANK"] = os.environ["RANK"]
    return int(os.environ["RANK"])


def _result(job: Job, folder: Path, rank: int) -> bytes:
    """Join the group, call the function, and return the pickle of what it returned."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if job.main is not None:
        _import_main(*job.main)
    function, args, kwargs = pickle.loads(job.call)
    if isinstance(function, str):
        module, _, name = function.partition(":")
        function = getattr(importlib.import_module(module), name)
    if job.backend is not None:
        from effnn.comm import backends

        backends.init_process_group(
            job.backend,
            init_method=f"file://{folder / 'rendezvous'}",
            rank=rank,
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timedelta(seconds=job.group_timeout),
        )
    result = function(*args, **kwargs)
    try:
        return pickle.dumps(result)
    except Exception as error:
        raise TypeError(
            f"the result, a {type(result).__name__}, cannot be pickled, so it cannot be returned: {error}"
        ) from error


def _import_main(name: str | None, file: str | None) -> None:
    """Import the launcher's script under the name __mp_main__, as multiprocessing does, so that its guard is false."""
    global importing_main
    importing_main = True
    run = runpy.run_module if name else runpy.run_path
    module = types.ModuleType("__mp_main__")
    module.__dict__.update(run(name or file, run_name="__mp_main__"))
    sys.modules["__main__"] = sys.modules["__mp_main__"] = module
    importing_main = False


def _leave_group() -> None:
    """Destroy the group. The result is safe by now, so an error (another rank may have left already) is only logged."""
    try:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    except Exception as error:
        logger.warning("destroy_process_group: %s", error)


def _end_with_launcher(pid: int, started: str | None) -> None:
    """End this process when the launcher is gone, however it went.

    Where the launcher is the parent, Linux does it. Below mpiexec the parent is a shell, which does it (see MpiRanks).
    The thread is for other systems, and for a launcher that was gone before this line.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if start_time(pid) != started:
        os._exit(1)

    def watch() -> None:
        while start_time(pid) == started:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    from effnn.comm.launching import (
        worker,  # so that Job, Report and importing_main exist once, under the module's real name
    )

    worker.main(Path(sys.argv[1]))
