"""WordPiece tokenizers are the same on every run, also where merges tie, and survive saving."""

import os
import random
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from effnn import paths
from effnn.base import InvalidInput
from effnn.data import text
from effnn.data.text import loading, wordpiece

PROGRAM = """
import random
from effnn.data.text import loading, wordpiece
draw = random.Random(0)
words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 9))) for _ in range(300)]
print(wordpiece.fingerprint(wordpiece.train_wordpiece([" ".join(words)] * 2, 300)))
"""


def _tied_texts() -> list[str]:
    draw = random.Random(0)
    return [" ".join("".join(draw.choices("abcdefgh", k=draw.randint(2, 9))) for _ in range(300))] * 2


def test_two_processes_give_equal_ids():
    environment = os.environ | {"PYTHONPATH": str(paths.LIB)}
    command = [sys.executable, "-c", PROGRAM]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    prints = {process.communicate(timeout=120)[0].strip() for process in running}
    prints.add(wordpiece.fingerprint(wordpiece.train_wordpiece(_tied_texts(), 300)))
    assert len(prints) == 1 and len(prints.pop()) == 64


def test_many_trainings_with_ties_and_any_order_of_texts_agree():
    texts = _tied_texts()
    vocabularies = {tuple(wordpiece.train_vocabulary(texts, size)) for size in (300,) for _ in range(6)}
    assert len(vocabularies) == 1
    shuffled = [" ".join(reversed(line.split())) for line in texts]
    assert tuple(wordpiece.train_vocabulary(shuffled, 300)) in vocabularies


def test_ids_are_specials_then_sorted():
    tokenizer = wordpiece.train_wordpiece(["hello yellow fellows hello yellow"] * 3, 40)
    entries = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tuple(entries[:5]) == wordpiece.SPECIALS and entries[5:] == sorted(entries[5:])
    assert len(tokenizer) <= 40 and tokenizer.pad_token_id == 0
    ids = tokenizer("Hello fellows")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello fellows"


def test_saving_and_loading_gives_equal_ids(tmp_path):
    tokenizer = wordpiece.train_wordpiece(["some words, and some more words"] * 3, 60)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("some more", "Words!")["input_ids"] == tokenizer("some more", "Words!")["input_ids"]
    assert wordpiece.fingerprint(again) == wordpiece.fingerprint(tokenizer)


def test_case_is_kept_on_request():
    cased = wordpiece.train_wordpiece(["Ab ab Ab ab"] * 3, 40, lowercase=False)
    assert cased("Ab")["input_ids"] != cased("ab")["input_ids"]
    lower = wordpiece.train_wordpiece(["Ab ab Ab ab"] * 3, 40)
    assert lower("Ab")["input_ids"] == lower("ab")["input_ids"]
    assert wordpiece.fingerprint(cased) != wordpiece.fingerprint(lower)


def test_rare_characters_become_unknown(monkeypatch):
    monkeypatch.setattr(wordpiece, "ALPHABET", 3)
    tokenizer = wordpiece.train_wordpiece(["ab abc ab abc ab zz"] * 2, 30)
    assert tokenizer.tokenize("zz") == ["[UNK]"] and "[UNK]" not in tokenizer.tokenize("abc")


def test_wrong_input():
    with pytest.raises(InvalidInput, match="too small"):
        wordpiece.train_wordpiece(["abcdefgh"], 8)
    with pytest.raises(InvalidInput, match="texts are empty"):
        wordpiece.train_wordpiece(["", " "], 100)
    with pytest.raises(InvalidInput, match="begins with"):
        wordpiece.from_vocabulary(["a", "b"])


def test_the_task_tokenizer_is_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    rows = text.Split(["one two three"] * 4, [0, 1, 0, 1])
    task = text.TextTask("toy", ("a", "b"), rows, rows, rows, "here")
    first = text.tokenizer_for(task, 50)
    monkeypatch.setattr(wordpiece, "_count_words", lambda *_: pytest.fail("trained again"))
    assert wordpiece.fingerprint(text.tokenizer_for(task, 50)) == wordpiece.fingerprint(first)


def test_another_version_of_the_trainer_trains_again(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    trained = []
    monkeypatch.setattr(wordpiece, "train_vocabulary", lambda *_: trained.append(1) or [*wordpiece.SPECIALS, "one"])
    rows = text.Split(["one"] * 2, [0, 1])
    task = text.TextTask("toy", ("a", "b"), rows, rows, rows, "here")
    for version in ("1.0", "1.0", "2.0"):
        monkeypatch.setattr(loading.importlib.metadata, "version", lambda name, v=version: v)
        text.tokenizer_for(task, 50)
    assert len(trained) == 2
