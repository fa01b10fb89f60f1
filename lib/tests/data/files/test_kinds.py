"""Files that hold no text, or not as it is read here: named by what they are, with a way out."""

import bz2
import errno
import gzip
import json
import lzma
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from effnn import paths
from effnn.base import CannotWrite, InvalidInput, NotAvailable
from effnn.data import corpus
from effnn.data.corpus import token_files
from effnn.data.files import kinds

TEXT = "a line of words, and one more\n" * 300


def load(path: Path, tokenizer: str = "character") -> corpus.Corpus:
    return corpus.load("text", path, tokenizer)


def file(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


BOM = b"\xef\xbb\xbf"
WITHOUT_TEXT = {
    "only-bom.txt": (BOM, "holds no text: its 3 bytes are white space or a byte-order mark"),
    "blank.txt": (b" \n\t\r\n" * 10, "holds no text: its 50 bytes"),
    "long-blank.txt": (b" \n" * 600_000, "holds no text: its 1,200,000 bytes"),
    "bom-and-blank.txt": (BOM + b"\n", "holds no text: its 4 bytes"),
    "empty.txt": (b"", "is empty: expected text"),
    "empty.jsonl": (b"", "is empty"),
    "rows-without-text.jsonl": (b'{"text": ""}\n{"text": " "}\n', "holds no text: all of its documents are empty"),
}
OF_ANOTHER_KIND = {
    "a.txt.gz": (gzip.compress(TEXT.encode()), "compressed by gzip, expected UTF-8 text: unpack it with gunzip"),
    "gzip.txt": (gzip.compress(TEXT.encode()), "compressed by gzip"),
    "a.bz2": (bz2.compress(TEXT.encode()), "compressed by bzip2, .* bunzip2"),
    "a.xz": (lzma.compress(TEXT.encode()), "compressed by xz, .* unxz"),
    "a.zst": (b"\x28\xb5\x2f\xfd" + bytes(range(99)), "compressed by Zstandard, .* zstd -d"),
    "parquet.txt": (b"PAR1" + bytes(40), "a Parquet file, .* a name that ends in .parquet"),
    "a.pdf": (b"%PDF-1.7\n" + TEXT.encode(), "a PDF document"),
    "pointer.txt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer"),
    "utf-16.txt": (TEXT.encode("utf-16"), r"UTF-16 text, .*iconv -f UTF-16"),
    "utf-16-without-mark.txt": (TEXT.encode("utf-16-le"), "no UTF-8 text: 2048 of its first 4096 bytes are zero"),
    "utf-32.txt": (TEXT.encode("utf-32"), "UTF-32 text"),
    "a.tar": (b"a.txt" + bytes(500) + TEXT.encode(), "no UTF-8 text: .* zero, as in a binary file"),
    "gzip.jsonl": (gzip.compress(b'{"text": "a"}\n'), "compressed by gzip"),
    "zst.jsonl": (b"\x28\xb5\x2f\xfd" + bytes(range(99)), "compressed by Zstandard"),
    "plain.json.gz": (b'{"text": "a"}\n', r"not compressed by gzip, as its name says: it begins with b'{\"text\":'"),
    "plain.parquet": (b"some text", "not a Parquet file, as its name says"),
}


@pytest.mark.parametrize("name", [*WITHOUT_TEXT, *OF_ANOTHER_KIND])
def test_a_file_that_holds_no_readable_text_is_named(tmp_path, name):
    content, sentence = (WITHOUT_TEXT | OF_ANOTHER_KIND)[name]
    path = file(tmp_path / "given", name, content)
    for tokenizer in ("character", "bpe"):
        with pytest.raises(InvalidInput, match=rf"{name}.* {sentence}"):
            load(path, tokenizer)
    assert not [entry for entry in paths.CACHE.rglob("*") if entry.is_file()]


def test_one_of_many_files_is_named_too(tmp_path):
    for number in range(4):
        file(tmp_path / "given", f"{number}.txt", TEXT.encode())
    for content, sentence in ((BOM, "holds no text"), (gzip.compress(b"a"), "is compressed by gzip")):
        file(tmp_path / "given", "other.txt", content)
        with pytest.raises(InvalidInput, match=rf"other.txt {sentence}"):
            load(tmp_path / "given")


def test_folders_say_what_they_hold_instead(tmp_path):
    file(tmp_path / "given", "a.txt.zst", b"x")
    file(tmp_path / "given", "deeper/b.docx", b"x")
    with pytest.raises(InvalidInput, match=r"holds no text: .*, found .docx, .zst \(unpack or rename these\)"):
        load(tmp_path / "given")


def test_archives_and_arrays_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", TEXT)
    np.save(tmp_path / "ids.npy", np.arange(9))
    with pytest.raises(InvalidInput, match="a.zip is a ZIP archive"):
        load(tmp_path / "a.zip")
    with pytest.raises(InvalidInput, match="ids.npy is a NumPy array, .* give staged.train the array itself"):
        load(tmp_path / "ids.npy")
    with pytest.raises(InvalidInput, match="l.txt.gz is compressed by gzip"):
        corpus.lambada_examples(file(tmp_path, "l.txt.gz", gzip.compress(b"two words\n")))


def test_what_is_text_passes(tmp_path):
    """Also with a byte-order mark, a NUL here and there, or white space in front of it all."""
    for content in (BOM + TEXT.encode(), TEXT.encode() + b"\0" + TEXT.encode(), b"\n" * 2_000_000 + b"PK and BZ\n"):
        found = load(file(tmp_path, "a.txt", content))
        ids = np.concatenate([found.train, found.validation, found.test])
        assert len(ids) >= len(content.removeprefix(BOM).decode()) > 0
    rows = b"".join(json.dumps({"text": f"row {i}"}).encode() + b"\n" for i in range(50))
    assert len(load(file(tmp_path, "a.jsonl", rows)).train) == len(
        load(file(tmp_path, "a.json.gz", gzip.compress(rows))).train
    )


def test_a_file_that_may_not_be_read_is_said(tmp_path, monkeypatch):
    path = file(tmp_path, "a.txt", b"text")

    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(kinds.Path, "open", refused)
    with pytest.raises(NotAvailable, match=r"a.txt cannot be read \(Permission denied\): make it readable"):
        load(path)


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    path = file(tmp_path, "a.txt", TEXT.encode())

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(token_files, "write_text", full)
        with pytest.raises(CannotWrite, match=r"cache/corpus/.* could not be written \(No space left"):
            load(path)
    assert not [entry for entry in paths.CACHE.rglob("*") if entry.is_file()]
    assert len(load(path).train)
