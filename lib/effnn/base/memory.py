"""Peak memory of a block: CUDA's own counter on a GPU, the resident set of this process (sampled) on a CPU."""

import ctypes
import gc
import os
import threading
from types import TracebackType

import torch


class PeakMemory:
    """Context manager; afterwards `peak_bytes` is the largest memory seen above the level at entry.

    On CUDA the figure is exact (allocator statistics). On a CPU a thread reads /proc/self/statm every `interval`
    seconds, so a shorter peak can be missed; where that file does not exist `peak_bytes` stays None.
    """

    def __init__(self, device: str | torch.device = "cpu", interval: float = 0.005):
        self.device, self.interval = torch.device(device), interval
        self.peak_bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            return self
        release_free_memory()
        self._start = _resident_bytes()
        if self._start is not None:
            self._highest, self._stop = self._start, threading.Event()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self._start
        elif self._start is not None:
            self._stop.set()
            self._thread.join()
            self.peak_bytes = self._highest - self._start

    def _sample(self) -> None:
        while not self._stop.wait(self.interval):
            self._highest = max(self._highest, _resident_bytes() or 0)


def _resident_bytes() -> int | None:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def release_free_memory() -> None:
    """Ask the C library (glibc) to return freed memory to the system: what is resident is then what is in use.

    Otherwise fragments remain after large tensors are freed, and the resident set grows. Without glibc nothing happens.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass
