"""What every room may use: errors, atomic writes, a lock, seeds and threads, and one timer.

Standard library and torch only.
"""

from effnn.base.atomic import atomic_path, write_json, write_text
from effnn.base.errors import CannotWrite, EffnnError, InvalidInput, NotAvailable
from effnn.base.lock import folder_lock
from effnn.base.memory import PeakMemory, release_free_memory
from effnn.base.seeds import seed_everything, threads
from effnn.base.timer import LEAST, Timing, interleave, load_average
from effnn.base.writing import writing

__all__ = [
    "LEAST",
    "CannotWrite",
    "EffnnError",
    "InvalidInput",
    "NotAvailable",
    "PeakMemory",
    "Timing",
    "atomic_path",
    "folder_lock",
    "interleave",
    "load_average",
    "release_free_memory",
    "seed_everything",
    "threads",
    "write_json",
    "write_text",
    "writing",
]
