"""Sparse gradients over any backend: what a rank has touched travels as padded (ids, values) pairs.

Of torch's backends only gloo sums sparse tensors, and with restrictions; every backend gathers dense ones, as the
talk says on its slide of DQRM's gradients. `effnn.comm.probing.matrix` checks both ways by running them.
"""

from collections.abc import Callable, Generator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from effnn.base import InvalidInput


def all_gather_pairs(
    ids: Tensor, values: Tensor, group: dist.ProcessGroup | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Return every rank's (ids, values), in rank order, each of its own length.

    ids: [n] integers; values: [n, ...], the trailing shape and the types equal on all ranks; n may differ and be 0. No
    sum is made, so nothing is rounded.
    """
    if ids.dim() != 1 or values.dim() < 1 or len(ids) != len(values):
        raise InvalidInput(f"expected ids [n] and values [n, ...]; got {tuple(ids.shape)} and {tuple(values.shape)}")
    if dist.get_rank(group) < 0:
        raise InvalidInput("this rank does not belong to the group; call it on the ranks of the group only")
    world = dist.get_world_size(group)

    def gather(tensor: Tensor) -> tuple[Tensor, None]:
        parts = [torch.zeros_like(tensor) for _ in range(world)]  # not empty: a length must never be a random number
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.stack(parts), None

    steps = gather_padded([ids, values], gather)
    try:
        while True:
            next(steps)
    except StopIteration as end:
        return list(zip(*end.value, strict=True))


def gather_padded(
    tensors: Sequence[Tensor], gather: Callable[[Tensor], tuple[Tensor, object]]
) -> Generator[object, None, list[list[Tensor]]]:
    """A generator of steps that returns, per tensor, every rank's values in rank order, each of its own length.

    tensors: [n, ...] each, the same n. gather: starts an all_gather of one tensor, and returns the [world, ...] that it
    fills and the request that has to end before the next step. The lengths are gathered first, then each tensor padded
    to the longest; where all are empty there is nothing to gather.
    """
    length = torch.tensor([len(tensors[0])], device=tensors[0].device)
    lengths, request = gather(length)
    yield request
    counts = lengths.flatten().tolist()
    if not max(counts):
        return [[tensor] * len(counts) for tensor in tensors]
    found = []
    for tensor in tensors:
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])  # kept here: a request does not keep its memory
        padded[: len(tensor)] = tensor
        every, request = gather(padded)
        yield request
        found.append([part[:count] for part, count in zip(every, counts, strict=True)])
    return found


def all_reduce(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the sum over ranks of a sparse COO tensor, coalesced, the same bits on every rank.

    tensor: [rows, ...] with one sparse dimension, as `nn.Embedding(sparse=True)` gives its gradient. The sums are made
    on every rank in rank order.
    """
    if tensor.layout is not torch.sparse_coo or tensor.sparse_dim() != 1:
        raise InvalidInput(f"expected a sparse COO tensor with one sparse dimension, got {tensor.layout}")
    tensor = tensor.coalesce()
    pairs = all_gather_pairs(tensor.indices()[0], tensor.values(), group)
    return sum_of_rows([ids[:, None] for ids, _ in pairs], [values for _, values in pairs], tensor.shape)


def sum_of_rows(indices: list[Tensor], values: list[Tensor], shape: torch.Size) -> Tensor:
    """Return the coalesced sparse sum of every rank's rows, added in rank order.

    indices: one tensor per rank, [n, sparse dimensions], no index twice in one; values: [n, ...]. `coalesce()` would
    add equal rows in any order, so ranks on different machines could differ.
    """
    sparse_shape = shape[: indices[0].shape[1]]
    lines = torch.cat([_line(rank_indices, sparse_shape) for rank_indices in indices])
    rows, places = torch.unique(lines, return_inverse=True)
    total = values[0].new_zeros(len(rows), *values[0].shape[1:])
    for rank_places, rank_values in zip(places.split([len(part) for part in indices]), values, strict=True):
        total.index_add_(0, rank_places, rank_values)
    found = torch.stack(torch.unravel_index(rows, sparse_shape))
    return torch.sparse_coo_tensor(found, total, shape, is_coalesced=True, check_invariants=False)


def _line(indices: Tensor, shape: torch.Size) -> Tensor:
    """[n]: the number of each index when the dimensions are laid out as one."""
    line = indices.new_zeros(len(indices))
    for dimension, size in enumerate(shape):
        line = line * size + indices[:, dimension]
    return line
