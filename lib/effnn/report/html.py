"""results/report.html: every slide with its claims, figures, published beside measured, and the verdict, in one file.

The page loads nothing: style and pictures are inside, so it can be mailed, printed and read without a network. It is
built from the result files alone; it computes no number.
"""

import base64
import json
from html import escape
from pathlib import Path

from effnn import paths
from effnn.base import write_text
from effnn.report import rules, tables
from effnn.report.claims import PROFILES, Entry, data_notes, ledger
from effnn.report.results import Results, load
from effnn.report.rules import number, span_text

STYLE = Path(__file__).with_name("report.css")
TITLE = "Efficient inference and training of large neural network models: what held"

# The sign repeats what the colour says, for those who do not see it.
_CHIPS = {
    rules.HELD: ("held", "\N{CHECK MARK}"),
    rules.IN_DIRECTION: ("half", "\N{ALMOST EQUAL TO}"),
    rules.DID_NOT_HOLD: ("not", "\N{MULTIPLICATION SIGN}"),
}


def build_report() -> Path:
    """Write results/report.html from data/claims.csv, results/ and data/bench.csv; returns its path."""
    entries = ledger()
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.claim.notebook, []).append(entry)
    groups = dict(sorted(groups.items()))
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(TITLE)}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f"{_header(entries, groups)}\n<main>\n"
        + "\n".join(_notebook(digits, group) for digits, group in groups.items())
        + f"\n{_bench()}\n</main>\n{_footer()}\n</body>\n</html>\n"
    )
    return write_text(paths.RESULTS / "report.html", page)


def _header(entries: list[Entry], groups: dict[str, list[Entry]]) -> str:
    words = [entry.verdict.word for entry in entries]
    tally = "".join(f"<li>{_chip(word, words.count(word))}</li>" for word in rules.WORDS if word in words)
    links = "".join(
        f'<li><a href="#notebook-{digits}">{escape(_title(digits, group))}</a></li>' for digits, group in groups.items()
    )
    return (
        f"<header>\n<h1>{escape(TITLE)}</h1>\n"
        f"<p>{len(entries)} claims of the talk, each with rules fixed before it was measured. "
        "<b>Held</b>: the rule is true over the whole 95&nbsp;% interval over paired seeds; an exact quantity needs "
        "one value. <b>Held in direction</b>: the weaker rule is, or the rule itself on the mean only. Published "
        "numbers come from the machines of the talk and the papers; times measured here are ratios within one "
        "run.</p>\n"
        f'<ul class="tally">{tally}</ul>\n'
        f'<nav aria-label="notebooks"><ul>{links}<li><a href="#bench">Benchmarks</a></li></ul></nav>\n</header>'
    )


def _notebook(digits: str, group: list[Entry]) -> str:
    """One notebook: its claims by slide with their figures, then the figures that belong to no claim."""
    name = group[0].notebook
    found = [results for profile in PROFILES if name and (results := load(profile, name)) is not None]
    owners = _owners(found, {entry.claim.id for entry in group})
    parts = [f'<section id="notebook-{digits}">\n<h2>{escape(_title(digits, group))}</h2>']
    for slide in dict.fromkeys(entry.claim.slide for entry in group):
        parts.append(f"<h3>Slide: {escape(slide)}</h3>")
        for entry in group:
            if entry.claim.slide == slide:
                shown = [_figure(results, key) for results, key, owner in owners if owner == entry.claim.id]
                also = [(key, owner) for results, key, owner in owners if _answers(results, key, entry, owner)]
                parts.append(_claim(entry, shown, also))
    rest = [_figure(results, key) for results, key, owner in owners if owner is None]
    if rest:
        parts.append(f'<h3>More figures</h3>\n<div class="card">{"".join(rest)}</div>')
    notes = [f"Note: {sentence}." for sentence in (data_notes(name) if name else ())]
    lines = "".join(f"<dt>{escape(r.profile)}</dt><dd>{escape(tables.origin_text(r.provenance))}</dd>" for r in found)
    if lines:
        parts.append(f'<dl class="origin">{lines}</dl>')
    parts += [f'<p class="origin">{escape(note)}</p>' for note in notes]
    return "\n".join([*parts, "</section>"])


def _owners(found: list[Results], ids: set[str]) -> list[tuple[Results, str, str | None]]:
    """Give each figure to the first claim that it answers, so that no picture is in the file twice."""
    return [
        (results, key, next((claim for claim in figure.claims if claim in ids), None))
        for results in found
        for key, figure in results.figures.items()
    ]


def _answers(results: Results, key: str, entry: Entry, owner: str | None) -> bool:
    return owner is not None and owner != entry.claim.id and entry.claim.id in results.figures[key].claims


def _claim(entry: Entry, shown: list[str], also: list[tuple[str, str]]) -> str:
    claim, result = entry.claim, entry.result
    measured = "-" if result is None else number(result.value)
    spread = ""
    if result is not None and result.interval is not None:
        spread = f" <small>95&nbsp;% {span_text(result.interval)}, {len(result.samples)} seeds</small>"
    if result is not None and result.value is not None:
        spread += f" <small>({entry.answered_by})</small>"
    both = " / ".join(rule.text for rule in (claim.held, claim.direction) if rule is not None) or "none"
    note = f" {result.note}" if result is not None and result.note not in entry.verdict.reason else ""
    links = "".join(f'<p class="why">See also the figure <a href="#{to}">{escape(key)}</a>.</p>' for key, to in also)
    return (
        f'<article class="card" id="{escape(claim.id)}">\n<div class="head"><h4>{escape(claim.claim)}</h4>'
        f"{_chip(entry.verdict.word)}</div>\n"
        f'<dl class="numbers"><div><dt>published</dt><dd>{escape(number(claim.published))}</dd></div>'
        f"<div><dt>measured here</dt><dd>{escape(measured)}{spread}</dd></div>"
        f"<div><dt>rule / weaker rule</dt><dd><small>{_prose(both)}</small></dd></div></dl>\n"
        f'<p class="why">What is measured (<code>{escape(claim.id)}</code>): {escape(claim.unit)}.<br>'
        f"Why: {_prose(entry.verdict.reason + '.' + note)}</p>\n{''.join(shown)}{links}</article>"
    )


def _figure(results: Results, key: str) -> str:
    """The SVG as a data address: isolated, so that the ids of two drawings cannot meet."""
    caption = results.figures[key].caption or key.replace("_", " ")
    if results.profile != "laptop":
        caption += f" ({results.profile})"
    picture = base64.b64encode((results.folder / f"{key}.svg").read_bytes()).decode()
    return (
        f'<figure><img src="data:image/svg+xml;base64,{picture}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _bench() -> str:
    rows = []
    for line in tables.bench().to_dict("records"):
        value = "-"
        if line["measured"]:
            value = f"{number(line['median'])} [{number(line['min'])}, {number(line['max'])}]"
        cells = (line["key"], line["bar"], value, line["state"], f"{line['meaning']} {line['note']}".strip())
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("key", "bar", "median [min, max]", "state", "what is measured"))
    return (
        '<section id="bench">\n<h2>Benchmarks</h2>\n<div class="card scroll"><table><thead><tr>'
        f"{head}</tr></thead><tbody>\n{chr(10).join(rows)}\n</tbody></table></div>\n</section>"
    )


def _footer() -> str:
    return (
        "<footer><p>Built by <code>make report</code> from the result files; the provenance of each number is printed "
        "below its notebook. <code>make reproduce</code> and <code>make study</code> make the "
        "results again.</p></footer>"
    )


def _title(digits: str, group: list[Entry]) -> str:
    """The notebook's number and its own first heading; the prefixes of its claims while it is not built."""
    if group[0].notebook is None:
        rooms = ", ".join(dict.fromkeys(entry.claim.id.split(".")[0] for entry in group))
        return f"{digits} {rooms} (not built yet)"
    cells = json.loads((paths.NOTEBOOKS / f"{group[0].notebook}.ipynb").read_text(encoding="utf-8")).get("cells", ())
    for cell in cells:
        for line in "".join(cell["source"]).splitlines() if cell.get("cell_type") == "markdown" else ():
            if line.startswith("# "):
                return f"{digits} {line[2:].strip().removeprefix(digits).lstrip(' .:-')}"
    return group[0].notebook.replace("_", " ")


def _chip(word: str, count: int | None = None) -> str:
    look, sign = _CHIPS.get(word, ("none", "\N{EN DASH}"))
    return f'<span class="chip {look}">{sign} {word}{"" if count is None else f": {count}"}</span>'


def _prose(text: str) -> str:
    """Escape a rule or a reason; what stands in back quotes is code."""
    text = escape(text).replace("&lt;=", "\N{LESS-THAN OR EQUAL TO} ").replace("&gt;=", "\N{GREATER-THAN OR EQUAL TO} ")
    pieces = text.replace("==", "= ").split("`")
    return "".join(f"<code>{piece}</code>" if place % 2 else piece for place, piece in enumerate(pieces))
