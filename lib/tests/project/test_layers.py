"""Who may import whom (docs: the table below), and that the library prints nothing. Rooms not built yet are in it too.

The checker reads the syntax tree, so an import inside a function counts; it is itself tested on a tree with planted
violations.
"""

import ast
import sys
from pathlib import Path

import pytest

import effnn

PACKAGE = Path(effnn.__file__).parent
METHODS = ("ltp", "staged", "tasc", "dqrm")
TORCH_ONLY = {"torch"}
METHOD_PACKAGES = {"torch", "transformers", "numpy", "scipy", "safetensors", "tqdm"}
ROOMS = (*METHODS, "comm", "data", "report")

# room -> rooms of effnn that it may import (its own always), and third-party packages (None: any)
RULES = {
    "__init__": (set(), set()),
    "base": (set(), TORCH_ONLY),
    "paths": (set(), set()),
    "cache": ({"base", "paths"}, None),
    **{room: ({"base"}, METHOD_PACKAGES) for room in METHODS},
    **{room: ({"base", "paths", "cache"}, None) for room in ("comm", "data", "report")},
    "experiments": ({"base", "paths", "cache", *ROOMS}, None),
    "runner": ({"base", "paths"}, None),
    "reproduce": ({"base", "paths", "runner", "report"}, None),
}


def violations(package: Path) -> list[str]:
    """Return one line for each import and each print that the rules forbid."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        tree = ast.parse(path.read_text(encoding="utf-8"))
        place, room = "/".join(parts), parts[0]
        if room not in RULES:
            found.append(f"{place}: no rule for the room {room}")
            continue
        rooms, packages = RULES[room]
        for name in imported(tree, ("effnn", *parts[:-1])):
            top, _, rest = name.partition(".")
            if top == "effnn":
                target = rest.split(".")[0]
                if target not in rooms | {room, ""}:
                    found.append(f"{place}: imports effnn.{target}")
            elif top not in sys.stdlib_module_names and packages is not None and top not in packages:
                found.append(f"{place}: imports {top}")
        if parts[-1] != "__main__" and not has_main_guard(tree):
            found += [f"{place}: prints" for node in ast.walk(tree) if is_print(node)]
    return found


def imported(tree: ast.AST, package: tuple[str, ...]) -> set[str]:
    """Dotted names that a module imports; `from effnn import x` gives effnn.x."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*package[: len(package) - node.level + 1], node.module or ""] if node.level else [node.module]
            )
            base = base.rstrip(".")
            names |= {f"effnn.{alias.name}" for alias in node.names} if base == "effnn" else {base}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            if isinstance(node.args[0], ast.Constant):
                names.add(node.args[0].value)
    return {name for name in names if name != "effnn.__version__"}


def has_main_guard(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in tree.body)


def is_print(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"


def test_the_library_keeps_the_rules():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("base/a.py", "import numpy", "base/a: imports numpy"),
        ("base/a.py", "from effnn import paths", "base/a: imports effnn.paths"),
        ("paths.py", "import torch", "paths: imports torch"),
        ("ltp/a.py", "from effnn.data import text", "ltp/a: imports effnn.data"),
        ("ltp/a.py", "def f():\n    import effnn.cache", "ltp/a: imports effnn.cache"),
        ("ltp/a.py", "from ..report import claims", "ltp/a: imports effnn.report"),
        ("ltp/a.py", "from .. import staged", "ltp/a: imports effnn.staged"),
        ("ltp/deep/a.py", "from ...comm import launch", "ltp/deep/a: imports effnn.comm"),
        ("tasc/a.py", "import pandas.testing", "tasc/a: imports pandas"),
        ("dqrm/a.py", "import importlib\nimportlib.import_module('effnn.comm')", "dqrm/a: imports effnn.comm"),
        ("data/a.py", "from effnn.report import results", "data/a: imports effnn.report"),
        ("report/a.py", "from effnn import experiments", "report/a: imports effnn.experiments"),
        ("experiments/a.py", "from effnn.reproduce import run", "experiments/a: imports effnn.reproduce"),
        ("new/a.py", "", "new/a: no rule for the room new"),
        ("ltp/a.py", "def f():\n    print(1)", "ltp/a: prints"),
        ("__init__.py", "from effnn import ltp", "__init__: imports effnn.ltp"),
    ],
)
def test_the_checker_finds_a_planted_violation(tmp_path, file, text, expected):
    path = tmp_path / "effnn" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert violations(tmp_path / "effnn") == [expected]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("ltp/a.py", "import math, torch\nfrom transformers import BertModel\nfrom effnn.base import InvalidInput"),
        ("ltp/a.py", "from effnn.ltp import masks\nfrom . import macs\nfrom .macs import count"),
        ("data/a.py", "import pandas\nfrom effnn import cache, paths"),
        ("experiments/a.py", "from effnn import data, ltp, report"),
        ("experiments/bench.py", "def main():\n    print(1)\n\nif __name__ == '__main__':\n    main()"),
        ("report/__main__.py", "print(1)"),
    ],
)
def test_the_checker_accepts_what_is_allowed(tmp_path, file, text):
    path = tmp_path / "effnn" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert violations(tmp_path / "effnn") == []
