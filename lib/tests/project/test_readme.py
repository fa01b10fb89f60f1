"""The code of README.md and of each card's "Examples" runs, in order and in one namespace, and its commands exist."""

import re
import subprocess
import sys

import pytest

from effnn import paths

README = (paths.HOME / "README.md").read_text(encoding="utf-8")
MAKEFILE = (paths.HOME / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, flags=re.MULTILINE))


CARDS = sorted((paths.LIB / "effnn").glob("*/README.md"))


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def examples():
    """README.md, and what follows the heading "Examples" of each card that has one."""
    cards = {card.parent.name: card.read_text(encoding="utf-8").partition("\n## Examples\n")[2] for card in CARDS}
    return {"README": README} | {name: text for name, text in cards.items() if blocks("python", text)}


@pytest.mark.parametrize("text", examples().values(), ids=examples().keys())
def test_the_python_blocks_run(text, tmp_path):
    script = tmp_path / "readme.py"
    script.write_text("\n\n".join(blocks("python", text)), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stdout[-500:]}{done.stderr[-3000:]}"


def test_the_methods_are_shown():
    assert {"README", "ltp", "staged", "comm"} <= examples().keys()


def test_the_two_commands_are_there():
    assert any(
        {"make reproduce", "make test"} <= {" ".join(line.split()[:2]) for line in b.splitlines()} for b in shell()
    )


def test_every_make_command_that_is_named_exists():
    named = re.findall(r"`make ([a-z-]+)", README)
    named += [match for block in shell() for match in re.findall(r"^\s*make ([a-z-]+)", block, flags=re.MULTILINE)]
    assert named and set(named) <= TARGETS


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!https?:|#|mailto:)[^)]+)\)", README) or ["README.md"])
def test_every_file_that_is_linked_exists(link):
    built = {"results/report.html"}  # by make reproduce
    assert link.split("#")[0] in built or (paths.HOME / link.split("#")[0]).exists()


def shell():
    """Indented and fenced blocks that are not Python."""
    return blocks("(?:sh|bash|console)?") + re.findall(r"(?:^    .*\n)+", README, flags=re.MULTILINE)
