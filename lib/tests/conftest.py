"""Settings that hold for every test: no network and one thread. A test that fills the cache gives it a folder."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

STARTS_RANKS = ("comm/", "experiments/backends/", "staged/training/test_checkpoint.py")
"""Tests whose ranks wait for one another with a time limit: side by side they would take the cores from each other."""


class _OneWorkerForRanks(LoadScopeScheduling):
    """All tests that start ranks go to one worker, and each other module stays whole, as its tests share fixtures."""

    def _split_scope(self, nodeid: str) -> str:
        name = nodeid.split("::")[0].removeprefix("lib/tests/")
        return "ranks" if name.startswith(STARTS_RANKS) else name


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return _OneWorkerForRanks(config, log)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
