"""What every option may be: one check per kind of value, with one clear sentence for any other.

`prune` runs all of them before a batch is read; the steps run their own, for those who call them alone.
"""

import math
from numbers import Integral, Real

import torch

from effnn.base import InvalidInput


def check_choice(name: str, value: object, *choices: str) -> None:
    """InvalidInput unless the value is one of the choices."""
    if value not in choices:
        raise InvalidInput(f"{name}={value!r}: expected " + " or ".join(f'"{choice}"' for choice in choices))


def check_count(name: str, value: object, least: int, most: int | None = None, of: str = "") -> None:
    """InvalidInput unless the value is a whole number of at least `least`, and at most `most`. of: what that counts."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InvalidInput(f"{name}={value!r}: expected a whole number {wanted}{of and ', ' + of}")


def is_number(value: object, above: float, most: float = math.inf) -> bool:
    """Whether the value is a finite number above `above` and at most `most`."""
    return isinstance(value, Real) and not isinstance(value, bool) and above < value <= most and math.isfinite(value)


def check_floating(name: str, dtype: object) -> None:
    """InvalidInput unless None or a floating dtype wide enough for hidden states."""
    wide = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2
    if dtype is not None and not wide:
        raise InvalidInput(
            f"{name}={dtype!r}: expected None or a floating dtype of at least 16 bits, such as torch.bfloat16"
        )


def check_calibration(fisher: object, holdout: object, autocast: object, offload: object) -> None:
    """InvalidInput unless the calibration pass takes these."""
    check_choice("fisher", fisher, "batch", "sample")
    if not (is_number(holdout, -1, 1) and 0 <= holdout < 1):
        raise InvalidInput(f"holdout={holdout!r}: expected a share from 0 up to, but not including, 1")
    check_floating("autocast", autocast)
    check_floating("offload", offload)


def check_tuning(solver: object, autocast: object, offload: object) -> None:
    """InvalidInput unless mask tuning takes these."""
    check_choice("solver", solver, "ridge", "lsmr")
    check_floating("autocast", autocast)
    check_floating("offload", offload)
