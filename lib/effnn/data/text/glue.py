"""GLUE tasks from the published TSV files in a folder, or from the hub's copy of them.

`FORMATS` is the one table of what each file looks like. The files are read strictly: a bad row stops the reading with
its file and line, except for the few short rows that QQP was published with. The unlabelled test.tsv is not read.
"""

import hashlib
import logging
import math
from dataclasses import dataclass
from pathlib import Path

from effnn.base import InvalidInput
from effnn.data import hub
from effnn.data.files.reading import published_files
from effnn.data.splits import unit_hash
from effnn.data.text.task import Split, TextTask

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Format:
    """Columns of one task's files.

    labels: names of the classes in the order of their indices; empty for scores (then 0 to 5).
    text, label: column names in the header line, or column numbers (int) where the file has no header.
    written: how each class is written in the file.
    hub_text: the hub's names of the text columns.
    columns: their number, where the file has no header.
    config: the hub's configuration, where it is not named as the task.
    dev, hub_dev: stem of the dev file, and the hub's split.
    short_rows: rows of too few columns that the published training file is known to hold; they are skipped.
    """

    labels: tuple[str, ...]
    text: tuple[str | int, ...]
    label: str | int
    written: tuple[str, ...]
    hub_text: tuple[str, ...]
    columns: int | None = None
    config: str = ""
    dev: str = "dev"
    hub_dev: str = "validation"
    short_rows: int = 0


_SENTENCES = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = {
    "labels": ("entailment", "neutral", "contradiction"),
    "text": _SENTENCES,
    "label": "gold_label",
    "written": ("entailment", "neutral", "contradiction"),
    "hub_text": ("premise", "hypothesis"),
    "config": "mnli",
}
FORMATS = {
    "sst2": Format(("negative", "positive"), ("sentence",), "label", ("0", "1"), ("sentence",)),
    "cola": Format(("unacceptable", "acceptable"), (3,), 1, ("0", "1"), ("sentence",), columns=4),
    "mrpc": Format(("not_equivalent", "equivalent"), ("#1 String", "#2 String"), "Quality", ("0", "1"), _SENTENCES),
    "qqp": Format(
        ("not_duplicate", "duplicate"),
        ("question1", "question2"),
        "is_duplicate",
        ("0", "1"),
        ("question1", "question2"),
        short_rows=10,
    ),
    "stsb": Format((), _SENTENCES, "score", (), _SENTENCES),
    "mnli": Format(**_MNLI, dev="dev_matched", hub_dev="validation_matched"),
    "mnli_mismatched": Format(**_MNLI, dev="dev_mismatched", hub_dev="validation_mismatched"),
    "qnli": Format(_ENTAILMENT, ("question", "sentence"), "label", _ENTAILMENT, ("question", "sentence")),
    "rte": Format(_ENTAILMENT, _SENTENCES, "label", _ENTAILMENT, _SENTENCES),
}


def load_folder(name: str, folder: str | Path, seed: int = 0) -> TextTask:
    """The task from `train.tsv` and `dev.tsv` (MNLI: `dev_matched.tsv`, `dev_mismatched.tsv`) in `folder`.

    Raises NotAvailable for a missing folder or file, and InvalidInput naming file and line of the first bad row.
    """
    folder, layout = Path(folder).expanduser(), _format(name)
    files = published_files(f"GLUE {name}", folder, ["train.tsv", f"{layout.dev}.tsv"])
    train, dev = (read_tsv(file, layout) for file in files)
    return _with_validation(name, layout, train, dev, f"folder {folder}", seed)


def load_hub(name: str, seed: int = 0) -> TextTask:
    """The task from the hub's copy that `make data` left under data/cache. Raises NotAvailable where it is missing."""
    layout = _format(name)
    tables = hub.tables("glue", layout.config or name)
    train, dev = (_from_table(tables[split], layout) for split in ("train", layout.hub_dev))
    return _with_validation(name, layout, train, dev, hub.describe("glue", layout.config or name), seed)


def read_tsv(path: str | Path, layout: Format) -> Split:
    """The rows of one labelled file in their order. Raises InvalidInput naming file and line.

    The files were written without quoting, so quotation marks are text, every tab is a border and every line is a row.
    Only "\\n" ends a line; other Unicode line ends occur inside sentences.
    """
    path = Path(path)
    lines = path.read_bytes().split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    cells = [_cells(line, path, number) for number, line in enumerate(lines, 1)]
    first = 0 if layout.columns else 1
    if len(cells) <= first:
        raise InvalidInput(f"{path}: no rows")
    text, label, width = _places(cells[0], layout, path)

    columns: list[list[str]] = [[] for _ in text]
    labels: list[int] | list[float] = []
    short = []
    for number, row in enumerate(cells[first:], first + 1):
        if len(row) != width:
            short.append(number)
            if len(row) < width and len(short) <= layout.short_rows:
                continue
            raise InvalidInput(f"{path}, line {number}: {len(row)} columns where {width} were expected")
        labels.append(_label(row[label], layout, path, number))
        for column, place in zip(columns, text, strict=True):
            column.append(row[place])
    if short:
        log.warning("%s: skipped %d rows with too few columns (lines %s)", path, len(short), short)
    return Split(columns[0], labels, columns[1] if len(columns) > 1 else None)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise InvalidInput(f"unknown GLUE task {name!r}: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def _cells(line: bytes, path: Path, number: int) -> list[str]:
    try:
        text = line.removesuffix(b"\r").decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start} of the line)"
        ) from None
    return text.split("\t")


def _places(header: list[str], layout: Format, path: Path) -> tuple[list[int], int, int]:
    """Column numbers of the texts and of the label, and the number of columns."""
    if layout.columns:
        return [int(place) for place in layout.text], int(layout.label), layout.columns
    missing = [name for name in (*layout.text, layout.label) if name not in header]
    if missing:
        raise InvalidInput(
            f"{path}, line 1: the header lacks {', '.join(map(repr, missing))}; it holds {', '.join(map(repr, header))}"
        )
    return [header.index(str(name)) for name in layout.text], header.index(str(layout.label)), len(header)


def _label(written: str, layout: Format, path: Path, number: int) -> int | float:
    written = written.strip()
    if layout.labels:
        if written in layout.written:
            return layout.written.index(written)
        raise InvalidInput(f"{path}, line {number}: label {written!r} is not one of {', '.join(layout.written)}")
    try:
        score = float(written)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 5:
        raise InvalidInput(f"{path}, line {number}: score {written!r} is not a number from 0 to 5")
    return score


def _from_table(table: dict[str, list], layout: Format) -> Split:
    texts = [table[name] for name in layout.hub_text]
    return Split(texts[0], table["label"], texts[1] if len(texts) > 1 else None)


def _with_validation(name: str, layout: Format, train: Split, dev: Split, source: str, seed: int) -> TextTask:
    """Carve `validation` out of `train` by a seeded hash of the text: about a tenth, at most about 2,000 rows.

    Equal texts land on the same side. SST-2's training rows are phrases of one another, so there validation is easier
    than dev; it still ranks settings.
    """
    share = min(0.1, 2000 / len(train))
    seconds = train.texts_b or [""] * len(train)
    kept, held = [], []
    for row, (a, b) in enumerate(zip(train.texts, seconds, strict=True)):
        key = hashlib.sha256(f"{a}\t{b}".encode()).hexdigest()
        (held if unit_hash(f"glue/{seed}/{key}") < share else kept).append(row)
    return TextTask(name, layout.labels, train.take(kept), train.take(held), dev, source)
