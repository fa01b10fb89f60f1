"""Tokenizers: characters, byte pairs, and those that others trained."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.corpora import characters, fast_tokenizer, prose, written
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from effnn import paths
from effnn.base import InvalidInput, NotAvailable
from effnn.data import corpus, hub
from effnn.data.corpus import coders, token_files

_TRAIN_IN_A_PROCESS = """
import hashlib, sys
from effnn.data.corpus import coders
coder = coders.train("bpe", [open(sys.argv[1], encoding="utf-8").read()] * 3, 400)
ids = coder.encode(open(sys.argv[1], encoding="utf-8").read())
print(coder.fingerprint, hashlib.sha256(str(ids).encode()).hexdigest())
"""


def test_byte_pairs_are_the_same_in_every_process(tmp_path):
    file = written(tmp_path / "a.txt", prose(200) + "naïve café – 𝄞\n")
    running = []
    for seed, parallel in (("1", "false"), ("2", "true")):
        settings = {"PYTHONPATH": str(paths.LIB), "PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": parallel}
        command = [sys.executable, "-c", _TRAIN_IN_A_PROCESS, str(file)]
        running.append(subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True))
    first, second = (process.communicate(timeout=120)[0].split() for process in running)
    assert first == second and len(first) == 2
    assert coders.train("bpe", [file.read_text(encoding="utf-8")] * 3, 400).fingerprint == first[0]


def test_byte_pairs_give_back_every_text():
    coder = coders.train("bpe", [prose(100)], 350)
    for text in (prose(3, 1), "  two\n\n\tlines \r\n", "naïve 𝄞 \x00\x1f\xa0", "", " "):
        assert coder.decode(coder.encode(text)) == text
        assert np.array_equal(coder.encode_many(["x", text])[1], coder.encode(text))
    assert coder.vocab_size == 350 and max(coder.encode(prose(100))) < 350
    assert len(coder.encode(prose(100))) < len(prose(100)) / 1.5  # pairs were learned


def test_characters_come_back_and_others_are_unknown():
    coder = coders.train("character", ["abcab\n"])
    assert (coder.known, coder.vocab_size) == ("\nabc", 5)
    assert coder.encode("\nabc") == [1, 2, 3, 4]
    assert coder.encode("aéb𝄞\ufffd") == [2, 0, 3, 0, 0]
    assert coder.decode(coder.encode("cab\n\nbaé")) == "cab\n\nba\ufffd"
    assert coder.separator == (1, 1)


def test_the_most_frequent_characters_are_kept_ties_by_code_point():
    assert coders.train("character", ["zzzyyyxxbbaac"], 6).known == "\nabyz"
    assert coders.train("character", ["zzzyyy", "xxbbaac"], 5).known == "\nayz"
    assert (
        coders.train("character", ["edcba", "\ufffd" * 9], 4).known == "\nab"
    )  # the unknown character is no character
    many = "".join(map(chr, range(0x100, 0x200)))
    assert coders.train("character", [many]).vocab_size == 96


@pytest.mark.parametrize("kind", ["bpe", "character"])
def test_a_stored_tokenizer_is_the_same(kind):
    coder = coders.train(kind, [prose(50)], 300)
    again = coders.load_coder(coder.dump())
    assert again.fingerprint == coder.fingerprint and again.separator == coder.separator
    assert again.encode(prose(5, 2)) == coder.encode(prose(5, 2))
    assert coders.train(kind, [prose(50, 9) + "XYZ"], 300).fingerprint != coder.fingerprint


@pytest.mark.parametrize("kind", ["bpe", "character"])
def test_ids_outside_the_vocabulary_are_refused(kind):
    coder = coders.train(kind, ["some text\n"])
    for wrong in (coder.vocab_size, -1):
        with pytest.raises(InvalidInput, match=f"token id {wrong} is outside the vocabulary of {coder.vocab_size}"):
            coder.decode([1, wrong])


def test_vocabularies_that_are_too_small_are_refused(tmp_path):
    file = written(tmp_path / "a.txt", prose(20))
    with pytest.raises(InvalidInput, match="vocab_size=256: byte-level BPE needs at least 257"):
        corpus.load("text", file, "bpe", vocab_size=256)
    with pytest.raises(InvalidInput, match="vocab_size=2: a character vocabulary needs at least 3"):
        characters(file, vocab_size=2)
    assert corpus.load("text", file, "bpe", vocab_size=257).vocab_size == 257
    assert characters(file, vocab_size=3).vocab_size == 3


@pytest.mark.parametrize(
    "make", [lambda: coders.train("bpe", [prose(50)], 300), lambda: coders.Pretrained(fast_tokenizer())]
)
def test_the_words_end_of_text_are_text(make):
    coder = make()
    text = f"one{coders.END_OF_TEXT}two {coders.END_OF_TEXT}"
    for ids in (coder.encode(text), coder.encode_many([text])[0].tolist()):
        assert not set(coder.separator) & set(ids)
        assert coder.decode(ids) == text
    assert coder.decode(coder.separator) == coders.END_OF_TEXT


def test_a_saved_tokenizer_by_object_by_folder_and_as_gpt2(tmp_path, monkeypatch):
    file, fast = written(tmp_path / "a.txt", prose(80)), fast_tokenizer()
    fast.save_pretrained(tmp_path / "saved")
    by_object = corpus.load("text", file, fast)
    assert by_object.vocab_size == len(fast) == 300
    assert by_object.encode("abc def") == fast("abc def")["input_ids"]
    assert corpus.load("text", file, str(tmp_path / "saved")).fingerprint == by_object.fingerprint

    from transformers import AutoTokenizer

    def absent(*_, **settings):
        assert settings["local_files_only"]
        raise OSError("not in the local cache")

    with monkeypatch.context() as patched:
        patched.setattr(AutoTokenizer, "from_pretrained", absent)
        with pytest.raises(NotAvailable, match=r"python -m effnn.data download gpt2"):
            corpus.load("text", file, "gpt2")
    fast.save_pretrained(hub.folder_of("gpt2"))
    assert corpus.load("text", file, "gpt2").fingerprint == by_object.fingerprint
    # Calling a tokenizer sets padding and truncation in it, which say nothing about its ids.
    fast(["a", "a b"], padding=True, truncation=True, max_length=2)
    assert coders.Pretrained(fast).fingerprint == by_object.tokenizer.fingerprint
    assert len(coders.Pretrained(fast).encode(prose(9))) > 16


def _word_tokenizer(vocabulary: dict[str, int], **settings) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def test_large_vocabularies_take_four_bytes_also_with_unused_ids(tmp_path):
    file = written(tmp_path / "train.jsonl", "".join(json.dumps({"text": "b"}) + "\n" for _ in range(3)))
    for vocabulary in ({f"w{i}": i + 3 for i in range(69_997)} | {"?": 0, "b": 1, "end": 2}, {"?": 0, "b": 1}):
        eos = "end" if "end" in vocabulary else "far"
        found = corpus.load("text", file.parent, _word_tokenizer(vocabulary | {eos: 69_999}, eos_token=eos))
        assert found.vocab_size == 70_000
        assert found.train.dtype == np.dtype("<u4")
        assert found.decode([69_999]) == eos
    assert token_files.dtype_for(65_535).itemsize == 2 and token_files.dtype_for(65_536).itemsize == 4


def test_tokenizers_that_cannot_be_used_are_refused(tmp_path):
    file = written(tmp_path / "a.txt", prose(20))
    with pytest.raises(InvalidInput, match="no end-of-sequence token"):
        corpus.load("text", file, _word_tokenizer({"?": 0}))
    with pytest.raises(NotAvailable, match=r"expected bpe, character, gpt2, or the folder"):
        corpus.load("text", file, "wordpiece")
    with pytest.raises(InvalidInput, match="no tokenizer: expected a name, a folder or a fast tokenizer"):
        corpus.load("text", file, 7)
    with pytest.raises(InvalidInput, match="vocab_size=300 goes with"):
        corpus.load("text", file, fast_tokenizer(), vocab_size=300)
    with pytest.raises(InvalidInput, match="choose one of bpe, character"):
        coders.train("words", ["a"])
    (tmp_path / "empty").mkdir()
    fast_tokenizer().save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_text('{"model": ')
    for folder in ("empty", "broken"):
        with pytest.raises(NotAvailable, match=f"{folder} holds no tokenizer that transformers can load"):
            corpus.load("text", file, tmp_path / folder)


def test_ids_that_are_no_whole_numbers_are_refused():
    coder = coders.train("character", ["abc\n"])
    assert coder.decode(np.array([2, 3], ">u2")) == "ab"
    for ids in ([1.7], np.array([1.0]), np.ones((2, 2), int), "ab", [None], 5):
        with pytest.raises(InvalidInput, match="expected token ids, whole numbers in one dimension"):
            coder.decode(ids)
