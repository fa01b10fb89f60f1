"""Text, files and tokenizers for the tests of the language-model corpora."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from effnn.data import corpus
from effnn.data.corpus import coders
from effnn.data.corpus.documents import SPLITS


def prose(lines: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklm", k=draw.randint(2, 7))) for _ in range(80)]
    return "".join(f"{' '.join(draw.choices(words, k=9))}.\n" for _ in range(lines))


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def texts(found: corpus.Corpus) -> dict[str, str]:
    return {split: found.decode(getattr(found, split)) for split in SPLITS}


def characters(path: Path, **arguments) -> corpus.Corpus:
    return corpus.load("text", path, tokenizer="character", **arguments)


def parquet(path: Path, texts: list, column: str = "text") -> Path:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({column: texts}), path)
    return path


def fast_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    state = json.loads(coders.train("bpe", [prose(50)], vocab_size).dump())["tokenizer"]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        eos_token=coders.END_OF_TEXT,
        pad_token=coders.END_OF_TEXT,
        model_max_length=16,
    )
