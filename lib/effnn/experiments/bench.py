"""`make bench`, or `python -m effnn.experiments.bench [KEY]`: measures the keys of data/bench.csv beside their bars.

A key is one ratio of two things that run in turn in one process; its figure is the median of five runs (three where
a run takes minutes), after a warm-up, and every run is kept with its load average. The code of a key stands in the
`bench.py` of its notebook's folder; keys of methods that are not built yet are listed as such. Results of keys that
were not asked for stay in results/bench.json.
"""

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

import pandas as pd

from effnn import paths
from effnn.base import EffnnError, InvalidInput, write_json
from effnn.experiments.backends import bench as bench_comm
from effnn.experiments.pruning import bench as bench_ltp
from effnn.experiments.shared.measured import Measured
from effnn.experiments.staged import bench as bench_staged
from effnn.report import Rule, bench_table, provenance, write_claims

log = logging.getLogger(__name__)

BENCHMARKS: dict[str, Callable[[], Measured]] = {
    **bench_comm.BENCHMARKS,
    **bench_ltp.BENCHMARKS,
    **bench_staged.BENCHMARKS,
}
"""Key of data/bench.csv -> the function that measures it."""


@dataclass(frozen=True)
class KeyResult:
    """One measured key beside its bar.

    key, bar: of data/bench.csv.
    median: of the runs.
    met: whether the median keeps the bar, and every bounded detail its bound.
    runs: the figure of each run.
    """

    key: str
    bar: str
    median: float
    met: bool
    runs: tuple[float, ...] = field(repr=False)


def keys(part: str = "") -> list[str]:
    """Keys of data/bench.csv that `part` names: a whole key, or the beginning of one up to a dot."""
    listed = pd.read_csv(paths.BENCH_BARS).key.tolist()
    chosen = [key for key in listed if not part or key == part or key.startswith(f"{part}.")]
    if not chosen:
        parts = sorted({key.split(".")[0] for key in listed})
        raise InvalidInput(f"KEY={part}: no such benchmark; parts are {', '.join(parts)}, keys are {', '.join(listed)}")
    return chosen


def run(part: str = "") -> list[KeyResult]:
    """Measure the keys of a part, writing results/bench.json after each; returns those that could be measured."""
    bars = pd.read_csv(paths.BENCH_BARS).set_index("key")
    results = []
    for key in keys(part):
        if key not in BENCHMARKS:
            log.info("%s: not built yet", key)
            continue
        started = datetime.now(UTC)
        log.info("measuring %s", key)
        measured = BENCHMARKS[key]()
        row = bars.loc[key]
        median = statistics.median(measured.runs)
        _store(key, measured, row, provenance.gather("bench", {"threads": measured.threads}, started=started))
        met = Rule.parse(row.bar).holds(median) and measured.within_bounds()
        results.append(KeyResult(key, row.bar, median, met, measured.runs))
    return results


def _store(key: str, measured: Measured, row: pd.Series, origin: dict[str, object]) -> None:
    path = paths.RESULTS / "bench.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise InvalidInput(f"{path} is not readable ({error}): delete it and run make bench again") from None
    median = statistics.median(measured.runs)
    entry = {
        "median": median,
        "min": min(measured.runs),
        "max": max(measured.runs),
        "bar": row.bar,
        "met": bool(Rule.parse(row.bar).holds(median)) and measured.within_bounds(),
        "unit": row.unit,
        **asdict(measured),
        "provenance": origin,
    }
    stored = content | {key: entry}
    write_json(path, {name: stored[name] for name in sorted(stored)})


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns 0, 1 where a bar was missed, 2 for a key that does not exist."""
    parser = argparse.ArgumentParser(prog="python -m effnn.experiments.bench", description=__doc__.splitlines()[0])
    parser.add_argument("key", nargs="?", default="", help="a key or the beginning of one, such as ltp; default: all")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        results = run(parser.parse_args(arguments).key)
        write_claims()
    except EffnnError as error:
        print(error, file=sys.stderr)
        return 2
    print(bench_table())
    return int(not all(result.met for result in results))


if __name__ == "__main__":
    sys.exit(main())
