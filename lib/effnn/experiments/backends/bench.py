"""Benchmarks of the backends; what each key means stands in data/bench.csv.

Every ratio comes from runs of gloo and oneCCL in turn within the same processes, one thread each, which are started
anew for every run: two ranks for the first three keys, twice as many ranks as cores for the crowded one. oneCCL's
variables reach the ranks, so its settings can be compared; the note of a figure names them.
"""

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from effnn.comm import launch, unavailable
from effnn.comm.probing import timing
from effnn.experiments.shared.measured import Measured

RUNS = 5  # of new processes
ROUNDS = 7  # within a run; a run's figure is the median of its rounds
SIZES = {"4kb": 4 << 10, "1mb": 1 << 20, "64mb": 64 << 20}
CORES = 2  # that the ranks of the crowded key share


@dataclass(frozen=True)
class Setting:
    """One row of launches: ranks, message sizes in bytes, and the cores that all ranks share (None: as they come)."""

    ranks: int
    sizes: tuple[int, ...]
    cores: int | None = None


ALONE = Setting(2, tuple(SIZES.values()))
CROWDED = Setting(2 * CORES, (SIZES["1mb"],), CORES)


def _ratio(setting: Setting, nbytes: int) -> Measured:
    above, below = (_milliseconds(setting, name, nbytes) for name in ("ccl", "gloo"))
    seconds = {name: tuple(ms / 1e3 for ms in values) for name, values in (("ccl", above), ("gloo", below))}
    load = tuple(statistics.median(row["load"] for row in rows if row["bytes"] == nbytes) for rows in _runs(setting))
    where = f" on {setting.cores} cores" if setting.cores else ""
    processes = f"{RUNS} runs of {setting.ranks} new processes{where}"
    note = f"{processes}, the median of {ROUNDS} rounds each; {nbytes} bytes per rank"
    settings = sorted(f"; {name}={value}" for name, value in os.environ.items() if name.startswith("CCL_"))
    note += "".join(settings)
    return Measured(tuple(a / b for a, b in zip(above, below, strict=True)), load, seconds, 1, note)


def _milliseconds(setting: Setting, backend: str, nbytes: int) -> list[float]:
    return [
        statistics.median(row["ms"] for row in rows if row["backend"] == backend and row["bytes"] == nbytes)
        for rows in _runs(setting)
    ]


@cache
def _runs(setting: Setting) -> tuple[list[dict], ...]:
    arguments = (["gloo", "ccl"], list(setting.sizes), ROUNDS, 0.2)
    with _confined(setting.cores):
        return tuple(
            launch.run(timing.all_reduce_rounds, setting.ranks, "gloo", args=arguments, **launch.PATIENT)[0]
            for _ in range(RUNS)
        )


@contextmanager
def _confined(cores: int | None) -> Iterator[None]:
    """What is started meanwhile runs on so many cores, the first of those that this process may use."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _benchmarks() -> dict[str, Callable[[], Measured]]:
    if unavailable("ccl") is not None:
        return {}
    alone = {f"comm.ccl_over_gloo_{name}": lambda size=size: _ratio(ALONE, size) for name, size in SIZES.items()}
    return alone | {"comm.ccl_over_gloo_crowded_1mb": lambda: _ratio(CROWDED, SIZES["1mb"])}


BENCHMARKS = _benchmarks()
