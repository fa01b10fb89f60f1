"""effnn.comm.check with one operation that goes wrong on rank 1, for test_check.py."""

import sys

import torch.distributed as dist

from effnn.comm import check
from effnn.comm.probing import operations


def broken(device):
    if dist.get_rank() == 1:
        raise operations.WrongResult("element 0 is 1.0, expected 2.0")


operations.OPERATIONS["gather"] = broken

if __name__ == "__main__":
    sys.exit(check.main())
