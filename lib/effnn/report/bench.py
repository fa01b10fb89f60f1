"""The benchmarks: bars that were fixed beforehand (data/bench.csv) beside what was measured (results/bench.json)."""

import json

import pandas as pd

from effnn import paths
from effnn.base import InvalidInput
from effnn.report import markers
from effnn.report.claims import notebook_of, rows
from effnn.report.provenance import busy
from effnn.report.rules import Rule, number

HEADER = """\
# Benchmarks

Made by `make bench` and `make claims` from data/bench.csv and results/bench.json; not edited by hand. The bars were
fixed before the measurements. Every ratio is of two things that were measured in turn within one run.
"""


def bench_markdown() -> str:
    """Return results/BENCH.md."""
    return f"{HEADER}\n{bench_table()}\n"


def bench() -> pd.DataFrame:
    """Return data/bench.csv joined with results/bench.json, one row per key.

    Columns: key, bar, unit, meaning, median, min, max, runs, note, also (details with a bound, such as peak memory over
    its bound, which must be at most 1), measured (bool), state. The state is "meets the bar", "misses the bar" (both
    with a word on a machine that was busy), "not measured", or "not built yet" while the notebook of the key's room
    (as data/claims.csv names it) does not exist.
    """
    bars = pd.read_csv(paths.BENCH_BARS, dtype=str, keep_default_na=False)
    measured = _bench_results()
    notebooks = {claim.id.split(".")[0]: claim.notebook for claim in rows()}
    table = []
    for bar in bars.to_dict("records"):
        rule = Rule.parse(bar["bar"])
        if rule is None:
            raise InvalidInput(f"{paths.BENCH_BARS}: key {bar['key']!r} has no bar")
        digits = notebooks.get(bar["key"].split(".")[0])
        state = "not built yet" if digits is None or notebook_of(digits) is None else "not measured"
        line = dict(bar) | {"median": None, "min": None, "max": None, "runs": 0, "note": "", "also": "", "state": state}
        line["measured"] = bar["key"] in measured
        if line["measured"]:
            found = measured[bar["key"]]
            line |= {name: float(found[name]) for name in ("median", "min", "max")}
            line |= {"runs": len(found.get("runs", ())), "note": str(found.get("note") or "")}
            bounded = {k: v for k, v in (found.get("details") or {}).items() if k.endswith("_over_bound")}
            met = rule.holds(line["median"]) and all(value <= 1 for value in bounded.values())
            line["state"] = "meets the bar" if met else "misses the bar"
            loads, origin = [one for one in found.get("load") or () if one == one], found.get("provenance") or {}
            machine = busy(max(loads, default=None), origin.get("cores"))
            line["state"] += f", {machine}" if machine else ""
            line["also"] = "".join(f"; {k.replace('_', ' ')} {number(v)}" for k, v in bounded.items())
        table.append(line)
    return pd.DataFrame(table)


def bench_table() -> str:
    """Return the benchmarks as a Markdown table, the bar beside the measured median and its extremes."""
    body = []
    for line in bench().to_dict("records"):
        value = "-"
        if line["measured"]:
            value = f"{number(line['median'])} [{number(line['min'])}, {number(line['max'])}], {line['runs']} runs"
            value += line["also"]
        body.append([f"`{line['key']}`", line["bar"], value, line["state"], line["meaning"]])
    return markers.table(["Key", "Bar", "Median [min, max]", "State", "What is divided by what"], body)


def _bench_results() -> dict[str, dict[str, object]]:
    path = paths.RESULTS / "bench.json"
    if not path.is_file():
        return {}
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
        for found in keys.values():
            _ = [float(found[name]) for name in ("median", "min", "max")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{path} is damaged ({type(error).__name__}: {error}); run `make bench` again") from error
    return keys
