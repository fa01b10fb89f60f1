"""One place that seeds the random generators and sets the number of threads."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_everything(seed: int) -> torch.Generator:
    """Seed Python, torch and (where it is loaded) NumPy; return a fresh CPU generator seeded the same way."""
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    return torch.Generator().manual_seed(seed)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run a block with `count` intra-op torch threads, then restore the former number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
