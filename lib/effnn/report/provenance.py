"""Where a number comes from: versions, machine, threads, commit, data and duration, as plain JSON.

Nothing here fails where something is not available: without git the commit is "unknown", without /proc the CPU's name
comes from Python.
"""

import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

import effnn
from effnn import paths
from effnn.base import load_average

PACKAGES = ("torch", "transformers", "numpy")
UNKNOWN = "unknown"
BUSY = 1.5
"""Load average per core above which a machine counts as busy: two jobs side by side on two cores give about one."""


def gather(
    profile: str,
    parameters: Mapping[str, object] | None = None,
    seeds: Iterable[int] = (),
    started: datetime | None = None,
    fingerprints: Mapping[str, str] | None = None,
    git: tuple[str, bool | None] | None = None,
    load_start: float | None = None,
) -> dict[str, object]:
    """Return the provenance of what is being written now, ready for JSON.

    profile: size of the run.
    parameters: name -> value.
    seeds: of the samples.
    started: UTC time at which the work began; `duration_s` counts from there.
    fingerprints: data set -> sha256.
    git: `git_state` when the work began; None takes it now.
    load_start: load average when the work began; None takes it now.
    Keys: profile, parameters, seeds, versions, cpu, cores, threads, accelerator, platform, git_commit, git_dirty,
    start, duration_s, load_start, load_end (1-minute load averages, None where the system knows none), fingerprints.
    """
    now = datetime.now(UTC)
    started = started or now
    parameters = {str(name): plain(value) for name, value in (parameters or {}).items()}
    commit, dirty = git or git_state(paths.HOME)
    return {
        "profile": profile,
        "parameters": parameters,
        "seeds": [int(seed) for seed in seeds],
        "versions": versions(),
        "cpu": cpu_model(),
        "cores": cores(),
        # The parameter says what the work ran with; the present setting may be another.
        "threads": int(parameters.get("threads") or torch.get_num_threads()),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "git_commit": commit,
        "git_dirty": dirty,
        "start": started.isoformat(timespec="seconds"),
        "duration_s": round((now - started).total_seconds(), 1),
        "load_start": _rounded(load_average() if load_start is None else load_start),
        "load_end": _rounded(load_average()),
        "fingerprints": dict(fingerprints or {}),
    }


def cores() -> int | None:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def busy(load: float | None, count: int | None) -> str:
    """Return a remark for a load average above `BUSY` times the cores, an empty text for a lower one."""
    if load is None or not count or not load > BUSY * count:
        return ""
    return f"measured on a busy machine (load {load:.1f} on {count} cores)"


def _rounded(load: float) -> float | None:
    return round(load, 2) if math.isfinite(load) else None


def versions() -> dict[str, str]:
    """Return name -> version of Python, effnn and `PACKAGES`; "not installed" for one that is missing."""
    found = {"python": platform.python_version(), "effnn": effnn.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def cpu_model() -> str:
    """Return the CPU's name as the kernel gives it, else as Python does."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or UNKNOWN


def git_state(home: Path) -> tuple[str, bool | None]:
    """Return the commit checked out in `home`, and whether tracked files outside results/ differ from it.

    ("unknown", None) where git is missing or `home` is not the top of a repository. Result files and README.md (its
    tables) do not count as a difference: writing them is what a run does.
    """
    top = _git(home, "rev-parse", "--show-toplevel")
    if top is None or Path(top.strip()).resolve() != home.resolve():
        return UNKNOWN, None
    commit = _git(home, "rev-parse", "HEAD")
    status = _git(
        home, "status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)results", ":(exclude)README.md"
    )
    return (commit or UNKNOWN).strip(), None if status is None else bool(status.strip())


def _git(home: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=home, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def fingerprint_differences(before: Mapping[str, object] | None, after: Mapping[str, object]) -> list[str]:
    """Return one sentence for each data set whose fingerprint differs between two provenances; [] when none does.

    Results are compared under equal fingerprints only; a data set that only one side has does not count.
    """
    old, new = (dict((side or {}).get("fingerprints") or {}) for side in (before, after))
    return [
        f"data '{name}' differ from those of the earlier result (sha256 {new[name][:12]}, earlier {old[name][:12]}); "
        "the numbers are not comparable"
        for name in sorted(old.keys() & new.keys())
        if old[name] != new[name]
    ]


def plain(value: object) -> object:
    """Return `value` as JSON types: numpy scalars and arrays, tuples and paths are converted, the rest by str()."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | np.ndarray):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    return str(value)
