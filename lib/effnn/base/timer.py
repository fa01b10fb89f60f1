"""One timer: interleaved measurements, so that a machine whose speed drifts treats all variants alike.

`interleave` runs A B A B ... after a warm-up; ratios are taken round by round, so they hold where absolute times do
not. An interval of zero counts as `LEAST` seconds, so that a ratio can always be taken.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

LEAST = 1e-9
"""Seconds that a measured interval counts as at least."""


def load_average() -> float:
    """1-minute load average of this machine; NaN where the system has none (Windows)."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of one variant, one entry per round, and the 1-minute load average when each round began."""

    name: str
    seconds: tuple[float, ...]
    load: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest seconds."""
        return min(self.seconds), max(self.seconds)

    def over(self, other: "Timing") -> tuple[float, ...]:
        """Ratio of this variant's time to `other`'s, round by round."""
        return tuple(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def interleave(
    variants: Mapping[str, Callable[[], object]], rounds: int = 5, warmup: int = 1, device: str | torch.device = "cpu"
) -> dict[str, Timing]:
    """Time each variant once per round, in the given order, `rounds` times after `warmup` rounds that do not count.

    Variants take no argument; on a CUDA device each is followed by a synchronisation. Returns name -> `Timing`.
    """
    device = torch.device(device)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    load: list[float] = []
    for round_index in range(warmup + rounds):
        if round_index >= warmup:
            load.append(load_average())
        for name, run in variants.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            if round_index >= warmup:
                seconds[name].append(max(time.perf_counter() - start, LEAST))
    return {name: Timing(name, tuple(values), tuple(load)) for name, values in seconds.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
