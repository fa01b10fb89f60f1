"""Modules and files of effnn that a text names exist, and notebooks use public names alone."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from effnn import paths

NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
TEXTS = sorted(
    path
    for folder in (paths.LIB, paths.NOTEBOOKS, paths.DATA, paths.HOME / ".github")
    for path in folder.rglob("*")
    if path.suffix in (".py", ".md", ".ipynb", ".yml", ".csv", ".jinja") and not path.is_relative_to(paths.CACHE)
    if not path.is_relative_to(paths.DATA / "cache") and ".ipynb_checkpoints" not in path.parts
) + [paths.HOME / name for name in ("README.md", "Makefile", "pyproject.toml", "environment.yml", "CITATION.cff")]
# a style file, and modules that tests make
MADE_UP = {"effnn.mplstyle", "effnn.near", "effnn.near.far", "effnn.x", "effnn.__file__"}
MODULE = re.compile(r"(?<![\w./])effnn(?:\.[A-Za-z_]\w*)+")
FILE = re.compile(r"(?<![\w/])(?:lib/)?(?:effnn|tests|lib/tests)/[\w/]+\.(?:py|md|csv)\b")


def is_known(name: str) -> bool:
    """Whether a dotted name is a module of effnn, or something that the text of the module before it mentions."""
    place = paths.LIB / "effnn"
    for part in name.split(".")[1:]:
        if (place / part).is_dir():
            place /= part
        elif (place / f"{part}.py").is_file():
            place /= f"{part}.py"
        else:
            source = place if place.is_file() else place / "__init__.py"
            return re.search(rf"\b{part}\b", source.read_text(encoding="utf-8")) is not None
    return True


def unknown(text: str) -> list[str]:
    """Return the modules and files that a text names and that do not exist."""
    modules = {name for name in MODULE.findall(text) if name not in MADE_UP and not is_known(name)}
    files = {name for name in FILE.findall(text) if not (paths.LIB / name.removeprefix("lib/")).is_file()}
    return sorted(modules | files)


def private(source: str) -> list[str]:
    """Return the private names that a notebook's cell imports or reaches into."""
    names = []
    for node in ast.walk(ast.parse(TransformerManager().transform_cell(source))):
        if isinstance(node, ast.ImportFrom):
            names += [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Attribute):
            names.append(node.attr)
    return [name for name in names if re.match(r"_(?!_)", name)]


def test_every_module_and_file_that_a_text_names_exists():
    found = {path.as_posix(): unknown(path.read_text(encoding="utf-8")) for path in TEXTS if path != Path(__file__)}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_uses_public_names_alone(path: Path):
    cells = nbformat.read(path, as_version=4).cells
    assert [name for cell in cells if cell.cell_type == "code" for name in private(cell.source)] == []


def test_the_checkers_find_what_they_should():
    text = "effnn.report.claims.ledger, effnn.report.lost, `effnn.gone.x`, lib/effnn/cache.py, lib/tests/test_gone.py"
    assert unknown(text) == ["effnn.gone.x", "effnn.report.lost", "lib/tests/test_gone.py"]
    cell = "from effnn.report import _hidden\nimport effnn._x\nwriter._keep\n__name__"
    assert private(cell) == ["_hidden", "_x", "_keep"]
