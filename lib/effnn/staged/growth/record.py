"""What was grown, when and how: one record an event, kept in the configuration, so that it is saved with the model."""

from dataclasses import asdict, dataclass, fields
from math import prod

from transformers import GPT2Config

from effnn.base import InvalidInput

_KEY = "effnn_growth"


@dataclass(frozen=True)
class GrowthRecord:
    """One growth event.

    op: "width" or "depth". factor: by how much. order, init: of depth. noise: standard deviation of the
    symmetry-breaking noise over that of the matrix, 0 for none (width). seed: of the noise. step: optimizer steps done
    when it happened, None without optimizer state. n_params_before, n_params_after: parameters, a tied head counted
    once. loss_before, loss_after: mean cross-entropy in nats a token, in eval mode, on the batch handed to `grow`; None
    where none was, and between two events of one call.
    """

    op: str
    factor: int
    order: str | None
    init: str | None
    noise: float
    seed: int
    step: int | None
    n_params_before: int
    n_params_after: int
    loss_before: float | None = None
    loss_after: float | None = None


def history(config: GPT2Config) -> tuple[GrowthRecord, ...]:
    """All growth events in a model's past, oldest first; empty for a model that was never grown.

    InvalidInput if the entry in the configuration is not one that this library wrote.
    """
    entries = getattr(config, _KEY, None) or []
    known = {field.name for field in fields(GrowthRecord)}
    try:
        return tuple(GrowthRecord(**{key: entry[key] for key in entry if key in known}) for entry in entries)
    except TypeError as error:
        raise InvalidInput(f"config.{_KEY} is not a list of growth records: {error}") from None


def append_history(config: GPT2Config, records: tuple[GrowthRecord, ...]) -> None:
    """Add events to the history in `config`."""
    if records:
        setattr(config, _KEY, [asdict(record) for record in (*history(config), *records)])


def total_width(config: GPT2Config) -> int:
    """The product of all width factors in a model's past; 1 for a model that was never grown."""
    return prod(record.factor for record in history(config) if record.op == "width")
