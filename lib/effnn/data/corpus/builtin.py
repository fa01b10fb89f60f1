"""The built-in corpus: the docstrings of the standard library and of five installed packages, as they are written.

A document is a docstring, less the paragraphs that another document already holds. Names and code stay in, unlike in
the text task.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from effnn.data import docstrings
from effnn.data.splits import split_files

log = logging.getLogger(__name__)

PACKAGES = (docstrings.STDLIB, "numpy", "scipy", "pandas", "matplotlib", "sklearn")
HELD_OUT = {
    "test": 0.05,
    "validation": 0.05,
}  # of a package's characters, in whole files, before repetitions are dropped
_BLANK = re.compile(r"\n\s*\n")


def collect(folders: Mapping[str, Path]) -> dict[str, list[str]]:
    """The documents of each split, in the order of package, file and place.

    No paragraph occurs twice, blanks aside: a repetition is dropped, and one that stands in two splits stays in train
    or else in validation.
    """
    files = docstrings.read(folders)
    place = split_files({file: sum(map(len, found)) for file, found in files.items()}, HELD_OUT)
    splits: dict[str, list[str]] = {}
    seen: set[str] = set()
    for split in ("train", "validation", "test"):
        documents = (text for file, found in files.items() if place[file] == split for text in found)
        splits[split] = [kept for text in documents if (kept := _unseen(text, seen))]
        log.info("docstrings: %s holds %d documents", split, len(splits[split]))
    return splits


def _unseen(docstring: str, seen: set[str]) -> str:
    kept = []
    for paragraph in _BLANK.split(docstring):
        essence = " ".join(paragraph.split())
        if essence and essence not in seen:
            seen.add(essence)
            kept.append(paragraph.strip("\n").rstrip())
    return "\n\n".join(kept)
