"""Growth in width by a whole factor k: k copies of the model side by side, without cross-talk (Shen et al. 2022).

The residual stream x becomes [x; ...; x]. Its mean and variance stay, so LayerNorm gives k equal copies. Attention gets
k times as many heads of the same size: the query, key and value parts of c_attn each become block-diagonal, so every
head of a copy sees that copy alone. The final normalisation is divided by k, since the inner product with the output
head is k times as large. The loss is the same up to rounding in eval mode (with dropout each copy draws its own mask).

    tensor                       grown value             gradient of the grown tensor, from the small one's g
    EMBEDDING (rows, d)          [E ... E]               g / k in every copy
    VECTOR (parts * n,)          every part repeated     g / k in every copy
    MATRIX (in, parts * out)     every part block-       g / k in all k x k blocks
                                 diagonal
    FINAL_NORM (d,)              repeated, over k        g in every copy

Equal copies get equal gradients: without dropout, training would keep them equal, and the grown model could compute no
more than the small one. `add_noise_` breaks this symmetry without changing the loss. Source: the released code for
k = 2; other k are derived here in the same way.
"""

import torch
from torch import Tensor

from effnn.staged.growth.roles import Kind, Role

DEFAULT_NOISE = 0.3


def widen(tensor: Tensor, role: Role, factor: int, *, divisor: int = 1, cross: bool = False) -> Tensor:
    """A new tensor: `factor` copies of `tensor`, divided by `divisor`, laid out as its role asks.

    Dtype and device stay. (rows, d) -> (rows, factor * d); (parts * n,) -> (parts * factor * n,); a matrix
    (in, parts * out) -> (factor * in, parts * factor * out), with copies on the block diagonal of every part, or with
    cross=True in all factor x factor blocks.
    """
    if role.kind is Kind.EMBEDDING:
        rows, d = tensor.shape
        wide = tensor.new_empty(rows, factor, d)
        torch.div(tensor[:, None].expand_as(wide), divisor, out=wide)
        return wide.view(rows, factor * d)
    if role.kind is not Kind.MATRIX:
        small = tensor.reshape(role.parts, 1, -1)
        wide = tensor.new_empty(role.parts, factor, small.shape[2])
        torch.div(small.expand_as(wide), divisor, out=wide)
        return wide.view(-1)
    rows, columns = tensor.shape
    small = tensor.reshape(rows, role.parts, columns // role.parts)
    # axes: input copy, input, part, output copy, output
    shape = (factor, rows, role.parts, factor, columns // role.parts)
    if cross:
        wide = tensor.new_empty(shape)
        torch.div(small[None, :, :, None].expand_as(wide), divisor, out=wide)
    else:
        wide = tensor.new_zeros(shape) if factor > 1 else tensor.new_empty(shape)
        for copy in range(factor):
            torch.div(small, divisor, out=wide[copy, :, :, copy])
    return wide.view(factor * rows, factor * columns)


def value_divisor(role: Role, factor: int) -> int:
    """The divisor of a grown parameter: `factor` for the final normalisation, 1 for everything else."""
    return factor if role.kind is Kind.FINAL_NORM else 1


def gradient_divisor(role: Role, factor: int) -> int:
    """The divisor of a grown gradient: 1 for the final normalisation, `factor` for everything else."""
    return 1 if role.kind is Kind.FINAL_NORM else factor


def add_noise_(wide: Tensor, role: Role, factor: int, scale: float, generator: torch.Generator) -> None:
    """Add symmetry-breaking noise to a grown matrix, in place; other tensors stay as they are.

    Normal noise, `scale` times the standard deviation of the grown matrix, that sums to zero over the `factor` copies
    of an input: on equal copies it cancels, so the output is the same up to rounding. Noise on an embedding or a vector
    would change the residual stream, hence the loss.
    """
    if role.kind is not Kind.MATRIX or factor == 1 or scale == 0:
        return
    rows, columns = wide.shape
    exact = torch.promote_types(wide.dtype, torch.float32)  # half precision is rounded once, at the end
    draws = torch.empty((factor, rows // factor, columns), dtype=exact, device=wide.device)
    draws.normal_(generator=generator)
    draws -= draws.mean(0, keepdim=True)
    # without their mean the draws have a variance of 1 - 1/k
    draws *= scale * wide.std(correction=0).to(exact) * (factor / (factor - 1)) ** 0.5
    wide += draws.view(rows, columns)
