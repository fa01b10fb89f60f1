"""Texts from the files that data sets of documents are published in: one row a document, in a field named "text".

JSON lines (.jsonl), the same compressed (.json.gz, .jsonl.gz), and Parquet. Rows come one after another, so a file of
any size can be read; a bad row stops the reading with its file and line.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from effnn.base import InvalidInput

SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz", ".parquet")
COLUMN = "text"


def holds_rows(path: str | Path) -> bool:
    """True where the name says that the file holds rows rather than plain text."""
    return str(path).lower().endswith(SUFFIXES)


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
