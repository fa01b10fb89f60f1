"""Token ids on the disk: one raw file per split, memory-mapped, and a small JSON file with their checksums.

The folder is written under a temporary name and renamed, so it is either whole or absent; what was damaged later is
seen on loading. Ids are little-endian uint16, or uint32 for vocabularies above 65,535.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from effnn.base import atomic_folder, sha256_file, write_json, write_text

META = "meta.json"
TOKENIZER = "tokenizer.json"


class Damaged(Exception):
    """A folder of token files is not what was written; the message says what is wrong."""


@dataclass(frozen=True)
class TokenFiles:
    """Ids by split (1-D, memory-mapped, read-only), sha256 of each, and what was stored of the tokenizer."""

    tokens: Mapping[str, np.ndarray]
    sha256: Mapping[str, str]
    tokenizer: str


def dtype_for(vocab_size: int) -> np.dtype:
    """Type of the ids of a vocabulary."""
    return np.dtype("<u2" if vocab_size <= 65535 else "<u4")


def write(folder: Path, splits: Mapping[str, Iterable[np.ndarray]], dtype: np.dtype, tokenizer: str = "") -> None:
    """Write the ids of each split, array by array as they come, and put `folder` in its place when all is there."""
    meta = {"dtype": dtype.str, "splits": {}}
    with atomic_folder(folder) as temporary:
        for name, arrays in splits.items():
            digest, size = hashlib.sha256(), 0
            with (temporary / f"{name}.bin").open("wb") as file:
                for ids in arrays:
                    raw = ids.astype(dtype).tobytes()
                    file.write(raw)
                    digest.update(raw)
                    size += len(raw)
            meta["splits"][name] = {"bytes": size, "sha256": digest.hexdigest()}
        write_text(temporary / TOKENIZER, tokenizer)
        meta["tokenizer"] = hashlib.sha256(tokenizer.encode()).hexdigest()
        write_json(temporary / META, meta)


def read(folder: Path) -> TokenFiles:
    """The files of a folder, mapped. Raises Damaged where size or checksum of any file is not what was written."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        tokenizer = (folder / TOKENIZER).read_text(encoding="utf-8")
        dtype = np.dtype(meta["dtype"])
        if hashlib.sha256(tokenizer.encode()).hexdigest() != meta["tokenizer"]:
            raise Damaged(f"{TOKENIZER} is not what was written")
        tokens, sums = {}, {}
        for name, expected in meta["splits"].items():
            tokens[name] = _map(folder / f"{name}.bin", expected["bytes"], dtype)
            sums[name] = expected["sha256"]
            if sha256_file(folder / f"{name}.bin") != sums[name]:
                raise Damaged(f"{name}.bin does not have the checksum that was written")
        return TokenFiles(tokens, sums, tokenizer)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{type(error).__name__}: {error}") from error


def _map(path: Path, size: int, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size != size:
        raise Damaged(f"{path.name} holds {path.stat().st_size} bytes, {size} were written")
    if not size:  # an empty file cannot be mapped
        empty = np.empty(0, dtype)
        empty.flags.writeable = False
        return empty
    return np.memmap(path, dtype=dtype, mode="r")
