"""The policy for notebooks (see `problems`), held for every notebook of the project; the checker itself is tested."""

import ast
import json
import re
from pathlib import Path

import nbformat
import papermill
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from effnn import paths
from effnn.base import InvalidInput
from effnn.runner import declared

NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
LARGEST = 1_000_000  # bytes
LONGEST = 10  # lines of a helper function; longer ones belong to effnn.experiments
CHECKED = 3  # cells whose output nbval compares
REQUIRED = {"profile": "smoke", "seed": None, "threads": None}  # name -> default, None for any

OF_A_MACHINE = re.compile(r"(?<![\w+/.:<])/(?:home|root|Users|tmp|var|opt|usr|mnt|work|workspace|data)/|[A-Za-z]:\\\\")
"""An absolute path in the notebook's JSON, where a backslash is written twice."""

RELATIVE = {
    r"\.\./": "a relative path ('../')",
    r"\bopen\(\s*[rbf]*['\"]": "a file opened by a literal name; take it from effnn.paths",
    r"\bPath\(\s*[rbf]*['\"]": "a literal path; take it from effnn.paths",
    r"\b(?:read_csv|read_json|savefig|to_csv)\(\s*[rbf]*['\"]": "a literal file name; take it from effnn.paths",
    r"['\"](?:/home|/Users|/root|/tmp|[A-Za-z]:\\\\)": "a path of one machine",
}


def problems(path: Path) -> list[str]:
    """Return what a notebook does against the policy.

    Exactly one parameters cell, among the first two code cells, typed, commented, with profile, seed and threads; all
    code cells executed in order from a fresh kernel at the smoke values; no error output; at least three cells tagged
    `nbval-check-output` that show a number; no relative or literal path; no long function; a file under 1 MB.
    """
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    found = parameter_problems(path, code)
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("the cells were not all executed, in order, from a fresh kernel")
    if any("injected-parameters" in tags(cell) for cell in code):
        found.append("it was run by papermill; the committed outputs come from the cell's own values")
    if any(output.output_type == "error" for cell in code for output in cell.outputs):
        found.append("an error output")
    shown = [cell for cell in code if "nbval-check-output" in tags(cell) and re.search(r"\d", text_of(cell))]
    if len(shown) < CHECKED:
        found.append(f"{len(shown)} cells tagged nbval-check-output show a number; at least {CHECKED} must")
    for cell in code:
        found += [what for pattern, what in RELATIVE.items() if re.search(pattern, cell.source)]
        found += [f"the function {name} is longer than {LONGEST} lines" for name in long_functions(cell.source)]
    shown_or_kept = [[cell.outputs, cell.metadata] for cell in notebook.cells if cell.cell_type == "code"]
    if OF_A_MACHINE.search(json.dumps([shown_or_kept, notebook.metadata])):
        found.append("an output or its metadata names a folder of the machine that ran it")
    if path.stat().st_size > LARGEST:
        found.append(f"{path.stat().st_size} bytes; at most {LARGEST} are allowed")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("its kernel is not python3")
    return found


def parameter_problems(path: Path, code: list) -> list[str]:
    try:
        known = declared(path)
    except InvalidInput as error:
        return [str(error)]
    found = [f"no comment on the parameter {name}" for name, seen in inspect(path).items() if not seen["help"].strip()]
    if not any("parameters" in tags(cell) for cell in code[:2]):
        found.append("the parameters cell is not among the first two code cells")
    for name, default in REQUIRED.items():
        if name not in known or default not in (None, known[name].default):
            found.append(
                f"the parameter {name}" + (f" with the default '{default}'" if default else "") + " is missing"
            )
    return found


def inspect(path: Path) -> dict:
    return papermill.inspect_notebook(path)


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def text_of(cell) -> str:
    """What a code cell shows as text: streams and plain representations."""
    shown = []
    for output in cell.outputs:
        shown.append(output.get("text", "") or output.get("data", {}).get("text/plain", ""))
    return "".join("".join(part) for part in shown)


def long_functions(source: str) -> list[str]:
    tree = ast.parse(TransformerManager().transform_cell(source))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [node.name for node in functions if node.end_lineno - node.lineno + 1 > LONGEST]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_the_policy(path):
    assert problems(path) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_named_for_its_place_in_the_order(path):
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem)


GOOD_PARAMETERS = 'profile: str = "smoke"  # size of the run\nseed: int = 0  # of all\nthreads: int = 1  # of torch'


def good(**changes) -> nbformat.NotebookNode:
    """A notebook that keeps the policy, but for one change."""
    cells = [nbformat.v4.new_code_cell(changes.get("parameters", GOOD_PARAMETERS), execution_count=1)]
    cells[0].metadata["tags"] = ["parameters"]
    source = changes.get("source", "print(round(0.123, 2))")
    for number in range(2, 5):
        output = nbformat.v4.new_output("stream", name="stdout", text=changes.get("text", "accuracy 0.12\n"))
        cell = nbformat.v4.new_code_cell(source, execution_count=number, outputs=[output])
        cell.metadata["tags"] = ["nbval-check-output"]
        cells.append(cell)
    kernel = {"name": changes.get("kernel", "python3"), "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    changes.get("edit", lambda _: None)(notebook)
    return notebook


def check(tmp_path, **changes):
    path = tmp_path / "01_a.ipynb"
    nbformat.write(good(**changes), path)
    return problems(path)


def test_a_good_notebook_has_no_problem(tmp_path):
    assert check(tmp_path) == []


def unexecuted(notebook):
    notebook.cells[2].execution_count = None


def two_parameter_cells(notebook):
    notebook.cells[1].metadata["tags"] = ["parameters"]


def late_parameters(notebook):
    notebook.cells.append(notebook.cells.pop(0))
    for number, cell in enumerate(notebook.cells, start=1):
        cell.execution_count = number


def an_error(notebook):
    notebook.cells[1].outputs.append(nbformat.v4.new_output("error", ename="E", evalue="e", traceback=[]))


def unchecked(notebook):
    notebook.cells[1].metadata["tags"] = ["nbval_check_output"]  # a spelling that nbval ignores


def a_path_in_the_metadata(notebook):
    notebook.metadata["papermill"] = {"output_path": "/tmp/a.ipynb"}


def run_by_papermill(notebook):
    notebook.cells[1].metadata["tags"].append("injected-parameters")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"edit": unexecuted}, "not all executed"),
        ({"edit": two_parameter_cells}, "2 cells are tagged 'parameters'"),
        ({"edit": late_parameters}, "not among the first two"),
        ({"edit": an_error}, "an error output"),
        ({"edit": unchecked}, "2 cells tagged nbval-check-output show a number"),
        ({"edit": run_by_papermill}, "run by papermill"),
        ({"text": "held\n"}, "0 cells tagged nbval-check-output show a number"),
        ({"text": "1 warning in /home/me/lib\n"}, "names a folder of the machine"),
        ({"text": "1 warning in C:\\me\\lib\n"}, "names a folder of the machine"),
        ({"edit": a_path_in_the_metadata}, "names a folder of the machine"),
        ({"text": "1" * 400_000}, "bytes; at most"),
        ({"parameters": GOOD_PARAMETERS.replace(": int = 0", " = 0")}, "'name: type = value'"),
        ({"parameters": GOOD_PARAMETERS.replace("  # of all", "")}, "no comment on the parameter seed"),
        ({"parameters": GOOD_PARAMETERS.replace("seed", "sed")}, "the parameter seed is missing"),
        ({"parameters": GOOD_PARAMETERS.replace('"smoke"', '"laptop"')}, "profile with the default 'smoke' is missing"),
        ({"source": "x = '../data'"}, "a relative path"),
        ({"source": "open('a.txt')"}, "opened by a literal name"),
        ({"source": "import pandas as pd\npd.read_csv('a.csv')"}, "a literal file name"),
        ({"source": "from pathlib import Path\nPath('data')"}, "a literal path"),
        ({"source": "x = '/home/me/data'"}, "a path of one machine"),
        ({"source": "def f():\n" + "    x = 1\n" * 10}, "the function f is longer than 10 lines"),
        ({"kernel": "mine"}, "not python3"),
    ],
)
def test_the_checker_finds_a_planted_problem(tmp_path, changes, expected):
    assert any(expected in problem for problem in check(tmp_path, **changes))
