"""A barrier that says who did not come, as gloo's monitored_barrier does; over the store, so no library is needed."""

import time
from datetime import timedelta

import torch.distributed as dist

from effnn.comm.groups.lane.lane import CollectiveTimeout

_ALL = b"all"
_POLL = 0.005  # seconds


def monitored_barrier(
    store: dist.Store,
    rank: int,
    size: int,
    timeout: float,
    wait_all_ranks: bool,
) -> None:
    """Return once every rank has come; store: one of this barrier's own. timeout: seconds that rank 0 waits.

    Raises CollectiveTimeout on every rank that has come, with the ranks that have not: the first one, or with
    wait_all_ranks all of them.
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
