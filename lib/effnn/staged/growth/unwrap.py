"""The GPT-2 inside the object that a user holds: wrappers are opened, and what cannot grow is refused with a way out.

A wrapper of torch or accelerate (HF Trainer) holds the same tensors and the same state, so nothing is lost by looking
inside. A library that shards or quantizes the tensors themselves changes them, and such a model is refused.
"""

from os import PathLike

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import GPT2LMHeadModel

from effnn.base import InvalidInput
from effnn.staged.growth.hooks import check_hooks
from effnn.staged.growth.module_settings import check_modules
from effnn.staged.growth.roles import role_of

_GATHER = (
    "load get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
    "torch.distributed.checkpoint.state_dict into a new GPT2LMHeadModel(model.config); effnn.staged.train runs that on "
    "all ranks by itself"
)
_WAYS_OUT = {
    "PeftModel": "model.merge_and_unload() gives the plain one",
    "FullyShardedDataParallel": f"it is sharded: {_GATHER}",
    "TrainState": "hand over its .model and .optimizer",
    "Trainer": "hand over its .model, .optimizer and .lr_scheduler",
}


def plain_model(model: object) -> object:
    """The model inside DistributedDataParallel, DataParallel and torch.compile; anything else as it is."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(model, nn.Module) and isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def plain_optimizer(optimizer: object) -> object:
    """The torch optimizer inside accelerate's AcceleratedOptimizer; anything else as it is."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def plain_scheduler(scheduler: object) -> object:
    """The torch scheduler inside accelerate's AcceleratedScheduler; anything else as it is."""
    while not isinstance(scheduler, LRScheduler) and (inner := getattr(scheduler, "scheduler", None)) is not None:
        scheduler = inner
    return scheduler


def check_model(model: nn.Module) -> None:
    """InvalidInput unless `model` is a GPT2LMHeadModel and there is a growth rule for each of its tensors.

    Raised for another class, sharded or quantized tensors, an unknown parameter or buffer, a module or a shape that
    does not follow from the configuration, hooks and replaced methods (hooks.py), and an output head whose tying
    contradicts the configuration.
    """
    if not isinstance(model, GPT2LMHeadModel):
        raise InvalidInput(f"growth takes a GPT2LMHeadModel, found a {type(model).__name__}{way_out(model)}")
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise InvalidInput(f"{name} is sharded (FullyShardedDataParallel), growth needs whole tensors: {_GATHER}")
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter:
            raise _not_plain(name, type(parameter).__name__)
        role_of(name)
        if not parameter.is_floating_point() or parameter.is_meta:
            raise InvalidInput(f"{name} is {parameter.dtype} on {parameter.device}: growth needs floating-point values")
    if buffers := [name for name, _ in model.named_buffers()]:
        raise InvalidInput(f"no growth rule for the buffers {buffers[:5]}: a stock GPT2LMHeadModel has none")
    check_modules(model)
    check_hooks(model)
    tied = model.lm_head.weight is model.transformer.wte.weight
    if tied != bool(model.config.tie_word_embeddings):
        found = "one tensor" if tied else "two tensors"
        raise InvalidInput(
            f"config.tie_word_embeddings is {model.config.tie_word_embeddings}, but the output head and the token "
            f"embedding are {found}: call model.tie_weights() or correct the configuration"
        )


def way_out(model: object) -> str:
    """What to do with an object that is not a GPT2LMHeadModel, as the end of a sentence; empty if that is unknown."""
    if isinstance(model, str | PathLike):
        return ": load it first by GPT2LMHeadModel.from_pretrained"
    for kind in type(model).__mro__:
        if kind.__name__ in _WAYS_OUT:
            return f": {_WAYS_OUT[kind.__name__]}"
    for name in ("module", "model"):
        if isinstance(getattr(model, name, None), GPT2LMHeadModel):
            return f": hand over its .{name}"
    return ""


def _not_plain(name: str, kind: str) -> InvalidInput:
    if kind == "DTensor":
        return InvalidInput(
            f"{name} is a DTensor, so the model is sharded (fully_shard, tensor parallelism), and growth needs whole "
            f"tensors: {_GATHER}"
        )
    return InvalidInput(
        f"{name} is a {kind}, not a plain parameter, and growth needs whole floating-point tensors: take the model "
        "before it was quantized or sharded"
    )
