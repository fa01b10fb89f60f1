"""The support matrix: which operation works on which backend and device, found by running each with value checks.

Every backend gets processes of its own. An operation that hangs or kills its processes costs only its own cell: the
rest go on in new ones. A cell says what a backend can do and not how busy the machine was, so what looks like a hang is
run once more, with limits that only a hang can meet, before it counts.

A `Probe` of one machine can be saved, and merged with one of another (one with GPUs, say).
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from effnn.base import InvalidInput, write_json
from effnn.comm import backends, launch
from effnn.comm.probing import answers, operations
from effnn.comm.probing.answers import Status

DEVICES = ("cpu", "cuda")

CHECKS = operations.OPERATIONS | operations.SPARSE
"""Name of an operation -> what runs and checks it on a device."""

_FORMAT = 1
_AT_FIRST = {"timeout": 400.0, "group_timeout": 90.0}
"""Limits of the first run of the operations of a backend, which take about a second on an idle machine."""


class How(StrEnum):
    """By what means an operation works: one call of the library, several, or another library's."""

    NATIVE = "native"
    COMPOSED = "composed"
    DELEGATED = "delegated"


@dataclass(frozen=True)
class Cell:
    """One operation on one backend and device.

    backend, device, operation: which cell it is.
    status: what became of the operation.
    how: by what means it works; empty where it does not.
    message: what went wrong, or why it was not run.
    machine: where it was run, if elsewhere than the rest of its probe.
    """

    backend: str
    device: str
    operation: str
    status: Status
    how: How | str = ""
    message: str = ""
    machine: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", Status(self.status))
        object.__setattr__(self, "how", How(self.how) if self.how else "")

    @property
    def note(self) -> str:
        """The message, and the machine where it is another one."""
        return "; ".join(filter(None, (self.message, self.machine and f"probed on {self.machine}")))


@dataclass(frozen=True)
class Probe:
    """What one machine can do.

    machine: system, cores and GPUs.
    created: date and time.
    world_size: number of ranks.
    versions: of torch and of the libraries under the backends.
    cells: one per backend, device and operation.
    """

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
        if content.pop("format") != _FORMAT:
            raise ValueError("its format is unknown to this version")
        return Probe(**content | {"cells": cells})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(
            f"{path} is not a saved probe of effnn.comm.probing.matrix ({error}); write one with save()"
        ) from None


def merge(here: Probe, *others: Probe) -> Probe:
    """Return `here` with the cells that it could not answer (no device, not built) taken from the others.

    Such a cell names the machine that it was probed on; the versions of that machine come along under its name.
    """
    cells, versions = [], dict(here.versions)
    for cell in here.cells:
        for other in others if not cell.status.answered else ():
            answer = other.cell(cell.backend, cell.device, cell.operation)
            if answer is not None and answer.status.answered:
                cell = dataclasses.replace(answer, machine=answer.machine or other.machine)
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
    """Run every operation on every backend and device; returns the cells with versions.

    names: of the backends. Those that are not available here get cells with the reason.
    devices: "cpu", "cuda".
    world_size: number of ranks.
    selected: names of some of the operations; None for all.
    progress: whether to show a bar. All of it takes some ten seconds on two cores, and up to half an hour more for each
      operation that hangs.
    checks: "module:attribute" of a mapping like CHECKS; the ranks import it.
    """
    known = answers.imported(checks)
    chosen = list(selected or known)
    for name in chosen:
        if name not in known:
            raise InvalidInput(f"operation {name!r}: expected some of {', '.join(known)}")
    pairs = [(name, device) for name in names for device in devices]
    cells: list[Cell] = []
    for name, device in tqdm(pairs, desc="support matrix", leave=False, disable=not progress):
        cells += _cells(name, device, chosen, world_size, checks)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Probe(_machine(), now, world_size, versions(names), tuple(cells))


def _cells(backend: str, device: str, chosen: list[str], world_size: int, checks: str) -> list[Cell]:
    refusal = backends.refusal(backend, device, world_size)
    if refusal is not None:
        status = Status.NO_DEVICE if refusal.built else Status.NOT_BUILT
        return [Cell(backend, device, name, status, message=refusal.reason) for name in chosen]
    found: dict[str, answers.Answer] = {}
    while waiting := [name for name in chosen if name not in found]:
        given = answers.in_new_processes(backend, device, waiting, world_size, checks, **_AT_FIRST)
        doubtful = [name for name, answer in given.items() if answer.may_be_slowness]
        found |= {name: answer for name, answer in given.items() if name not in doubtful}
        if doubtful:  # one, or all where no rank came to begin
            found |= answers.in_new_processes(backend, device, doubtful, world_size, checks, **launch.PATIENT)
    return [
        Cell(
            backend,
            device,
            name,
            found[name].status,
            _how(backend, name) if found[name].ok else "",
            found[name].message,
        )
        for name in chosen
    ]


def versions(names: Iterable[str] = backends.BACKENDS) -> dict[str, str]:
    """Versions of torch and of the packages under the backends that are installed here."""
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


def _how(backend: str, operation: str) -> How:
    """Native for torch's own backends; ours say it themselves, and make sparse sums of all_gathers."""
    ours = backend == "mpi4py" or (backend == "ccl" and backends.ccl_provider() == "effnn")
    if operation == operations.PAIRS or (ours and operation in operations.SPARSE):
        return How.COMPOSED
    if backend == "ccl" and ours:
        from effnn.comm.groups.oneccl.group import SUPPORT

        return How(SUPPORT.get(operation, How.NATIVE))
    return How.NATIVE


def _machine() -> str:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores", *gpus])
