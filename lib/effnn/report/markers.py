"""Generated text inside a hand-written file: what is between `<!-- name:begin -->` and `<!-- name:end -->`."""

from pathlib import Path

from effnn.base import InvalidInput, write_text


def fill(text: str, name: str, body: str) -> str:
    """Return `text` with `body` between the two markers of `name`; filling twice changes nothing more.

    Raises InvalidInput unless each marker is there exactly once, begin before end.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise InvalidInput(f"expected one {begin!r} and, after it, one {end!r}; put both on lines of their own")
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{body.strip()}\n{end}{after}"


def fill_file(path: Path, name: str, body: str) -> bool:
    """Fill the markers of `name` in a file, written only when it changes; returns whether it did."""
    text = path.read_text(encoding="utf-8")
    try:
        filled = fill(text, name, body)
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from None
    if filled != text:
        write_text(path, filled)
    return filled != text


def has(path: Path, name: str) -> bool:
    """Whether the file exists and holds the begin marker of `name`."""
    return path.is_file() and f"<!-- {name}:begin -->" in path.read_text(encoding="utf-8")


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table; bars and line breaks inside cells are made harmless."""
    cells = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in [header, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(header), *lines[1:]])
