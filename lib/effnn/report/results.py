"""Result files of one notebook under one profile: tables, figures, named values and where they come from.

A `ResultWriter` keeps everything in memory until `finish()`, which writes results.json last: an interrupted run leaves
the earlier results as they were. results.json lists every file with its sha256, so `load` refuses a mixture of two
runs. The smoke profile writes under data/cache/smoke and never touches what is committed.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import numpy as np
import pandas as pd
import papermill
from matplotlib.figure import Figure

from effnn import paths
from effnn.base import InvalidInput, atomic_path, load_average, write_json
from effnn.report import figures, provenance
from effnn.report.values import Value, finite, interval, read_value

log = logging.getLogger(__name__)

SMOKE = "smoke"
FILE = "results.json"
_NOTEBOOK = re.compile(r"\d\d_[a-z0-9_]+")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


@dataclass(frozen=True)
class FigureEntry:
    """A figure's caption and the ids of the claims that it answers."""

    caption: str = ""
    claims: tuple[str, ...] = ()


@dataclass(frozen=True)
class Results:
    """The results of one finished run.

    notebook: file name without suffix.
    profile: its size, also the name of the folder.
    folder: holds <table>.csv, <figure>.svg and <figure>.png.
    values: key -> number with its samples.
    figures: name -> caption and claims.
    tables: their names.
    provenance: see `effnn.report.provenance.gather`.
    """

    notebook: str
    profile: str
    folder: Path
    values: dict[str, Value]
    figures: dict[str, FigureEntry]
    tables: tuple[str, ...]
    provenance: dict[str, object]

    def table(self, name: str) -> pd.DataFrame:
        """Return one of the tables; raises InvalidInput naming those there are."""
        if name not in self.tables:
            raise InvalidInput(f"no table {name!r} in {self.folder}; there are: {', '.join(self.tables) or 'none'}")
        return pd.read_csv(self.folder / f"{name}.csv")


class ResultWriter:
    """Collects the results of one notebook and writes them all at the end.

    notebook: file name without suffix, e.g. "01_post_training_pruning".
    profile: smoke, laptop, study, paper or a name of your own; the ledger reads laptop and study only.
    parameters: of the run, for the provenance; inside a notebook `from_notebook` collects them.
    seeds: of the samples, for the provenance.
    Use it as a context manager (nothing is written when the block fails) or call `finish()`. Giving a name twice
    replaces the earlier one, so notebook cells can be run again.
    """

    def __init__(
        self,
        notebook: str,
        profile: str = SMOKE,
        parameters: Mapping[str, object] | None = None,
        seeds: Iterable[int] = (),
    ):
        if not _NOTEBOOK.fullmatch(notebook):
            raise InvalidInput(f"notebook {notebook!r}: expected its file name without .ipynb, e.g. '01_some_name'")
        self.notebook, self.profile = notebook, _name("profile", profile)
        self.folder = folder(profile, notebook)
        self.values: dict[str, Value] = {}
        self._files: dict[str, bytes] = {}
        self._figures: dict[str, FigureEntry] = {}
        self._fingerprints: dict[str, str] = {}
        self._parameters, self._seeds = dict(parameters or {}), list(seeds)
        self._started, self._git = datetime.now(UTC), provenance.git_state(paths.HOME)
        self._load = load_average()

    @classmethod
    def from_notebook(cls, notebook: str, variables: Mapping[str, object], seeds: Iterable[int] = ()) -> "ResultWriter":
        """Return the writer of a running notebook, with all parameters of its parameters cell.

        notebook: as above; its file says which names are parameters. variables: the notebook's `globals()`, which hold
        their values, those that papermill set included. seeds: of the samples, where the notebook draws several.
        """
        declared = papermill.inspect_notebook(paths.NOTEBOOKS / f"{notebook}.ipynb")
        if missing := [name for name in ("profile", *declared) if name not in variables]:
            raise InvalidInput(f"{notebook} has not set {', '.join(missing)}: run its parameters cell first")
        parameters = {name: variables[name] for name in declared}
        return cls(notebook, parameters["profile"], parameters, seeds)

    def value(
        self,
        key: str,
        value: float | None = None,
        *,
        samples: Sequence[float] | None = None,
        unit: str = "",
        note: str = "",
        load: float | None = None,
    ) -> Value:
        """Record one number and return it with its interval.

        key: a claim's id, or a name of your own.
        value: the number; the mean of the samples where it is left out. With neither, the claim was not attempted.
        samples: one number per seed.
        unit: what the number is.
        note: shown with the verdict; for a claim that was not attempted, what a measurement needs.
        load: of a measured time, the highest load average during the measurement (NaN: not known); the verdict
        names a busy machine.
        Raises InvalidInput for any other NaN, for infinity and for a value outside its own samples.
        """
        _name("key", key)
        numbers = tuple(finite(key, item) for item in (() if samples is None else samples))
        if value is None and numbers:
            value = float(np.mean(numbers))
        if value is None and not note:
            raise InvalidInput(f"value {key!r} is None: give a number, or a note saying what a measurement needs")
        value = None if value is None else finite(key, value)
        slack = 1e-9 * max((abs(item) for item in numbers), default=0.0)
        if value is not None and numbers and not min(numbers) - slack <= value <= max(numbers) + slack:
            raise InvalidInput(f"value {key!r} = {value} is outside the range of its own samples {list(numbers)}")
        load = None if load is None or np.isnan(load) else round(finite("load", load), 2)
        self.values[key] = Value(value, numbers, interval(numbers), unit, note, load)
        return self.values[key]

    def table(self, name: str, frame: pd.DataFrame) -> Path:
        """Keep a tidy DataFrame as <name>.csv (an index other than 0, 1, ... becomes columns); returns that path."""
        if not isinstance(frame, pd.DataFrame):
            raise InvalidInput(f"table {name!r}: expected a pandas DataFrame, got {type(frame).__name__}")
        keep_index = not isinstance(frame.index, pd.RangeIndex)
        text = frame.to_csv(index=keep_index, float_format="%.10g", lineterminator="\n")
        return self._keep(f"{_name('table', name)}.csv", text.encode())

    def json(self, name: str, value: object) -> Path:
        """Keep a value as <name>.json, for what is not a table, such as a saved probe; returns that path."""
        if f"{_name('file', name)}.json" == FILE:
            raise InvalidInput(f"{FILE} is written by finish(); choose another name than {name!r}")
        return self._keep(f"{name}.json", (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())

    def figure(self, name: str, figure: Figure, *, caption: str = "", claims: Iterable[str] = ()) -> Path:
        """Keep a figure as <name>.svg and <name>.png, equal bytes for equal content; returns the SVG's path.

        caption: one sentence shown below it in the report (also its alternative text). claims: ids that it answers.
        """
        self._figures[_name("figure", name)] = FigureEntry(caption, tuple(claims))
        self._keep(f"{name}.png", figures.to_png(figure))
        return self._keep(f"{name}.svg", figures.to_svg(figure))

    def fingerprint(self, name: str, sha256: str) -> None:
        """Record the sha256 of a data set that the results depend on."""
        self._fingerprints[name] = str(sha256)

    def provenance(self) -> dict[str, object]:
        """Return the provenance as of now; see `effnn.report.provenance.gather` for its keys."""
        return provenance.gather(
            self.profile, self._parameters, self._seeds, self._started, self._fingerprints, self._git, self._load
        )

    def finish(self) -> Path:
        """Write all files, results.json last, remove what only the former run had, and return results.json's path.

        Logs a warning for each data set that differs from that of the former results in the same folder.
        """
        target, former = self.folder / FILE, _former(self.folder)
        origin = self.provenance()
        for sentence in provenance.fingerprint_differences(former.get("provenance"), origin):
            log.warning("%s/%s: %s", self.profile, self.notebook, sentence)
        for name, content in self._files.items():
            with atomic_path(self.folder / name) as temporary:
                temporary.write_bytes(content)
        record = {
            "notebook": self.notebook,
            "profile": self.profile,
            "values": {key: asdict(value) for key, value in self.values.items()},
            "figures": {name: asdict(entry) for name, entry in self._figures.items()},
            "files": {name: _sha256(content) for name, content in sorted(self._files.items())},
            "provenance": origin,
        }
        write_json(target, record)
        for name in set(former.get("files", ())) - self._files.keys():
            if _NAME.fullmatch(name) and name != FILE:
                (self.folder / name).unlink(missing_ok=True)
        return target

    def __enter__(self) -> "ResultWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.finish()

    def _keep(self, name: str, content: bytes) -> Path:
        self._files[name] = content
        return self.folder / name


def folder(profile: str, notebook: str) -> Path:
    """Return where one notebook's result files live; those of the smoke profile live in the cache."""
    return paths.results_of(profile, notebook)


def load(profile: str, notebook: str) -> Results | None:
    """Return the results of a finished run, or None where there is none.

    Raises InvalidInput for a results.json that is damaged, belongs to another profile or notebook, or does not fit the
    files beside it (a run killed while it wrote); the message names the file and the way out.
    """
    place = folder(profile, notebook)
    path = place / FILE
    if not path.is_file():
        return None
    advice = f"run `{command(profile, notebook)}` again"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        values = {key: read_value(item) for key, item in record["values"].items()}
        entries = {key: FigureEntry(item["caption"], tuple(item["claims"])) for key, item in record["figures"].items()}
        origin, files = dict(record["provenance"]), dict(record["files"])
        owner = (record["profile"], record["notebook"], origin["profile"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{path} is not a result file ({type(error).__name__}: {error}); {advice}") from error
    if owner != (profile, notebook, profile):
        raise InvalidInput(f"{path} holds results of {owner[0]}/{owner[1]}, not of {profile}/{notebook}; {advice}")
    for name, digest in files.items():
        if not (place / name).is_file():
            raise InvalidInput(f"{path} names {name}, which is missing; {advice}")
        if _sha256((place / name).read_bytes()) != digest:
            raise InvalidInput(f"{place / name} is not the file that {FILE} describes (an interrupted run?); {advice}")
    tables = tuple(name.removesuffix(".csv") for name in files if name.endswith(".csv"))
    return Results(notebook, profile, place, values, entries, tables, origin)


def command(profile: str, notebook: str) -> str:
    """Return the command that makes these results."""
    if profile == "study":
        return "make study"
    return f"make reproduce NOTEBOOK={notebook[:2]}" + ("" if profile == "laptop" else f" PROFILE={profile}")


def _former(place: Path) -> dict[str, object]:
    try:
        record = json.loads((place / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _sha256(content: bytes) -> str:
    # Git may check text out with other line ends; the result is the same.
    return hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest()


def _name(what: str, name: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidInput(f"{what} {name!r}: expected lower-case letters, digits and . _ - only")
    return name
