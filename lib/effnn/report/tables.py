"""The ledger as files for people and programs: claims.json, CLAIMS.md and the lines of README.md.

Everything here is a function of data/ and results/ alone, so writing twice changes nothing.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from effnn import paths
from effnn.base import write_json, write_text
from effnn.report import bench, markers, rules
from effnn.report.claims import Entry, data_notes, ledger, title
from effnn.report.results import FILE, folder
from effnn.report.rules import number, span_text

log = logging.getLogger(__name__)

# The part of a provenance that claims.json shows; all of it is in the result file that is named with it.
_PROVENANCE = (
    *("git_commit", "git_dirty", "start", "duration_s", "load_start", "load_end"),
    *("cpu", "cores", "threads", "accelerator", "seeds"),
)


def write_claims() -> list[Entry]:
    """Write claims.json, CLAIMS.md and BENCH.md in results/ and the lines between README.md's markers.

    Returns the ledger.
    """
    entries = ledger()
    write_json(paths.RESULTS / "claims.json", [as_record(entry) for entry in entries])
    write_text(paths.RESULTS / "CLAIMS.md", claims_markdown(entries))
    write_text(paths.RESULTS / "BENCH.md", bench.bench_markdown())
    readme = paths.HOME / "README.md"
    if readme.is_file():
        markers.fill_file(readme, "claims", readme_lines(entries))
    else:
        log.warning("%s does not exist; its table of verdicts is not written", readme)
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


def readme_lines(entries: list[Entry]) -> str:
    """Return the table of README.md, one row per notebook that exists with its verdicts, and a line for the others."""
    body, waiting = [], []
    for group in by_notebook(entries):
        if group[0].notebook is None:
            waiting += group
        else:
            link = f"[{title(group[0])}](notebooks/{group[0].notebook}.ipynb)"
            body.append([link, str(len(group)), counts(group)])
    lines = markers.table(["Notebook", "Claims", "Verdicts"], body)
    if waiting:
        rooms = ", ".join(f"{len(group)} in {title(group[0])}" for group in by_notebook(waiting))
        lines += f"\n\nNot built yet: {len(waiting)} claims ({rooms})."
    return lines


def claims_markdown(entries: list[Entry]) -> str:
    """Return results/CLAIMS.md: every claim by notebook with rules and reason, and where the numbers come from."""
    parts = [
        "# Claims",
        "Made by `make claims` from data/claims.csv and the result files; not edited by hand. The rules were fixed "
        "before the measurements. *held*: the rule is true over the whole 95 % interval over paired seeds (an exact "
        "quantity needs one value). *held in direction*: the weaker rule is, or the rule itself on the mean only.",
        tally(entries),
    ]
    for group in by_notebook(entries):
        parts.append(f"## {group[0].notebook or f'{group[0].claim.notebook} (not built yet)'}")
        header = ["Id", "Slide", "Claim", "Unit", "Published", "Ours [95 %]", "Rule / weaker", "Verdict", "Why"]
        parts.append(markers.table(header, [_full_row(entry) for entry in group]))
        parts += [f"Note: {sentence}." for sentence in (data_notes(group[0].notebook) if group[0].notebook else ())]
        origins = {_place(entry): entry.provenance for entry in group if entry.provenance is not None}
        parts += [f"{place}: {origin_text(origin)}." for place, origin in origins.items()]
    return "\n\n".join(parts) + "\n"


def by_notebook(entries: list[Entry]) -> list[list[Entry]]:
    """Return the entries in one list per notebook, in the order of the notebooks' numbers."""
    digits = sorted({entry.claim.notebook for entry in entries})
    return [[entry for entry in entries if entry.claim.notebook == one] for one in digits]


def counts(entries: list[Entry]) -> str:
    """Return how often each verdict was given, in the order of `rules.WORDS`."""
    words = [entry.verdict.word for entry in entries]
    return ", ".join(f"{words.count(word)} {word}" for word in rules.WORDS if word in words)


def tally(entries: list[Entry]) -> str:
    """Return the number of claims and the count of each verdict, in one line."""
    return f"{len(entries)} claims: {counts(entries)}."


def ours(entry: Entry) -> str:
    """Return the measured value with its interval, and the profile that gave it unless that is the laptop as asked."""
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
