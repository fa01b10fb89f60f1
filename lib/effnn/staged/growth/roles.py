"""Which tensor of a GPT2LMHeadModel is what: rules by name, and an error for a name that no rule covers.

Growth never guesses from a shape: a square matrix could be many things. Everything else in this room asks `role_of`.
"""

import re
from dataclasses import dataclass
from enum import Enum
from os import PathLike

from torch import nn
from transformers import GPT2LMHeadModel

from effnn.base import InvalidInput
from effnn.staged.growth.settings import check_modules


class Kind(Enum):
    """How a tensor takes part in growth in width (d: model width). Conv1D weights are stored (in, out)."""

    EMBEDDING = "embedding"  # (rows, d): token and position embeddings, and an output head that is not tied
    MATRIX = "matrix"  # (in, parts * out): maps between activations that are both repeated
    VECTOR = "vector"  # (parts * n,): biases, and gains of the normalisations inside the layers
    FINAL_NORM = "final norm"  # (d,): gain and bias in front of the output head


@dataclass(frozen=True)
class Role:
    """One tensor: its kind, and how many equal parts lie side by side in its last axis (query, key, value: 3).

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


_WAYS_OUT = {
    "PeftModel": "model.merge_and_unload() gives the plain one",
    "FullyShardedDataParallel": "it is sharded: {gather}",
    "TrainState": "hand over its .model and .optimizer",
    "Trainer": "hand over its .model, .optimizer and .lr_scheduler",
}
_GATHER = (
    "load get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
    "torch.distributed.checkpoint.state_dict into a new GPT2LMHeadModel(model.config); effnn.staged.train runs that on "
    "all ranks by itself"
)


def check_model(model: nn.Module) -> None:
    """InvalidInput unless `model` is a GPT2LMHeadModel all of whose tensors have a rule.

    Raised for another class, tensors that are sharded or quantized, an unknown parameter or buffer, a module or a shape
    that the configuration does not make, and a head that is tied where the configuration says otherwise or the other
    way round.
    """
    if not isinstance(model, GPT2LMHeadModel):
        raise InvalidInput(f"growth takes a GPT2LMHeadModel, found a {type(model).__name__}{way_out(model)}")
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise InvalidInput(f"{name} is sharded (FullyShardedDataParallel), growth needs whole tensors: {_GATHER}")
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:
            _refuse(name, type(parameter).__name__)
        role_of(name)
        if not parameter.is_floating_point() or parameter.is_meta:
            raise InvalidInput(f"{name} is {parameter.dtype} on {parameter.device}: growth needs floating-point values")
    if buffers := [name for name, _ in model.named_buffers()]:
        raise InvalidInput(f"no growth rule for the buffers {buffers[:5]}: a stock GPT2LMHeadModel has none")
    check_modules(model)
    tied = model.lm_head.weight is model.transformer.wte.weight
    if tied != bool(model.config.tie_word_embeddings):
        found = "one tensor" if tied else "two tensors"
        raise InvalidInput(
            f"config.tie_word_embeddings is {model.config.tie_word_embeddings}, but the output head and the token "
            f"embedding are {found}; call model.tie_weights() or mend the configuration"
        )


def way_out(model: object) -> str:
    """What to do with an object that is no GPT2LMHeadModel, as the end of a sentence; empty where nobody knows."""
    if isinstance(model, str | PathLike):
        return ": load it first by GPT2LMHeadModel.from_pretrained"
    for kind in type(model).__mro__:
        if kind.__name__ in _WAYS_OUT:
            return f": {_WAYS_OUT[kind.__name__].format(gather=_GATHER)}"
    for name in ("module", "model"):
        if isinstance(getattr(model, name, None), GPT2LMHeadModel):
            return f": hand over its .{name}"
    return ""


def _refuse(name: str, kind: str) -> None:
    if kind == "DTensor":
        raise InvalidInput(
            f"{name} is a DTensor, so the model is sharded (fully_shard, tensor parallelism), and growth needs whole "
            f"tensors: {_GATHER}"
        )
    raise InvalidInput(
        f"{name} is a {kind}, no plain parameter, and growth needs whole floating-point tensors: take the model before "
        "it was quantized or sharded"
    )
