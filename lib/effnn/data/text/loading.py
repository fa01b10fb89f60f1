"""The front door of the text data: one `load` for built-in, local and hub data, all of one type.

    task = load("docstrings")                        # built in, no network
    task = load("sst2", source="/data/glue/SST-2")   # published TSV files in a folder
    task = load("mnli", source="hub")                # the hub's copy, pinned, as `make data` left it
    task = load("movie_sentences", source="packages")   # out of a pinned package, as `make env` left it

Every source gives a `TextTask`; nothing falls back to another source by itself.
"""

import importlib.metadata
from pathlib import Path

from transformers import BertTokenizerFast

from effnn import cache
from effnn.base import InvalidInput
from effnn.data import docstrings
from effnn.data.text import baseline, builtin, glue, movie_sentences, wordpiece
from effnn.data.text.baseline import BagOfWords
from effnn.data.text.task import TextTask

TASKS = ("docstrings", "movie_sentences", *glue.FORMATS)


def load(task: str = "docstrings", source: str | Path = "builtin", seed: int = 0) -> TextTask:
    """The task from its source; the built-in one takes about 15 s once and is cached.

    source: "builtin" (docstrings only), "packages" (movie_sentences only), "hub" (what `make data` downloaded), or the
    folder of the published files (GLUE tasks). seed: of the hash that carves GLUE's validation rows out of train.
    Raises InvalidInput for a task or row that makes no sense, and NotAvailable for data that is not here.
    """
    if task not in TASKS:
        raise InvalidInput(f"unknown text task {task!r}: choose one of {', '.join(TASKS)}")
    if task == "docstrings":
        if str(source) != "builtin":
            raise InvalidInput(f"the docstring task is built in: its source is 'builtin', not {str(source)!r}")
        key = {"folders": str(docstrings.locate(builtin.LABELS)), **docstrings.versions(builtin.LABELS)}
        return cache.remember("docstrings", key, builtin.load)
    if task == "movie_sentences":
        if str(source) != "packages":
            raise InvalidInput(
                f"movie_sentences come out of a package: their source is 'packages', not {str(source)!r}"
            )
        return movie_sentences.load()
    if str(source) in ("builtin", "packages"):
        raise InvalidInput(
            f"{task} is not built in (docstrings is): its source is 'hub' or the folder of its published TSV files"
        )
    return glue.load_hub(task, seed) if str(source) == "hub" else glue.load_folder(task, source, seed)


def tokenizer_for(task: TextTask, vocab_size: int = 4096, lowercase: bool = True) -> BertTokenizerFast:
    """A WordPiece tokenizer trained on the task's training texts, the same on every run; cached."""
    vocabulary = cache.remember(
        "wordpiece",
        {
            "data": task.fingerprint,
            "vocab_size": vocab_size,
            "lowercase": lowercase,
            "tokenizers": importlib.metadata.version("tokenizers"),
        },
        lambda: wordpiece.train_vocabulary(task.train.texts + (task.train.texts_b or []), vocab_size, lowercase),
    )
    return wordpiece.from_vocabulary(vocabulary, lowercase)


def bag_of_words(task: TextTask) -> BagOfWords:
    """The bag-of-words baseline of a task (see `effnn.data.text.baseline`); cached."""
    return cache.remember(
        "bag_of_words",
        {"data": task.fingerprint, "scikit-learn": importlib.metadata.version("scikit-learn")},
        lambda: baseline.bag_of_words(task),
    )
