"""The built-in corpus: the docstrings of the standard library and of five installed packages, as they are written.

Read with `ast` from the files that are installed: nothing is imported and nothing is downloaded. A document is a
docstring, less the paragraphs that were seen before. Versions of the packages decide the text, so results compare only
under equal fingerprints. Names and code stay in, other than in the text task.
"""

import ast
import importlib.metadata
import importlib.util
import logging
import platform
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from tqdm.auto import tqdm

from effnn.base import NotAvailable
from effnn.data.text.task import unit_hash

log = logging.getLogger(__name__)

PACKAGES = {name: name for name in ("numpy", "scipy", "pandas", "matplotlib")} | {"sklearn": "scikit-learn"}
"""Package as it is imported -> distribution as it is installed."""
VALIDATION_SHARE = TEST_SHARE = 0.05  # of a package's characters, in whole files, before repeated text is dropped

# Tests are left out because some distributions do not install them; the rest is other people's code.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_SKIPPED_FILE = re.compile(r"(test_.*|.*_tests?|conftest)\.py")
_BLANK = re.compile(r"\n\s*\n")
_DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def locate() -> dict[str, Path]:
    """Folder of the source files of the standard library and of each package. Raises NotAvailable."""
    folders = {"stdlib": Path(sysconfig.get_path("stdlib"))}
    for name, distribution in PACKAGES.items():
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise NotAvailable(
                f"the built-in corpus reads the docstrings of {name}: install it (pip install {distribution})"
            )
        folders[name] = Path(spec.submodule_search_locations[0])
    return folders


def versions() -> dict[str, str]:
    """What the text depends on: the versions of Python and of the packages."""
    found = {name: importlib.metadata.version(distribution) for name, distribution in PACKAGES.items()}
    return {"python": platform.python_version(), **found}


def collect(folders: Mapping[str, Path]) -> dict[str, list[str]]:
    """The documents of each split, in the order of package, file and place; takes about 20 s for all packages.

    No paragraph occurs twice, blanks aside: a repetition is dropped, and one that stands in two splits stays in train
    or else in validation.
    """
    files = {}  # "numpy/lib/_npyio.py" -> its docstrings
    with tqdm(folders.items(), desc="reading docstrings", unit="package") as progress:
        for name, folder in progress:
            for path in sorted(_source_files(folder)):
                if found := list(_docstrings(path)):
                    files[f"{name}/{path.relative_to(folder).as_posix()}"] = found
    place = split_files({file: sum(map(len, found)) for file, found in files.items()})
    splits: dict[str, list[str]] = {}
    seen: set[str] = set()
    for split in ("train", "validation", "test"):
        documents = (text for file, found in files.items() if place[file] == split for text in found)
        splits[split] = [kept for text in documents if (kept := _unseen(text, seen))]
        log.info("docstrings: %s holds %d documents", split, len(splits[split]))
    return splits


def split_files(sizes: Mapping[str, int]) -> dict[str, str]:
    """Split of every file ("package/path" -> characters): neighbours in a file are alike, so they stay together.

    The files of a package are ordered by the hash of their name; the first ones, up to the share of the package's
    characters, are for test, the next ones for validation. So each package has about the same share in every split.
    """
    totals, used = Counter(), Counter()
    for file, size in sizes.items():
        totals[_package(file)] += size
    place = {}
    for file in sorted(sizes, key=unit_hash):
        share = used[_package(file)] / totals[_package(file)]
        held_out = "test" if share < TEST_SHARE else "validation"
        place[file] = held_out if share < TEST_SHARE + VALIDATION_SHARE else "train"
        used[_package(file)] += sizes[file]
    return place


def _package(file: str) -> str:
    return file.partition("/")[0]


def _unseen(docstring: str, seen: set[str]) -> str:
    kept = []
    for paragraph in _BLANK.split(docstring):
        essence = " ".join(paragraph.split())
        if essence and essence not in seen:
            seen.add(essence)
            kept.append(paragraph.strip("\n").rstrip())
    return "\n\n".join(kept)


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
    except (SyntaxError, ValueError) as error:
        log.debug("skipped %s: %s", path, error)
        return
    found = [node for node in ast.walk(tree) if isinstance(node, _DEFINITIONS)]
    for node in sorted(found, key=lambda node: getattr(node, "lineno", 0)):
        if text := ast.get_docstring(node):
            # Escapes can spell half a surrogate pair, which is no text and which UTF-8 cannot hold.
            yield text.encode("utf-8", "replace").decode("utf-8")
