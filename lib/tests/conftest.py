"""Settings that hold for every test: no network and one thread. A test that fills the cache gives it a folder."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

RANKS = "ranks"
STARTS_RANKS = ("comm/", "experiments/backends/", "staged/training/test_checkpoint.py")
"""Tests whose ranks wait for one another with a time limit: side by side they would take the cores from each other."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items):
    """Name the tests that one worker runs under `--dist loadgroup`: all that start ranks, and each other module.

    A module stays in one worker as its tests share fixtures. The ranks' tests come first, as they take longest.
    """
    for item in items:
        name = os.path.relpath(item.path, Path(__file__).parent)
        item.add_marker(pytest.mark.xdist_group(RANKS if name.startswith(STARTS_RANKS) else name))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args != (RANKS,))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
