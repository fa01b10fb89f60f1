"""The cache of slow steps: a trained checkpoint, a tokenized corpus, a long curve.

joblib does the hashing of keys and the (compressed, hence check-summed) storing; this file adds what joblib's own
Memory lacks: the version of all code that a value comes from in the key, atomic writes, and a damaged entry that is
made again instead of read.
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
    """Return the stored value of `compute()` for this `key` and this version of its code, making it if there is none.

    name: folder under data/cache, e.g. "classifier". key: everything the value depends on (parameters, data
    fingerprint, seeds). The value must be something joblib can pickle; tensors and state dicts are.

    The key is completed by the code that `compute` can reach: the module that it stands in and all of effnn that this
    imports, directly or not (`effnn.base.imports`), and the versions of `LIBRARIES`. So `compute` is a function or a
    lambda of a module; InvalidInput for one typed into a notebook.

    Where a file of that code was edited after this process started, it may not be the code that runs here: the value is
    then returned but not stored, with a warning.
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
    """Where the value of this key, made by `function`, lies or would lie, with this version of its code.

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
