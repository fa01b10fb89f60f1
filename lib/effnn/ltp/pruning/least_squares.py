"""Least squares for mask scales without the design matrix (Kwon et al. 2022, section 4.3).

Column i of the design matrix A is what unit i adds to the output projection, C_i W_i, flattened over (token, d): as
tall as tokens times hidden size. It is never made. With C (T, n) the projection's input, W (n, d) its transposed weight
and R (T, d) the target, the normal equations follow from two small products:

    A^T A = (C^T C) o (W W^T),   A^T b = rowsum((C^T R) o W),   each summed over a unit's d_h columns.

The products of a mini-batch are float32, sums and solves float64. A second set of sums, from held-out rows, gives the
error of a solution on rows that it was not fitted to.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RELATIVE_RIDGE = 1e-3
"""Damping of the default solver, as a share of the mean diagonal of the normal matrix."""


class Sums:
    """Sums over tokens from which the normal equations of one output projection follow.

    weight: W, (n, d), n = units * block; block: d_h for heads, 1 for filters.
    """

    def __init__(self, weight: Tensor, block: int):
        size = weight.shape[0]
        self.weight, self.block, self.units = weight.float(), block, size // block
        self._upper = torch.zeros(size, size, dtype=torch.float64, device=weight.device)  # C^T C, see `products`
        self.rhs = torch.zeros(self.units, dtype=torch.float64, device=weight.device)
        self.column_sums = torch.zeros(size, dtype=torch.float64, device=weight.device)
        self.target_sum = self.target_square = 0.0
        self.tokens = 0

    @property
    def products(self) -> Tensor:
        """C^T C, (n, n) float64; only what stands on and above the diagonal was added up."""
        return self._upper.triu() + self._upper.triu(1).T

    def add(self, inputs: Tensor, target: Tensor) -> None:
        """Add tokens. inputs: C, (T, n); target: R, (T, d)."""
        if len(inputs) == 0:
            return
        with torch.autocast(inputs.device.type, enabled=False):  # the forward may run in bfloat16, the sums may not
            inputs, target = inputs.float(), target.float()
            _add_upper_product(self._upper, inputs)
            self.rhs += ((inputs.T @ target) * self.weight).sum(1).view(self.units, self.block).sum(1)
        self.column_sums += inputs.sum(0)
        self.target_sum += float(target.sum(dtype=torch.float64))
        self.target_square += float(target.square().sum(dtype=torch.float64))
        self.tokens += len(inputs)


@dataclass(frozen=True)
class NormalEquations:
    """The normal equations of one output projection, in float64.

    matrix: A^T A; the first `units` unknowns are scales, the last may be an intercept.
    rhs: A^T b.
    target_square: b^T b.
    units: number of scales.
    tokens: that the sums are over.
    """

    matrix: Tensor
    rhs: Tensor
    target_square: float
    units: int
    tokens: int

    @classmethod
    def of(cls, sums: Sums, weight_products: Tensor, intercept: bool = False) -> "NormalEquations":
        """Assemble the equations. weight_products: W W^T, (n, n). intercept: an all-ones column as a last unknown."""
        units, block = sums.units, sums.block
        products = (sums.products * weight_products).view(units, block, units, block).sum((1, 3))
        if not intercept:
            return cls(products, sums.rhs, sums.target_square, units, sums.tokens)
        column = (sums.column_sums * sums.weight.double().sum(1)).view(units, block).sum(1)
        corner = column.new_full((1,), sums.tokens * sums.weight.shape[1])
        matrix = torch.cat([torch.cat([products, column.unsqueeze(1)], 1), torch.cat([column, corner]).unsqueeze(0)])
        rhs = torch.cat([sums.rhs, sums.rhs.new_full((1,), sums.target_sum)])
        return cls(matrix, rhs, sums.target_square, units, sums.tokens)

    def error(self, scale: Tensor) -> float:
        """Mean squared reconstruction error per token with these scales (units,) and no intercept."""
        scale = scale.double()
        matrix, rhs = self.matrix[: self.units, : self.units], self.rhs[: self.units]
        return float(scale @ matrix @ scale - 2 * scale @ rhs + self.target_square) / max(self.tokens, 1)

    def solve(self, solver: str = "ridge") -> Tensor:
        """Scales (units,) in float64 that best reconstruct the target; the intercept is solved for and dropped.

        The unknown is the scales' deviation from 1, so damping pulls towards "unchanged". solver: "ridge", Cholesky
        with a ridge of `RELATIVE_RIDGE` times the mean diagonal; "lsmr", the closed form of what the paper's code
        computes by iteration, LSMR with damping 1 on the normal matrix. A single unknown is solved undamped. Scales are
        NaN where the matrix is not positive definite.
        """
        start = torch.zeros_like(self.rhs)
        start[: self.units] = 1
        residual = self.rhs - self.matrix @ start
        if len(residual) == 1:
            delta = residual / self.matrix[0, 0]
        elif solver == "lsmr":
            values, vectors = torch.linalg.eigh(self.matrix)
            delta = vectors @ (values / (values.square() + 1) * (vectors.T @ residual))
        else:
            damped = self.matrix.clone()
            damped.diagonal().add_(RELATIVE_RIDGE * self.matrix.diagonal().mean())
            factor, info = torch.linalg.cholesky_ex(damped)
            delta = torch.cholesky_solve(residual.unsqueeze(1), factor).squeeze(1)
            if int(info) != 0:
                delta = torch.full_like(residual, torch.nan)
        return 1 + delta[: self.units]


def _add_upper_product(total: Tensor, inputs: Tensor, parts: int = 8) -> None:
    """total += C^T C in the blocks on and above the diagonal; the others would be their transposes."""
    size = inputs.shape[1]
    parts = max(1, min(parts, size // 128))  # a narrower block keeps no processor busy
    edges = [size * i // parts for i in range(parts + 1)]
    for low, high in zip(edges, edges[1:], strict=False):
        total[low:high, low:] += inputs[:, low:high].T @ inputs[:, low:]
