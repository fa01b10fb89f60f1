"""The built-in text task: to which package does a piece of documentation belong?

Texts are runs of prose from the docstrings of scipy, pandas, matplotlib and the standard library. What would give the
answer away (names, code, package names) is replaced by one neutral word. No ten words in a row stand in two splits.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from effnn.data import docstrings
from effnn.data.splits import split_files
from effnn.data.text.task import Split, TextTask

log = logging.getLogger(__name__)

LABELS = ("scipy", "pandas", "matplotlib", docstrings.STDLIB)
NEUTRAL = "xnamex"  # one lower-case word, so that a tokenizer keeps it whole
MIN_WORDS = 20
HELD_OUT = {"dev": 0.16, "validation": 0.08}  # of a package's rows, in whole files, before shared runs are dropped
# Two texts that have so many words in a row in common are taken for near duplicates. Half of the shortest text: with
# one word changed, a text of 20 words still has a run of ten in common with what it was.
SHARED_RUN = MIN_WORDS // 2

_PACKAGE_WORDS = (
    "scipy|pandas|matplotlib|numpy|c?python|scikit|scikits|sklearn|pylab|pyplot|mpl|plt|np|pd|sp|pyarrow|cython|pypi"
)
_NAMES = [  # the order matters: a longer form is taken before the shorter one inside it
    re.compile(r"\b(?:https?|ftp)://\S+|\bwww\.\S+|\bdoi:\S+", re.I),
    re.compile(r"``.+?``|(?::[\w:+.-]+:)?`[^`]+`_{0,2}|\*{1,2}\w[\w.]*\*{1,2}|\|[^|\s]+\||\$[^$]+\$"),  # spans
    re.compile(r"\b[\w.]+\([^()]*\)"),  # calls
    re.compile(r"\b(?!(?:e\.g|i\.e)\b)[A-Za-z_]\w*(?:\.\w+)+\b"),  # dotted
    re.compile(r"\b\w*_\w*\b"),  # snake_case
    re.compile(r"\b(?:[a-z]+[A-Z]\w*|[A-Z][a-z0-9]+[A-Z]\w*|[A-Z]{2,}[a-z]+\w*)\b"),  # camelCase
    re.compile(rf"\b(?:{_PACKAGE_WORDS})\d*\b", re.I),
]
_REPEATED = re.compile(rf"{NEUTRAL}(?:\W+{NEUTRAL})+")
_FIELD = re.compile(r"[\w*, ]+ : ")  # "x : array_like, optional", the head of a numpydoc entry


@dataclass(frozen=True)
class Row:
    """One run of prose, the index of its package in `LABELS`, and the file it came from ("scipy/stats/_stats.py")."""

    text: str
    label: int
    file: str


def load() -> TextTask:
    """The docstring task from what is installed here; takes about 15 s (the front door caches it)."""
    splits = split_rows(collect(docstrings.locate(LABELS)))
    made = {name: Split([r.text for r in part], [r.label for r in part]) for name, part in splits.items()}
    return TextTask("docstrings", LABELS, **made, source="builtin: docstrings of the installed packages")


def collect(folders: Mapping[str, Path]) -> list[Row]:
    """All runs of at least `MIN_WORDS` words, neutral, in the order of label, file and place; no text occurs twice.

    A text found in two packages is dropped from both: it has no right answer.
    """
    labels = {name: label for label, name in enumerate(folders)}
    first: dict[str, Row] = {}
    ambiguous: set[str] = set()
    for file, found in docstrings.read(folders).items():
        label = labels[file.partition("/")[0]]
        for run in (run for text in found for run in prose_runs(text)):
            # counted before, too, since making a text neutral takes most of the time
            if _word_count(run) < MIN_WORDS or _word_count(text := neutralize(run)) < MIN_WORDS:
                continue
            if first.setdefault(text, Row(text, label, file)).label != label:
                ambiguous.add(text)
    return [row for row in first.values() if row.text not in ambiguous]


def split_rows(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of "train", "validation" and "dev": whole files, less the held-out rows that repeat another split.

    Packages paste the same sentences into many files. A validation row that has `SHARED_RUN` words in a row in common
    with a train row is dropped, and a dev row that has them in common with a train or validation row. Putting such
    files on one side instead would put half of all rows into one group.
    """
    place = split_files(Counter(row.file for row in rows), HELD_OUT)
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "dev": []}
    for row in rows:
        splits[place[row.file]].append(row)
    seen: set[str] = set()
    for name, part in splits.items():
        runs = [_word_runs(row.text) for row in part]
        splits[name] = [row for row, found in zip(part, runs, strict=True) if seen.isdisjoint(found)]
        seen.update(*runs)
        log.info("docstrings: %s keeps %d of %d rows", name, len(splits[name]), len(part))
    return splits


def prose_runs(docstring: str) -> list[str]:
    """Runs of prose of a docstring: neighbouring paragraphs of one indentation, each run on one line.

    Doctests, literal blocks, directives, section headings and the heads of numpydoc entries end a run and are left out.
    """
    runs: list[str] = []
    lines: list[str] = []
    indent, block_indent, in_doctest = 0, None, False

    def close() -> None:
        if lines:
            runs.append(" ".join(lines))
            lines.clear()

    for raw in docstring.splitlines():
        line = raw.strip()
        here = len(raw) - len(raw.lstrip())
        if not line:
            in_doctest = False
            continue
        if block_indent is not None and here > block_indent:  # body of a directive or literal block
            continue
        block_indent = None
        if line.startswith(">>>") or in_doctest:
            in_doctest = True
            close()
        elif line.startswith(".. "):
            block_indent = here
            close()
        elif not re.search(r"[A-Za-z]{2}", line):  # an underline (its heading is the line before), a rule, a number
            if lines and set(line) <= set("-=~^*+#\"'`."):
                lines.pop()
            close()
        elif _FIELD.match(line) and len(line.split()) < 12:
            close()
        else:
            if lines and here != indent:
                close()
            lines.append(line)
            indent = here
            if line.endswith("::"):
                block_indent = here
                close()
    close()
    return runs


def neutralize(text: str) -> str:
    """The text with names, code, URLs and package names replaced by `NEUTRAL` and each digit by 0."""
    for pattern in _NAMES:
        text = pattern.sub(f" {NEUTRAL} ", text)
    text = re.sub(r"\d", "0", " ".join(text.split()))
    return _REPEATED.sub(NEUTRAL, text)


def _word_count(text: str) -> int:
    return sum(word != NEUTRAL for word in re.findall(r"[A-Za-z]+", text))


def _word_runs(text: str) -> set[str]:
    """All runs of `SHARED_RUN` words, without case and punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + SHARED_RUN]) for i in range(len(words) - SHARED_RUN + 1)}
