"""Heads or filters by their importance: the one ranking that every mask search goes by.

All units of a layer's kind cost the same, so within a layer the best n units are its n most important ones, and what is
left to search for is how many each layer keeps. Ties go to the lower layer, then to the lower index.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from effnn.base import InvalidInput
from effnn.ltp.pruning.options import check_count


def check_chunks(kind: str, width: int, chunk: int, minimum: int) -> None:
    """InvalidInput unless a layer of `width` heads or filters (`kind`) has such chunks and such a minimum."""
    check_count("round_to", chunk, 1, width, f"the {kind} of a layer")
    check_count(f"min_{kind}", minimum, 0, width, f"the {kind} of a layer")


def fewest_kept(width: int, chunk: int, minimum: int) -> int:
    """Units that every layer keeps at least: the minimum, rounded up to whole chunks."""
    return min(chunk * math.ceil(minimum / chunk), width)


class RankedUnits:
    """The heads or the filters of all layers in chunks that are kept together, the most important first in each layer.

    chunk_importance: (L, K), of every chunk, falling in each layer.
    kept_importance: (L, K + 1), with 0, 1, ... K chunks kept.
    counts: (K + 1,), units in 0, 1, ... K chunks; the last chunk may be a smaller one.
    lowest: chunks that every layer keeps at least.
    """

    def __init__(self, kind: str, importance: Tensor, chunk: int = 1, minimum: int = 0):
        """kind: "heads" or "filters", for messages. importance: (L, units). minimum: units kept in every layer."""
        if not (importance.isfinite().all() and (importance >= 0).all()):
            raise InvalidInput(f"importance of {kind}: expected finite numbers of at least 0")
        width = importance.shape[1]
        check_chunks(kind, width, chunk, minimum)
        importance = importance.detach().double().cpu()
        self.order = importance.argsort(dim=1, descending=True, stable=True)
        ranked = importance.gather(1, self.order)
        self.chunk_importance = pad(ranked, (0, -width % chunk)).unflatten(1, (-1, chunk)).sum(-1)
        self.counts = torch.tensor([*range(0, width, chunk), width])
        self.kept_importance = pad(ranked.cumsum(1), (1, 0))[:, self.counts]
        self.lowest = math.ceil(minimum / chunk)

    def mask(self, chunks: Tensor) -> Tensor:
        """(L, units) binary mask of each layer's most important units. chunks: (L,), how many a layer keeps."""
        kept = torch.arange(self.order.shape[1]) < self.counts[chunks].unsqueeze(1)
        return torch.zeros(self.order.shape).scatter_(1, self.order, kept.float())


def rank_across_layers(importance: Tensor) -> tuple[Tensor, Tensor]:
    """All entries of `importance`, (L, n), greatest first, and the layer that each is of; both (L * n,).

    importance: falling in each layer, so that the first entries are each layer's best.
    """
    ranked, order = importance.flatten().sort(descending=True, stable=True)
    return ranked, order // max(importance.shape[1], 1)
