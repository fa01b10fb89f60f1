"""Rows of text from JSON lines and Parquet, and their errors."""

import gzip
import json
import random

import pytest
from helpers.corpora import parquet, written

from effnn.base import InvalidInput
from effnn.data.files import reading


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"text": 3}', 'line 2: expected a JSON object with a string "text"'),
        ('["text"]', "line 2: expected a JSON object"),
        ('{"text": "a"', "line 2: not JSON"),
    ],
)
def test_bad_rows_are_named(tmp_path, line, match):
    with pytest.raises(InvalidInput, match=rf"a\.jsonl, {match}"):
        list(reading.read_rows(written(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")))


def test_bad_bytes_and_half_surrogates_in_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(InvalidInput, match="line 2: not UTF-8"):
        list(reading.read_rows(tmp_path / "a.jsonl"))
    assert list(reading.read_rows(written(tmp_path / "b.jsonl", '{"text": "a\\ud800b"}\n'))) == ["a?b"]


def test_damaged_files_of_rows_are_named(tmp_path):
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefghijklmnop", k=2000)) for _ in range(200)]
    packed = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    middle = len(packed) // 2
    burnt = [packed[:at] + b"\xff" * 40 + packed[at + 40 :] for at in (10, middle)]
    for raw in (packed[:middle], *burnt, b"no gzip at all"):
        (tmp_path / "a.jsonl.gz").write_bytes(raw)
        with pytest.raises(InvalidInput, match=r"a\.jsonl\.gz"):
            list(reading.read_rows(tmp_path / "a.jsonl.gz"))

    whole_file = parquet(tmp_path / "a.parquet", texts).read_bytes()
    middle = len(whole_file) // 2
    for raw in (whole_file[:middle], bytes([4]) * 4 + bytes([255]) * (middle - 4) + whole_file[middle:], b"PAR1"):
        (tmp_path / "a.parquet").write_bytes(raw)
        with pytest.raises(InvalidInput, match=r"a\.parquet"):
            list(reading.read_rows(tmp_path / "a.parquet"))
    with pytest.raises(InvalidInput, match=r'expected a column "text", found words'):
        list(reading.read_rows(parquet(tmp_path / "b.parquet", ["a"], "words")))
    with pytest.raises(InvalidInput, match=r'c\.parquet: expected .*"text"'):
        list(reading.read_rows(parquet(tmp_path / "c.parquet", [1, 2])))
