"""The support matrix: which operation works on which backend and device, found by running each with value checks.

Every backend gets processes of its own. An operation that hangs or kills its processes costs only its own cell: the
rest go on in new ones. A `Probe` of one machine can be saved, and merged with one of another (one with GPUs, say).
"""

import dataclasses
import importlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from effnn.base import InvalidInput, write_json
from effnn.comm import backends, launch
from effnn.comm.groups.lane.lane import CollectiveTimeout
from effnn.comm.probing import operations

STATUSES = ("ok", "wrong result", "error", "hang", "not built", "no device")
HOWS = ("native", "composed", "delegated")

DEVICES = ("cpu", "cuda")

CHECKS = operations.OPERATIONS | operations.SPARSE
"""Name of an operation -> what runs and checks it on a device."""

_UNANSWERED = ("not built", "no device")

_FORMAT = 1
_MOMENT = 1.0  # seconds that one event may take to be noticed by all ranks
# Everything takes about a second on an idle machine. The limits are far above that: only what hangs may meet them, as a
# cell says what a backend can do, and not how busy the machine was.
_SECONDS_A_LAUNCH = 400.0  # for all operations of one backend
_SECONDS_AN_OPERATION = 90.0  # time-out of the group: a hang is an error of the operation where the backend can tell


@dataclass(frozen=True)
class Cell:
    """One operation on one backend and device. how: of an ok cell, native, composed or delegated."""

    backend: str
    device: str
    operation: str
    status: str
    how: str = ""
    message: str = ""


@dataclass(frozen=True)
class Probe:
    """What one machine can do. versions: of torch and of the libraries under the backends."""

    machine: str
    created: str
    world_size: int
    versions: dict[str, str]
    cells: tuple[Cell, ...]

    def cell(self, backend: str, device: str, operation: str) -> Cell | None:
        """The cell of that name, None if it was not probed."""
        wanted = (backend, device, operation)
        return next((cell for cell in self.cells if (cell.backend, cell.device, cell.operation) == wanted), None)

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, atomically; `load` reads it."""
        return write_json(path, self.as_dict())

    def as_dict(self) -> dict[str, object]:
        """What `save` writes."""
        return {"format": _FORMAT, **dataclasses.asdict(self)}


def load(path: str | Path) -> Probe:
    """Read a saved probe; raises InvalidInput when the file is not one."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        cells = tuple(Cell(**cell) for cell in content["cells"])
        wrong = [cell.status for cell in cells if cell.status not in STATUSES]
        if content.pop("format") != _FORMAT or wrong:
            raise ValueError(f"format or status {wrong} unknown to this version")
        return Probe(**content | {"cells": cells})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(
            f"{path} is not a saved probe of effnn.comm.probing.matrix ({error}); write one with save()"
        ) from None


def merge(here: Probe, *others: Probe) -> Probe:
    """Return `here` with the cells that it could not answer (no device, not built) taken from the others.

    The message of such a cell names the machine that it was probed on; the versions of that machine come along under
    its name.
    """
    cells, versions = [], dict(here.versions)
    for cell in here.cells:
        if cell.status in _UNANSWERED:
            for other in others:
                answer = other.cell(cell.backend, cell.device, cell.operation)
                if answer is not None and answer.status not in _UNANSWERED:
                    origin = f"probed on {other.machine}"
                    message = f"{answer.message}; {origin}" if answer.message else origin
                    cell = dataclasses.replace(answer, message=message)
                    versions |= {f"{name} ({other.machine})": number for name, number in other.versions.items()}
                    break
        cells.append(cell)
    return dataclasses.replace(here, versions=versions, cells=tuple(cells))


def probe(
    names: Sequence[str] = backends.BACKENDS,
    devices: Sequence[str] = DEVICES,
    world_size: int = 2,
    selected: Iterable[str] | None = None,
    progress: bool = True,
    checks: str = "effnn.comm.probing.matrix:CHECKS",
) -> Probe:
    """Run every operation (or those `selected`) on every backend and device; returns the cells with versions.

    checks: "module:attribute" of a mapping like CHECKS; the ranks import it. Takes some ten seconds on two cores. Cells
    that cannot be had here get the reason as their message.
    """
    known = _imported(checks)
    chosen = list(selected or known)
    for name in chosen:
        if name not in known:
            raise InvalidInput(f"operation {name!r}: expected some of {', '.join(known)}")
    pairs = [(name, device) for name in names for device in devices]
    cells: list[Cell] = []
    for name, device in tqdm(pairs, desc="support matrix", leave=False, disable=not progress):
        cells += _probe_one(name, device, chosen, world_size, checks)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Probe(_machine(), now, world_size, versions(names), tuple(cells))


def _probe_one(backend: str, device: str, chosen: list[str], world_size: int, checks: str) -> list[Cell]:
    reason = backends.unavailable(backend)
    if reason is not None:
        status = "no device" if "no CUDA device" in reason else "not built"
        return [Cell(backend, device, name, status, message=reason) for name in chosen]
    reason = backends.unavailable(backend, device) or _too_few_devices(backend, device, world_size)
    if reason is not None:
        return [Cell(backend, device, name, "no device", message=reason) for name in chosen]
    found: dict[str, Cell] = {}
    waiting = list(chosen)
    while waiting:
        answers, broken = _run(backend, device, waiting, world_size, checks)
        for name, (status, message) in answers.items():
            how = _how(backend, name) if status == "ok" else ""
            found[name] = Cell(backend, device, name, status, how, message)
        if broken is not None:
            stopped, status, message = broken
            for name in waiting if stopped is None else [stopped]:
                found[name] = Cell(backend, device, name, status, message=message)
        waiting = [name for name in waiting if name not in found]
    return [found[name] for name in chosen]


def _run(
    backend: str, device: str, names: list[str], world_size: int, checks: str
) -> tuple[dict[str, tuple[str, str]], tuple[str | None, str, str] | None]:
    """Run the operations in new processes: name -> (status, message) of those that ended on all ranks, and the one
    that stopped the rest (None: no rank even began, and none would with the rest), with what became of it."""
    with tempfile.TemporaryDirectory(prefix="effnn-matrix-") as folder:
        outcomes = launch.run_outcomes(
            worker,
            world_size,
            backend,
            args=(names, device, folder, checks),
            timeout=_SECONDS_A_LAUNCH,
            group_timeout=_SECONDS_AN_OPERATION,
            grace=2 * _SECONDS_AN_OPERATION,
        )
        logs = [_read_log(folder, rank) for rank in range(world_size)]
    answers: dict[str, tuple[str, str]] = {}
    for name in names:
        if not all(name in (log or ()) for log in logs):
            break
        failures = [log[name] for log in logs if log[name].status != "ok"]
        if failures:
            # The first failure in time counts: the others may come of it. A rank whose time-out has passed closes its
            # connections, and may say so a moment later than those who lose them.
            first = min(failures, key=lambda answer: answer.time - (_MOMENT if answer.status == "hang" else 0.0))
            # Ranks may be out of step now: the rest starts afresh.
            return answers | {name: (first.status, first.message)}, None
        answers[name] = "ok", ""
    if len(answers) == len(names):
        return answers, None
    stopped = names[len(answers)] if any(log is not None for log in logs) else None
    failed = [outcome for outcome in outcomes if not outcome.ok]
    if not failed:
        return answers, (stopped, "error", "a rank ended without an answer")
    first = min(failed, key=lambda outcome: outcome.finished or float("inf"))
    return answers, (stopped, "hang" if _timed_out(first.error) else "error", first.error)


def worker(names: list[str], device: str, folder: str, checks: str) -> None:
    """In each rank: run the operations, noting each result; stops at the first that fails."""
    known = _imported(checks)
    place = (
        torch.device(device, dist.get_rank() % torch.cuda.device_count()) if device == "cuda" else torch.device(device)
    )
    with open(Path(folder) / f"{dist.get_rank()}.jsonl", "w", encoding="utf-8") as log:
        for name in names:
            status, message = "ok", ""
            try:
                known[name](place)
            except operations.WrongResult as error:
                status, message = "wrong result", str(error)
            except Exception as error:
                message = _last_line(error)
                status = "hang" if isinstance(error, CollectiveTimeout) or _timed_out(message) else "error"
            log.write(json.dumps([name, status, message, time.monotonic()]) + "\n")
            log.flush()
            os.fsync(log.fileno())
            if status != "ok":
                return


def versions(names: Iterable[str] = backends.BACKENDS) -> dict[str, str]:
    """Versions of torch and of the packages under the backends that are installed here."""
    import importlib.metadata

    found = {"torch": torch.__version__}
    packages = {"ccl": ("oneccl", "oneccl_bind_pt"), "mpi4py": ("mpi4py", "impi-rt", "mpich", "openmpi")}
    for name in names:
        for package in packages.get(name, ()):
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
    if dist.is_nccl_available() and torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _imported(checks: str) -> Mapping[str, Callable[[torch.device], None]]:
    module, _, name = checks.partition(":")
    return getattr(importlib.import_module(module), name)


def _timed_out(message: str) -> bool:
    return launch.STILL_RUNNING in message or "imed out" in message


def _how(backend: str, operation: str) -> str:
    """Native for torch's own backends; ours say it themselves. The pairs are always composed of all_gathers."""
    ours = backend == "mpi4py" or (backend == "ccl" and backends.ccl_provider() == "effnn")
    if operation == "all_gather of (ids, values)" or (ours and operation in operations.SPARSE):
        return "composed"
    if backend == "ccl" and backends.ccl_provider() == "effnn":
        from effnn.comm.groups import oneccl

        return oneccl.SUPPORT.get(operation, "native")
    return "native"


def _too_few_devices(backend: str, device: str, world_size: int) -> str | None:
    if backend != "nccl" or device != "cuda" or torch.cuda.device_count() >= world_size:
        return None
    return f"nccl wants a GPU for each of the {world_size} ranks; this machine has {torch.cuda.device_count()}"


class _Answer(NamedTuple):
    """What one rank says of one operation; time is one clock for all processes of a machine."""

    status: str
    message: str
    time: float


def _read_log(folder: str, rank: int) -> dict[str, _Answer] | None:
    """What a rank has noted; None if it did not come that far."""
    path = Path(folder) / f"{rank}.jsonl"
    if not path.exists():
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    return {name: _Answer(*answer) for name, *answer in map(json.loads, lines)}


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _machine() -> str:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores", *gpus])
