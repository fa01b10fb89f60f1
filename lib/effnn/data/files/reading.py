"""Reading text by path: plain text files, and rows in the forms that data sets of documents are published in.

A file of rows has one document per row, in a field named "text": JSON lines (.jsonl), the same compressed (.json.gz,
.jsonl.gz), or Parquet. Both kinds are read piece by piece, so a file of any size can be read; what is wrong stops the
reading with the file and the place.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from effnn.base import InvalidInput, NotAvailable
from effnn.data.files.kinds import check_rows, check_text

ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz", ".parquet")
COLUMN = "text"
_BLOCK = 1 << 16


def published_files(what: str, folder: str | Path, names: Sequence[str]) -> list[Path]:
    """The paths of these files of a published data set in `folder`. Raises NotAvailable naming what is missing.

    what: name of the data set, for the message.
    """
    folder = Path(folder).expanduser()
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise NotAvailable(
            f"{what} was looked for in {folder}, where {' and '.join(missing)} cannot be found: give the folder that "
            f"holds the published {Path(names[0]).suffix[1:].upper()} files, or use the laptop profile, which needs no "
            f"files"
        )
    return [folder / name for name in names]


def check_file(path: Path) -> None:
    """Raise InvalidInput for a file without text or not of the kind that its name says, NotAvailable if not readable.

    Looks at the beginning alone, except for a file of white space; what is wrong further on is found in reading.
    """
    (check_rows if holds_rows(path) else check_text)(path)


def read_text(path: str | Path, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """The text of bytes `start` to `stop` in small chunks, line ends as "\\n", without byte-order mark.

    Raises InvalidInput naming the file and the offset of the first byte that is not UTF-8.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    position = start
    with Path(path).open("rb") as file:
        file.seek(start)
        while True:
            block = file.read(_BLOCK if stop is None else min(_BLOCK, stop - position))
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                offset = position - (len(error.object) - len(block)) + error.start
                raise InvalidInput(
                    f"{path}: byte {offset} is not UTF-8 ({error.reason}); save the file as UTF-8"
                ) from error
            if position == 0:
                text = text.removeprefix("\ufeff")
            position += len(block)
            if text:
                yield text
            if not block:
                return


def holds_rows(path: str | Path) -> bool:
    """True where the name says that the file holds rows rather than plain text."""
    return str(path).lower().endswith(ROW_SUFFIXES)


def read_rows(path: str | Path) -> Iterator[str]:
    """The texts of a file in their order. Raises InvalidInput naming the file, and the line of the first bad row."""
    path = Path(path)
    return _parquet(path) if path.suffix.lower() == ".parquet" else _json_lines(path)


def clean(text: str) -> str:
    """The text without halves of surrogate pairs, which escapes can spell and UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _json_lines(path: Path) -> Iterator[str]:
    opened = gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")
    with opened as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get(COLUMN), str):
                    raise InvalidInput(f'{path}, line {number}: expected a JSON object with a string "{COLUMN}"')
                yield clean(row[COLUMN])
        except UnicodeDecodeError as error:
            raise InvalidInput(f"{path}, line {number}: not UTF-8 (byte {error.start} of the line)") from error
        except json.JSONDecodeError as error:
            raise InvalidInput(f"{path}, line {number}: not JSON ({error.msg})") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InvalidInput(f"{path}, after line {number}: the compressed file is damaged ({error})") from error


def _parquet(path: Path) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if COLUMN not in file.schema_arrow.names:
                found = ", ".join(file.schema_arrow.names)
                raise InvalidInput(f'{path}: expected a column "{COLUMN}", found {found}')
            for batch in file.iter_batches(batch_size=1000, columns=[COLUMN]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str | None):
                        raise InvalidInput(
                            f'{path}: expected strings in column "{COLUMN}", found {type(text).__name__}'
                        )
                    yield text or ""
    except (pyarrow.ArrowException, OSError) as error:  # a damaged page is an OSError
        raise InvalidInput(f"{path}: not a whole Parquet file ({error})") from error
