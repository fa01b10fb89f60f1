"""Run one notebook through papermill, in a kernel of this interpreter that ends with the runner.

The kernel leads a process group, so that whatever it starts is killed with it: at the time limit, at the end of the
notebook, and, through `effnn.runner.guard`, when the runner itself is killed.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import papermill
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.translators import PythonTranslator, papermill_translators

from effnn.base import EffnnError
from effnn.runner import guard as guard_script

NATIVE = "python3"
LONGEST_SOCKET_FOLDER = 80  # characters; a Unix socket's whole path may have about 100


class NotebookFailed(EffnnError):
    """The notebook stopped: an error in a cell, a dead kernel or the time limit. The message says which and where."""


class Guard:
    """The process that kills the kernels if this one dies; a context manager, entered once for all notebooks."""

    def __enter__(self) -> "Guard":
        self._process = None
        if os.name == "posix":
            command = [sys.executable, "-I", "-S", guard_script.__file__]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process:
            self._process.stdin.close()
            self._process.wait()

    def watch(self, group: int) -> None:
        """Kill this process group if this process dies."""
        self._say(f"watch {group}")

    def forget(self, group: int) -> None:
        """The group has ended."""
        self._say(f"forget {group}")

    def _say(self, line: str) -> None:
        if self._process:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()


PATIENCE = 600
"""Seconds in which a kernel must start and its outputs arrive; long, since a busy machine is slow."""


class _Literals(PythonTranslator):
    """papermill writes a tuple as a quoted string and the keys of a dict as strings; repr keeps every literal."""

    @classmethod
    def translate(cls, value: object) -> str:
        return repr(value)


papermill_translators.register(NATIVE, _Literals)


def execute(
    notebook: Path,
    output: Path,
    parameters: Mapping[str, object],
    *,
    guard: Guard,
    time_limit: float | None = None,
    threads: int | None = None,
    progress_bar: bool = False,
    on_cell: Callable[..., None] | None = None,
) -> None:
    """Run `notebook` with `parameters` (already checked), writing the executed copy after each cell.

    notebook: the file.
    output: the executed copy.
    parameters: name -> value.
    guard: entered by the caller, once for all notebooks.
    time_limit: seconds, None for no limit.
    threads: of OpenMP in the kernel; None leaves the environment as it is.
    progress_bar: whether papermill draws one.
    on_cell: called as on_cell(cell, cell_index, ...) after each cell.
    Raises `NotebookFailed`, and KeyboardInterrupt after Ctrl-C or SIGTERM.
    """
    running: list[int] = []
    out_of_time, interrupted = threading.Event(), threading.Event()

    def started(pid: int) -> None:
        guard.watch(pid)
        running.append(pid)
        if out_of_time.is_set() or interrupted.is_set():
            _kill(running)

    def stop(why: threading.Event) -> None:
        why.set()
        _kill(running)

    timer = threading.Timer(time_limit, stop, [out_of_time]) if time_limit else None
    with (
        tempfile.TemporaryDirectory(prefix="effnn-", ignore_cleanup_errors=True) as folder,
        _openmp_threads(threads),
        _on_interrupt(lambda: stop(interrupted)),
    ):
        if timer:
            timer.daemon = True
            timer.start()
        try:
            papermill.execute_notebook(
                notebook,
                output,
                dict(parameters),
                kernel_name=NATIVE,
                language="python",
                start_timeout=PATIENCE,
                iopub_timeout=PATIENCE,
                progress_bar=progress_bar,
                kernel_manager_class=_manager(Path(folder), started),
                **({"on_cell_executed": on_cell} if on_cell else {}),
            )
        except papermill.PapermillExecutionError as error:
            raise NotebookFailed(f"cell {error.cell_index}: {error.ename}: {error.evalue}") from None
        except (DeadKernelError, RuntimeError) as error:
            if interrupted.is_set():
                raise KeyboardInterrupt from None
            if out_of_time.is_set():
                raise NotebookFailed(f"stopped at the time limit of {time_limit:g} s") from None
            reason = "its kernel died" if isinstance(error, DeadKernelError) else "its kernel did not start"
            raise NotebookFailed(f"{reason} ({error}); if memory ran out, choose a smaller profile") from None
        finally:
            if timer:
                timer.cancel()
            _kill(running)
            for group in running:
                guard.forget(group)
    if interrupted.is_set():  # after the last cell: the notebook is complete, but the user wants to stop
        raise KeyboardInterrupt


def _manager(folder: Path, started: Callable[[int], None]) -> type[AsyncKernelManager]:
    """A kernel manager class (papermill takes a class) whose kernels report their process group to `started`."""

    class Manager(AsyncKernelManager):
        def __init__(self, **options: object):
            # No folder is searched, so that a "python3" of another environment is never found.
            options["kernel_spec_manager"] = KernelSpecManager(kernel_dirs=[])
            if os.name == "posix" and len(str(folder)) <= LONGEST_SOCKET_FOLDER:
                # Unix sockets: no port to compete for, and no warning about unencrypted TCP.
                options.update(transport="ipc", connection_file=str(folder / "kernel.json"))
            super().__init__(**options)

        async def _async_post_start_kernel(self, **options: object) -> None:
            started(self.provisioner.pid)
            await super()._async_post_start_kernel(**options)

    return Manager


def _kill(groups: list[int]) -> None:
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL) if os.name == "posix" else os.kill(group, signal.SIGTERM)
        except OSError:
            pass  # it has already ended


@contextmanager
def _on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on Ctrl-C or SIGTERM; a second one interrupts as usual.

    An exception inside asyncio would leave tasks behind; a killed kernel ends the notebook cleanly.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        signal.signal(number, before[number])
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _openmp_threads(count: int | None) -> Iterator[None]:
    """Let the kernel inherit OMP_NUM_THREADS = `count`; None changes nothing."""
    before = os.environ.get("OMP_NUM_THREADS")
    if count:
        os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS", None)
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
