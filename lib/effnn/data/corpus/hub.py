"""Corpora of the hub, as `python -m effnn.data download corpus` left them under data/cache.

Loading downloads nothing (download.py does). The rows lie in Parquet shards, with a small JSON file for each split of
the hub that says how much of it is there.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from effnn.base import InvalidInput
from effnn.data import hub
from effnn.data.corpus.coders import Pretrained, load_pretrained
from effnn.data.corpus.documents import SPLITS, Documents, Piece, in_pieces, whole
from effnn.data.files.reading import read_rows
from effnn.data.hub import HubSet
from effnn.data.splits import unit_hash

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """How much of a split was downloaded; whole: all of it."""

    revision: str
    rows: int
    characters: int
    whole: bool


def documents(name: str) -> Documents:
    """The documents of a corpus that was downloaded.

    Raises NotAvailable where it was not, and InvalidInput for one of another revision than the pinned one.
    """
    entry, folder = hub.CORPORA[name], hub.folder_of(name)
    splits = entry.rows[entry.config]
    states = {split: state for split in splits if (state := read_state(folder, split))}
    if len(states) < len(splits):
        raise hub.not_downloaded(name)
    for split, state in states.items():
        if state.revision != entry.revision:
            raise InvalidInput(
                f"{folder}: {split} is of revision {state.revision[:12]}, {entry.revision[:12]} is pinned; delete "
                f"the folder and download again"
            )
    partly = ", ".join(f"the first {state.rows:,} rows of {s}" for s, state in states.items() if not state.whole)
    return Documents(
        name,
        hub.describe(name) + (f", {partly}" if partly else ""),
        {"id": entry.id, "config": entry.config, "rows": {split: vars(state) for split, state in states.items()}},
        lambda split: _read(entry, folder, states, split),
        {split: _characters(entry, states, split) for split in SPLITS},
        cut="train" in states and not states["train"].whole,
    )


def gpt2() -> Pretrained:
    """GPT-2's own tokenizer, from data/cache or from the hub's local cache. Raises NotAvailable where it is in none."""
    from transformers import AutoTokenizer

    entry, folder = hub.TOKENIZERS["gpt2"], hub.folder_of("gpt2")
    if folder.is_dir():
        return load_pretrained(folder)
    for revision in (entry.revision, "main"):
        try:
            return Pretrained(AutoTokenizer.from_pretrained(entry.id, revision=revision, local_files_only=True))
        except (OSError, ValueError) as error:
            log.debug("%s at %s is not in the hub's local cache: %s", entry.id, revision, error)
    raise hub.not_downloaded("gpt2")


def shards(folder: Path, split: str) -> list[Path]:
    """The Parquet files of one split of the hub, in their order."""
    return sorted(folder.glob(f"{split}-*.parquet"))


def state_path(folder: Path, split: str) -> Path:
    """The JSON file that says how much of a split is there."""
    return folder / f"{split}.json"


def read_state(folder: Path, split: str) -> State | None:
    """What that file says; None where there is none, so the download was never finished."""
    path = state_path(folder, split)
    return State(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _read(entry: HubSet, folder: Path, states: dict[str, State], split: str) -> Iterator[Piece]:
    if not (found := _source_of(entry, split)):
        return iter(())
    theirs, low, high = found
    rows = _rows(folder, theirs, states[theirs].rows)
    if entry.one_text:
        return in_pieces(row or " \n" for row in rows)  # the published file has " \n" where the hub has an empty row
    return whole(text for text in rows if low <= unit_hash(text) < high)


def _rows(folder: Path, split: str, expected: int) -> Iterator[str]:
    """So many rows, from the first: shards of a download that is still to go on are left out."""
    rows = 0
    for text in islice((text for path in shards(folder, split) for text in read_rows(path)), expected):
        rows += 1
        yield text
    if rows < expected:
        raise InvalidInput(
            f"{folder}: {split} holds {rows:,} rows, {expected:,} were downloaded; delete the folder and download again"
        )


def _characters(entry: HubSet, states: dict[str, State], split: str) -> int:
    if not (found := _source_of(entry, split)):
        return 0
    theirs, low, high = found
    return int(states[theirs].characters * (high - low))


def _source_of(entry: HubSet, split: str) -> tuple[str, float, float] | None:
    """The hub's split and the range of hashes that one of our splits is made of; None where there is no text for it."""
    return entry.carved.get(split) or ((split, 0.0, 1.0) if split in entry.rows[entry.config] else None)
