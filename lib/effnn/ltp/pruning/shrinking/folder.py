"""Writing a folder of several files so that a killed process never leaves a folder that looks whole but is not.

The files are written to a hidden folder inside the target and then moved one by one; `config.json`, without which
nothing loads, goes first from the old content and comes last in the new one. What else lies in the target stays.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from effnn.base import InvalidInput

CONFIG = "config.json"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


@contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty folder; on success its files replace those of the same name in `target`, on an error none do."""
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise InvalidInput(f"{target} is a file; expected a folder to save the model in")
    target.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target, prefix=".tmp-"))
    try:
        yield temporary
        names = sorted((path.name for path in temporary.iterdir()), key=lambda name: (name == CONFIG, name))
        if CONFIG in names:
            (target / CONFIG).unlink(missing_ok=True)
        # a loader prefers one weight file to several: those of an earlier save must not outlive it
        if any(name.endswith(".safetensors") for name in names):
            for old in target.iterdir():
                if WEIGHTS.fullmatch(old.name):
                    old.unlink()
        for name in names:
            os.replace(temporary / name, target / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
