"""Plain versions of effnn.ltp's fast code: slow, obvious, and the yardstick of tests and of `make bench`."""

import torch
from torch import Tensor


def rearrange_layer(gradients: Tensor, kept: Tensor) -> Tensor:
    """The greedy exchange of one layer, one try at a time on its Gram matrix. gradients: (N, U), kept: (U,) mask."""
    g = gradients.double()
    gram = g.T @ g
    diagonal = gram.diagonal()
    ranking = diagonal.argsort(stable=True).tolist()
    count = int((kept == 0).sum())
    members, candidates = ranking[:count], ranking[count:]
    if count == 0 or not candidates:
        return (kept != 0).float()
    sums = gram[:, members].sum(1)
    for unit in candidates:
        members.append(unit)
        sums = sums + gram[unit]
        index = torch.tensor(members)
        leaving = members.pop(int((diagonal[index] - 2 * sums[index]).argmin()))
        sums = sums - gram[leaving]
    mask = torch.ones(len(kept))
    mask[members] = 0
    return mask


def rearrange(gradients: Tensor, mask: Tensor) -> Tensor:
    """Layer by layer. gradients: (N, L, U), mask: (L, U)."""
    return torch.stack([rearrange_layer(gradients[:, layer], row) for layer, row in enumerate(mask)])


def design_matrix(inputs: Tensor, weight: Tensor, block: int) -> Tensor:
    """(T * d, units): column i is what unit i adds to the projection, flattened. inputs: (T, n), weight: (d, n)."""
    columns = []
    for start in range(0, inputs.shape[1], block):
        unit = slice(start, start + block)
        columns.append((inputs[:, unit] @ weight[:, unit].T).flatten())
    return torch.stack(columns, 1)


def best_prefixes(
    head_importance: Tensor, filter_importance: Tensor, head_cost: float, filter_cost: float, budget: float
):
    """Greatest kept importance within the budget, by trying every pair of numbers of heads and filters."""
    heads = torch.cat([torch.zeros(1), head_importance.flatten().sort(descending=True).values.cumsum(0)])
    filters = torch.cat([torch.zeros(1), filter_importance.flatten().sort(descending=True).values.cumsum(0)])
    best = -1.0
    for i, head_value in enumerate(heads):
        for j, filter_value in enumerate(filters):
            if i * head_cost + j * filter_cost <= budget:
                best = max(best, float(head_value + filter_value))
    return best
