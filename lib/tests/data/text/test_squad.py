"""SQuAD: the published JSON, its errors, and windows whose answer spans read back as the answer."""

import json
from pathlib import Path

import pytest

from effnn import paths
from effnn.base import InvalidInput, NotAvailable
from effnn.data import text

CONTEXT = " ".join(f"word{i} walks" for i in range(60)) + " to the green hill near town."


def _document(articles: int = 40, answer: dict | None = None) -> dict:
    start = CONTEXT.index("green hill")
    answer = answer or {"text": "green hill", "answer_start": start}
    paragraph = lambda a: {  # noqa: E731
        "context": CONTEXT,
        "qas": [
            {"id": f"{a}-0", "question": "where to?", "answers": [answer]},
            {"id": f"{a}-1", "question": "why?", "answers": [], "is_impossible": True},
        ],
    }
    return {"version": "2.0", "data": [{"title": f"T{a}", "paragraphs": [paragraph(a)]} for a in range(articles)]}


def _folder(folder: Path, dev: dict | None = None) -> Path:
    (folder / "train-v2.0.json").write_text(json.dumps(_document()))
    (folder / "dev-v2.0.json").write_text(json.dumps(dev or _document(2)))
    return folder


def test_examples_and_splits_by_article(tmp_path):
    task = text.load_squad(_folder(tmp_path), "2.0")
    assert len(task.train) + len(task.validation) == 80 and task.validation and len(task.dev) == 4
    assert not {e.title for e in task.train} & {e.title for e in task.validation}
    assert task.dev[0].answers == ("green hill",) and task.dev[1].answers == ()
    assert task.fingerprint == text.load_squad(tmp_path, "2.0").fingerprint


def test_windows_hold_the_answer_or_point_at_the_start(tmp_path):
    task = text.load_squad(_folder(tmp_path), "2.0")
    tokenizer = text.train_wordpiece([CONTEXT.replace("green", "g r e e n"), "where to why ?"], 150)
    rows, examples = text.squad_features(task.dev, tokenizer, max_length=64, stride=16)
    assert len(rows) == len(examples) > len(task.dev) and set(examples) == {0, 1, 2, 3}
    found = 0
    for row, number in zip(rows, examples, strict=True):
        start, end = int(row["start_positions"]), int(row["end_positions"])
        if number % 2:
            assert (start, end) == (0, 0)
        elif start:
            assert tokenizer.decode(row["input_ids"][start : end + 1]).replace(" ", "") == "greenhill"
            found += 1
    assert found >= 2
    batch = next(iter(text.loader(rows, 4)))
    assert batch["start_positions"].shape == (4,) and batch["token_type_ids"].shape == batch["input_ids"].shape
    assert batch["input_ids"].shape[1] <= 64


def test_an_answer_one_character_off_is_put_right(tmp_path):
    late = {"text": "green hill", "answer_start": CONTEXT.index("green hill") + 1}
    task = text.load_squad(_folder(tmp_path, _document(1, late)), "2.0")
    assert task.dev[0].starts == (CONTEXT.index("green hill"),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("data"), r"dev-v2\.0\.json, data: a list"),
        (lambda d: d["data"][1]["paragraphs"][0].pop("context"), r"data\[1\]\.paragraphs\[0\]\.context: a text"),
        (lambda d: d["data"][0]["paragraphs"][0]["qas"][0].pop("id"), r"qas\[0\]\.id: a text"),
        (lambda d: d["data"][0]["paragraphs"].append(3), r"data\[0\]\.paragraphs\[1\]: an object"),
        (
            lambda d: d["data"][0]["paragraphs"][0]["qas"][0]["answers"][0].update(answer_start=3),
            r"answers\[0\]\.answer_start: the paragraph does not read 'green hill' at character 3",
        ),
        (lambda d: d["data"].clear(), "holds no question"),
    ],
)
def test_bad_entries_are_named(tmp_path, change, message):
    document = _document(2)
    change(document)
    with pytest.raises(InvalidInput, match=message):
        text.load_squad(_folder(tmp_path, document), "2.0")


def test_wrong_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    with pytest.raises(NotAvailable, match=r"train-v1\.1\.json and dev-v1\.1\.json.*laptop profile"):
        text.load_squad(tmp_path)
    with pytest.raises(NotAvailable, match="rajpurkar/squad_v2.*python -m effnn.data download squad.*local path"):
        text.load_squad("hub", "2.0")
    with pytest.raises(InvalidInput, match=r"choose 1\.1 or 2\.0"):
        text.load_squad("hub", "3")
    (tmp_path / "train-v1.1.json").write_text("{")
    (tmp_path / "dev-v1.1.json").write_text("{")
    with pytest.raises(InvalidInput, match="not a JSON file"):
        text.load_squad(tmp_path)


def test_windows_too_short_for_the_stride(tmp_path):
    task = text.load_squad(_folder(tmp_path), "2.0")
    with pytest.raises(InvalidInput, match="must be more than the stride"):
        text.squad_features(task.dev, text.train_wordpiece([CONTEXT], 150), max_length=20, stride=16)
