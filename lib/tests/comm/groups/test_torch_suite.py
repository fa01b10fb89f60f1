"""PyTorch's own distributed tests, over the backends of this project: what torch asks of gloo and nccl holds here too.

lib/tests/reference/torch_suite.csv lists the tests that are known to fail, each with its reason. Of kind `torch` are
those that fail on torch's gloo as well, for reasons of their own; of kind `pending` those that known work will mend; of
kind `backend` those that this backend cannot or need not pass.
"""

from collections import Counter

import pandas as pd
import pytest
from helpers import torch_suite as torch_suite
from helpers.backends import need
from helpers.torch_suite import FAILED, PASSED, SKIPPED

from effnn import paths

KNOWN = pd.read_csv(paths.TESTS / "reference" / "torch_suite.csv")
PASSES = {"ccl": 98, "mpi4py": 98}
"""How many of torch 2.13's 285 tests pass with two ranks on a CPU; the rest is skipped (GPUs, more ranks) or known."""


def known(backend, kinds=("torch", "pending", "backend")):
    whose = {"any", "ours"} if backend in PASSES else {"any"}
    return set(KNOWN[KNOWN.backend.isin(whose) & KNOWN.kind.isin(kinds)].test)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", ["ccl", "mpi4py"])
def test_torchs_own_tests_pass(backend):
    need(backend)
    results = torch_suite.run_suite(backend)
    counts = Counter(result.state for result in results.values())
    print(f"{backend}: {dict(counts)}")
    failed = {name: result.detail for name, result in results.items() if result.state == FAILED}
    new = sorted(set(failed) - known(backend))
    assert not new, "\n".join(f"{name}: {failed[name]}" for name in new)
    assert counts[PASSED] >= PASSES[backend], counts
    healed = known(backend, ("torch", "backend")) - set(failed)  # those that are pending may have been mended
    assert not healed, f"no longer failing, to be taken off the list: {', '.join(sorted(healed))}"


@pytest.mark.slow
def test_what_fails_for_reasons_of_torchs_tests_fails_on_gloo_too():
    names = sorted(known("gloo"))
    found = torch_suite.run_suite("gloo", names)
    assert {name: found[name].state for name in names} == dict.fromkeys(names, FAILED)


def test_every_known_failure_is_a_test_with_a_reason():
    names = torch_suite.test_names()
    assert len(names) > 200 and set(KNOWN.test) <= set(names)
    assert KNOWN.reason.str.len().gt(10).all() and KNOWN.test.is_unique
    assert set(KNOWN.backend) == {"any", "ours"} and (KNOWN[KNOWN.backend == "any"].kind == "torch").all()
    assert set(KNOWN.kind) <= {"torch", "pending", "backend"}
    assert set(torch_suite.FOR_BACKENDS_BY_NAME) <= set(names)


@pytest.mark.slow
def test_a_failure_costs_neither_the_tests_before_nor_those_after_it():
    names = ["test_all_reduce_sum", "test_nothing_of_this_name", "test_all_reduce_sum_cuda", "test_barrier"]
    found = torch_suite.run_suite("gloo", names)
    assert [found[name].state for name in names][:2] == [PASSED, FAILED] and found["test_barrier"].state == PASSED
    assert found["test_all_reduce_sum_cuda"].state in (SKIPPED, PASSED)  # this machine may have GPUs
    assert "test_nothing_of_this_name" in found["test_nothing_of_this_name"].detail


@pytest.mark.slow
def test_a_test_that_hangs_is_ended_and_the_next_one_runs():
    names = ["test_all_reduce_sum", "test_barrier"]
    found = torch_suite.run_suite("gloo", names, seconds=1e-4)  # too little for any test
    assert list(found) == names
    for result in found.values():
        assert result.state == FAILED and "Timeout (0:00:00.0001" in result.detail, result
