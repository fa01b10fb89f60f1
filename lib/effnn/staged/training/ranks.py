"""The ranks of a run under torchrun, and how all of them stop when one fails.

Only rank 0 writes checkpoints and asks the stop rule. It reports the result or the error to all ranks, so that none
waits in a collective for a rank that has failed. Without torch.distributed there is one rank, and nothing is
communicated.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from effnn.base import EffnnError, InvalidInput

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. device: where it trains and where its collectives run."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def current(cls, device: str | torch.device) -> "Ranks":
        """The ranks of the default process group, one rank where there is none.

        "cuda" without an index is the device of LOCAL_RANK under torchrun, else torch's current one.
        """
        device = torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InvalidInput("device='cuda': this torch sees no GPU: give device='cpu', or install a CUDA build")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(0, 1, device)

    def first(self, work: Callable[[], T]) -> T:
        """The result of `work`, done by rank 0 alone; its error is raised on all ranks. The result must be small."""
        if self.size == 1:
            return work()
        answer, failure = [None], None
        if self.rank == 0:
            try:
                answer = [("result", work())]
            except Exception as error:
                failure, answer = error, [(_kind(error), f"rank 0: {error}")]
        dist.broadcast_object_list(answer, src=0, device=self.device)
        if failure is not None:
            raise failure
        kind, value = answer[0]
        if kind != "result":
            raise (InvalidInput if kind == "invalid" else EffnnError)(value)
        return value

    def each(self, work: Callable[[], T]) -> T:
        """The result of this rank's own `work`; where any rank's fails, all raise."""
        if self.size == 1:
            return work()
        result = failure = None
        try:
            result = work()
        except Exception as error:
            failure = error
        reports: list = [None] * self.size
        dist.all_gather_object(reports, None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        if failed := [f"rank {rank}: {report}" for rank, report in enumerate(reports) if report is not None]:
            raise EffnnError(failed[0])
        return result

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over all ranks, in float64; every rank gets the same bits."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def check_equal(self, what: str, value: float) -> None:
        """InvalidInput, on all ranks, unless `value` is the same everywhere."""
        if self.size == 1:
            return
        ends = torch.tensor([value, -value], dtype=torch.float64, device=self.device)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        if ends[0] != -ends[1]:
            raise InvalidInput(f"{what} differs between the ranks: start all of them with the same arguments")


def _kind(error: Exception) -> str:
    return "invalid" if isinstance(error, InvalidInput) else "failed"
