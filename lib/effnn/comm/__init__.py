"""Backends, process launch, emulated nodes and the support matrix: see README.md beside this.

Importing this registers "ccl" and "mpi4py" with torch.distributed.
"""

from effnn.comm import backends
from effnn.comm.backends import BACKENDS, available, init_process_group, unavailable
from effnn.comm.groups.lane.call import CollectiveFailed, CollectiveTimeout

backends.register()

__all__ = [
    "BACKENDS",
    "CollectiveFailed",
    "CollectiveTimeout",
    "available",
    "backends",
    "init_process_group",
    "unavailable",
]
