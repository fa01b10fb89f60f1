"""The ledger and the benchmarks as files for people and programs: claims.json, CLAIMS.md and the tables in README.md.

Everything here is a function of data/ and results/ alone, so writing twice changes nothing.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from effnn import paths
from effnn.base import InvalidInput, write_json, write_text
from effnn.report import markers, rules
from effnn.report.claims import Entry, data_notes, ledger, notebook_of, rows
from effnn.report.provenance import busy
from effnn.report.results import FILE, folder
from effnn.report.rules import Rule, number, span_text

log = logging.getLogger(__name__)

# What a reader of the ledger needs of a provenance; the whole of it is in the result file named beside it.
_PROVENANCE = (
    *("git_commit", "git_dirty", "start", "duration_s", "load_start", "load_end"),
    *("cpu", "cores", "threads", "accelerator", "seeds"),
)


def write_claims() -> list[Entry]:
    """Write results/claims.json, results/CLAIMS.md and the tables between README.md's markers; return the ledger."""
    entries = ledger()
    write_json(paths.RESULTS / "claims.json", [as_record(entry) for entry in entries])
    write_text(paths.RESULTS / "CLAIMS.md", claims_markdown(entries))
    readme = paths.HOME / "README.md"
    if not readme.is_file():
        log.warning("%s does not exist; its tables are not written", readme)
        return entries
    markers.fill_file(readme, "claims", readme_table(entries))
    if markers.has(readme, "bench"):
        markers.fill_file(readme, "bench", bench_table())
    return entries


def as_record(entry: Entry) -> dict[str, object]:
    """Return one row of claims.json: `spread` is the 95 % interval, `answered_by` the profile whose value it is."""
    claim, result = entry.claim, entry.result
    origin = None
    if entry.provenance is not None:
        origin = {key: entry.provenance.get(key) for key in (*_PROVENANCE, "versions", "fingerprints")}
        origin["file"] = f"{_place(entry)}/{FILE}"
    return {
        "id": claim.id,
        "slide": claim.slide,
        "claim": claim.claim,
        "kind": claim.kind,
        "verdict": entry.verdict.word,
        "value": None if result is None else result.value,
        "spread": None if result is None or result.interval is None else list(result.interval),
        "samples": [] if result is None else list(result.samples),
        "published": claim.published,
        "unit": claim.unit,
        "held": "" if claim.held is None else claim.held.text,
        "direction": "" if claim.direction is None else claim.direction.text,
        "reason": entry.verdict.reason,
        "note": "" if result is None else result.note,
        "notebook": entry.notebook or claim.notebook,
        "profile": claim.profile,
        "answered_by": entry.answered_by,
        "provenance": origin,
    }


def readme_table(entries: list[Entry]) -> str:
    """Return the compact table of README.md: claim and what is measured, published, ours with its interval, verdict."""
    body = []
    for entry in entries:
        claim = entry.claim
        text = f"{claim.claim}<br><sub>`{claim.id}`: {claim.unit}</sub>"
        body.append([text, number(claim.published), ours(entry), _verdict(entry)])
    return f"{tally(entries)}\n\n{markers.table(['Claim', 'Published', 'Ours [95 %]', 'Verdict'], body)}"


def claims_markdown(entries: list[Entry]) -> str:
    """Return results/CLAIMS.md: every claim by notebook with rules and reason, and where the numbers come from."""
    parts = [
        "# Claims",
        "Made by `make claims` from data/claims.csv and the result files; not edited by hand. The rules were fixed "
        "before the measurements. *held*: the rule is true over the whole 95 % interval over paired seeds (an exact "
        "quantity needs one value). *held in direction*: the weaker rule is, or the rule itself on the mean only.",
        tally(entries),
    ]
    for digits in dict.fromkeys(entry.claim.notebook for entry in entries):
        group = [entry for entry in entries if entry.claim.notebook == digits]
        parts.append(f"## {group[0].notebook or f'{digits} (not built yet)'}")
        header = ["Id", "Slide", "Claim", "Unit", "Published", "Ours [95 %]", "Rule / weaker", "Verdict", "Why"]
        parts.append(markers.table(header, [_full_row(entry) for entry in group]))
        parts += [f"Note: {sentence}." for sentence in (data_notes(group[0].notebook) if group[0].notebook else ())]
        origins = {_place(entry): entry.provenance for entry in group if entry.provenance is not None}
        parts += [f"{place}: {origin_text(origin)}." for place, origin in origins.items()]
    return "\n\n".join(parts) + "\n"


def tally(entries: list[Entry]) -> str:
    """Return the count of each verdict, in one line."""
    words = [entry.verdict.word for entry in entries]
    return f"{len(words)} claims: " + ", ".join(f"{words.count(w)} {w}" for w in rules.WORDS if w in words) + "."


def ours(entry: Entry) -> str:
    """Return the measured value with its interval, labelled when another profile than the asked one gave it."""
    if entry.result is None or entry.result.value is None:
        return "-"
    text = number(entry.result.value)
    if entry.result.interval is not None:
        text += f" {span_text(entry.result.interval)}"
    return text if entry.answered_by == "laptop" == entry.claim.profile else f"{text} ({entry.answered_by})"


def origin_text(origin: Mapping[str, object]) -> str:
    """Return a provenance in one line for people."""
    versions = ", ".join(f"{name} {version}" for name, version in dict(origin.get("versions") or {}).items())
    local = " with local changes" if origin.get("git_dirty") else ""
    seeds = ", ".join(str(seed) for seed in origin.get("seeds") or ()) or "none given"
    hashes = ", ".join(f"{name} {str(sha)[:12]}" for name, sha in dict(origin.get("fingerprints") or {}).items())
    machine = f"{origin.get('cpu')}, {origin.get('cores')} cores, {origin.get('threads')} thread(s) a process"
    if origin.get("accelerator"):
        machine += f", {origin['accelerator']}"
    loads = [origin.get(name) for name in ("load_start", "load_end")]
    duration = f"{origin.get('duration_s')} s" + ("" if None in loads else f", load {loads[0]:.1f} to {loads[1]:.1f}")
    return (
        f"profile {origin.get('profile')}, commit {str(origin.get('git_commit'))[:12]}{local}, {origin.get('start')}, "
        f"{duration}; {machine}; seeds {seeds}; {versions}; data {hashes or 'without fingerprint'}"
    )


def bench() -> pd.DataFrame:
    """Return data/bench.csv joined with results/bench.json, one row a key.

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


def _full_row(entry: Entry) -> list[str]:
    claim = entry.claim
    both = " / ".join(str(rule) for rule in (claim.held, claim.direction) if rule is not None) or "-"
    note = entry.result.note if entry.result is not None else ""
    why = entry.verdict.reason if not note or note in entry.verdict.reason else f"{entry.verdict.reason}. {note}"
    published = number(claim.published)
    return [f"`{claim.id}`", claim.slide, claim.claim, claim.unit, published, ours(entry), both, _verdict(entry), why]


def _verdict(entry: Entry) -> str:
    """Bold where a verdict was reached, for or against alike."""
    word = entry.verdict.word
    return f"**{word}**" if word in (rules.HELD, rules.IN_DIRECTION, rules.DID_NOT_HOLD) else word


def _place(entry: Entry) -> str:
    """The result folder as it is called in the repository."""
    place: Path = folder(entry.answered_by, entry.notebook)
    return f"results/{place.relative_to(paths.RESULTS).as_posix()}"
