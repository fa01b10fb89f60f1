"""Benchmarks of the backends; what each key means stands in data/bench.csv.

All three ratios come from the same runs: two ranks, one thread each, gloo and oneCCL in turn within the same processes,
which are started anew for every run.
"""

import statistics
from functools import cache

from effnn.comm import launch, timing, unavailable
from effnn.experiments.bench_result import Measured

RUNS = 5  # of new processes
ROUNDS = 7  # within a run; a run's figure is the median of its rounds
SIZES = {"4kb": 4 << 10, "1mb": 1 << 20, "64mb": 64 << 20}


def _ratio(size: str) -> Measured:
    above, below = (_milliseconds(name, size) for name in ("ccl", "gloo"))
    seconds = {name: tuple(ms / 1e3 for ms in values) for name, values in (("ccl", above), ("gloo", below))}
    load = tuple(statistics.median(row["load"] for row in rows if row["bytes"] == SIZES[size]) for rows in _runs())
    note = f"{RUNS} runs of new processes, the median of {ROUNDS} rounds each; {SIZES[size]} bytes a rank"
    return Measured(tuple(a / b for a, b in zip(above, below, strict=True)), load, seconds, 1, note)


def _milliseconds(backend: str, size: str) -> list[float]:
    return [
        statistics.median(row["ms"] for row in rows if row["backend"] == backend and row["bytes"] == SIZES[size])
        for rows in _runs()
    ]


@cache
def _runs() -> tuple[list[dict], ...]:
    names = ["gloo", "ccl"]
    return tuple(
        launch.run(timing.all_reduce_rounds, 2, "gloo", args=(names, list(SIZES.values()), ROUNDS, 0.2))[0]
        for _ in range(RUNS)
    )


BENCHMARKS = {
    f"comm.ccl_over_gloo_{size}": lambda size=size: _ratio(size) for size in SIZES if unavailable("ccl") is None
}
