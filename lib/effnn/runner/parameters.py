"""The parameters cell of a notebook: its names and types, and values checked against them before anything runs.

papermill only warns about an unknown name, and YAML reads `1e-4` as text; both are settled here first.
"""

import ast
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import nbformat
import papermill
from pydantic import BeforeValidator, Field, StrictBool, StrictInt, StrictStr, TypeAdapter, ValidationError

from effnn.base import InvalidInput


def _number(value: object) -> object:
    return float(value) if isinstance(value, str) else value  # YAML reads 1e-4 as text


SCALARS = {
    "int": StrictInt,
    "float": Annotated[float, Field(strict=True, allow_inf_nan=False), BeforeValidator(_number)],
    "bool": StrictBool,
    "str": StrictStr,
}
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
        raise InvalidInput(f"{notebook.name} is not a readable notebook ({type(error).__name__}): restore it") from None
    cells = [
        cell for cell in content.cells if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", [])
    ]
    if len(cells) != 1:
        raise InvalidInput(f"{notebook.name}: {len(cells)} cells are tagged 'parameters'; expected exactly one")
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
    if parameter.annotation in ("str", "float"):
        return text
    if parameter.annotation == "bool":
        return BOOLEANS.get(text.strip().lower(), text)
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        raise _mistyped(text, parameter, where) from None


def _convert(value: object, parameter: Parameter, where: str) -> object:
    try:
        return TypeAdapter(_type_of(parameter)).validate_python(value)
    except ValidationError:
        raise _mistyped(value, parameter, where) from None


def _type_of(parameter: Parameter) -> object:
    """The declared type for pydantic; elements of a bare list or tuple have the type of the default's elements."""
    kind = parameter.annotation
    if kind in SCALARS:
        return SCALARS[kind]
    items = parameter.items or (() if kind == "dict" else _common_kind(parameter.default))
    types = [SCALARS[item] for item in items] or [object]
    if kind == "dict":
        return dict[types[0], (types[1:] or [object])[0]]
    return list[types[0]] if kind == "list" else tuple[types[0], ...]


def _common_kind(default: Sequence[object]) -> tuple[str, ...]:
    """The one type of the elements, () where they differ; a list of floats and ints takes 1e-4 and 1 as floats."""
    kinds = {type(item).__name__ for item in default}
    if kinds == {"int", "float"}:
        return ("float",)
    return tuple(kinds) if len(kinds) == 1 and kinds <= set(SCALARS) else ()


def _mistyped(value: object, parameter: Parameter, where: str) -> InvalidInput:
    kind = parameter.annotation + (f"[{', '.join(parameter.items)}]" if parameter.items else "")
    return InvalidInput(
        f"{where}: parameter '{parameter.name}' must be {kind}, for example {EXAMPLES[parameter.annotation]}; "
        f"got {value!r} ({type(value).__name__})"
    )


def _listed(names: object) -> str:
    return ", ".join(str(name) for name in names)
