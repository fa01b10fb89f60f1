"""What a notebook's result depends on, and the marks by which an unchanged notebook is skipped.

Each dependency has a hash of its own, so that a rerun can say what changed. Marks are under data/cache only, so a fresh
clone runs everything although results are committed. A result that was changed or deleted since is made again.
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


def dependencies_of(notebook: Path, parameters: Mapping[str, object], profile: str) -> dict[str, str]:
    """Return the dependencies of one notebook's results, each with its hash.

    They are its cells, its parameters, the Python version, the locks, published numbers and claims, the library files
    that it imports (directly or not), data given by path, and, except for the study itself, the study's results of the
    same notebook.
    """
    cells = nbformat.read(notebook, as_version=4).cells
    source = [[cell.cell_type, cell.source, cell.metadata.get("tags", [])] for cell in cells]
    dependencies = {
        "the notebook": _hash_text(json.dumps(source)),
        "the parameters": _hash_text(repr(sorted(parameters.items()))),
        "the Python version": platform.python_version(),
    }
    files = [paths.HOME / name for name in LOCKS] + [paths.CLAIMS, *sorted(paths.PUBLISHED.glob("*.csv"))]
    if profile != "study":
        files += sorted(path for path in paths.results_of("study", notebook.stem).glob("*.*") if _is_result(path))
    code = (cell.source for cell in cells if cell.cell_type == "code")
    files += library_files(TransformerManager().transform_cell(source) for source in code)  # without %magic and !shell
    dependencies |= {_label(path): _hash_file(path) for path in files}
    dependencies |= {
        f"data at {value}": _hash_folder(Path(value).expanduser()) for value in parameters.values() if _is_path(value)
    }
    return dependencies


def mark_path(profile: str, notebook: str) -> Path:
    """The file that marks a finished notebook."""
    return paths.CACHE / "marks" / profile / f"{notebook}.json"


def read_mark(profile: str, notebook: str) -> dict | None:
    """Return the mark of the last finished run, None when there is none or it cannot be read."""
    try:
        return json.loads(mark_path(profile, notebook).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_mark(profile: str, notebook: str, dependencies: Mapping[str, str], results: Path) -> None:
    """Record that the notebook has finished with these dependencies and wrote this results file."""
    write_json(mark_path(profile, notebook), {"dependencies": dict(dependencies), "results": _hash_file(results)})


def stale_because(mark: dict | None, dependencies: Mapping[str, str], results: Path, executed: Path) -> str:
    """Return why a notebook must run, empty when it need not."""
    if not isinstance(mark, dict) or not isinstance(mark.get("dependencies"), dict):
        return "not run here before"
    if not results.is_file() or not executed.is_file():
        return "its results are missing"
    if _hash_file(results) != mark.get("results") or not _files_match(results):
        return "its results were changed since"
    before = mark["dependencies"]
    changed = [name for name in {**before, **dependencies} if before.get(name) != dependencies.get(name)]
    return "" if not changed else f"changed: {', '.join(changed[:3])}{' and more' if len(changed) > 3 else ''}"


def _files_match(results: Path) -> bool:
    """Whether the tables and figures that the results file lists still have the sha256 that it gives."""
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
