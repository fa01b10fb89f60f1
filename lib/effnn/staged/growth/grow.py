"""Growing a GPT-2 in one call: the model, its AdamW state and its scheduler, in width, in depth, or both.

"Staged Training for Transformer Language Models" (Shen et al. 2022, arXiv 2203.06211): train small, grow the whole
training state so that the loss and the training dynamics are preserved, train on.

  1. Build the grown model without values (meta device).
  2. Widen every tensor and add noise (width.py); derive the tensors of new layers from it (depth.py).
  3. Rebuild the optimizer and the scheduler around the new parameters, with the state found by name (optimizer.py).
  4. Record the events in the configuration (config.py).

The grown model shares nothing with the original, which is not changed. Not covered: other architectures and optimizers,
and growth of the head size. Gradients are not carried over; a model or an optimizer with hooks is refused (hooks.py).
"""

from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2LMHeadModel

from effnn.base import InvalidInput, evaluating
from effnn.staged.growth.config import GrowthRecord, append_history, check_factor, grown_config
from effnn.staged.growth.depth import INITS, ORDERS, Layout, check_depth, new_value
from effnn.staged.growth.hooks import check_optimizer_hooks
from effnn.staged.growth.module_settings import carry_over, skeleton
from effnn.staged.growth.optimizer import (
    MOMENTS,
    NEW_MOMENTS,
    WIDTH_RULES,
    check_scheduler,
    grow_optimizer,
    grow_scheduler,
    names_by_group,
    steps_done,
)
from effnn.staged.growth.roles import role_of
from effnn.staged.growth.unwrap import check_model, plain_model, plain_optimizer, plain_scheduler
from effnn.staged.growth.width import DEFAULT_NOISE, add_noise_, value_divisor, widen


@dataclass(frozen=True)
class Grown:
    """What `grow` returns. record: the events of this call; none for factors of 1, two for both width and depth."""

    model: GPT2LMHeadModel
    optimizer: AdamW | None
    scheduler: LambdaLR | None
    record: tuple[GrowthRecord, ...]


def grow(
    model: GPT2LMHeadModel,
    optimizer: AdamW | None = None,
    scheduler: LambdaLR | None = None,
    *,
    width: int = 1,
    depth: int = 1,
    order: str = "interleave",
    init: str = "zero_proj",
    noise: float | None = None,
    seed: int = 0,
    moments: str = "consistent",
    new_moments: str = "zero",
    adam_width_rule: str = "none",
    batch: Tensor | None = None,
) -> Grown:
    """A model `width` times as wide and `depth` times as deep that computes the same, with its training state.

    What is set on the model stays: device and dtype of every tensor, train or eval mode, `requires_grad`, settings on
    the modules (dropout, gradient checkpointing with its arguments) and the generation configuration. Wrappers are
    opened (unwrap.py), and what comes back has none.

    model: GPT2LMHeadModel, with a tied output head or one of its own.
    optimizer: its torch.optim.AdamW, or None.
    scheduler: the LambdaLR of `optimizer`, or None; the new one stands at the same position.
    width: multiplies n_embd, n_head and a given n_inner; the head size stays. With a depth factor too, width comes
    first; for the reverse, call twice.
    depth: multiplies n_layer.
    order: of new layers: "interleave" or "append" (depth.py).
    init: of new layers: "zero_proj", "ln_zero", "identity" (all bit-exact) or "copy" (changes the loss).
    noise: standard deviation of the symmetry-breaking noise of width over that of the matrix, 0 to 1. None takes 0.3
    for a model without dropout and 0 for one with dropout, which breaks the symmetry too. The loss stays the same up to
    rounding, in half precision only roughly.
    seed: of the noise, which is drawn on the model's device; the global generators stay untouched.
    moments: of what grew in width: "consistent", "authors" or "reset" (optimizer.py).
    new_moments: of new layers: "zero" or, with init="copy", "copy".
    adam_width_rule: "none" keeps the hyper-parameters, "1/k" adapts learning rate, eps and weight decay (optimizer.py).
    batch: token ids (rows, length), on which the loss is measured before and after, for the record.

    Raises InvalidInput for a model that is not a GPT2LMHeadModel of whole, unquantized tensors (a subclass may have
    other methods and plain attributes, which stay), hooks and replaced methods, a factor that is not a whole number of
    at least 1, growth in depth with inverse-layer scaling of the scores, an optimizer or scheduler of another kind or
    of another model, and an unknown choice.
    Source: Shen et al. 2022 and its released code for width 2 and depth 2; other factors are derived (width.py).
    """
    width, depth = check_options(width, depth, order, init, noise, moments, new_moments, adam_width_rule)
    model, optimizer, scheduler = plain_model(model), plain_optimizer(optimizer), plain_scheduler(scheduler)
    check_model(model)
    check_depth(model, depth, init)
    noise = _noise_in_force(model, noise) if width > 1 else 0.0
    if optimizer is not None:
        names_by_group(model, optimizer)
        check_optimizer_hooks(optimizer)
    if scheduler is not None:
        check_scheduler(scheduler, optimizer)
    if batch is not None:
        _check_batch(batch, model.config.n_positions)

    layout = Layout.of(model.config.n_layer, depth, order)
    with torch.no_grad():
        grown, n_wide = _grow_model(model, layout, width, depth, init, noise, seed)
        new_optimizer = new_scheduler = None
        if optimizer is not None:
            new_optimizer, origins = grow_optimizer(
                optimizer,
                model,
                grown,
                layout,
                width,
                moments=moments,
                new_moments=new_moments,
                adam_width_rule=adam_width_rule,
            )
            if scheduler is not None:
                new_scheduler = grow_scheduler(scheduler, new_optimizer, origins)

    step, n_small = steps_done(optimizer), model.num_parameters()
    records = []
    if width > 1:
        records.append(GrowthRecord("width", width, None, None, noise, seed, step, n_small, n_wide))
    if depth > 1:
        records.append(GrowthRecord("depth", depth, order, init, 0.0, seed, step, n_wide, grown.num_parameters()))
    if batch is not None and records:
        records[0] = replace(records[0], loss_before=evaluate_loss(model, batch))
        records[-1] = replace(records[-1], loss_after=evaluate_loss(grown, batch))
    append_history(grown.config, tuple(records))
    return Grown(grown, new_optimizer, new_scheduler, tuple(records))


def check_options(
    width: int,
    depth: int,
    order: str,
    init: str,
    noise: float | None,
    moments: str,
    new_moments: str,
    adam_width_rule: str,
) -> tuple[int, int]:
    """The factors (width, depth) as ints; InvalidInput for an option of `grow` that no model allows."""
    choices = {
        "order": (order, ORDERS),
        "init": (init, INITS),
        "moments": (moments, MOMENTS),
        "new_moments": (new_moments, NEW_MOMENTS),
        "adam_width_rule": (adam_width_rule, WIDTH_RULES),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise InvalidInput(f"{name}={value!r}: expected one of {', '.join(allowed)}")
    if new_moments == "copy" and init != "copy":
        raise InvalidInput(f"new_moments='copy' goes with init='copy': init={init!r} does not copy the layer")
    if noise is not None and (isinstance(noise, bool) or not isinstance(noise, Real) or not 0 <= noise <= 1):
        raise InvalidInput(f"noise={noise!r}: expected a number from 0 to 1, or None")
    return check_factor("width", width), check_factor("depth", depth)


@torch.no_grad()
def evaluate_loss(model: GPT2LMHeadModel, batch: Tensor) -> float:
    """Mean cross-entropy in nats per token of token ids (rows, length), in eval mode, summed in at least float32."""
    with evaluating(model):
        logits = model(input_ids=batch).logits[:, :-1].flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return float(functional.cross_entropy(logits, batch[:, 1:].flatten()))


def _grow_model(
    model: GPT2LMHeadModel, layout: Layout, width: int, depth: int, init: str, noise: float, seed: int
) -> tuple[GPT2LMHeadModel, int]:
    """The grown model, and the number of parameters that growth in width alone would have given."""
    grown = skeleton(grown_config(model.config, width, depth), type(model))
    generators: dict[torch.device, torch.Generator] = {}
    n_wide = 0
    for name, parameter in model.named_parameters():
        role = role_of(name)
        wide = widen(parameter.detach(), role, width, divisor=value_divisor(role, width))
        n_wide += wide.numel()
        if noise:
            if wide.device not in generators:
                generators[wide.device] = torch.Generator(wide.device).manual_seed(seed)
            add_noise_(wide, role, width, noise, generators[wide.device])
        for place, new in layout.places(name):
            value = new_value(wide, role, init) if new else wide
            path, _, leaf = place.rpartition(".")
            setattr(grown.get_submodule(path), leaf, nn.Parameter(value, requires_grad=parameter.requires_grad))
    if model.config.tie_word_embeddings:
        grown.lm_head.weight = grown.transformer.wte.weight
    carry_over(model, grown, layout.source)
    return grown, n_wide


def _noise_in_force(model: GPT2LMHeadModel, noise: float | None) -> float:
    if noise is not None:
        return float(noise)
    dropout = any(module.p > 0 for module in model.modules() if isinstance(module, nn.Dropout))
    return 0.0 if dropout else DEFAULT_NOISE


def _check_batch(batch: Tensor, positions: int) -> None:
    if not isinstance(batch, Tensor) or batch.ndim != 2 or not 2 <= batch.shape[1] <= positions:
        found = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
        raise InvalidInput(
            f"batch: expected token ids (rows, length) with a length from 2 to n_positions={positions}, found {found}"
        )
