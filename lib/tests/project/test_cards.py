"""Every room of the library has a card, README.md, whose tables name each of its files and no other."""

import re

import pytest

from effnn import paths

PACKAGE = paths.LIB / "effnn"
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))


def problems(room) -> list[str]:
    """Return what the tables of a room's card leave out, and what they name that does not exist.

    A file is named in back quotes by its path within the room, as in `pruning/fisher.py`. `__init__.py` is not needed.
    """
    card = room / "README.md"
    if not card.is_file():
        return [f"{room.name} has no README.md"]
    rows = [line for line in card.read_text(encoding="utf-8").splitlines() if line.lstrip().startswith("|")]
    named = set(re.findall(r"`([\w/]+\.py)`", "\n".join(rows)))
    there = {path.relative_to(room).as_posix() for path in room.rglob("*.py")}
    missing = {name for name in there - named if not name.endswith("__init__.py")}
    return [f"no table names {name}" for name in sorted(missing)] + [
        f"no file {name}" for name in sorted(named - there)
    ]


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_a_card_names_every_file_of_its_room(room):
    assert problems(room) == []


def test_the_checker_finds_what_is_missing_and_what_is_gone(tmp_path):
    assert problems(tmp_path) == [f"{tmp_path.name} has no README.md"]
    (tmp_path / "inner").mkdir()
    for name in ("__init__.py", "a.py", "inner/b.py", "inner/__init__.py"):
        (tmp_path / name).touch()
    card = tmp_path / "README.md"
    card.write_text("`a.py` in a sentence does not count\n\n| file | what |\n|---|---|\n| `b.py`, `inner/b.py` | x |\n")
    assert problems(tmp_path) == ["no table names a.py", "no file b.py"]
    card.write_text("| file | what |\n|---|---|\n| `a.py`, `inner/b.py` | x |\n")
    assert problems(tmp_path) == []
