"""One named number with its samples, and the 95 % interval over them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from effnn.base import InvalidInput
from effnn.report.rules import MIN_SAMPLES


@dataclass(frozen=True)
class Value:
    """One named number.

    value: the number; None for not attempted.
    samples: one number per seed, paired differences where the claim is a difference.
    interval: 95 % t interval over the samples, None with fewer than three.
    unit: what the number is.
    note: shown with the verdict; for a claim that was not attempted, what it needs.
    load: of a measured time, the highest 1-minute load average during the measurement; None for what is counted.
    """

    value: float | None
    samples: tuple[float, ...] = ()
    interval: tuple[float, float] | None = None
    unit: str = ""
    note: str = ""
    load: float | None = None


def interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """Return the two-sided 95 % Student t interval of the mean, or None with fewer than three samples."""
    if len(samples) < MIN_SAMPLES:
        return None
    if min(samples) == max(samples):  # rounding would give equal samples a tiny spread, and `==1` would then fail
        return float(samples[0]), float(samples[0])
    mean, error = float(np.mean(samples)), float(np.std(samples, ddof=1)) / math.sqrt(len(samples))
    half = float(special.stdtrit(len(samples) - 1, 0.975)) * error
    return mean - half, mean + half


def read_value(item: Mapping[str, object]) -> Value:
    """Return a stored value; its interval is computed from the samples again."""
    number = None if item["value"] is None else finite("value", item["value"])
    samples = tuple(finite("samples", sample) for sample in item["samples"])
    load = None if item.get("load") is None else finite("load", item["load"])
    return Value(number, samples, interval(samples), str(item["unit"]), str(item["note"]), load)


def finite(key: str, number: object) -> float:
    """Return `number` as a float; raises InvalidInput, naming `key`, for NaN, infinity and anything else."""
    try:
        number = float(number)
    except (TypeError, ValueError):
        raise InvalidInput(f"{key!r}: expected a number, got {number!r}") from None
    if not math.isfinite(number):
        raise InvalidInput(f"{key!r} is {number}: only finite numbers are results; find out why before recording it")
    return number
