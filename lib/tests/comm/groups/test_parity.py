"""Our groups answer the calls that gloo answers, with the same values: torch's own tools run over them unchanged."""

from functools import cache

import pytest
import torch
from helpers.backends import parameters
from helpers.crew import ask
from workers import parity as workers

OURS = parameters(("ccl", "mpi4py"))


@cache
def answers(backend, size):
    """What every rank got for every call: one launch a backend."""
    return ask(workers.run_calls, size, backend, timeout=200)


def expect_same(ours, theirs):
    """Equal structures; tensors are close, since sums of more than two ranks may be made in another order."""
    assert type(ours) is type(theirs), (ours, theirs)
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            expect_same(ours[key], value)
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), (ours, theirs)
        for mine, value in zip(ours, theirs, strict=True):
            expect_same(mine, value)
    else:
        assert ours == theirs


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("name", list(workers.CALLS))
def test_a_call_gives_what_gloo_gives(backend, name):
    compare(backend, name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("name", list(workers.CALLS))
def test_a_call_of_three_ranks_gives_what_gloo_gives(backend, name):
    compare(backend, name, 3)


def compare(backend, name, size):
    for rank, (ours, theirs) in enumerate(zip(answers(backend, size), answers("gloo", size), strict=True)):
        assert "Error: " not in str(theirs[name]), f"gloo itself fails: {theirs[name]}"
        assert "Error: " not in str(ours[name]), f"rank {rank}: {ours[name]}"
        expect_same(ours[name], theirs[name])
