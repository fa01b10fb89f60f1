"""What growth does to a GPT-2's configuration: its sizes, and the record of growth events that is kept in it.

Width multiplies n_embd and n_head and leaves the head size alone: growing the size of a head is another operator (it
changes the scale of the scores), not offered here. Depth multiplies n_layer. Vocabulary and positions never change.
"""

import copy
from dataclasses import asdict, dataclass, fields
from math import prod
from numbers import Integral

from transformers import GPT2Config

from effnn.base import InvalidInput

_FIXED = ("vocab_size", "n_positions", "tie_word_embeddings", "activation_function", "layer_norm_epsilon")
_KEY = "effnn_growth"


def check_factor(name: str, factor: int) -> int:
    """`factor` as an int; InvalidInput unless it is a whole number of at least 1."""
    if not isinstance(factor, Integral) or isinstance(factor, bool) or factor < 1:
        raise InvalidInput(f"{name}={factor!r}: a growth factor is a whole number of at least 1")
    return int(factor)


def grown_config(config: GPT2Config, width: int, depth: int) -> GPT2Config:
    """A copy of `config` at the grown size; n_inner=None (four times n_embd) stays None."""
    grown = copy.deepcopy(config)
    grown.n_embd, grown.n_head = config.n_embd * width, config.n_head * width
    grown.n_inner = None if config.n_inner is None else config.n_inner * width
    grown.n_layer = config.n_layer * depth
    return grown


def factors(config: GPT2Config, target: GPT2Config) -> tuple[int, int]:
    """The factors (width, depth) that lead from `config` to `target`.

    InvalidInput where no growth leads there: a size that is not a whole multiple, another head size, an n_inner that
    does not follow the width, another vocabulary or context length, a tied head against an untied one.
    """
    for name in _FIXED:
        if (old := getattr(config, name)) != (new := getattr(target, name)):
            raise InvalidInput(f"{name} is {old} and would become {new}: growth does not change it")
    width, depth = (_quotient(name, config, target) for name in ("n_embd", "n_layer"))
    if target.n_head != config.n_head * width:
        raise InvalidInput(
            f"the head size would change: {config.n_embd} / {config.n_head} against {target.n_embd} / {target.n_head}. "
            f"Width {width} keeps the size of a head and needs n_head={config.n_head * width}"
        )
    inner, wanted = (c.n_inner if c.n_inner is not None else 4 * c.n_embd for c in (config, target))
    if wanted != inner * width:
        raise InvalidInput(f"n_inner is {inner} and would become {wanted}: width {width} makes it {inner * width}")
    return width, depth


def _quotient(name: str, config: GPT2Config, target: GPT2Config) -> int:
    old, new = getattr(config, name), getattr(target, name)
    if new < old or new % old:
        raise InvalidInput(f"{name} is {old} and would become {new}: not a whole multiple")
    return new // old


@dataclass(frozen=True)
class GrowthRecord:
    """One growth event. It is kept in the configuration, so that it is saved with the model.

    op: "width" or "depth".
    factor: by how much.
    order, init: of depth; None for width.
    noise: of width: standard deviation of the symmetry-breaking noise over that of the matrix, 0 for none.
    seed: of the noise.
    step: optimizer steps done before it, None without optimizer state.
    n_params_before, n_params_after: parameters, a tied head counted once.
    loss_before, loss_after: mean cross-entropy in nats per token, in eval mode, on the batch given to `grow`; None
    without a batch, and between the two events of one call.
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

    InvalidInput if the entry in the configuration was not written by this library.
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
