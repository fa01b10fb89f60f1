"""The cache of slow steps: a trained checkpoint, a tokenized corpus, a long curve.

joblib does the hashing of keys and the (compressed, hence check-summed) storing; this file adds what joblib's own
Memory lacks: the code version in the key, atomic writes, and a damaged entry that is made again instead of read.
"""

import hashlib
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
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
    digest = joblib.hash({"key": dict(key), "code": [_source_hash(item) for item in code]})
    path = paths.CACHE / name / f"{digest}.joblib"
    if path.exists():
        try:
            return joblib.load(path)
        except Exception as error:
            log.warning("cache entry %s is damaged (%s: %s); making it again", path, type(error).__name__, error)
    value = compute()
    with atomic_path(path) as temporary:
        joblib.dump(value, temporary, compress=("zlib", 1))
    return value


def _source_hash(item: ModuleType | Callable) -> str:
    return hashlib.sha256(inspect.getsource(item).encode()).hexdigest()
