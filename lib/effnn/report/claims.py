"""The ledger: every claim of the talk (data/claims.csv), what was measured, and the verdict that its rules give.

A claim's id is the result key that answers it. Claims of the profile `laptop` are answered by results/laptop, those of
`study` by results/study or, labelled, by the laptop's value until the study has run. Smoke results never enter.
"""

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from effnn import paths
from effnn.base import InvalidInput
from effnn.report import rules
from effnn.report.provenance import busy, fingerprint_differences
from effnn.report.results import Results, ResultWriter, Value, command, load
from effnn.report.rules import Rule, Verdict, number, span_text

COLUMNS = ("id", "slide", "claim", "kind", "published", "unit", "held", "direction", "notebook", "profile")
PROFILES = ("laptop", "study")  # the profiles whose results may enter the ledger
_ID = re.compile(r"[a-z0-9]+(\.[a-z0-9_]+)+")


@dataclass(frozen=True)
class Claim:
    """One row of data/claims.csv.

    id: also the key of the result that answers it, e.g. "ltp.half".
    slide: of the talk, or the paper.
    claim: what is claimed, in one sentence.
    kind: one of `rules.KINDS`.
    published: the number, None where the talk gives none.
    unit: what is measured.
    held: the rule, fixed before the measurement.
    direction: the weaker rule, None for none.
    notebook: its two digits, "01".
    profile: the profile that must answer it.
    """

    id: str
    slide: str
    claim: str
    kind: str
    published: float | None
    unit: str
    held: Rule | None
    direction: Rule | None
    notebook: str
    profile: str


@dataclass(frozen=True)
class Entry:
    """A claim with its verdict.

    claim: the row.
    verdict: the word and the reason.
    result: the value that answered it, None without one.
    answered_by: the profile that the value comes from.
    notebook: the notebook's name, None while it is not built.
    provenance: of the run that gave the value.
    """

    claim: Claim
    verdict: Verdict
    result: Value | None = None
    answered_by: str | None = None
    notebook: str | None = None
    provenance: Mapping[str, object] | None = None


def rows(path: Path | None = None) -> list[Claim]:
    """Return the claims in file order (data/claims.csv by default).

    Raises InvalidInput, naming file and line, for a missing column, a repeated or malformed id, an unknown kind or
    profile, a rule that cannot be read, a direction rule that is not the weaker one, or a published value that is not a
    number.
    """
    path = path or paths.CLAIMS
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := [column for column in COLUMNS if column not in (reader.fieldnames or ())]:
            raise InvalidInput(f"{path}: missing column(s) {', '.join(missing)}; expected {', '.join(COLUMNS)}")
        claims: dict[str, Claim] = {}
        for row in reader:
            where = f"{path} line {reader.line_num}"
            try:
                claim = _claim(row)
            except InvalidInput as error:
                raise InvalidInput(f"{where} ({row['id'] or 'no id'}): {error}") from None
            if claim.id in claims:
                raise InvalidInput(f"{where}: id {claim.id!r} is there twice; an id is the key of one result")
            claims[claim.id] = claim
    return list(claims.values())


def verdict(
    row: Claim,
    value: float | None,
    interval: tuple[float, float] | None = None,
    samples: Iterable[float] = (),
    note: str = "",
) -> Verdict:
    """Return the verdict of a row's rules on a value.

    row: the claim.
    value, interval, samples, note: as `effnn.report.rules.judge` takes them.
    """
    return rules.judge(row.kind, row.held, row.direction, value, interval, tuple(samples), note)


def verdict_table(ids: Iterable[str] | str, source: ResultWriter | Results) -> pd.DataFrame:
    """Return one row per claim for a notebook's closing cell: claim, published, ours, interval, unit, verdict, reason.

    ids: claim ids, or one prefix such as "ltp" for all its claims. A key that `source` lacks reads "no result yet".
    """
    known = {claim.id: claim for claim in rows()}
    wanted = [name for name in known if name.split(".")[0] == ids] if isinstance(ids, str) else list(ids)
    if unknown := [name for name in wanted if name not in known]:
        raise InvalidInput(f"no claim {', '.join(unknown)} in {paths.CLAIMS}; there are: {', '.join(known)}")
    if not wanted:
        prefixes = dict.fromkeys(name.split(".")[0] for name in known)
        raise InvalidInput(f"no claim begins with {ids!r}; the prefixes are {', '.join(prefixes)}")
    cores = (source.provenance if isinstance(source, Results) else source.provenance()).get("cores")
    table = []
    for name in wanted:
        claim, value = known[name], source.values.get(name)
        missing = Verdict(rules.NO_RESULT, f"the run recorded no value {name!r}")
        given, measured = (missing, Value(None)) if value is None else (_judge(claim, value, cores), value)
        table.append(
            {
                "id": name,
                "claim": claim.claim,
                "published": number(claim.published),
                "ours": number(measured.value),
                "interval": span_text(measured.interval),
                "unit": claim.unit,
                "verdict": given.word,
                "reason": given.reason,
            }
        )
    return pd.DataFrame(table).set_index("id")


def ledger() -> list[Entry]:
    """Return every claim joined with the results that exist, in the order of data/claims.csv.

    A damaged result file raises InvalidInput.
    """
    found: dict[tuple[str, str], Results | None] = {}

    def results(profile: str, notebook: str) -> Results | None:
        if (profile, notebook) not in found:
            found[profile, notebook] = load(profile, notebook)
        return found[profile, notebook]

    entries = []
    for claim in rows():
        notebook = notebook_of(claim.notebook)
        if notebook is None:
            reason = f"notebooks/{claim.notebook}_*.ipynb does not exist"
            entries.append(Entry(claim, Verdict(rules.NOT_BUILT, reason)))
            continue
        tried = PROFILES[::-1] if claim.profile == "study" else (claim.profile,)
        sources = [source for source in (results(profile, notebook) for profile in tried) if source is not None]
        answer = next((source for source in sources if claim.id in source.values), None)
        if answer is None:
            reason = f"`{command(claim.profile, notebook)}` makes it"
            if sources:
                reason = f"results/{sources[0].profile}/{notebook} has no value {claim.id!r}; {reason}"
            entries.append(Entry(claim, Verdict(rules.NO_RESULT, reason), notebook=notebook))
            continue
        value = answer.values[claim.id]
        given = _judge(claim, value, answer.provenance.get("cores"))
        if answer.profile != claim.profile:
            reason = f"{given.reason} (the laptop's value; `{command(claim.profile, notebook)}` makes the study's)"
            given = Verdict(given.word, reason)
        entries.append(Entry(claim, given, value, answer.profile, notebook, answer.provenance))
    return entries


def notebook_of(digits: str) -> str | None:
    """Return the file name without suffix of the notebook with this number, or None where it is not built yet."""
    names = sorted(path.stem for path in paths.NOTEBOOKS.glob(f"{digits}_*.ipynb"))
    if len(names) > 1:
        raise InvalidInput(f"several notebooks begin with {digits}_: {', '.join(names)}; a number belongs to one")
    return names[0] if names else None


def title(entry: Entry) -> str:
    """Return the number and the first heading of a claim's notebook; the claim's prefix while it is not built."""
    digits, name = entry.claim.notebook, entry.notebook
    if name is None:
        return f"{digits} {entry.claim.id.split('.')[0]}"
    cells = json.loads((paths.NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")).get("cells", ())
    text = "\n".join("".join(cell["source"]) for cell in cells if cell.get("cell_type") == "markdown")
    heading = re.search(r"^# (.*)", text, flags=re.MULTILINE)
    return f"{digits} {heading[1].strip().removeprefix(digits).lstrip(' .:-')}" if heading else name.replace("_", " ")


def data_notes(notebook: str) -> list[str]:
    """Return a sentence for each data set that differs between a notebook's laptop and study results."""
    laptop, study = (load(profile, notebook) for profile in PROFILES)
    if laptop is None or study is None:
        return []
    return [
        sentence.replace("the earlier result", "the study").replace("earlier", "study")
        for sentence in fingerprint_differences(study.provenance, laptop.provenance)
    ]


def _judge(claim: Claim, value: Value, cores: int | None) -> Verdict:
    given = verdict(claim, value.value, value.interval, value.samples, value.note)
    machine = busy(value.load, cores) if value.value is not None else ""
    return Verdict(given.word, f"{given.reason}; {machine}") if machine else given


def _claim(row: Mapping[str, str | None]) -> Claim:
    """Read one row; None marks a cell that the row is too short to have, and the key None cells too many."""
    if None in row or any(row[column] is None for column in COLUMNS):
        raise InvalidInput("the row has too many or too few cells; quote a text that contains a comma")
    cell = {column: row[column].strip() for column in COLUMNS}
    if not _ID.fullmatch(cell["id"]):
        raise InvalidInput(f"id {cell['id']!r}: expected room.name in lower case, e.g. 'ltp.half'")
    if cell["kind"] not in rules.KINDS:
        raise InvalidInput(f"unknown kind {cell['kind']!r}; the kinds are {', '.join(rules.KINDS)}")
    if cell["profile"] not in PROFILES:
        raise InvalidInput(f"unknown profile {cell['profile']!r}; a claim is answered by {' or '.join(PROFILES)}")
    if not re.fullmatch(r"\d\d", cell["notebook"]):
        raise InvalidInput(f"notebook {cell['notebook']!r}: expected its two digits, e.g. '01'")
    if not cell["slide"] or not cell["claim"]:
        raise InvalidInput("slide and claim may not be empty")
    held, direction = Rule.parse(cell["held"]), Rule.parse(cell["direction"])
    if held is None and (direction is not None or cell["kind"] not in ("figure", "table")):
        raise InvalidInput(f"kind {cell['kind']!r} needs a `held` rule; only figures and tables may have none")
    if held is not None and direction is not None and not direction.contains(held):
        raise InvalidInput(f"direction rule {direction} must be weaker than held rule {held}")
    return Claim(**cell | {"published": _published(cell["published"]), "held": held, "direction": direction})


def _published(text: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidInput(f"published {text!r} is not a number; leave it empty where the talk gives none")
    return value
