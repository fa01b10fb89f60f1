"""Gradient clipping with a threshold that means the same before and after growth in width.

The plain global norm changes at the moment of growth although the function did not: k equal copies hold gradients of
g / k (g in the final normalisation). Weighted squares give back the small model's norm.
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from effnn.staged.growth.config import check_factor, total_width
from effnn.staged.growth.roles import Kind, role_of
from effnn.staged.growth.unwrap import plain_model


def gradient_norm(model: GPT2LMHeadModel, width: int | None = None) -> Tensor:
    """The gradient norm of a grown model on the scale of the small one, 0-dimensional.

    Squares count 1 in block matrices, `width` in embeddings and vectors, 1 / `width` in the final normalisation. Right
    after growth in width this is exactly the small model's norm (eval mode, no noise). Tensors without a gradient are
    left out. width: the total factor since the model whose scale is meant; by default all growth in the model's
    history. InvalidInput for a parameter that GPT-2 does not have.
    """
    model = plain_model(model)
    factor = total_width(model.config) if width is None else check_factor("width", width)
    named = [(name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None]
    norms = [torch.linalg.vector_norm(gradient) for _, gradient in named]
    weights = _norm_weights((name for name, _ in named), factor)
    weighted = [norm * weight for norm, weight in zip(norms, weights, strict=True)]
    return torch.linalg.vector_norm(torch.stack(weighted)) if weighted else torch.zeros(())


def clip_grad_norm_(model: GPT2LMHeadModel, max_norm: float, width: int | None = None) -> Tensor:
    """Scale all gradients, in place, such that `gradient_norm` is at most `max_norm`; returns the norm before."""
    norm = gradient_norm(model, width)
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


class Clip:
    """`clip_grad_norm_` for the steps of a run: the names are looked up once, the norms taken together.

    trained: the parameters of the optimizer; they alone are clipped and count in the norm.
    """

    def __init__(self, model: GPT2LMHeadModel, max_norm: float, trained: Collection[Tensor]) -> None:
        self.max_norm = max_norm
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p in trained]
        self.parameters = [parameter for _, parameter in named]
        weights = _norm_weights((name for name, _ in named), total_width(model.config))
        self.weights = torch.tensor(weights, dtype=torch.float64).to(self.parameters[0])

    def __call__(self) -> None:
        norms = torch.stack(torch._foreach_norm([parameter.grad for parameter in self.parameters]))
        norm = torch.linalg.vector_norm(norms * self.weights)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_norm, norm)


def _norm_weights(names: Iterable[str], factor: int) -> list[float]:
    """The weight of each tensor's norm: its square is the weight of the squares."""
    weights = {Kind.MATRIX: 1.0, Kind.FINAL_NORM: factor**-0.5}
    return [weights.get(role_of(name).kind, factor**0.5) for name in names]
