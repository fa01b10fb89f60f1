"""results/report.html: every slide with its claims, figures, published beside measured, and the verdict, in one file.

The page loads nothing: style and pictures are inside, so it can be mailed, printed and read without a network. It is
built from the result files alone and computes no number. The page itself is the template report.html.jinja.
"""

import base64
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from effnn import paths
from effnn.base import write_text
from effnn.report import bench, rules, tables
from effnn.report.claims import PROFILES, Entry, data_notes, ledger, title
from effnn.report.results import Results, load
from effnn.report.rules import number, span_text

HERE = Path(__file__).parent

# The sign repeats what the colour says, for those who do not see it.
_CHIPS = {
    rules.HELD: ("held", "\N{CHECK MARK}"),
    rules.IN_DIRECTION: ("half", "\N{ALMOST EQUAL TO}"),
    rules.DID_NOT_HOLD: ("not", "\N{MULTIPLICATION SIGN}"),
}


@dataclass(frozen=True)
class Picture:
    """One figure of one run.

    key: its name.
    caption: below it.
    claims: ids of all claims that it answers.
    owner: id of the claim that it is shown with, None for none.
    address: the SVG as a data address, so that ids inside two drawings cannot clash.
    """

    key: str
    caption: str
    claims: tuple[str, ...]
    owner: str | None
    address: str


def build_report() -> Path:
    """Write results/report.html from data/claims.csv, results/ and data/bench.csv; returns its path."""
    entries = ledger()
    words = [entry.verdict.word for entry in entries]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "span": span_text, "prose": _prose}
    page = environment.get_template("report.html.jinja").render(
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        entries=entries,
        tally=[(word, words.count(word)) for word in rules.WORDS if word in words],
        sections=[_section(group) for group in tables.by_notebook(entries)],
        bench=bench.bench().to_dict("records"),
        look=lambda word: _CHIPS.get(word, ("none", "\N{EN DASH}")),
    )
    return write_text(paths.RESULTS / "report.html", page + "\n")


def _section(group: list[Entry]) -> dict[str, object]:
    """What the template needs of one notebook."""
    name = group[0].notebook
    found = [results for profile in PROFILES if name and (results := load(profile, name)) is not None]
    slides = dict.fromkeys(entry.claim.slide for entry in group)
    return {
        "digits": group[0].claim.notebook,
        "title": title(group[0]) + ("" if name else " (not built yet)"),
        "slides": {slide: [entry for entry in group if entry.claim.slide == slide] for slide in slides},
        "pictures": _pictures(found, {entry.claim.id for entry in group}),
        "origins": [(results.profile, tables.origin_text(results.provenance)) for results in found],
        "notes": data_notes(name) if name else [],
    }


def _pictures(found: list[Results], ids: set[str]) -> list[Picture]:
    """Give each figure to the first claim that it answers, so that no picture is in the file twice."""
    pictures = []
    for results in found:
        for key, figure in results.figures.items():
            caption = figure.caption or key.replace("_", " ")
            caption += "" if results.profile == "laptop" else f" ({results.profile})"
            owner = next((claim for claim in figure.claims if claim in ids), None)
            svg = base64.b64encode((results.folder / f"{key}.svg").read_bytes()).decode()
            pictures.append(Picture(key, caption, figure.claims, owner, f"data:image/svg+xml;base64,{svg}"))
    return pictures


def _prose(text: str) -> Markup:
    """Escape a rule or a reason; what is in back quotes is code."""
    for signs, one in (("<=", "\N{LESS-THAN OR EQUAL TO} "), (">=", "\N{GREATER-THAN OR EQUAL TO} "), ("==", "= ")):
        text = text.replace(signs, one)
    pieces = str(escape(text)).split("`")
    return Markup("".join(f"<code>{piece}</code>" if place % 2 else piece for place, piece in enumerate(pieces)))
