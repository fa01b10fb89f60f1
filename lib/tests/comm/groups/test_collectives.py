"""Process groups: every collective on every backend present, against values worked out by hand and against gloo."""

import pytest
from helpers.backends import need, parameters
from helpers.crew import ask
from workers import collectives as workers

from effnn.comm import launch
from effnn.comm.groups import process_group
from effnn.comm.groups.mpi import MPIProcessGroup
from effnn.comm.groups.oneccl.group import OneCCLProcessGroup

OURS = parameters(("ccl", "mpi4py"))
BUCKETS_MB = (0.001, 0.005, 0.02, 25)
VARIANTS = {
    "plain": {},
    "fp16 hook": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True},
    "static_graph": {"static_graph": True},
}
_answers = {}


def answers(backend, size):
    """What the ranks found, one launch for all checks: a list of name -> None or traceback."""
    if (backend, size) not in _answers:
        _answers[backend, size] = ask(workers.run_checks, size, backend)
    return _answers[backend, size]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("backend", parameters())
@pytest.mark.parametrize("name", list(workers.CHECKS))
def test_a_check_on_all_ranks(backend, size, name):
    for rank, found in enumerate(answers(backend, size)):
        assert found[name] is None, f"rank {rank}:\n{found[name]}"


@pytest.mark.parametrize("group", [OneCCLProcessGroup, MPIProcessGroup])
def test_a_library_fills_in_all_that_the_base_leaves_open(group):
    left_open = [name for name in process_group.LaneProcessGroup.__annotations__ if name.startswith("_")]
    assert len(left_open) > 10
    assert [name for name in left_open if not callable(getattr(group, name, None))] == []


@pytest.mark.parametrize("backend", OURS)
def test_a_group_of_one_rank(backend):
    alone = ["all_reduce_of_every_type_and_operation", "gathers", "scatters", "all_to_alls", "objects"]
    assert launch.run(workers.run_checks, 1, backend, args=(alone,), timeout=300) == [dict.fromkeys(alone)]


def compare_ddp(size, bucket_sizes):
    """Two ranks with the library's own sums, more with sums in gloo's order (floating-point sums depend on it)."""
    need("ccl")
    env = {"EFFNN_CCL_SUM": "gloo"} if size > 2 else None
    found = launch.run(workers.compare_ddp, size, "ccl", args=(50, bucket_sizes, VARIANTS), env=env, timeout=500)
    assert len(found[0]) == len(bucket_sizes) * len(VARIANTS)
    assert [{case for case, equal in rank.items() if not equal} for rank in found] == [set()] * size


def test_ddp_over_oneccl_is_bit_equal_to_gloo_on_two_ranks(forked):
    compare_ddp(2, BUCKETS_MB)


def test_ddp_over_oneccl_is_bit_equal_to_gloo_on_four_ranks(forked):
    compare_ddp(4, BUCKETS_MB[1:2])


@pytest.mark.slow
def test_ddp_over_oneccl_is_bit_equal_to_gloo_on_four_ranks_at_every_bucket_size():
    compare_ddp(4, BUCKETS_MB)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("size", [2, 3])
def test_random_collectives_agree_with_gloo(backend, size):
    calls = ask(workers.stress, size, backend, size, 50)
    assert calls == [50] * size


@pytest.mark.slow
@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize(("size", "seed"), [(2, 10), (2, 11), (3, 12), (4, 13)])
def test_many_random_collectives_agree_with_gloo(backend, size, seed):
    calls = launch.run(workers.stress, size, backend, args=(seed, 500), timeout=500, group_timeout=60)
    assert calls == [500] * size


@pytest.mark.parametrize("backend", OURS)
def test_calls_that_do_not_fit_together_are_an_error_if_asked_for(forked, backend):
    found = launch.run(workers.disagree, 2, backend, env={"EFFNN_COMM_CHECK": "1"}, timeout=300, group_timeout=20)
    for types, sizes, names in found:
        assert "torch.float32 x 4" in types and "torch.float64 x 4" in types
        assert "x 5" in sizes
        assert "broadcast" in names and "all_reduce" in names


@pytest.mark.parametrize("backend", OURS)
def test_everything_works_while_the_ranks_compare_their_calls(forked, backend):
    checked = launch.run(workers.run_checks, 3, backend, env={"EFFNN_COMM_CHECK": "1"}, timeout=300, group_timeout=20)
    assert [{name for name, trace in rank.items() if trace} for rank in checked] == [set()] * 3


@pytest.mark.parametrize("backend", OURS)
def test_a_rank_that_leaves_late_neither_hangs_nor_crashes(backend):
    results = launch.run_ranks(workers.leave_alone, 2, backend, args=(8,), timeout=300, group_timeout=20, grace=20)
    assert [(result.ok, result.result, result.exit_code) for result in results] == [(True, False, 0)] * 2


@pytest.mark.parametrize("how", ["plain", "ddp"])
@pytest.mark.parametrize("backend", parameters())
def test_a_killed_rank_is_an_error_on_all_others_within_the_time_out(backend, how):
    """They return by themselves; ranks that hang would be ended at the end of the grace."""
    results = launch.run_ranks(
        workers.die_while_reducing, 3, backend, args=(2, how), timeout=300, group_timeout=6, grace=120
    )
    assert "SIGKILL" in results[2].error
    for result in results[:2]:
        assert result.ok, f"rank {result.rank}: {result.error}\n{result.stderr}"
        assert not result.result.endswith(": ")  # the error has a text
