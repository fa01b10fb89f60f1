"""Other papers' ways to grow a GPT-2, each a few lines on our operators, for one fair comparison.

- stack: copies of the whole stack on top of it, moments copied too (G_stack; progressive stacking). Changes the loss.
- hypercloning: every matrix is spread over all four blocks as [[W, W], [W, W]] / 2, with noise. Keeps the loss.
- lemon: the blocks of the input copies are new random matrices, shifted by one common matrix so that they sum to W.
  Keeps the loss.
- bert2bert: W is divided among the input copies, and the second half of a layer's outputs comes from the layer above
  (advanced knowledge initialisation). Changes the loss.

Written from the papers' abstracts and summaries, without the authors' code. All but stack grow in width and begin with
new moments.
"""

import copy

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from effnn import staged
from effnn.base import InvalidInput
from effnn.staged.growth.roles import Kind, in_layer, layer_of, role_of
from effnn.staged.training.begin import begin

OTHER_OPERATORS = ("stack", "hypercloning", "lemon", "bert2bert")
NOISE = 0.3


def grow_state(
    operator: str, state: staged.TrainState, width: int, depth: int, recipe: staged.Recipe
) -> staged.TrainState:
    """Return the state grown by one of `OTHER_OPERATORS`, with the compute spent so far; `state` is not changed.

    operator: its name.
    state: to grow.
    width, depth: factors; one of them is 1.
    recipe: of the new AdamW, and the seed of new weights.

    Raises InvalidInput for an unknown name, and for a factor that the operator does not grow by.
    """
    if operator not in OTHER_OPERATORS:
        raise InvalidInput(f"unknown way to grow {operator!r}; choices: {', '.join(OTHER_OPERATORS)}")
    if (depth > 1) != (operator == "stack") or (width > 1) != (operator != "stack"):
        raise InvalidInput(
            f"{operator} grows in {'depth' if operator == 'stack' else 'width'} alone; got x{width}, x{depth}"
        )
    grown = copy.copy(state)
    grown.points = list(state.points)
    if operator == "stack":
        options = {"order": "append", "init": "copy", "new_moments": "copy"}
        made = staged.grow(state.model, state.optimizer, depth=depth, **options)
        grown.model, grown.optimizer = made.model, made.optimizer
        return grown
    new = begin(widened(operator, state.model, width, recipe.seed), recipe, state.model.device)
    grown.model, grown.optimizer, grown.learning_rate = new.model, new.optimizer, new.learning_rate
    return grown


@torch.no_grad()
def widened(operator: str, model: GPT2LMHeadModel, width: int, seed: int = 0) -> GPT2LMHeadModel:
    """Return a model `width` times as wide, grown by `operator` (any but stack)."""
    grown = staged.grow(model, width=width, noise=0.0).model
    generator = torch.Generator(model.device).manual_seed(seed)
    values = dict(grown.named_parameters())
    for name, value in values.items():
        if role_of(name).kind is Kind.MATRIX:
            value.copy_(_matrix(operator, value, width, generator, model.config.initializer_range))
    expanded = {name: value.clone() for name, value in values.items()}
    for name, value in values.items():
        if operator == "bert2bert" and layer_of(name) is not None and layer_of(name) + 1 < grown.config.n_layer:
            _borrow(value, expanded[in_layer(name, layer_of(name) + 1)], role_of(name).parts, width)
    return grown


def _matrix(operator: str, value: Tensor, width: int, generator: torch.Generator, new: float) -> Tensor:
    """A widened matrix (width * in, out) with the same effect on `width` equal input copies.

    operator: its name.
    value: the matrix as `staged.grow` widens it.
    width: number of input copies.
    generator: of the random parts.
    new: standard deviation of a new model's weights.
    """
    copies = value.view(width, -1, value.shape[1])
    shared = copies.sum(0, keepdim=True) / width
    if operator == "bert2bert":
        return shared.expand_as(copies).reshape(value.shape)
    scale = NOISE * value.std() if operator == "hypercloning" else new
    random = scale * torch.randn(copies.shape, generator=generator, device=value.device, dtype=value.dtype)
    return (shared + random - random.mean(0, keepdim=True)).view_as(value)


def _borrow(value: Tensor, above: Tensor, parts: int, width: int) -> None:
    """All output copies but the first take their values from the layer above, in place."""
    shape = (*value.shape[:-1], parts, width, -1)
    value.view(shape)[..., 1:, :] = above.view(shape)[..., 1:, :]
