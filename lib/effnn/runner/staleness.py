"""What a notebook's result depends on, and the marks by which an unchanged notebook is skipped.

Inputs are hashed one by one, so that a rerun can say what changed. Marks lie under data/cache only: a fresh clone runs
everything although results are committed, and a result that was changed or deleted since is made again.
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from effnn import paths
from effnn.base import write_json
from effnn.base.imports import PACKAGE, library_files

LOCKS = ("requirements.lock", "requirements-ccl.lock")


def inputs_of(notebook: Path, parameters: Mapping[str, object], profile: str) -> dict[str, str]:
    """Return input -> hash for one notebook: its cells, its parameters, the Python version, the locks, published
    numbers and claims, the library files it imports (directly or not), data given by path, and, but for the study
    itself, the study's results of the same notebook."""
    cells = nbformat.read(notebook, as_version=4).cells
    source = [[cell.cell_type, cell.source, cell.metadata.get("tags", [])] for cell in cells]
    inputs = {
        "the notebook": _hash_text(json.dumps(source)),
        "the parameters": _hash_text(repr(sorted(parameters.items()))),
        "the Python version": platform.python_version(),
    }
    files = [paths.HOME / name for name in LOCKS] + [paths.CLAIMS, *sorted(paths.PUBLISHED.glob("*.csv"))]
    if profile != "study":
        files += sorted(path for path in paths.results_of("study", notebook.stem).glob("*.*") if _is_result(path))
    code = (cell.source for cell in cells if cell.cell_type == "code")
    files += library_files(TransformerManager().transform_cell(source) for source in code)  # without %magic and !shell
    inputs |= {_label(path): _hash_file(path) for path in files}
    inputs |= {
        f"data at {value}": _hash_folder(Path(value).expanduser()) for value in parameters.values() if _is_path(value)
    }
    return inputs


def mark_path(profile: str, notebook: str) -> Path:
    """Where the mark of a finished notebook lies."""
    return paths.CACHE / "marks" / profile / f"{notebook}.json"


def read_mark(profile: str, notebook: str) -> dict | None:
    """Return the mark of the last finished run, None when there is none or it cannot be read."""
    try:
        return json.loads(mark_path(profile, notebook).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_mark(profile: str, notebook: str, inputs: Mapping[str, str], results: Path) -> None:
    """Note that the notebook has finished with these inputs and wrote this results file."""
    write_json(mark_path(profile, notebook), {"inputs": dict(inputs), "results": _hash_file(results)})


def stale_because(mark: dict | None, inputs: Mapping[str, str], results: Path, executed: Path) -> str:
    """Return why a notebook must run, empty when it need not."""
    if not isinstance(mark, dict) or not isinstance(mark.get("inputs"), dict):
        return "not run here before"
    if not results.is_file() or not executed.is_file():
        return "its results are not there"
    if _hash_file(results) != mark.get("results") or not _files_stand(results):
        return "its results were changed since"
    before = mark["inputs"]
    changed = [name for name in {**before, **inputs} if before.get(name) != inputs.get(name)]
    return "" if not changed else f"changed: {', '.join(changed[:3])}{' and more' if len(changed) > 3 else ''}"


def _files_stand(results: Path) -> bool:
    """Whether the tables and figures that the results file lists, with their sha256, are still those of that run."""
    try:
        listed = json.loads(results.read_text(encoding="utf-8")).get("files", {})
    except (OSError, ValueError, AttributeError):
        return False
    return all(_hash_file(results.parent / name) == digest for name, digest in listed.items())


def _is_result(path: Path) -> bool:
    return path.suffix in (".csv", ".json") and not path.name.startswith(".")


def _is_path(value: object) -> bool:
    return isinstance(value, str) and value not in ("", "builtin", "hub") and Path(value).expanduser().exists()


def _label(path: Path) -> str:
    for root in (paths.HOME, PACKAGE.parent):
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return path.name


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"


def _hash_folder(root: Path) -> str:
    """Names, sizes and times of the files: data sets are large, and a changed file changes its time."""
    files = sorted(root.rglob("*")) if root.is_dir() else [root]
    facts = [(path.relative_to(root).as_posix(), path.stat()) for path in files if path.is_file()]
    return _hash_text(repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in facts]))
