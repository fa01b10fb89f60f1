"""Sizes before and after growth: which configurations can be reached from which, and by what factors.

Width multiplies n_embd and n_head and leaves the head size alone: growing the size of a head is another operator
(scores change their scale), not offered here. Depth multiplies n_layer. Vocabulary and positions never change.
"""

import copy
from numbers import Integral

from transformers import GPT2Config

from effnn.base import InvalidInput

_FIXED = ("vocab_size", "n_positions", "tie_word_embeddings", "activation_function", "layer_norm_epsilon")


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

    InvalidInput where no growth leads there: a size that does not divide, another head size, n_inner that does not
    follow the width, another vocabulary or context length, a tied head against an untied one.
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
