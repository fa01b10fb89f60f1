"""The cache of slow steps: a trained checkpoint, a tokenized corpus, a long curve.

joblib does the hashing of keys and the (compressed, hence check-summed) storing; this file adds what joblib's own
Memory lacks: the code version in the key, atomic writes, and a damaged entry that is made again instead of read.
"""

import hashlib
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import joblib

from effnn import paths
from effnn.base import atomic_path

log = logging.getLogger(__name__)
T = TypeVar("T")
Code = Iterable[ModuleType | Callable]
_STARTED = time.time()


def remember(name: str, key: Mapping[str, object], compute: Callable[[], T], code: Code) -> T:
    """Return the stored value of `compute()` for this `key` and this version of `code`, making it if there is none.

    name: folder under data/cache, e.g. "classifier". key: everything the value depends on (parameters, data
    fingerprint, seeds). code: modules or functions whose source text enters the key, so that an edit is never served an
    old value. The value must be something joblib can pickle; tensors and state dicts are.

    A file of `code` that was edited after this process started may not be the code that runs here: the value is then
    returned but not stored, with a warning.
    """
    code = list(code)
    path = entry(name, key, code)
    if path.exists():
        try:
            return joblib.load(path)
        except Exception as error:
            log.warning("cache entry %s is damaged (%s: %s); making it again", path, type(error).__name__, error)
    value = compute()
    edited = [file for file in map(_file, code) if file.exists() and file.stat().st_mtime > _STARTED]
    if edited:
        names = ", ".join(sorted({file.name for file in edited}))
        log.warning("%s was edited while this process ran: the value is not cached; start Python again", names)
        return value
    with atomic_path(path) as temporary:
        joblib.dump(value, temporary, compress=("zlib", 1))
    return value


def entry(name: str, key: Mapping[str, object], code: Code) -> Path:
    """Where the value of this key and this version of the code lies, or would lie."""
    digest = joblib.hash({"key": dict(key), "code": [_source_hash(item) for item in code]})
    return paths.CACHE / name / f"{digest}.joblib"


def _source_hash(item: ModuleType | Callable) -> str:
    return hashlib.sha256(inspect.getsource(item).encode()).hexdigest()


def _file(item: ModuleType | Callable) -> Path:
    return Path(inspect.getsourcefile(item) or "")
