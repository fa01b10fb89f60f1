"""What every room may use: errors, atomic files, a lock, modes and hooks of modules, seeds, threads, and a timer.

Standard library and torch only.
"""

from effnn.base.errors import CannotWrite, EffnnError, InvalidInput, NotAvailable, first_line
from effnn.base.files import (
    atomic_folder,
    atomic_path,
    sha256_file,
    temporary_folder,
    write_json,
    write_text,
    writing,
)
from effnn.base.lock import folder_lock
from effnn.base.memory import PeakMemory, release_free_memory
from effnn.base.modules import evaluating, hooked
from effnn.base.seeds import seed_everything, threads
from effnn.base.timer import LEAST, Timing, interleave, load_average

__all__ = [
    "LEAST",
    "CannotWrite",
    "EffnnError",
    "InvalidInput",
    "NotAvailable",
    "PeakMemory",
    "Timing",
    "atomic_folder",
    "atomic_path",
    "evaluating",
    "first_line",
    "folder_lock",
    "hooked",
    "interleave",
    "load_average",
    "release_free_memory",
    "seed_everything",
    "sha256_file",
    "temporary_folder",
    "threads",
    "write_json",
    "write_text",
    "writing",
]
