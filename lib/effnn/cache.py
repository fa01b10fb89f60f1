"""The cache of slow steps: a trained checkpoint, a tokenized corpus, a long curve.

joblib does the hashing of keys and the (compressed, hence check-summed) storing; this file adds what joblib's own
Memory lacks: the code version in the key, atomic writes, and a damaged entry that is made again instead of read.

A process runs the code that it has loaded, not what stands in the files by now. A step whose source was edited since
this process began is computed and neither read nor stored, so an entry always is what the code of its key gives.
"""

import hashlib
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import joblib

from effnn import paths
from effnn.base import atomic_path

log = logging.getLogger(__name__)
T = TypeVar("T")


def remember(
    name: str, key: Mapping[str, object], compute: Callable[[], T], code: Iterable[ModuleType | Callable]
) -> T:
    """Return the stored value of `compute()` for this `key` and this version of `code`, making it if there is none.

    name: folder under data/cache, e.g. "classifier". key: everything the value depends on (parameters, data
    fingerprint, seeds). code: modules or functions whose source text enters the key, so that an edit is never served an
    old value. The value must be something joblib can pickle; tensors and state dicts are.
    """
    code = list(code)
    if _edited(code):
        return compute()
    digest = joblib.hash({"key": dict(key), "code": [_source_hash(item) for item in code]})
    path = paths.CACHE / name / f"{digest}.joblib"
    if path.exists():
        try:
            return joblib.load(path)
        except Exception as error:
            log.warning("cache entry %s is damaged (%s: %s); making it again", path, type(error).__name__, error)
    value = compute()
    if not _edited(code):
        with atomic_path(path) as temporary:
            joblib.dump(value, temporary, compress=("zlib", 1))
    return value


def _source_hash(item: ModuleType | Callable) -> str:
    return hashlib.sha256(inspect.getsource(item).encode()).hexdigest()


def _edited(code: list[ModuleType | Callable]) -> bool:
    """Whether the file of some item differs from what it was when first seen; says so once for each file."""
    edited = False
    for path in {Path(inspect.getsourcefile(item) or "") for item in code}:
        if not path.is_file():  # a notebook's cell: its text cannot change under the function made from it
            continue
        now = _file_hash(path)
        if _seen.setdefault(path, now) != now:
            edited = True
            if path not in _told:
                log.warning("%s was edited since this process began; its results are not cached until a restart", path)
                _told.add(path)
    return edited


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Our own files as they are now, that is before any of the code whose results are kept here is likely to be edited. A
# module may be imported long before its first slow step, so its first use would be too late; other files are seen then.
_seen = {path: _file_hash(path) for path in Path(__file__).parent.rglob("*.py")}
_told: set[Path] = set()
