"""What a file holds by its first bytes, so that a compressed or binary one is named and not read as text."""

import codecs
from collections.abc import Iterator
from pathlib import Path

from effnn.base import InvalidInput, NotAvailable

_BEGINNINGS = (
    # first bytes, what that is, how to get at the text
    (b"\x1f\x8b", "compressed by gzip", "unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "compressed by Zstandard", "unpack it with zstd -d"),
    (b"\xfd7zXZ\x00", "compressed by xz", "unpack it with unxz"),
    (b"BZh", "compressed by bzip2", "unpack it with bunzip2"),
    (b"\x04\x22\x4d\x18", "compressed by LZ4", "unpack it with lz4 -d"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"PK\x03\x04", "a ZIP archive (.docx and .npz files are, too)", "unpack it, or save the document as plain text"),
    (b"PAR1", "a Parquet file", "give it a name that ends in .parquet"),
    (b"ARROW1", "an Arrow file", "write its rows as .parquet or .jsonl"),
    (b"\x93NUMPY", "a NumPy array", "give staged.train the array itself, or text here"),
    (b"%PDF-", "a PDF document", "save its text as UTF-8"),
    (b"SQLite format 3\x00", "an SQLite database", "write its rows as .parquet or .jsonl"),
    (b"version https://git-lfs.github.com/spec", "a Git LFS pointer instead of the file", "fetch it with git lfs pull"),
    # longer marks first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "UTF-32 text", "save it as UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (codecs.BOM_UTF32_BE, "UTF-32 text", "save it as UTF-8 (iconv -f UTF-32 -t UTF-8)"),
    (codecs.BOM_UTF16_LE, "UTF-16 text", "save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
    (codecs.BOM_UTF16_BE, "UTF-16 text", "save it as UTF-8 (iconv -f UTF-16 -t UTF-8)"),
)
_GZIP, _PARQUET = _BEGINNINGS[0][0], _BEGINNINGS[7][0]
_HEAD = 4096
_NULS = 0.05  # share of NUL bytes from which a file is not taken for UTF-8 text
_BLOCK = 1 << 20


def check_text(path: Path) -> None:
    """Raise InvalidInput for a file without text (empty, a byte-order mark, white space alone) or of another kind.

    Raises NotAvailable for a file that may not be read. Bytes further on that are not UTF-8 are found in reading.
    """
    _check_kind(path, _head(path))
    if not any(block.strip() for block in _blocks(path)):
        raise InvalidInput(
            f"{path} holds no text: its {path.stat().st_size:,} bytes are white space or a byte-order mark (leave the "
            "file out, or fill it)"
        )


def check_rows(path: Path) -> None:
    """Raise InvalidInput for a file of rows that is empty or not what its name says; else as `check_text`."""
    head, name = _head(path), path.name.lower()
    for suffix, beginning, kind in ((".gz", _GZIP, "compressed by gzip"), (".parquet", _PARQUET, "a Parquet file")):
        if name.endswith(suffix):
            if not head.startswith(beginning):
                raise InvalidInput(
                    f"{path} is not {kind}, as its name says: it begins with {head[:8]!r}; rename it (.jsonl for plain "
                    "rows), or fetch it again"
                )
            return
    _check_kind(path, head)


def _check_kind(path: Path, head: bytes) -> None:
    for beginning, kind, way_out in _BEGINNINGS:
        if head.startswith(beginning):
            raise InvalidInput(f"{path} is {kind}, expected UTF-8 text: {way_out}")
    if head.count(0) > _NULS * len(head):
        raise InvalidInput(
            f"{path} is no UTF-8 text: {head.count(0)} of its first {len(head)} bytes are zero, as in a binary file or "
            "in UTF-16 text (save that as UTF-8)"
        )


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise NotAvailable(f"{path} cannot be read ({error.strerror}): make it readable, or leave it out") from error
    if not head:
        raise InvalidInput(f"{path} is empty: expected text (leave the file out, or fill it)")
    return head


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield file.read(_BLOCK).removeprefix(codecs.BOM_UTF8)
        while block := file.read(_BLOCK):
            yield block
