"""Sparse gradients as padded pairs: every rank's pairs, and sums against dense ones, on every backend."""

import pytest
import torch
from helpers.backends import parameters
from helpers.crew import ask
from workers import units as workers

BACKENDS = pytest.mark.parametrize("backend", parameters(("gloo", "ccl", "mpi4py")))
SIZE = 3
_totals = {}


def totals(backend):
    if backend not in _totals:
        _totals[backend] = ask(workers.sparse_sums, SIZE, backend)
    return _totals[backend]


@BACKENDS
def test_pairs_and_sums_agree_with_dense_ones(backend):
    assert len(totals(backend)) == SIZE  # the ranks compare; a difference would have raised


@BACKENDS
def test_the_sum_is_made_in_rank_order_with_equal_bits_on_every_rank(backend):
    wanted = torch.zeros(300, 2)
    for rank in range(SIZE):
        wanted += workers.random_rows(rank).to_dense()
    backwards = sum(workers.random_rows(rank).to_dense() for rank in reversed(range(SIZE)))
    assert not torch.equal(wanted, backwards)  # the order does matter here
    for total in totals(backend):
        assert torch.equal(total, wanted)
