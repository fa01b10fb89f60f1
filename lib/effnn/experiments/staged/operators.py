"""Notebook 03, in seconds: the growth operators on a small trained GPT-2, at the moment of growth and just after.

Shen et al. 2022: growth keeps the loss and the training dynamics. Measured here: loss and logits before and after each
operator, the symmetry after growth in width, the trajectory of the grown model beside the small one's, and the
gradients of new layers. No long training and no compute saved.
"""

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from effnn import staged
from effnn.base import InvalidInput
from effnn.experiments.staged.toy_model import (
    ToyModel,
    batches,
    checked_tokens,
    held_out,
    loss,
    synthetic_tokens,
    train,
    train_toy_model,
)
from effnn.staged.growth.depth import Layout
from effnn.staged.growth.roles import layer_of

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Operator:
    """One way to grow.

    name: in tables and figures.
    kind: "width", "depth" or "both".
    width, depth, order, init, noise: as in `staged.grow`.
    model: that it is shown on: "plain", "untied" (an output head of its own) or "n_inner" (an FFN three times as wide).
    preserving: whether it claims to keep the loss.
    """

    name: str
    kind: str
    width: int = 1
    depth: int = 1
    order: str = "interleave"
    init: str = "zero_proj"
    noise: float = 0.0
    model: str = "plain"
    preserving: bool = True


NOISE = 0.3
"""Standard deviation of the symmetry-breaking noise over that of the matrix, the default of `staged.grow`."""

OPERATORS = (
    Operator("width x2", "width", width=2),
    Operator("width x3", "width", width=3),
    Operator("width x4", "width", width=4),
    Operator("width x2, noise", "width", width=2, noise=NOISE),
    Operator("width x2, untied head", "width", width=2, model="untied"),
    Operator("width x2, n_inner given", "width", width=2, model="n_inner"),
    *(
        Operator(f"depth x2, {init}, {order}", "depth", depth=2, init=init, order=order)
        for init in ("zero_proj", "ln_zero", "identity")
        for order in staged.ORDERS
    ),
    Operator("depth x3, zero_proj", "depth", depth=3),
    Operator("width x2 and depth x2, noise", "both", width=2, depth=2, noise=NOISE),
    Operator("copy (stacking), interleave", "depth", depth=2, init="copy", preserving=False),
    Operator("copy (stacking), append", "depth", depth=2, init="copy", order="append", preserving=False),
)
"""The growth operators of `staged.grow`. Copying layers comes from other papers and does not claim to keep the loss."""

TRAJECTORIES = {
    "1/k rule, consistent moments": {"moments": "consistent", "adam_width_rule": "1/k"},
    "1/k rule, authors' moments": {"moments": "authors", "adam_width_rule": "1/k"},
    "same rate, consistent moments": {"moments": "consistent"},
    "same rate, authors' moments": {"moments": "authors"},
    "same rate, moments reset": {"moments": "reset"},
}
"""Ways to grow the state of AdamW, for `exact_trajectory`."""


def loss_differences(
    seeds: Iterable[int] = (0,),
    tokens: Sequence[int] | Tensor | None = None,
    toy: ToyModel | None = None,
    dtypes: Sequence[str] = tuple(DTYPES),
    operators: Sequence[Operator] = OPERATORS,
) -> pd.DataFrame:
    """Return one row per seed, operator and precision: the loss on held-out tokens before and after growing.

    Each model is trained in float32 and then cast, so both sides of a difference are computed in `dtype`; only the mean
    over tokens is always in float64.

    seeds: of weights, batches and noise.
    tokens: as in `train_toy_model`; `synthetic_tokens` by default.
    toy: the model; the default one if None.
    dtypes: some of `DTYPES`.
    operators: to show.

    Columns: operator, kind, preserving, seed, dtype, loss_before, loss_after (nats per token), loss_difference
    (absolute) and logit_difference (largest absolute). Raises InvalidInput for an unknown precision.
    """
    if unknown := [name for name in dtypes if name not in DTYPES]:
        raise InvalidInput(f"unknown precision {', '.join(unknown)}; choices: {', '.join(DTYPES)}")
    toy, tokens = toy or ToyModel(), synthetic_tokens() if tokens is None else tokens
    shapes = {"plain": toy, "untied": replace(toy, tied=False), "n_inner": replace(toy, n_inner=3 * toy.width)}
    batch, rows = held_out(tokens, toy), []
    for seed in seeds:
        used = {operator.model for operator in operators}
        models = {name: train_toy_model(shape, tokens, seed)[0] for name, shape in shapes.items() if name in used}
        for dtype in dtypes:
            small = {name: copy.deepcopy(model).to(DTYPES[dtype]) for name, model in models.items()}
            before = {name: _look(model, batch) for name, model in small.items()}
            for how in operators:
                grown = staged.grow(
                    small[how.model], width=how.width, depth=how.depth, order=how.order, init=how.init,
                    noise=how.noise, seed=seed,
                )  # fmt: skip
                row = {"operator": how.name, "kind": how.kind, "preserving": how.preserving, "seed": seed}
                rows.append(row | {"dtype": dtype} | _change(before[how.model], _look(grown.model, batch)))
    return pd.DataFrame(rows)


def largest_loss_differences(frame: pd.DataFrame, dtype: str = "float32") -> list[float]:
    """Return the largest |loss difference| over all operators that claim to keep the loss, one number per seed."""
    kept = frame[frame.preserving & (frame["dtype"] == dtype)]
    if kept.empty:
        raise InvalidInput(f"no {dtype} row of an operator that keeps the loss: run loss_differences with {dtype}")
    return kept.groupby("seed").loss_difference.max().tolist()


def symmetry_trap(
    steps: int = 150,
    tokens: Sequence[int] | Tensor | None = None,
    toy: ToyModel | None = None,
    every: int = 10,
    noises: Sequence[float] = (0.0, NOISE),
    dtypes: Sequence[str] = ("float64", "float32"),
    rates: Sequence[float] = (3e-3, 1e-2),
    seed: int = 0,
) -> pd.DataFrame:
    """Return how far the two halves of a model grown by width 2 move apart in training without dropout.

    One row a learning rate (before and after growth), precision, noise and evaluated step after growth (0: at growth):
    learning_rate, dtype, noise, step, asymmetry (norm of the difference of the halves of the token embedding over the
    norm of the embedding, which itself gets no noise) and loss (held out, nats per token). AdamW's state is grown
    (consistent moments), its rate stays. Without noise the halves differ by rounding alone, and a model with equal
    halves computes no more than the small one. Whether training amplifies rounding depends on the learning rate, the
    task and the size.
    """
    toy, tokens = toy or ToyModel(), synthetic_tokens() if tokens is None else tokens
    tokens, rows = checked_tokens(tokens, toy), []
    batch = held_out(tokens, toy)
    for rate, dtype in itertools.product(rates, dtypes):
        small, optimizer = train_toy_model(replace(toy, learning_rate=rate), tokens, seed, DTYPES[dtype])
        for noise in noises:
            grown = staged.grow(small, optimizer, width=2, noise=noise, seed=seed)
            source = batches(tokens, toy, seed, steps, first=toy.steps)
            for step in range(0, steps + 1, every):
                embedding = grown.model.transformer.wte.weight.detach()
                first, second = embedding.chunk(2, dim=1)
                asymmetry = float((first - second).norm() / embedding.norm())
                row = {"learning_rate": rate, "dtype": dtype, "noise": noise, "step": step, "asymmetry": asymmetry}
                rows.append(row | {"loss": staged.evaluate_loss(grown.model, batch)})
                train(grown.model, grown.optimizer, source, every)
    return pd.DataFrame(rows)


def exact_trajectory(
    steps: int = 40, tokens: Sequence[int] | Tensor | None = None, toy: ToyModel | None = None, seed: int = 0
) -> pd.DataFrame:
    """Return how far a model grown by width 2 is from the small one, both trained on the same batches in float64.

    One row per variant of `TRAJECTORIES` and step after growth (0: at growth): variant, step, loss_before (the small
    model's), loss_after (the grown one's), loss_difference and logit_difference (absolute, held out). Without noise,
    which would make the models differ.
    """
    toy, tokens = toy or ToyModel(), synthetic_tokens() if tokens is None else tokens
    tokens = checked_tokens(tokens, toy)
    batch = held_out(tokens, toy)
    small, optimizer = train_toy_model(toy, tokens, seed, torch.float64)
    runs = {name: staged.grow(small, optimizer, width=2, noise=0.0, **how) for name, how in TRAJECTORIES.items()}
    rows = _compare(0, small, runs, batch)
    for step, used in enumerate(batches(tokens, toy, seed, steps, first=toy.steps), 1):
        for model, state in ((small, optimizer), *((run.model, run.optimizer) for run in runs.values())):
            train(model, state, [used])
        rows += _compare(step, small, runs, batch)
    return pd.DataFrame(rows)


def _compare(
    step: int, small: GPT2LMHeadModel, runs: dict[str, staged.Grown], batch: Tensor
) -> list[dict[str, object]]:
    before = _look(small, batch)
    return [{"variant": name, "step": step} | _change(before, _look(run.model, batch)) for name, run in runs.items()]


def new_layer_gradients(
    tokens: Sequence[int] | Tensor | None = None, toy: ToyModel | None = None, order: str = "interleave", seed: int = 0
) -> pd.DataFrame:
    """Return which part of the new layers has a gradient at the first step after growth by depth 2, one row per init.

    Columns: init, share (of the new layers' parameters: those with a gradient other than zero), matrices (the number of
    matrices with such a gradient), of_matrices (their number in all), and loss_difference at growth (float64).
    """
    toy, tokens = toy or ToyModel(), synthetic_tokens() if tokens is None else tokens
    batch, rows = held_out(tokens, toy), []
    small, _ = train_toy_model(toy, tokens, seed, torch.float64)
    before = staged.evaluate_loss(small, batch)
    new = Layout.of(toy.layers, 2, order).new
    for init in staged.INITS:
        grown = staged.grow(small, depth=2, init=init, order=order).model
        loss(grown, batch).backward()
        fresh = [p for name, p in grown.named_parameters() if layer_of(name) is not None and new[layer_of(name)]]
        moved, matrices = sum(int(p.grad.count_nonzero()) for p in fresh), [p for p in fresh if p.dim() == 2]
        row = {"init": init, "share": moved / sum(p.numel() for p in fresh)}
        row |= {"matrices": sum(bool(p.grad.any()) for p in matrices), "of_matrices": len(matrices)}
        rows.append(row | {"loss_difference": abs(staged.evaluate_loss(grown, batch) - before)})
    return pd.DataFrame(rows)


def grown_matrices(seed: int = 3, noise: float = NOISE) -> dict[str, np.ndarray]:
    """Return one small matrix before and after growing, for a picture: attention's output projection, width 4.

    Keys: small (4 x 4), width x2, width x2 + noise (8 x 8), and that of the new layer above it for the inits zero_proj
    and identity (4 x 4).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        small = GPT2LMHeadModel(
            GPT2Config(vocab_size=8, n_positions=8, n_layer=1, n_embd=4, n_head=2, bos_token_id=0, eos_token_id=0)
        )
    grown = {
        "small": (small, 0),
        "width x2": (staged.grow(small, width=2, noise=0.0).model, 0),
        "width x2 + noise": (staged.grow(small, width=2, noise=noise, seed=seed).model, 0),
        "new layer, zero_proj": (staged.grow(small, depth=2, init="zero_proj").model, 1),
        "new layer, identity": (staged.grow(small, depth=2, init="identity").model, 1),
    }
    return {
        name: model.transformer.h[layer].attn.c_proj.weight.detach().numpy() for name, (model, layer) in grown.items()
    }


@torch.no_grad()
def _look(model: GPT2LMHeadModel, batch: Tensor) -> tuple[float, Tensor]:
    """Loss and logits of a batch. The mean over tokens is in float64; in float32 it would hide differences."""
    logits = model.eval()(input_ids=batch).logits.double()
    return float(functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())), logits


def _change(before: tuple[float, Tensor], after: tuple[float, Tensor]) -> dict[str, float]:
    row = {"loss_before": before[0], "loss_after": after[0], "loss_difference": abs(after[0] - before[0])}
    return row | {"logit_difference": float((after[1] - before[1]).abs().max())}
