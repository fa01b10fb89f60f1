"""Which files of effnn a piece of code uses: the closure of its imports.

Results depend on code, and a list of modules kept by hand is soon incomplete. Imports are read from syntax trees, so
nothing is imported to find them; an import inside a function counts, and so does `import_module` with a literal name.
Names that are put together at run time (`importlib.import_module(f"...")`) are not found.
"""

import ast
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path

from effnn.base.errors import InvalidInput

PACKAGE = Path(__file__).resolve().parents[1]


def library_files(sources: Iterable[str]) -> list[Path]:
    """Return the files of effnn that these pieces of Python import, followed through effnn's own imports, sorted.

    Other files beside an imported module (a style file, a template) count too, except Markdown. A piece that is not
    valid Python adds nothing; running it will show the error.
    """
    return _closure([name for source in sources for name in _imports(source, "")], set())


def files_behind(function: Callable) -> list[Path]:
    """Return the file that defines `function` and the files of effnn that it imports, directly or not, sorted.

    function: of a module that was read from a file, also as a method, an object with `__call__`, or a
    `functools.partial`, of which the functions among its arguments count as well. Raises InvalidInput for one without a
    file (typed into a notebook or at a prompt).
    """
    waiting, starts = [], set()
    for start in {_source_file(one) for one in _functions(function)}:
        package = start.parent.relative_to(PACKAGE.parent).parts if start.is_relative_to(PACKAGE) else ()
        waiting += _imports_of(start, ".".join(package), *_stamp(start))
        starts |= {start, *(_data_beside(start) if package else ())}
    return _closure(waiting, starts)


def code_digest(function: Callable) -> str:
    """Return a sha256 of the code of `files_behind(function)`, the same wherever the repository lies.

    Comments, docstrings and layout do not count: a better sentence must not cost a long computation.
    """
    listed = [(_label(path), _digest(path, *_stamp(path))) for path in files_behind(function)]
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def _closure(waiting: list[str], found: set[Path]) -> list[Path]:
    waiting = list(waiting)
    while waiting:
        for path, package in _files_of(waiting.pop()):
            if path not in found:
                found.add(path)
                waiting += _imports_of(path, package, *_stamp(path))
                found.update(_data_beside(path))
    return sorted(found)


def _data_beside(path: Path) -> list[Path]:
    """Files in the folder of a module that are no Python code, such as a style file."""
    return [file for file in path.parent.iterdir() if file.is_file() and file.suffix not in (".py", ".pyc", ".md")]


def _functions(function: object) -> list[Callable]:
    """The function itself; what a partial calls, and the functions that it hands over."""
    if not isinstance(function, functools.partial):
        return [function]
    given = [item for item in (*function.args, *function.keywords.values()) if inspect.isroutine(item)]
    given += [item for item in (*function.args, *function.keywords.values()) if isinstance(item, functools.partial)]
    return [one for item in (function.func, *given) for one in _functions(item)]


def _source_file(function: Callable) -> Path:
    code = function if inspect.isroutine(function) or inspect.isclass(function) else type(function).__call__
    try:
        file = Path(inspect.getsourcefile(inspect.unwrap(code)) or "")
    except TypeError:  # built in
        file = Path()
    if not file.is_file():
        raise InvalidInput(
            f"{getattr(function, '__qualname__', function)!r} is not defined in a file, so the version of its code is "
            "unknown: put it into a module"
        )
    return file.resolve()


def _imports(source: str, package: str) -> list[str]:
    """Dotted names under effnn that `source` imports; `package` is where its relative imports start from."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(parents + ([node.module] if node.module else []))
            names += [base] + [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names += [item.value for item in node.args[:1] if isinstance(getattr(item, "value", None), str)]
    return [name for name in names if name.split(".")[0] == PACKAGE.name]


@functools.cache
def _imports_of(path: Path, package: str, changed: int, size: int) -> list[str]:
    """The same for a file; `changed` and `size` tell one version from the next."""
    return _imports(path.read_text(encoding="utf-8"), package)


def _files_of(name: str) -> list[tuple[Path, str]]:
    """Files that importing a dotted name reads, each with the package it belongs to; a plain attribute adds none."""
    files, folder, package = [(PACKAGE / "__init__.py", PACKAGE.name)], PACKAGE, PACKAGE.name
    for part in name.split(".")[1:]:
        if (folder / part / "__init__.py").is_file():
            folder, package = folder / part, f"{package}.{part}"
            files.append((folder / "__init__.py", package))
        elif (folder / f"{part}.py").is_file():
            files.append((folder / f"{part}.py", package))
            break
        else:
            break
    return files


def _label(path: Path) -> str:
    return path.relative_to(PACKAGE.parent).as_posix() if path.is_relative_to(PACKAGE) else path.name


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


@functools.cache
def _digest(path: Path, changed: int, size: int) -> str:
    """sha256 of what runs of a file."""
    content = path.read_bytes()
    if path.suffix == ".py":
        try:
            tree = ast.parse(content)
        except SyntaxError:
            return hashlib.sha256(content).hexdigest()
        content = ast.dump(_Bare().visit(tree)).encode()
    return hashlib.sha256(content).hexdigest()


class _Bare(ast.NodeTransformer):
    """Removes docstrings and other lone strings from a tree."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        alone = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if alone else node
