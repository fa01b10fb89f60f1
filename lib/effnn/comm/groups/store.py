"""What the ranks of a group tell each other through the store, so that no collective has to work for it.

A barrier that names the ranks that did not come, as gloo's monitored_barrier does. And a comparison of the calls:
no library of collectives compares what the ranks bring, so another type or size on one of them gives wrong values, or a
hang. With EFFNN_COMM_CHECK=1 every rank gets an error before anything is sent. That costs a few messages per call.
"""

import os
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from effnn.comm.groups.lane.call import CollectiveFailed, CollectiveTimeout

_ALL = b"all"
_POLL = 0.005  # seconds


def monitored_barrier(
    store: dist.Store,
    rank: int,
    size: int,
    timeout: float,
    wait_all_ranks: bool,
) -> None:
    """Return once every rank has come.

    store: one of this barrier's own.
    rank, size: of the group.
    timeout: seconds that rank 0 waits.
    wait_all_ranks: whether the error names all ranks that have not come, not the first alone.

    Raises CollectiveTimeout on every rank that has come.
    """
    store.set(f"here_{rank}", "")
    if rank == 0:
        end = time.monotonic() + timeout
        missing = set(range(1, size))
        while missing := {other for other in missing if not store.check([f"here_{other}"])}:
            if time.monotonic() >= end:
                break
            time.sleep(_POLL)
        named = sorted(missing) if wait_all_ranks else sorted(missing)[:1]
        store.set("answer", _ALL if not missing else ", ".join(map(str, named)))
    else:
        try:
            store.wait(["answer"], timedelta(seconds=2 * timeout))  # rank 0 may have come later, by less than that
        except Exception as error:
            raise CollectiveTimeout(
                f"monitored_barrier: rank {rank} has come, but rank 0 did not answer within {2 * timeout:g} s"
            ) from error
    answer = store.get("answer")
    if answer != _ALL:
        raise CollectiveTimeout(
            f"Rank {rank} timed out in monitoredBarrier: rank {answer.decode()} did not come within {timeout:g} s of "
            "rank 0's coming"
        )


def comparison_wanted() -> bool:
    """Whether the environment asks for the comparison."""
    return os.environ.get("EFFNN_COMM_CHECK", "") not in ("", "0")


def describe(name: str, tensors: Sequence[Tensor], sizes: bool) -> str:
    """What the ranks must have in common. sizes: False where the sizes may differ, as in an uneven all_to_all."""
    if not sizes:
        return f"{name} of {tensors[0].dtype if tensors else 'nothing'}"
    return f"{name} of {', '.join(f'{tensor.dtype} x {tensor.numel()}' for tensor in tensors) or 'nothing'}"


class Comparison:
    """The comparison of one group, call by call."""

    def __init__(self, store: dist.Store, rank: int, size: int):
        self._store, self._rank, self._size, self._calls = store, rank, size, 0

    def check(self, text: str) -> None:
        """Wait for all ranks' next call; raises CollectiveFailed when one differs from this rank's."""
        self._calls += 1
        self._store.set(f"call_{self._calls}_{self._rank}", text)
        for other in range(self._size):
            theirs = self._store.get(f"call_{self._calls}_{other}").decode()
            if theirs != text:
                raise CollectiveFailed(
                    f"call {self._calls} of the group: rank {self._rank} calls {text}, rank {other} calls {theirs}"
                )
