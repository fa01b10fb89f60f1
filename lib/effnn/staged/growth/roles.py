"""The role of each tensor of a GPT2LMHeadModel, by its name, and an error for a name without a rule.

Growth never guesses from a shape: a square matrix could be many things. Everything else in this room asks `role_of`.
"""

import re
from dataclasses import dataclass
from enum import Enum

from effnn.base import InvalidInput


class Kind(Enum):
    """How a tensor takes part in growth in width (d: model width). Conv1D weights are stored (in, out)."""

    EMBEDDING = "embedding"  # (rows, d): token and position embeddings, and an output head that is not tied
    MATRIX = "matrix"  # (in, parts * out): maps between activations that are both repeated
    VECTOR = "vector"  # (parts * n,): biases, and gains of the normalisations inside the layers
    FINAL_NORM = "final norm"  # (d,): gain and bias in front of the output head


@dataclass(frozen=True)
class Role:
    """What growth knows of one tensor.

    kind: how it takes part in growth in width.
    parts: how many equal parts lie side by side in its last axis (query, key, value: 3).
    ends_branch: it belongs to a projection back to the residual stream; with these at zero a layer adds nothing.
    """

    kind: Kind
    parts: int = 1
    ends_branch: bool = False


_OUTSIDE = {
    "transformer.wte.weight": Role(Kind.EMBEDDING),
    "transformer.wpe.weight": Role(Kind.EMBEDDING),
    "lm_head.weight": Role(Kind.EMBEDDING),
    "transformer.ln_f.weight": Role(Kind.FINAL_NORM),
    "transformer.ln_f.bias": Role(Kind.FINAL_NORM),
}
_IN_LAYER = {
    "ln_1.weight": Role(Kind.VECTOR),
    "ln_1.bias": Role(Kind.VECTOR),
    "attn.c_attn.weight": Role(Kind.MATRIX, parts=3),
    "attn.c_attn.bias": Role(Kind.VECTOR, parts=3),
    "attn.c_proj.weight": Role(Kind.MATRIX, ends_branch=True),
    "attn.c_proj.bias": Role(Kind.VECTOR, ends_branch=True),
    "ln_2.weight": Role(Kind.VECTOR),
    "ln_2.bias": Role(Kind.VECTOR),
    "mlp.c_fc.weight": Role(Kind.MATRIX),
    "mlp.c_fc.bias": Role(Kind.VECTOR),
    "mlp.c_proj.weight": Role(Kind.MATRIX, ends_branch=True),
    "mlp.c_proj.bias": Role(Kind.VECTOR, ends_branch=True),
}
_LAYER = re.compile(r"(transformer\.h\.)(\d+)((?:\..+)?)")


def role_of(name: str) -> Role:
    """The role of the parameter `name` of a GPT2LMHeadModel; InvalidInput for a name that stock GPT-2 does not have."""
    inside = _LAYER.fullmatch(name)
    role = _IN_LAYER.get(inside[3][1:]) if inside else _OUTSIDE.get(name)
    if role is None:
        raise InvalidInput(
            f"no growth rule for the parameter {name}: growth knows the tensors of a stock GPT2LMHeadModel only. "
            "Merge or remove what was added to the model (adapters, cross-attention) first"
        )
    return role


def layer_of(name: str) -> int | None:
    """Index of the layer that a parameter or module belongs to; None outside the layers."""
    inside = _LAYER.fullmatch(name)
    return int(inside[2]) if inside else None


def in_layer(name: str, layer: int) -> str:
    """The same parameter or module of another layer."""
    return _LAYER.sub(lambda match: f"{match[1]}{layer}{match[3]}", name)
