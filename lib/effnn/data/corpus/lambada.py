"""LAMBADA: passages whose last word a model is to guess (Paperno et al. 2016, arXiv 1606.06031).

It is for evaluation alone: there is nothing to train on. Passages come from the hub's copy that GPT-2's authors
prepared, or from a file. Scoring a model on them is not done here.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from effnn.base import InvalidInput, NotAvailable
from effnn.data.corpus import hub as corpus_hub
from effnn.data.corpus.documents import Documents, whole
from effnn.data.files.reading import check_file, holds_rows, read_rows, read_text


@dataclass(frozen=True)
class LambadaExample:
    """A passage without its last word, and that word; between them stood one blank, which is in neither."""

    context: str
    word: str


def lambada_examples(source: str | Path = "hub") -> list[LambadaExample]:
    """The passages in their order, each parted before its last word.

    source: "hub" (what was downloaded), or a file: rows with a text (.jsonl, .parquet), or one passage per line. Raises
    NotAvailable for data that is not here, and InvalidInput for a passage of fewer than two words.
    """
    examples = []
    for number, passage in enumerate(_passages(source), 1):
        parts = passage.rsplit(maxsplit=1)
        if len(parts) < 2:
            raise InvalidInput(
                f"LAMBADA passage {number} of {source}: expected at least two words, found {passage[:40]!r}"
            )
        examples.append(LambadaExample(parts[0], parts[1]))
    return examples


def documents(source: str | Path = "hub") -> Documents:
    """The passages as documents of test; train and validation are empty."""
    if str(source) == "hub":
        return corpus_hub.documents("lambada")
    passages = _passages(source)
    return Documents(
        "lambada",
        f"file {source}, all for test",
        {"lambada": hashlib.sha256(json.dumps(passages).encode()).hexdigest()},
        lambda split: whole(passages if split == "test" else ()),
        {"train": 0, "validation": 0, "test": sum(map(len, passages))},
    )


def _passages(source: str | Path) -> Sequence[str]:
    if str(source) == "hub":
        return [piece.text for piece in corpus_hub.documents("lambada").read("test")]
    path = Path(source).expanduser()
    if not path.is_file():
        raise NotAvailable(f"LAMBADA was looked for in {path}, which is no file: give the file of its passages")
    check_file(path)
    found = list(read_rows(path)) if holds_rows(path) else "".join(read_text(path)).split("\n")
    passages = [passage for passage in found if passage.strip()]
    if not passages:
        raise InvalidInput(f"{path} holds no passage: expected rows with a text, or one passage per line")
    return passages
