"""The front door of the language-model corpora: one `load` for built-in, local and hub text, all of one type.

    c = load("docstrings", tokenizer="character")                  # built in, no network
    c = load("text", source="/data/input.txt", tokenizer="bpe")    # a text file or a folder of them
    c = load("wikitext-103", source="hub", tokenizer="gpt2")       # as `python -m effnn.data download corpus` left it
    t = load("wikitext-103", source="hub", tokenizer=c.tokenizer)  # other text, for a model that was trained on c

Every source gives a `Corpus`; nothing falls back to another source by itself. Ids lie memory-mapped under data/cache;
they are checked on loading, and made again where they are damaged.
"""

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from effnn import cache
from effnn.base import InvalidInput
from effnn.data import docstrings, hub
from effnn.data.corpus import builtin, coders, files, lambada, token_files
from effnn.data.corpus import hub as corpus_hub
from effnn.data.corpus.coders import BytePairs, Characters, Coder, Pretrained
from effnn.data.corpus.documents import SPLITS, Documents, Piece, batches, whole

log = logging.getLogger(__name__)

NAMES = ("docstrings", "text", *hub.CORPORA)
# A vocabulary gets no better by counting more; this bounds time and memory of training on a large corpus.
TRAINING_BATCHES = 100  # of about a megabyte


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenized corpus; equal fingerprints mean equal ids in every split and an equal tokenizer.

    name: as it was asked for.
    train, validation, test: 1-D token ids, uint16 (uint32 for vocabularies above 65,535), memory-mapped and read-only.
    tokenizer: pass it to another `load` to encode other text the same way.
    source: where the text came from, for a person to read; it does not enter the fingerprint.
    fingerprint: sha256 over the tokenizer and the ids.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    tokenizer: Coder
    source: str
    fingerprint: str

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.tokenizer.vocab_size

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without separators; what reads like an end-of-text token is text."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids (any iterable of integers). Raises InvalidInput for an id outside the vocabulary."""
        return self.tokenizer.decode(ids)


def load(
    name: str = "docstrings",
    source: str | Path = "builtin",
    tokenizer: str | Path | PreTrainedTokenizerBase | Coder = "bpe",
    vocab_size: int | None = None,
    limit_tokens: int | None = None,
) -> Corpus:
    """The corpus from its source, encoded; the built-in one takes about 15 s once and is cached.

    name: "docstrings" (built in), "text", or a corpus of the hub (`NAMES`).
    source: "builtin", "hub", or the path of a file or folder (how that is split stands in files.py).
    tokenizer: "bpe" (byte-level BPE) or "character", trained on the first 100 MB of train; "gpt2"; the folder of a
    saved tokenizer; a fast one of transformers; or the tokenizer of another corpus. Documents are separated by one
    end-of-text token, or by two newlines among characters.
    vocab_size: number of ids at most, of "bpe" (4096) or "character" (96, the unknown character included).
    limit_tokens: train is cut to so many; None takes all that is there.

    Raises InvalidInput for a choice that does not exist, files without text or of another kind, text that cannot be
    read, and a limit beyond what was downloaded; NotAvailable for data or a tokenizer that is not here;
    CannotWrite where the disk takes no more.
    """
    if limit_tokens is not None and limit_tokens < 1:
        raise InvalidInput(f"limit_tokens={limit_tokens}: expected at least 1, or None for all")
    documents, coder = _documents(name, source), _ready_made(tokenizer, vocab_size)
    if coder is None and not documents.characters["train"]:
        raise InvalidInput(
            f"{name} ({documents.source}) holds no train text to make a tokenizer of: give the tokenizer of a trained "
            f"model's corpus, add a train file, or give one file as the source, which is cut into three splits"
        )
    size = coders.DEFAULT_SIZES.get(str(tokenizer), 0) if vocab_size is None else vocab_size
    key = {
        "documents": json.dumps(documents.identity),
        "tokenizer": [str(tokenizer), size] if coder is None else coder.fingerprint,
        "tokenizers": importlib.metadata.version("tokenizers"),
        "limit": limit_tokens,
    }
    folder = cache.entry("corpus", key, load).with_suffix("")
    corpus = _read(folder, documents, coder)
    if corpus is None:
        if not any(piece.text.strip() for split in SPLITS for piece in documents.read(split)):
            raise InvalidInput(f"{name} ({documents.source}) holds no text: all of its documents are empty")
        made = coder or _train(documents, str(tokenizer), size)
        streams = {split: _ids(documents, split, made, limit_tokens) for split in SPLITS}
        dumped = "" if coder else made.dump()
        token_files.write(folder, streams, token_files.dtype_for(made.vocab_size), dumped)
        corpus = _corpus(documents, token_files.read(folder), coder)
    if limit_tokens and documents.cut and len(corpus.train) < limit_tokens:
        raise InvalidInput(
            f"{name}: {len(corpus.train):,} tokens of train were downloaded, limit_tokens={limit_tokens:,} asks for "
            f"more: run `python -m effnn.data download {name} --limit-tokens N` with a larger N"
        )
    return corpus


def _documents(name: str, source: str | Path) -> Documents:
    if name not in NAMES:
        raise InvalidInput(f"unknown corpus {name!r}: choose one of {', '.join(NAMES)}")
    if (name == "docstrings") != (str(source) == "builtin") or (name == "text" and str(source) == "hub"):
        expected = {"docstrings": "'builtin'", "text": "the path of a text file or folder"}
        raise InvalidInput(
            f"the source of {name} is {expected.get(name, repr('hub') + ' or a path')}, not {str(source)!r}"
        )
    if name == "docstrings":
        return _docstrings()
    if name == "lambada":
        return lambada.documents(source)
    return corpus_hub.documents(name) if str(source) == "hub" else files.documents(name, source)


def _docstrings() -> Documents:
    folders = docstrings.locate(builtin.PACKAGES)
    texts = cache.remember(
        "corpus_docstrings",
        {"folders": str(folders), **docstrings.versions(builtin.PACKAGES)},
        lambda: builtin.collect(folders),
    )
    return Documents(
        "docstrings",
        "builtin: docstrings of the standard library and of installed packages",
        {"docstrings": hashlib.sha256(json.dumps(texts).encode()).hexdigest()},
        lambda split: whole(texts[split]),
        {split: sum(map(len, texts[split])) for split in SPLITS},
    )


def _ready_made(tokenizer: str | Path | PreTrainedTokenizerBase | Coder, vocab_size: int | None) -> Coder | None:
    """The tokenizer that was asked for; None where it is to be trained."""
    if isinstance(tokenizer, str) and tokenizer in coders.DEFAULT_SIZES:
        return None
    if vocab_size is not None:
        raise InvalidInput(f"vocab_size={vocab_size} goes with tokenizer 'bpe' or 'character': others have their own")
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return Pretrained(tokenizer)
    if isinstance(tokenizer, Characters | BytePairs | Pretrained):
        return tokenizer
    if not isinstance(tokenizer, str | Path):
        raise InvalidInput(f"no tokenizer: expected a name, a folder or a fast tokenizer, found {type(tokenizer)}")
    return corpus_hub.gpt2() if str(tokenizer) == "gpt2" else coders.load_pretrained(tokenizer)


def _train(documents: Documents, kind: str, vocab_size: int) -> Coder:
    few = islice(_watched(documents, "train", f"{kind} tokenizer"), TRAINING_BATCHES)
    return coders.train(kind, (piece.text for batch in few for piece in batch), vocab_size)


def _read(folder: Path, documents: Documents, coder: Coder | None) -> Corpus | None:
    if not folder.exists():
        return None
    try:
        return _corpus(documents, token_files.read(folder), coder)
    except token_files.Damaged as error:
        log.warning("the token files in %s are damaged (%s); making them again", folder, error)
        return None


def _corpus(documents: Documents, stored: token_files.TokenFiles, coder: Coder | None) -> Corpus:
    coder = coder or coders.load_coder(stored.tokenizer)
    identity = json.dumps([coder.fingerprint, [stored.sha256[split] for split in SPLITS]])
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    return Corpus(documents.name, **stored.tokens, tokenizer=coder, source=documents.source, fingerprint=fingerprint)


def _ids(documents: Documents, split: str, coder: Coder, limit_tokens: int | None) -> Iterator[np.ndarray]:
    """The ids of a split, batch by batch: documents with the separator between them, train cut at the limit."""
    separator, begun = np.asarray(coder.separator), False
    left = limit_tokens if split == "train" else None
    for batch in _watched(documents, split, split):
        parts = []
        for piece, ids in zip(batch, coder.encode_many([piece.text for piece in batch]), strict=True):
            if piece.first and begun:
                parts.append(separator)
            begun = True
            parts.append(ids)
        ids = np.concatenate(parts)[:left]
        yield ids
        if left is not None:
            left -= len(ids)
            if not left:
                return


def _watched(documents: Documents, split: str, what: str) -> Iterator[list[Piece]]:
    """The pieces of a split in batches, with a progress bar."""
    total = documents.characters[split]
    with tqdm(total=total, desc=f"{documents.name}: {what}", unit="char", unit_scale=True) as progress:
        for batch in batches(documents.read(split)):
            yield batch
            progress.update(sum(len(piece.text) for piece in batch))
