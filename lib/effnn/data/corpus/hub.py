"""Corpora of the hub at pinned revisions, as `python -m effnn.data download corpus` left them under data/cache.

Loading downloads nothing (corpus_download.py does): what is missing stops the run with one sentence. The rows lie in
Parquet shards, with a small JSON file for each split of the hub that says how much of it is there.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from effnn import paths
from effnn.base import InvalidInput, NotAvailable
from effnn.data.corpus.coders import Pretrained, load_pretrained
from effnn.data.corpus.documents import SPLITS, Documents, Piece, in_pieces, whole
from effnn.data.corpus.rows import read_rows
from effnn.data.text.task import unit_hash

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """A corpus of the hub: id, configuration, pinned revision, rows by split (None: it is downloaded in part).

    stream: each split is one text, a row a line of it; else a row is a document. carved: our split -> the hub's split
    and the range of hashes that its rows must lie in.
    """

    id: str
    config: str
    revision: str
    rows: dict[str, int | None]
    stream: bool = False
    carved: dict[str, tuple[str, float, float]] = field(default_factory=dict)

    def of(self, split: str) -> tuple[str, float, float] | None:
        """The hub's split and the range of hashes of one of ours; None where there is no text for it."""
        return self.carved.get(split) or ((split, 0.0, 1.0) if split in self.rows else None)


# Row counts are those of the data set cards at these revisions.
PLACES = {
    "wikitext-103": Place(
        "Salesforce/wikitext",
        "wikitext-103-raw-v1",
        "b08601e04326c79dfdd32d625aee71d232d685c3",
        {"train": 1801350, "validation": 3760, "test": 4358},
        stream=True,
    ),
    "openwebtext": Place(
        "Skylion007/openwebtext",
        "plain_text",
        "b4325f019c648b1641a1784748667e8b74e5e064",
        {"train": None},
        carved={"train": ("train", 0.0, 0.99), "validation": ("train", 0.99, 0.995), "test": ("train", 0.995, 1.0)},
    ),
    "c4": Place(
        "allenai/c4",
        "en",
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        {"train": None, "validation": None},
        carved={"validation": ("validation", 0.0, 0.5), "test": ("validation", 0.5, 1.0)},
    ),
    "lambada": Place(
        "EleutherAI/lambada_openai", "default", "900124bf3b8235c6daf21033af9948b3f07346c4", {"test": 5153}
    ),
}
GPT2 = ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e")


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
    place, folder = place_of(name), folder_of(name)
    states = {split: state for split in place.rows if (state := read_state(folder, split))}
    if len(states) < len(place.rows):
        raise NotAvailable(
            f"{place.id} ({place.config}) was looked for in {folder}, where it is not, or not whole: run `python -m "
            f"effnn.data download {name}`, give a local path as the source, or use the laptop profile, which needs no "
            f"download"
        )
    for split, state in states.items():
        if state.revision != place.revision:
            raise InvalidInput(
                f"{folder}: {split} is of revision {state.revision[:12]}, {place.revision[:12]} is pinned; delete "
                f"the folder and download again"
            )
    partly = ", ".join(f"the first {state.rows:,} rows of {s}" for s, state in states.items() if not state.whole)
    return Documents(
        name,
        f"hub: {place.id}/{place.config} at {place.revision[:12]}" + (f", {partly}" if partly else ""),
        {"id": place.id, "config": place.config, "rows": {split: vars(state) for split, state in states.items()}},
        lambda split: _read(place, folder, states, split),
        {split: _characters(place, states, split) for split in SPLITS},
        cut="train" in states and not states["train"].whole,
    )


def gpt2() -> Pretrained:
    """GPT-2's own tokenizer, from data/cache or from the hub's local cache. Raises NotAvailable where it is in none."""
    from transformers import AutoTokenizer

    if gpt2_folder().is_dir():
        return load_pretrained(gpt2_folder())
    for revision in (GPT2[1], "main"):
        try:
            return Pretrained(AutoTokenizer.from_pretrained(GPT2[0], revision=revision, local_files_only=True))
        except (OSError, ValueError) as error:
            log.debug("%s at %s is not in the hub's local cache: %s", GPT2[0], revision, error)
    raise NotAvailable(
        f"GPT-2's tokenizer ({GPT2[0]}) is neither in {gpt2_folder()} nor in the hub's local cache: run `python -m "
        f"effnn.data download gpt2`, or give the folder of a saved one as the tokenizer"
    )


def place_of(name: str) -> Place:
    """The entry of a corpus in `PLACES`."""
    if name not in PLACES:
        raise InvalidInput(f"unknown corpus of the hub {name!r}: choose one of {', '.join(PLACES)}")
    return PLACES[name]


def folder_of(name: str) -> Path:
    """Where a corpus lies once it is downloaded."""
    return paths.CACHE / "hub" / f"{name}-{place_of(name).revision[:12]}"


def gpt2_folder() -> Path:
    """Where GPT-2's tokenizer lies once it is downloaded."""
    return paths.CACHE / "hub" / f"gpt2-tokenizer-{GPT2[1][:12]}"


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


def _read(place: Place, folder: Path, states: dict[str, State], split: str) -> Iterator[Piece]:
    if not (found := place.of(split)):
        return iter(())
    theirs, low, high = found
    rows = _rows(folder, theirs, states[theirs].rows)
    if place.stream:
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


def _characters(place: Place, states: dict[str, State], split: str) -> int:
    if not (found := place.of(split)):
        return 0
    theirs, low, high = found
    return int(states[theirs].characters * (high - low))
