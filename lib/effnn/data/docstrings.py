"""The docstrings of installed packages, which both built-in data sets are made of.

Files are parsed with `ast`: no package is imported and nothing is downloaded. Versions of the packages decide the text,
so results compare only under equal fingerprints. What is made of the docstrings is said in text/builtin.py and
corpus/builtin.py.
"""

import ast
import importlib.metadata
import importlib.util
import logging
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tqdm.auto import tqdm

from effnn.base import NotAvailable
from effnn.data.files.reading import clean

log = logging.getLogger(__name__)

STDLIB = "stdlib"
"""The name under which the standard library stands beside the packages."""
DISTRIBUTIONS = {"sklearn": "scikit-learn"}
"""Package as it is imported -> distribution as it is installed, where the names differ."""

# Tests are left out because some distributions do not install them; site-packages is other people's code.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_SKIPPED_FILE = re.compile(r"(test_.*|.*_tests?|conftest)\.py")
_BODIES = ("body", "handlers", "orelse", "finalbody", "cases")
_DEFINITIONS = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def locate(packages: Iterable[str]) -> dict[str, Path]:
    """Folder of the source files of each package, in the given order; `STDLIB` is the standard library.

    Raises NotAvailable for a package that is not installed.
    """
    folders = {}
    for name in packages:
        if name == STDLIB:
            folders[name] = Path(sysconfig.get_path("stdlib"))
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise NotAvailable(
                f"the built-in data are the docstrings of {name}, which is not installed: install it "
                f"(pip install {DISTRIBUTIONS.get(name, name)})"
            )
        folders[name] = Path(spec.submodule_search_locations[0])
    return folders


def versions(packages: Iterable[str]) -> dict[str, str]:
    """What the text depends on: the versions of Python and of the packages, by name."""
    found = {name: importlib.metadata.version(DISTRIBUTIONS.get(name, name)) for name in packages if name != STDLIB}
    return {"python": platform.python_version(), **found}


def read(folders: Mapping[str, Path]) -> dict[str, list[str]]:
    """The docstrings of every file ("numpy/lib/_npyio.py"), packages in the given order, files sorted.

    folders: as from `locate`. Files without a docstring are left out; ten to twenty seconds for all packages.
    """
    files = {}
    with tqdm(folders.items(), desc="reading docstrings", unit="package", leave=False) as progress:
        for name, folder in progress:
            for path in sorted(_source_files(folder)):
                if found := list(_docstrings(path)):
                    files[f"{name}/{path.relative_to(folder).as_posix()}"] = found
    return files


def _source_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*.py"):
        inside = path.relative_to(folder)
        if not _SKIPPED_FOLDERS.intersection(inside.parts[:-1]) and not _SKIPPED_FILE.fullmatch(inside.name):
            yield path


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a file in their order; none for a file that this Python cannot parse."""
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
        if isinstance(node, _DEFINITIONS) and (text := ast.get_docstring(node)):
            yield clean(text)
        inner = [child for name in _BODIES for child in getattr(node, name, ())]
        pending.extend(reversed(inner))
