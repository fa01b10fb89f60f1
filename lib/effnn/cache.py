"""The cache of slow steps: a trained checkpoint, a tokenized corpus, a long curve.

joblib hashes the keys and stores the values, compressed and therefore with a checksum. This file adds what joblib's
Memory lacks: the version of all code behind a value in its key, atomic writes, and damaged entries that are made again.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import joblib

from effnn import paths
from effnn.base import atomic_path
from effnn.base.imports import code_digest, files_behind

log = logging.getLogger(__name__)
T = TypeVar("T")
LIBRARIES = ("torch", "transformers", "numpy", "scipy")
"""Whose versions are part of every key."""

_STARTED = time.time()


def remember(name: str, key: Mapping[str, object], compute: Callable[[], T]) -> T:
    """Return the stored value of `compute()` for this `key` and version of its code, computing it if there is none.

    name: folder under data/cache, e.g. "classifier". key: everything the value depends on (parameters, data
    fingerprint, seeds). The value must be something joblib can pickle; tensors and state dicts are.

    The key also contains the code that `compute` can reach (its module and all of effnn that this imports, directly or
    not; see `effnn.base.imports`) and the versions of `LIBRARIES`. So `compute` must be a function or a lambda of a
    module; one typed into a notebook raises InvalidInput.

    Where a file of that code was edited after this process started, other code may be running: the value is then
    returned but not stored, with a warning.
    """
    path = entry(name, key, compute)
    if path.exists():
        try:
            return joblib.load(path)
        except Exception as error:
            log.warning("cache entry %s is damaged (%s: %s); making it again", path, type(error).__name__, error)
    value = compute()
    if edited := _edited(compute):
        names = ", ".join(sorted({file.name for file in edited}))
        log.warning("%s was edited while this process ran: the value is not cached; start Python again", names)
        return value
    with atomic_path(path) as temporary:
        joblib.dump(value, temporary, compress=("zlib", 1))
    return value


def entry(name: str, key: Mapping[str, object], function: Callable) -> Path:
    """The file for the value of this key, made by `function` with this version of its code; it need not exist.

    Where a file of that code was edited after this process started, the entry belongs to this process alone.
    """
    versions = {library: metadata.version(library) for library in LIBRARIES}
    whole = {"key": dict(key), "code": code_digest(function), "libraries": versions}
    if _edited(function):
        whole["process"] = (os.getpid(), _STARTED)
    return paths.CACHE / name / f"{joblib.hash(whole)}.joblib"


def _edited(function: Callable) -> list[Path]:
    """Files of its code that may not be what runs here."""
    return [file for file in files_behind(function) if file.exists() and file.stat().st_mtime > _STARTED]
