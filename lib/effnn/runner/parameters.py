"""The parameters cell of a notebook: its names and types, and values checked against them before anything runs.

papermill only warns about a name that it does not know, and YAML reads `1e-4` as text; here both are settled first.
"""

import ast
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill

from effnn.base import InvalidInput

SCALARS = {"int": int, "float": float, "bool": bool, "str": str}
CONTAINERS = {"list": list, "tuple": tuple, "dict": dict}
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
EXAMPLES = {
    "int": "3",
    "float": "1e-4",
    "bool": "true or false",
    "str": "text",
    "list": "[1, 2]",
    "tuple": "(1, 2)",
    "dict": "{'a': 1}",
}


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: `name: annotation = default`; items: annotations of a container's elements."""

    name: str
    annotation: str
    default: object
    items: tuple[str, ...] = ()


def declared(notebook: Path) -> dict[str, Parameter]:
    """Return the parameters of a notebook, in order.

    Raises InvalidInput unless exactly one cell is tagged `parameters`, each of its lines is `name: type = literal`
    with a plain type, and papermill reads the same names from it.
    """
    try:
        content = nbformat.read(notebook, as_version=4)
    except Exception as error:  # whatever nbformat raises for a half-saved file or merge markers
        raise InvalidInput(f"{notebook.name} is no readable notebook ({type(error).__name__}): restore it") from None
    cells = [
        cell for cell in content.cells if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", [])
    ]
    if len(cells) != 1:
        raise InvalidInput(f"{notebook.name}: {len(cells)} cells are tagged 'parameters'; exactly one is wanted")
    try:
        found = [_read(statement) for statement in ast.parse(cells[0].source).body]
    except (SyntaxError, InvalidInput) as error:
        raise InvalidInput(f"{notebook.name}, parameters cell: {error}") from None
    parameters = {parameter.name: parameter for parameter in found}
    _agree_with_papermill(notebook, parameters)
    return parameters


def resolve(
    notebook: str, parameters: Mapping[str, Parameter], values: Mapping[str, object], source: str
) -> dict[str, object]:
    """Return `values` (name -> value, from a profile file) converted to the declared types.

    notebook and source are for the message. Raises InvalidInput for an unknown name or a value of another type.
    """
    _refuse_unknown(notebook, parameters, values, source)
    return {name: _convert(value, parameters[name], f"{source}: {notebook}") for name, value in values.items()}


def from_text(
    notebook: str, parameters: Mapping[str, Parameter], settings: Mapping[str, str], source: str = "--set"
) -> dict[str, object]:
    """Return `settings` (name -> text, from a command line) converted to the declared types.

    Lists, tuples and dicts are written as in Python; otherwise as `resolve`.
    """
    _refuse_unknown(notebook, parameters, settings, source)
    values = {name: _parse(text, parameters[name], f"{source} {name}={text}") for name, text in settings.items()}
    return resolve(notebook, parameters, values, source)


def _read(statement: ast.stmt) -> Parameter:
    line = ast.unparse(statement)
    if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value):
        raise InvalidInput(f"'{line}' is not of the form 'name: type = value'")
    annotation, items = statement.annotation, []
    if isinstance(annotation, ast.Subscript):
        inner = annotation.slice
        items = [ast.unparse(item) for item in (inner.elts if isinstance(inner, ast.Tuple) else [inner])]
        annotation = annotation.value
    kind = ast.unparse(annotation)
    known = kind in CONTAINERS or (kind in SCALARS and not items)
    if not known or any(item not in SCALARS for item in items) or len(items) > (2 if kind == "dict" else 1):
        raise InvalidInput(f"'{line}': a type is one of {_listed(EXAMPLES)}, or list[float] and the like")
    try:
        default = ast.literal_eval(statement.value)
    except ValueError:
        raise InvalidInput(f"'{line}': the value must be a literal") from None
    parameter = Parameter(statement.target.id, kind, default, tuple(items))
    _convert(default, parameter, "default")
    return parameter


def _agree_with_papermill(notebook: Path, parameters: Mapping[str, Parameter]) -> None:
    logging.getLogger("papermill").setLevel(logging.ERROR)  # It warns of what is said more clearly below.
    seen = papermill.inspect_notebook(notebook)
    missed = [name for name in parameters if name not in seen]
    if missed:
        raise InvalidInput(
            f"{notebook.name}: papermill cannot read the parameters {_listed(missed)}; a type must be plain, and a "
            "default text may hold neither '=' nor '#'"
        )


def _refuse_unknown(
    notebook: str, parameters: Mapping[str, Parameter], values: Mapping[str, object], source: str
) -> None:
    unknown = [name for name in values if name not in parameters]
    if unknown:
        raise InvalidInput(
            f"{source}: {notebook} has no parameter {_listed(unknown)}; its parameters are {_listed(parameters)}"
        )


def _parse(text: str, parameter: Parameter, where: str) -> object:
    if parameter.annotation == "str":
        return text
    if parameter.annotation == "bool":
        return BOOLEANS.get(text.strip().lower(), text)
    if parameter.annotation == "float":
        return text  # _convert reads it, as it does for YAML's 1e-4
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        raise _mistyped(text, parameter, where) from None
    if parameter.annotation in ("list", "tuple") and not isinstance(value, list | tuple):
        raise _mistyped(text, parameter, where)
    return value


def _convert(value: object, parameter: Parameter, where: str) -> object:
    kind = parameter.annotation
    if kind in SCALARS:
        return _scalar(value, kind, parameter, where)
    if kind == "dict":
        if not isinstance(value, Mapping):
            raise _mistyped(value, parameter, where)
        key_kind, item_kind = (parameter.items + (None, None))[:2]
        return {
            _item(key, key_kind, parameter, where): _item(item, item_kind, parameter, where)
            for key, item in value.items()
        }
    if not isinstance(value, list | tuple):
        raise _mistyped(value, parameter, where)
    item_kind = parameter.items[0] if parameter.items else _common_kind(parameter.default)
    return CONTAINERS[kind](_item(item, item_kind, parameter, where) for item in value)


def _item(value: object, kind: str | None, parameter: Parameter, where: str) -> object:
    return value if kind is None else _scalar(value, kind, parameter, where)


def _common_kind(default: object) -> str | None:
    """The type of a bare list's elements, when its default shows one: a list of floats takes 1e-4 and 1 as floats."""
    kinds = {type(item).__name__ for item in default} if isinstance(default, list | tuple) else set()
    if kinds == {"int", "float"}:
        return "float"
    return kinds.pop() if len(kinds) == 1 and kinds <= set(SCALARS) else None


def _scalar(value: object, kind: str, parameter: Parameter, where: str) -> object:
    if kind == "float" and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            raise _mistyped(value, parameter, where) from None
        if math.isfinite(number):
            return number
    elif type(value) is SCALARS[kind]:
        return value
    raise _mistyped(value, parameter, where)


def _mistyped(value: object, parameter: Parameter, where: str) -> InvalidInput:
    kind = parameter.annotation + (f"[{', '.join(parameter.items)}]" if parameter.items else "")
    return InvalidInput(
        f"{where}: parameter '{parameter.name}' wants {kind}, for example {EXAMPLES[parameter.annotation]}; "
        f"got {value!r} ({type(value).__name__})"
    )


def _listed(names: object) -> str:
    return ", ".join(str(name) for name in names)
