"""A corpus from a text file or a folder of files, by path.

Which text is for what, in this order:
  1. A folder with files whose names hold the word train, valid or test (`wiki.train.tokens`, `valid.txt`): these.
  2. A folder of at least three other text files: whole files by the hash of their names, 90/5/5 % of the bytes.
  3. A file, or a split that case 1 lacks: the end of the training file (of each one), by position, moved to the end of
     a line: 90/5/5 %, or 95/5 % for one missing split. Rows (a document each) go by the hash of their text instead.
Without train files nothing is carved out of the held-out ones: train is empty then.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from effnn.base import InvalidInput, NotAvailable, sha256_file
from effnn.data.corpus.documents import SPLITS, Documents, Piece, in_pieces, whole
from effnn.data.files.reading import ROW_SUFFIXES, check_file, holds_rows, read_rows, read_text
from effnn.data.splits import unit_hash

TEXT_SUFFIXES = (".txt", ".text", ".tokens", ".raw")
HELD_OUT = 0.05  # of the bytes, for each of validation and test
_WORDS = {"train": {"train", "training"}, "validation": {"valid", "validation", "val", "dev"}, "test": {"test"}}


@dataclass(frozen=True)
class Part:
    """Bytes `start` to `stop` (None: the end) of a text file; of a file of rows, those whose hash lies in `hashes`."""

    path: Path
    start: int = 0
    stop: int | None = None
    hashes: tuple[float, float] = (0.0, 1.0)

    def pieces(self) -> Iterator[Piece]:
        """A text file's stretch as one document, or one document per row."""
        if not holds_rows(self.path):
            return in_pieces(read_text(self.path, self.start, self.stop))
        low, high = self.hashes
        rows = read_rows(self.path)
        return whole(rows if self.hashes == (0.0, 1.0) else (text for text in rows if low <= unit_hash(text) < high))

    def size(self) -> int:
        """Bytes of the stretch; of rows, about that many."""
        end = self.path.stat().st_size if self.stop is None else self.stop
        return int((end - self.start) * (self.hashes[1] - self.hashes[0]))


def documents(name: str, path: str | Path) -> Documents:
    """The documents of a file or folder.

    Raises NotAvailable for a path that is missing or may not be read, and InvalidInput for a file without text, one of
    another kind (compressed, binary, UTF-16), a folder without text files, and a name that holds the words of two
    splits. Text that is not UTF-8 raises InvalidInput when it is read.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise NotAvailable(
            f"{name} was looked for in {path}, which does not exist: give a text file or a folder of text files"
        )
    files = [path] if path.is_file() else _files_of(path)
    for file in files:
        check_file(file)
    parts, rule = _parts(path, files)
    digests = {file: sha256_file(file) for file in files}
    identity = {
        split: [[digests[p.path], holds_rows(p.path), p.start, p.stop, p.hashes] for p in parts[split]]
        for split in SPLITS
    }
    return Documents(
        name,
        f"{'file' if path.is_file() else 'folder'} {path}, {rule}",
        identity,
        lambda split: (piece for part in parts[split] for piece in part.pieces()),
        {split: sum(part.size() for part in parts[split]) for split in SPLITS},
    )


def _files_of(folder: Path) -> list[Path]:
    known = TEXT_SUFFIXES + ROW_SUFFIXES
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name.lower().endswith(known) and not _hidden(path.relative_to(folder))
    )
    if not files:
        others = sorted({path.suffix for path in folder.rglob("*") if path.is_file() and path.suffix})
        found = f", found {', '.join(others[:5])} (unpack or rename these)" if others else ""
        raise InvalidInput(f"{folder} holds no text: expected files that end in {', '.join(known)}{found}")
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _parts(path: Path, files: Sequence[Path]) -> tuple[dict[str, list[Part]], str]:
    """The parts of each split, and the rule in words."""
    parts: dict[str, list[Part]] = {split: [] for split in SPLITS}
    for file in files if path.is_dir() else ():
        if split := _split_named(file):
            parts[split].append(Part(file))
    if any(parts.values()):
        missing = [split for split in SPLITS if not parts[split]]
        if "train" in missing:
            return parts, "split by file names, no train text"
        if not missing:
            return parts, "split by file names"
        train, parts["train"] = parts["train"], []
        _carve([part.path for part in train], missing, parts)
        return parts, f"split by file names, {' and '.join(missing)} from the end of train"
    texts = [file for file in files if not holds_rows(file)]
    by_file = len(texts) >= 3
    if by_file:
        _deal(path, texts, parts)
    _carve([file for file in files if not by_file or holds_rows(file)], ["validation", "test"], parts)
    rule = "whole files" if by_file else "position" if texts else ""
    return parts, "split 90/5/5 % by " + " and ".join(filter(None, (rule, "hash" if len(texts) < len(files) else "")))


def _split_named(file: Path) -> str | None:
    words = set(re.findall(r"[a-z]+", file.name.lower()))
    found = [split for split, names in _WORDS.items() if words & names]
    if len(found) > 1:
        raise InvalidInput(f"{file}: the name says {' and '.join(found)}; rename it so that it says one of them")
    return found[0] if found else None


def _deal(folder: Path, files: Sequence[Path], parts: dict[str, list[Part]]) -> None:
    """Whole files to the splits in the order of their hashes: test and validation get at least one, then train."""
    total = sum(file.stat().st_size for file in files)
    waiting = sorted(files, key=lambda file: unit_hash(file.relative_to(folder).as_posix()), reverse=True)
    for split, keep in (("test", 2), ("validation", 1)):
        taken = 0
        while taken < HELD_OUT * total and len(waiting) > keep:
            taken += waiting[-1].stat().st_size
            parts[split].append(Part(waiting.pop()))
    parts["train"] += [Part(file) for file in waiting]
    for chosen in parts.values():
        chosen.sort(key=lambda part: part.path)


def _carve(files: Sequence[Path], held_out: Sequence[str], parts: dict[str, list[Part]]) -> None:
    """Cut each file into train and, at its end, these splits."""
    shares = [1 - HELD_OUT * count for count in range(len(held_out), -1, -1)]  # 0.9, 0.95, 1
    for file in files:
        if holds_rows(file):
            edges = [(0.0, 0.0), *((0.0, share) for share in shares)]
            made = [Part(file, hashes=(edges[i][1], edges[i + 1][1])) for i in range(len(shares))]
        else:
            cuts = [0, *(_line_end(file, share) for share in shares[:-1]), None]
            made = [Part(file, cuts[i], cuts[i + 1]) for i in range(len(shares))]
        for split, part in zip(("train", *held_out), made, strict=True):
            parts[split].append(part)


def _line_end(path: Path, share: float) -> int:
    """The end of the line near that share of the bytes, or of the character where the line is long."""
    size = path.stat().st_size
    position = int(size * share)
    with path.open("rb") as file:
        file.seek(position)
        ahead = file.read(max(4, size // 200))
    if found := ahead.find(b"\n") + 1:
        return position + found
    return position + next((i for i, byte in enumerate(ahead) if byte & 0xC0 != 0x80), len(ahead))
