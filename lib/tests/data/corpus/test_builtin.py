"""The built-in corpus: docstrings without repetitions."""

import re
from pathlib import Path

import pytest
from helpers.corpora import texts, written

from effnn.data import corpus, docstrings
from effnn.data.corpus import builtin, coders


def _library(folder: Path, files: int) -> dict[str, Path]:
    """Two packages; every file repeats a paragraph of its neighbours, and has one of its own."""
    for package in ("one", "two"):
        for i in range(files):
            own, shared = f"The {package} {i} of a kind.", f"Pasted paragraph {i // 4}\n    on two lines."
            written(
                folder / package / f"m{i}.py",
                f'"""{own}\n\n{shared}\n"""\n\n\ndef f(x):\n    """\n    {shared}\n\n    {own[::-1]}\n    """\n',
            )
        written(folder / package / "broken.py", "def (:\n")
        written(folder / package / "boom.py", '"""Read."""\nraise SystemExit("imported")\n')
        written(folder / package / "tests" / "m.py", '"""Unwanted."""\n')
        written(folder / package / "test_m.py", '"""Unwanted."""\n')
    return {package: folder / package for package in ("one", "two")}


def test_no_paragraph_of_the_docstrings_occurs_twice(tmp_path):
    folders = _library(tmp_path, 40)
    splits = builtin.collect(folders)
    assert splits == builtin.collect(folders)
    seen = [" ".join(p.split()) for texts in splits.values() for text in texts for p in re.split(r"\n\s*\n", text)]
    assert len(seen) == len(set(seen))
    assert all(splits.values())
    expected = {f"The {package} {i} of a kind." for package in folders for i in range(40)}
    expected |= {own[::-1] for own in expected} | {f"Pasted paragraph {i} on two lines." for i in range(10)} | {"Read."}
    assert set(seen) == expected


def test_the_built_in_corpus_is_collected_once(tmp_path, monkeypatch):
    folders = _library(tmp_path / "library", 40)
    monkeypatch.setattr(docstrings, "locate", lambda _: folders)
    found = corpus.load("docstrings", tokenizer="character")
    expected = builtin.collect(folders)
    assert texts(found) == {split: "\n\n".join(texts) for split, texts in expected.items()}
    monkeypatch.setattr(builtin, "collect", lambda _: pytest.fail("read again"))
    pairs = corpus.load("docstrings", tokenizer="bpe", vocab_size=300)
    assert texts(pairs)["test"] == coders.END_OF_TEXT.join(expected["test"])
    assert corpus.load("docstrings", tokenizer="character").fingerprint == found.fingerprint != pairs.fingerprint
