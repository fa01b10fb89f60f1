"""How tests of effnn.comm start their ranks where the start is not what they are about: shared, or as forks."""

import os
import subprocess

import pytest
from helpers import crew, forks


@pytest.fixture(scope="session", autouse=True)
def _ranks_are_let_go():
    yield
    crew.let_go()


@pytest.fixture(scope="session")
def _fork_server():
    if not hasattr(os, "sched_setaffinity"):  # not Linux: ranks start as ever
        yield None
        return
    with forks.server() as popen:
        yield popen


@pytest.fixture
def forked(_fork_server, monkeypatch):
    """The ranks that this test launches are forks of a process that has imported torch."""
    if _fork_server is not None:
        monkeypatch.setattr(subprocess, "Popen", _fork_server)
