"""Gradient clipping that growth in width does not move.

The plain global norm changes at the moment of growth although the function did not: k equal copies hold gradients of
g / k (g in the final normalisation). Weighted squares give back the small model's norm, so that one clipping threshold
means the same before and after.
"""

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from effnn.staged.growth.record import total_width
from effnn.staged.growth.roles import Kind, role_of
from effnn.staged.growth.sizes import check_factor
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
    weights = {Kind.MATRIX: 1.0, Kind.FINAL_NORM: factor**-0.5, Kind.VECTOR: factor**0.5, Kind.EMBEDDING: factor**0.5}
    norms = [
        torch.linalg.vector_norm(parameter.grad) * weights[role_of(name).kind]
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    ]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def clip_grad_norm_(model: GPT2LMHeadModel, max_norm: float, width: int | None = None) -> Tensor:
    """Scale all gradients, in place, such that `gradient_norm` is at most `max_norm`; returns the norm before."""
    norm = gradient_norm(model, width)
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm
