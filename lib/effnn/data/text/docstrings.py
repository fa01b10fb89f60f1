"""The built-in text task: to which package does a piece of documentation belong?

Texts are runs of prose from the docstrings of scipy, pandas, matplotlib and the standard library, read with `ast` from
the files that are installed: nothing is imported and nothing is downloaded. What would give the answer away (names,
code, package names) is replaced by one neutral word. No ten words in a row stand in two splits. Versions of the
packages decide the rows, so results compare only under equal fingerprints. This file does not tokenize; the corpus for
language models is another loader's.
"""

import ast
import importlib.util
import logging
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from effnn.base import NotAvailable
from effnn.data.text.task import Split, TextTask, unit_hash

log = logging.getLogger(__name__)

PACKAGES = ("scipy", "pandas", "matplotlib")
LABELS = (*PACKAGES, "stdlib")
NEUTRAL = "xnamex"  # one lower-case word, so that a tokenizer keeps it whole
MIN_WORDS = 20
DEV_SHARE, VALIDATION_SHARE = 0.16, 0.08  # of a package's rows, in whole files, before shared runs are dropped
# Two texts that have so many words in a row in common are taken for near duplicates. Half of the shortest text: with
# one word changed, a text of 20 words still has a run of ten in common with what it was.
SHARED_RUN = MIN_WORDS // 2

# Tests are left out because some distributions do not install them; the rest is other people's code.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_SKIPPED_FILE = re.compile(r"(test_.*|.*_tests?|conftest)\.py")

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
_BODIES = ("body", "handlers", "orelse", "finalbody", "cases")
_FIELD = re.compile(r"[\w*, ]+ : ")  # "x : array_like, optional", the head of a numpydoc entry


@dataclass(frozen=True)
class Row:
    """One run of prose, the index of its package in `LABELS`, and the file it came from ("scipy/stats/_stats.py")."""

    text: str
    label: int
    file: str


def load() -> TextTask:
    """The docstring task from what is installed here; takes about 15 s (the front door caches it)."""
    splits = split_rows(collect(locate()))
    made = {name: Split([r.text for r in part], [r.label for r in part]) for name, part in splits.items()}
    return TextTask("docstrings", LABELS, **made, source="builtin: docstrings of the installed packages")


def locate() -> dict[str, Path]:
    """Folder of each package's source files, by label; none of them is imported. Raises NotAvailable."""
    folders = {"stdlib": Path(sysconfig.get_path("stdlib"))}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise NotAvailable(
                f"the built-in text task reads the docstrings of {name}: install it (pip install {name})"
            )
        folders[name] = Path(spec.submodule_search_locations[0])
    return {name: folders[name] for name in LABELS}


def collect(folders: Mapping[str, Path]) -> list[Row]:
    """All runs of at least `MIN_WORDS` words, cleaned, in the order of label, file and place; no text occurs twice.

    A text found in two packages is dropped altogether: it has no right answer.
    """
    first: dict[str, Row] = {}
    ambiguous: set[str] = set()
    for label, (name, folder) in enumerate(folders.items()):
        for path in sorted(_source_files(folder)):
            file = f"{name}/{path.relative_to(folder).as_posix()}"
            for docstring in _docstrings(path):
                for run in prose_runs(docstring):
                    if _word_count(run) < MIN_WORDS:
                        continue
                    text = neutralize(run)
                    if _word_count(text) < MIN_WORDS:
                        continue
                    known = first.setdefault(text, Row(text, label, file))
                    if known.label != label:
                        ambiguous.add(text)
    return [row for row in first.values() if row.text not in ambiguous]


def split_rows(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of "train", "validation" and "dev": whole files, less the held-out rows that repeat another split.

    Packages paste the same sentences into many files. A validation row that has `SHARED_RUN` words in a row in common
    with a train row is dropped, and a dev row that has them in common with a train or validation row. Putting such
    files on one side instead would put half of all rows into one group.
    """
    place = split_files(rows)
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


def split_files(rows: Sequence[Row]) -> dict[str, str]:
    """Split ("train", "validation", "dev") of every file: neighbours in a file are alike, so they stay together.

    The files of a package are ordered by the hash of their name; the first ones, up to the share of the package's rows,
    are for dev, the next ones for validation. So each package has about the same share in every split.
    """
    sizes = Counter((row.label, row.file) for row in rows)
    totals = Counter(row.label for row in rows)
    place, used = {}, Counter()
    for label, file in sorted(sizes, key=lambda item: unit_hash(item[1])):
        share = used[label] / totals[label]
        place[file] = "dev" if share < DEV_SHARE else "validation" if share < DEV_SHARE + VALIDATION_SHARE else "train"
        used[label] += sizes[label, file]
    return place


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


def _source_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*.py"):
        inside = path.relative_to(folder)
        if not _SKIPPED_FOLDERS.intersection(inside.parts[:-1]) and not _SKIPPED_FILE.fullmatch(inside.name):
            yield path


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files are not our reader's concern
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:  # templates and files for another Python are part of some packages
        log.debug("skipped %s: %s", path, error)
        return
    # Only statements can hold a definition, and skipping the expressions saves a third of the time.
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
        inner = [child for name in _BODIES for child in getattr(node, name, ())]
        pending.extend(reversed(inner))
