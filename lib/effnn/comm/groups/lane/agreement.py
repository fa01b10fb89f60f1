"""Do all ranks make the same call? Compared through the store before each collective, if EFFNN_COMM_CHECK=1 says so.

No library of collectives compares what the ranks bring: another type or size on one of them gives wrong values, or a
hang. With this on it gives an error on every rank, before anything is sent. It costs a few messages a call, so it is
for looking after a fault.
"""

import os
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from effnn.comm.groups.lane.lane import CollectiveFailed


def wanted() -> bool:
    """Whether the environment asks for the comparison."""
    return os.environ.get("EFFNN_COMM_CHECK", "") not in ("", "0")


def describe(name: str, tensors: Sequence[Tensor], sizes: bool) -> str:
    """What the ranks must have in common. sizes: False where the sizes may differ, as in an uneven all_to_all."""
    if not sizes:
        return f"{name} of {tensors[0].dtype if tensors else 'nothing'}"
    return f"{name} of {', '.join(f'{tensor.dtype} x {tensor.numel()}' for tensor in tensors) or 'nothing'}"


class Agreement:
    """The comparison of one group, call by call."""

    def __init__(self, store: dist.Store, rank: int, size: int):
        self._store, self._rank, self._size, self._calls = store, rank, size, 0

    def check(self, text: str) -> None:
        """Wait for all ranks' next call; raises CollectiveFailed when one differs from this rank's."""
        self._calls += 1
        self._store.set(f"agreement_{self._calls}_{self._rank}", text)
        for other in range(self._size):
            theirs = self._store.get(f"agreement_{self._calls}_{other}").decode()
            if theirs != text:
                raise CollectiveFailed(
                    f"call {self._calls} of the group: rank {self._rank} calls {text}, rank {other} calls {theirs}"
                )
