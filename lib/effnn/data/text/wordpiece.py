"""WordPiece tokenizers that come out the same on every run.

`tokenizers` numbers the continuation characters ("##a") in the order of a randomly seeded hash map, and breaks ties
between equally frequent merges by those numbers. So two trainings give other ids and, where there are ties, another
vocabulary. Here the characters are fixed and numbered before the training starts, and the ids are given afterwards:
special tokens first, then the vocabulary in sorted order. This file holds no other kind of tokenizer.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer
from transformers import BertTokenizerFast, PreTrainedTokenizerBase

from effnn.base import InvalidInput

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ALPHABET = 256  # characters kept; a rarer one makes its word [UNK]


def train_wordpiece(texts: Iterable[str], vocab_size: int = 4096, lowercase: bool = True) -> BertTokenizerFast:
    """A BERT tokenizer (fast) with at most `vocab_size` entries; equal texts and arguments give equal ids.

    Saves with `save_pretrained` and comes back with `AutoTokenizer.from_pretrained`. The order of the texts does not
    matter. Raises InvalidInput where there is no text or `vocab_size` cannot hold the characters.
    """
    return from_vocabulary(train_vocabulary(texts, vocab_size, lowercase), lowercase)


def train_vocabulary(texts: Iterable[str], vocab_size: int = 4096, lowercase: bool = True) -> list[str]:
    """The entries of that tokenizer in the order of their ids; this is what a cache should hold."""
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = _count_words(tokenizer, texts)
    if not words:
        raise InvalidInput("no word to train a tokenizer on: the texts are empty")

    counts = Counter()
    for word, times in words.items():
        for character in word:
            counts[character] += times
    alphabet = sorted(sorted(counts, key=lambda c: (-counts[c], c))[:ALPHABET])
    inside = {character for word in words for character in word[1:]}
    continuations = [f"##{character}" for character in alphabet if character in inside]
    if vocab_size < len(SPECIALS) + len(alphabet) + len(continuations):
        raise InvalidInput(
            f"vocab_size={vocab_size} is too small: the special tokens and single characters of these texts alone "
            f"need {len(SPECIALS) + len(alphabet) + len(continuations)}"
        )
    trainer = WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIALS, *continuations],  # this is what gives them fixed numbers
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    # The trainer goes by word counts alone; sorted words make the order of the texts irrelevant.
    tokenizer.train_from_iterator((" ".join([word] * times) for word, times in sorted(words.items())), trainer)
    return [*SPECIALS, *sorted(set(tokenizer.get_vocab()) - set(SPECIALS))]


def from_vocabulary(vocabulary: list[str], lowercase: bool = True) -> BertTokenizerFast:
    """The tokenizer with these entries; ids are positions in the list, which must begin with `SPECIALS`."""
    if tuple(vocabulary[: len(SPECIALS)]) != SPECIALS or len(set(vocabulary)) != len(vocabulary):
        raise InvalidInput(f"a vocabulary begins with {', '.join(SPECIALS)} and holds no entry twice")
    return BertTokenizerFast(vocab={entry: i for i, entry in enumerate(vocabulary)}, do_lower_case=lowercase)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over class, vocabulary with ids, and lower-casing: equal fingerprints mean equal token ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    identity = [type(tokenizer).__name__, vocabulary, bool(getattr(tokenizer, "do_lower_case", False))]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _count_words(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    words: Counter[str] = Counter()
    for text in texts:
        clean = tokenizer.normalizer.normalize_str(text)
        words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(clean))
    return words
