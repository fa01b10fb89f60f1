"""Documents on their way to tokens: a stream of pieces, so that a file larger than the memory can be encoded.

A document is cut only where byte-level BPE cuts anyway, so the ids do not depend on where the pieces end. Each source
decides what a document is; this file reads nothing and knows no tokenizer.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

SPLITS = ("train", "validation", "test")
PIECE = 1 << 16  # characters: `tokenizers` queues 256 pieces when it trains
BATCH = 1 << 20  # characters that are encoded at once; the ids and what the tokenizer needs are some tens of MB
# GPT-2's pattern joins a space to the word after it, keeps a newline by itself, and leaves the last white-space
# character of a run to what follows. So text may be cut before a space or newline with no white space after it.
_BREAK = re.compile(r"[ \n](?=\S)")
_TAIL = 1 << 12


class Piece(NamedTuple):
    """A stretch of text; `first` is True where a document begins."""

    text: str
    first: bool


@dataclass(frozen=True)
class Documents:
    """Where the documents of a corpus come from.

    name, source: of the corpus, for a person to read.
    identity: values that JSON can write and that change whenever a document changes; it enters the cache's key.
    read: the pieces of a split ("train", "validation" or "test"), from the start at each call.
    characters: about how many each split holds; 0 where there is no text for it.
    cut: train is the first part of a larger data set.
    """

    name: str
    source: str
    identity: Mapping[str, object]
    read: Callable[[str], Iterator[Piece]]
    characters: Mapping[str, int]
    cut: bool = False


def whole(texts: Iterable[str]) -> Iterator[Piece]:
    """Each text as a document of its own; empty ones are left out. Long ones come in pieces."""
    for text in texts:
        if len(text) <= PIECE:
            if text:
                yield Piece(text, True)
        else:
            yield from in_pieces(text[start : start + PIECE] for start in range(0, len(text), PIECE))


def in_pieces(chunks: Iterable[str], size: int = PIECE) -> Iterator[Piece]:
    """One document from consecutive chunks of its text, in pieces of about `size` characters or of a chunk.

    The pieces are cut at white space; a stretch of `size` characters without any is cut where it ends.
    """
    rest, first = "", True
    for chunk in chunks:
        rest += chunk
        if len(rest) < size:
            continue
        cut = _last_break(rest)
        yield Piece(rest[:cut], first)
        rest, first = rest[cut:], False
    if rest:
        yield Piece(rest, first)


def batches(pieces: Iterable[Piece], characters: int = BATCH) -> Iterator[list[Piece]]:
    """The pieces in lists of at least `characters` characters (the last list: what is left)."""
    batch, held = [], 0
    for piece in pieces:
        batch.append(piece)
        held += len(piece.text)
        if held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _last_break(text: str) -> int:
    for start in (max(1, len(text) - _TAIL), 1):  # nearly always in the tail
        cuts = [match.start() for match in _BREAK.finditer(text, start)]
        if cuts:
            return cuts[-1]
    return len(text)
