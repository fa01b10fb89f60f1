"""SQuAD 1.1 and 2.0: the published JSON files or the hub's copy, and windows of token ids for a span-picking model.

A long paragraph becomes several windows that overlap by `stride` tokens; a window that does not hold the whole answer
points at its first token, as an unanswerable question does. Scoring predicted spans is not done here.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from effnn.base import InvalidInput
from effnn.data import hub
from effnn.data.files.reading import published_files
from effnn.data.splits import unit_hash
from effnn.data.text.encoding import EncodedSplit

FILES = {"1.1": ("train-v1.1.json", "dev-v1.1.json"), "2.0": ("train-v2.0.json", "dev-v2.0.json")}
_HUB = {"1.1": ("squad", "plain_text"), "2.0": ("squad_v2", "squad_v2")}
VALIDATION_SHARE = 0.05  # of the training articles


@dataclass(frozen=True)
class SquadExample:
    """A question on a paragraph.

    id, title: of the question, and of the article.
    question, context: the question, and the paragraph.
    answers: the accepted answers; none where the question cannot be answered.
    starts: the character of the paragraph at which each answer begins.
    """

    id: str
    title: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class SquadTask:
    """The examples of each split.

    name: "squad-" and the version.
    train, validation: the training articles, parted by a hash of their titles.
    dev: the published development set, for reporting.
    source: where the files came from, for a person to read.
    """

    name: str
    train: list[SquadExample]
    validation: list[SquadExample]
    dev: list[SquadExample]
    source: str

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over all examples of all splits."""
        digest = hashlib.sha256(self.name.encode())
        for name in ("train", "validation", "dev"):
            digest.update(name.encode())
            for example in getattr(self, name):
                digest.update(json.dumps(astuple(example)).encode())
        return digest.hexdigest()


def load_squad(source: str | Path, version: str = "1.1") -> SquadTask:
    """SQuAD from "hub" or from the folder of the published files (train-v1.1.json, dev-v1.1.json, or v2.0).

    Raises NotAvailable where there is nothing, InvalidInput naming file and entry of the first bad one.
    """
    if version not in FILES:
        raise InvalidInput(f"unknown SQuAD version {version!r}: choose 1.1 or 2.0")
    if str(source) == "builtin":
        raise InvalidInput("SQuAD is not built in: its source is 'hub' or the folder of its JSON files")
    if str(source) == "hub":
        tables = hub.tables(*_HUB[version])
        train, dev = (_from_table(tables[split]) for split in ("train", "validation"))
        where = hub.describe(*_HUB[version])
    else:
        files = published_files(f"SQuAD {version}", source, FILES[version])
        train, dev = (read_json(file) for file in files)
        where = f"folder {files[0].parent}"
    held = {example.title for example in train if unit_hash(f"squad/{example.title}") < VALIDATION_SHARE}
    return SquadTask(
        f"squad-{version}",
        train=[example for example in train if example.title not in held],
        validation=[example for example in train if example.title in held],
        dev=dev,
        source=where,
    )


def read_json(path: str | Path) -> list[SquadExample]:
    """All questions of one published file. Raises InvalidInput naming file and entry, e.g. data[3].paragraphs[0]."""
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidInput(f"{path}: not a JSON file in UTF-8 ({error})") from None
    examples = []
    for a, article in _entries(document, "data", path, ""):
        for p, paragraph in _entries(article, "paragraphs", path, f"data[{a}]."):
            place = f"data[{a}].paragraphs[{p}]."
            context = _field(paragraph, "context", str, path, place)
            for q, question in _entries(paragraph, "qas", path, place):
                here = f"{place}qas[{q}]."
                answers = [
                    _answer(answer, context, path, f"{here}answers[{i}].")
                    for i, answer in _entries(question, "answers", path, here)
                ]
                examples.append(
                    SquadExample(
                        _field(question, "id", str, path, here),
                        str(article.get("title", f"article {a}")),
                        _field(question, "question", str, path, here),
                        context,
                        tuple(text for text, _ in answers),
                        tuple(start for _, start in answers),
                    )
                )
    if not examples:
        raise InvalidInput(f"{path}: holds no question")
    return examples


def squad_features(
    examples: list[SquadExample], tokenizer: PreTrainedTokenizerBase, max_length: int = 384, stride: int = 128
) -> tuple[EncodedSplit, list[int]]:
    """Windows for `loader`, and for each window the number of its example.

    A row holds `input_ids` (S,), `token_type_ids` (S,) where the tokenizer has them, and `start_positions` () and
    `end_positions` (), token numbers in the window, both inclusive. The first accepted answer is the target. A window
    never cuts the question. Raises InvalidInput for a slow tokenizer and for windows too short for their stride.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InvalidInput("the answers' places need a fast tokenizer (one with character offsets)")
    longest = max((len(tokenizer.tokenize(example.question)) for example in examples), default=0)
    room = max_length - longest - tokenizer.num_special_tokens_to_add(pair=True)
    if room <= stride:
        raise InvalidInput(
            f"max_length={max_length} leaves {room} tokens for the paragraph beside the longest question "
            f"({longest} tokens), which must be more than the stride ({stride})"
        )
    columns = tokenizer(
        [example.question for example in examples],
        [example.context for example in examples],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    names = [name for name in ("input_ids", "token_type_ids") if name in columns]
    rows = []
    for i, number in enumerate(columns["overflow_to_sample_mapping"]):
        start, end = _span(examples[number], columns["offset_mapping"][i], columns.sequence_ids(i))
        row = {name: torch.tensor(columns[name][i]) for name in names}
        rows.append(row | {"start_positions": torch.tensor(start), "end_positions": torch.tensor(end)})
    return EncodedSplit(rows, tokenizer.pad_token_id), columns["overflow_to_sample_mapping"]


def _span(example: SquadExample, offsets: list[tuple[int, int]], parts: list[int | None]) -> tuple[int, int]:
    """First and last token of the answer in a window; (0, 0) where the window does not hold all of it."""
    if not example.answers:
        return 0, 0
    begin, end = example.starts[0], example.starts[0] + len(example.answers[0])
    inside = [i for i, part in enumerate(parts) if part == 1]
    if not inside or offsets[inside[0]][0] > begin or offsets[inside[-1]][1] < end:
        return 0, 0
    touching = [i for i in inside if offsets[i][1] > begin and offsets[i][0] < end]
    return (touching[0], touching[-1]) if touching else (0, 0)


def _answer(answer: dict, context: str, path: Path, place: str) -> tuple[str, int]:
    text, start = _field(answer, "text", str, path, place), _field(answer, "answer_start", int, path, place)
    for shift in (0, 1, 2):  # a few published answers begin one or two characters late
        if start >= shift and text and context[start - shift : start - shift + len(text)] == text:
            return text, start - shift
    raise InvalidInput(f"{path}, {place}answer_start: the paragraph does not read {text!r} at character {start}")


def _entries(parent: Any, name: str, path: Path, place: str) -> Iterator[tuple[int, dict]]:
    for i, entry in enumerate(_field(parent, name, list, path, place)):
        if not isinstance(entry, dict):
            raise InvalidInput(f"{path}, {place}{name}[{i}]: an object was expected, found {type(entry).__name__}")
        yield i, entry


def _field(parent: Any, name: str, kind: type, path: Path, place: str) -> Any:
    if not isinstance(parent, dict) or not isinstance(parent.get(name), kind):
        wanted = {list: "a list", str: "a text", int: "a whole number"}[kind]
        raise InvalidInput(f"{path}, {place}{name}: {wanted} was expected, in the published SQuAD format")
    return parent[name]


def _from_table(table: dict[str, list]) -> list[SquadExample]:
    columns = (table[name] for name in ("id", "title", "question", "context", "answers"))
    return [
        SquadExample(id, title, question, context, tuple(answers["text"]), tuple(answers["answer_start"]))
        for id, title, question, context, answers in zip(*columns, strict=True)
    ]
