"""Mask rearrangement: better sets of the same size, by the block-diagonal Fisher (Kwon et al. 2022, section 4.2).

For the pruned set P of a layer the loss rises by about Q(P) = p^T G p, G = g^T g over the mini-batch gradients g.
Warm start: the cheapest units by G's diagonal. Then every kept unit, cheapest first, is tried in P, and the member
whose removal leaves the least Q is taken out (it may be the one just tried). The number of kept units of a layer, hence
the budget, does not change, and Q never rises.

Most tries change nothing, and then the next try starts from the same P. So many tries are evaluated at once, in
low-rank form (one product with N columns; no U x U matrix is ever made), up to the first one that changes P; their
number grows while nothing changes. The tests hold the plain form, one try at a time on the Gram matrix, and compare.
"""

import torch
from torch import Tensor

from effnn.base import InvalidInput

NARROWEST, WIDEST = 8, 512
"""Tries evaluated together: after a change of P, and at most."""


def rearrange(gradients: Tensor, mask: Tensor, passes: int = 1) -> Tensor:
    """(L, U) binary mask with as many kept units in every layer as `mask`, and no greater Q.

    gradients: (N, L, U) of heads or of filters, one row per mini-batch (or per calibration row).
    mask: (L, U), zero = pruned.
    passes: 1 is the paper's; with more, the kept units are tried again until nothing changes.
    """
    if gradients.dim() != 3 or tuple(gradients.shape[1:]) != tuple(mask.shape):
        raise InvalidInput(
            f"gradients {tuple(gradients.shape)} do not fit a mask {tuple(mask.shape)}: expected (N, L, U)"
        )
    if passes < 1:
        raise InvalidInput(f"passes={passes}: expected at least 1")
    result = (mask != 0).float()
    for layer, kept in enumerate(result):
        pruned_count = int((kept == 0).sum())
        if 0 < pruned_count < len(kept):  # a full or an empty layer has no choice
            pruned = _exchange(gradients[:, layer].double().T.contiguous(), pruned_count, passes)
            result[layer] = 1
            result[layer, pruned.to(result.device)] = 0
    return result


def quadratic_loss(gradients: Tensor, mask: Tensor) -> Tensor:
    """Q(P) of every layer, (L,) float64: squared sum of the pruned units' gradients, summed over mini-batches."""
    pruned = (mask == 0).double()
    return torch.einsum("nlu,lu->nl", gradients.double(), pruned).square().sum(0)


def _exchange(g: Tensor, pruned_count: int, passes: int) -> Tensor:
    """Indices of the pruned units of one layer; g: (U, N) in float64."""
    diagonal = g.square().sum(1)
    ranking = diagonal.argsort(stable=True)
    members = ranking[:pruned_count].clone()  # P
    for _ in range(passes):
        is_kept = torch.ones(len(g), dtype=torch.bool, device=g.device).index_fill_(0, members, False)
        if not _try_all(g, diagonal, members, ranking[is_kept[ranking]]):
            break
    return members


def _try_all(g: Tensor, diagonal: Tensor, members: Tensor, candidates: Tensor) -> bool:
    """Try every candidate in turn, changing `members` in place; whether anything changed."""
    g_members = g[members]  # (|P|, N)
    total = g_members.sum(0)  # g p, (N,)
    start, width, changed = 0, NARROWEST, False
    while start < len(candidates):
        batch = candidates[start : start + width]
        g_batch = g[batch]
        # change of Q by taking a unit out again once candidate b is in P: G_jj - 2 (G p)_j - 2 G_jb
        others = diagonal[members] - 2 * (g_members @ total) - 2 * (g_batch @ g_members.T)
        itself = -diagonal[batch] - 2 * (g_batch @ total)
        least, place = others.min(1)
        stays = (least <= itself).nonzero()
        if len(stays) == 0:
            start, width = start + width, min(2 * width, WIDEST)
            continue
        first = int(stays[0])
        out = int(place[first])
        total = total + g_batch[first] - g_members[out]
        members[out], g_members[out] = batch[first], g_batch[first]
        start, width, changed = start + first + 1, NARROWEST, True
    return changed
