"""Tokenizers for language-model corpora: characters, byte-level BPE, and one that somebody else trained.

All of them come out the same on every run, and text never turns into the separator by itself: where a document holds
the words "<|endoftext|>", they are encoded as text. WordPiece, for the encoder models, is in text/wordpiece.py.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from operator import index
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from effnn.base import InvalidInput, NotAvailable, first_line

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "\ufffd"  # the replacement character stands for every character outside the vocabulary
DEFAULT_SIZES = {"bpe": 4096, "character": 96}
BYTES = 256


class Coder(Protocol):
    """What a corpus needs of a tokenizer. separator: the ids between two documents."""

    kind: str
    vocab_size: int
    fingerprint: str
    separator: tuple[int, ...]

    def encode(self, text: str) -> list[int]: ...
    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


class Characters:
    """One id per character: 0 for every unknown one, then the known ones in the order of their code points.

    known: the characters, newline among them. Documents are separated by two newlines.
    """

    kind = "character"

    def __init__(self, known: Iterable[str]):
        self.known = "".join(sorted(set(known) - {UNKNOWN}))
        if "\n" not in self.known:
            raise InvalidInput("a character vocabulary needs the newline, which separates documents")
        self.vocab_size = 1 + len(self.known)
        self.fingerprint = hashlib.sha256(json.dumps([self.kind, self.known]).encode()).hexdigest()
        self._ids = np.zeros(0x110000, dtype=np.uint32)
        self._ids[[ord(character) for character in self.known]] = np.arange(1, self.vocab_size)
        self.separator = tuple(self.encode("\n\n"))

    def encode(self, text: str) -> list[int]:
        """The ids of a text, one per character."""
        return self._lookup(text).tolist()

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text."""
        return [self._lookup(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids; id 0 gives U+FFFD. Raises InvalidInput for an id outside the vocabulary."""
        return "".join((UNKNOWN + self.known)[i] for i in _checked(ids, self.vocab_size))

    def dump(self) -> str:
        """The vocabulary as text, for `load_coder`."""
        return json.dumps({"kind": self.kind, "known": self.known})

    def _lookup(self, text: str) -> np.ndarray:
        return self._ids[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")]


class BytePairs:
    """Byte-level BPE as GPT-2 does it; every text can be encoded and comes back as it was.

    Documents are separated by one end-of-text token, which has id 0.
    """

    kind = "bpe"

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = tokenizer.get_vocab_size()
        self.separator = (tokenizer.token_to_id(END_OF_TEXT),)
        self.fingerprint = hashlib.sha256(self.dump().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text."""
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in found]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids, separators included. Raises InvalidInput for an id outside the vocabulary."""
        return self._tokenizer.decode(_checked(ids, self.vocab_size), skip_special_tokens=False)

    def dump(self) -> str:
        """The tokenizer as text, for `load_coder`."""
        return json.dumps({"kind": self.kind, "tokenizer": json.loads(self._tokenizer.to_str())})


class Pretrained:
    """A tokenizer of transformers, as it is; documents are separated by its end-of-sequence token.

    Raises InvalidInput for one without such a token, and for one that is not of the fast kind.
    """

    kind = "pretrained"

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.is_fast:
            raise InvalidInput(
                f"{type(tokenizer).__name__} is a slow tokenizer: expected a fast one (AutoTokenizer gives it)"
            )
        if tokenizer.eos_token_id is None:
            raise InvalidInput(f"{type(tokenizer).__name__} has no end-of-sequence token to separate documents with")
        self._tokenizer = tokenizer
        self.vocab_size = 1 + max(tokenizer.get_vocab().values())  # more than there are tokens where ids are left out
        self.separator = (tokenizer.eos_token_id,)
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        settled = {key: value for key, value in state.items() if key not in ("padding", "truncation")}  # set by calls
        self.fingerprint = hashlib.sha256(json.dumps([settled, self.separator]).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return self._call([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, without special tokens."""
        return [np.asarray(ids, dtype=np.uint32) for ids in self._call(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids, separators included. Raises InvalidInput for an id outside the vocabulary."""
        known = _checked(ids, self.vocab_size)
        return self._tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _call(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]


def train(kind: str, texts: Iterable[str], vocab_size: int | None = None) -> Characters | BytePairs:
    """A tokenizer of this kind ("bpe" or "character") for these texts; equal texts and arguments give equal ids.

    vocab_size: ids at most, the unknown character or the end-of-text token included; None takes 4096 (bpe) or 96
    (character). Raises InvalidInput for a size that is too small and for texts without a character.
    """
    if kind not in DEFAULT_SIZES:
        raise InvalidInput(f"unknown kind of tokenizer {kind!r}: choose one of {', '.join(DEFAULT_SIZES)}")
    vocab_size = DEFAULT_SIZES[kind] if vocab_size is None else vocab_size
    return _train_characters(texts, vocab_size) if kind == "character" else _train_bpe(texts, vocab_size)


def load_coder(dumped: str) -> Characters | BytePairs:
    """The tokenizer that `dump` wrote."""
    state = json.loads(dumped)
    if state["kind"] == "character":
        return Characters(state["known"])
    return BytePairs(Tokenizer.from_str(json.dumps(state["tokenizer"])))


def load_pretrained(folder: str | Path) -> Pretrained:
    """The tokenizer saved in a folder (`save_pretrained`). Raises NotAvailable where there is none."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise NotAvailable(
            f"no tokenizer in {folder}, which is no folder: expected bpe, character, gpt2, or the folder of a saved "
            f"tokenizer (save_pretrained)"
        )
    try:
        return Pretrained(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise NotAvailable(f"{folder} holds no tokenizer that transformers can load ({first_line(error)})") from error


def _train_characters(texts: Iterable[str], vocab_size: int) -> Characters:
    if vocab_size < 3:
        raise InvalidInput(f"vocab_size={vocab_size}: a character vocabulary needs at least 3 ids")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    if not counts:
        raise InvalidInput("no character to make a vocabulary of: the texts are empty")
    # The newline separates documents, so it is in, however rare; ties go by code point.
    others = sorted(set(counts) - {"\n", UNKNOWN}, key=lambda character: (-counts[character], character))
    return Characters(["\n", *others[: vocab_size - 2]])


def _train_bpe(texts: Iterable[str], vocab_size: int) -> BytePairs:
    if vocab_size < BYTES + 1:
        raise InvalidInput(
            f"vocab_size={vocab_size}: byte-level BPE needs at least {BYTES + 1}, one id per byte and one"
        )
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return BytePairs(tokenizer)


def _checked(ids: Iterable[int], vocab_size: int) -> list[int]:
    try:
        known = [index(i) for i in ids]
    except TypeError as error:
        raise InvalidInput(f"expected token ids, whole numbers in one dimension: {error}") from None
    for i in known:
        if not 0 <= i < vocab_size:
            raise InvalidInput(f"token id {i} is outside the vocabulary of {vocab_size}")
    return known
