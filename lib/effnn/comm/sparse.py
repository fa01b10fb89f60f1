"""Sparse gradients over any backend: what a rank has touched travels as padded (ids, values) pairs.

Of torch's backends only gloo sums sparse tensors, and with restrictions; every backend gathers dense ones. DQRM's
gradient slide names the remark; `effnn.comm.matrix` checks both ways by running them.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from effnn.base import InvalidInput


def all_gather_pairs(
    ids: Tensor, values: Tensor, group: dist.ProcessGroup | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Return every rank's (ids, values), in rank order, each of its own length.

    ids: [n] integers; values: [n, ...], the trailing shape and the types equal on all ranks; n may differ and be 0. Two
    all_gathers of max n pairs a rank (and one of the lengths): no sum, so nothing is rounded.
    """
    if ids.dim() != 1 or values.dim() < 1 or len(ids) != len(values):
        raise InvalidInput(f"expected ids [n] and values [n, ...]; got {tuple(ids.shape)} and {tuple(values.shape)}")
    world = dist.get_world_size(group)
    lengths = _gathered(torch.tensor([len(ids)], device=ids.device), world, group).flatten().tolist()
    longest = max(lengths)
    if longest == 0:
        return [(ids.clone(), values.clone()) for _ in range(world)]
    every_id = _gathered(_padded(ids, longest), world, group)
    every_value = _gathered(_padded(values, longest), world, group)
    return [(every_id[rank, :length], every_value[rank, :length]) for rank, length in enumerate(lengths)]


def all_reduce(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the sum over ranks of a sparse COO tensor, coalesced, the same bits on every rank.

    tensor: [rows, ...] with one sparse dimension, as `nn.Embedding(sparse=True)` gives its gradient. The sums are made
    on every rank in rank order.
    """
    if tensor.layout is not torch.sparse_coo or tensor.sparse_dim() != 1:
        raise InvalidInput(f"expected a sparse COO tensor with one sparse dimension, got {tensor.layout}")
    tensor = tensor.coalesce()
    pairs = all_gather_pairs(tensor.indices()[0], tensor.values(), group)
    ids = torch.cat([rank_ids for rank_ids, _ in pairs])
    values = torch.cat([rank_values for _, rank_values in pairs])
    return torch.sparse_coo_tensor(ids[None], values, tensor.shape, check_invariants=False).coalesce()


def _padded(tensor: Tensor, length: int) -> Tensor:
    padded = tensor.new_zeros(length, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return padded


def _gathered(tensor: Tensor, world: int, group: dist.ProcessGroup | None) -> Tensor:
    """[world, ...]: every rank's tensor."""
    parts = [torch.empty_like(tensor) for _ in range(world)]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)
