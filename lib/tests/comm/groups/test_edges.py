"""Values and arguments at the edge: NaN, odd views, mistakes, groups made again, large messages, missing ranks."""

import subprocess
import sys
import textwrap

import pytest
import torch
from helpers.backends import need, parameters
from helpers.crew import ask
from workers import collectives as comm_group_workers
from workers import edges as workers

from effnn.base import InvalidInput
from effnn.comm import launch
from effnn.comm.groups.tensors.layout import expect_own_memory, flat_view
from effnn.comm.groups.tensors.reductions import FLOATS, reduction

OURS = parameters(("ccl", "mpi4py"))

# Elements: a scalar, less than a vector register, more than one, and beyond the limits where oneCCL and MPI change
# their algorithm (2 KB, 64 KB, 512 KB and more).
SIZES = (1, 5, 600, 20_001)
LARGE = (200_003, 1_100_001)


def run(function, size, backend, *args, **options):
    return launch.run(function, size, backend, args=args, **{"timeout": 120, "group_timeout": 25} | options)


@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("size", [2, 3])
def test_a_nan_on_any_rank_is_a_nan_on_all(backend, size):
    compared = ask(workers.reductions_of_nan, size, backend, SIZES)
    assert compared == [5 * 4 * 5 * (size + 2 * 3)] * size  # calls x types x operations x (scalars + others)


@pytest.mark.parametrize("backend", OURS)
def test_a_nan_in_a_large_tensor_is_a_nan_on_all(backend):
    assert min(ask(workers.reductions_of_nan, 2, backend, LARGE[1:], FLOATS, ("MIN", "MAX"), (1,))) == 40


@pytest.mark.slow
@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_nan_at_many_sizes(backend, size):
    sizes = (*range(2, 40), 255, 256, 257, 4096, 65_536, *LARGE)
    assert run(workers.reductions_of_nan, size, backend, sizes, timeout=900)


@pytest.mark.parametrize("backend", OURS)
def test_the_zero_of_a_minimum_is_the_negative_one_on_all_ranks(backend):
    first, second = ask(workers.zeros_of_both_signs, 2, backend)
    assert first == second
    for (name, _), signs in first.items():
        assert signs == ([False, True, True, True] if name == "MIN" else [False, True, False, False])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("int16", [False, True])
@pytest.mark.parametrize("name", ["MIN", "MAX"])
def test_integers_stand_in_the_order_of_the_floats(dtype, int16, name):
    """Of every float16 and bfloat16, and of as many patterns of the wider types; and each comes back as it was."""
    kind = workers.AS_BITS[dtype.itemsize]
    patterns = torch.arange(-(1 << 15), 1 << 15).to(kind) << (8 * dtype.itemsize - 16)
    values = patterns.view(dtype)
    asked = getattr(torch.distributed.ReduceOp, name)
    made = reduction("all_reduce", "this", asked, dtype, 2, int16)
    carried = made.carry(values)
    back = torch.empty_like(values)
    made.restore(carried.clone(), back)
    numbers = ~values.isnan()
    assert torch.equal(back.view(kind)[numbers], patterns[numbers]) and back[~numbers].isnan().all()
    order = carried[numbers].argsort()
    ordered = values[numbers][order]
    assert (ordered[1:] >= ordered[:-1]).all() and torch.equal(patterns, values.view(kind))  # the input is left alone
    beyond = carried[~numbers].unique()
    assert len(beyond) == 1 and (beyond > carried[numbers].max() if name == "MAX" else beyond < carried[numbers].min())


def test_reductions_that_have_no_meaning():
    operations = torch.distributed.ReduceOp
    for asked, dtype in (
        (operations.AVG, torch.int64),
        (operations.BOR, torch.float32),
        (operations.MAX, torch.complex64),
    ):
        with pytest.raises(InvalidInput, match="all_reduce"):
            reduction("all_reduce", "this", asked, dtype, 2, False)
    with pytest.raises(InvalidInput, match="takes float16, .*bool, complex32.*not torch.uint16"):
        reduction("all_reduce", "this", operations.SUM, torch.uint16, 2, False)


@pytest.mark.parametrize(
    ("shape", "strides", "own"),
    [
        ((3, 4), (4, 1), True),
        ((3, 4), (1, 3), True),
        ((2, 3), (0, 1), False),
        ((1, 3), (0, 1), True),
        ((4, 3), (2, 1), False),
        ((3, 2), (2, 3), True),
        ((3, 3), (2, 3), True),
        ((4, 4), (3, 2), False),
        ((0, 5), (1, 0), True),
        ((), (), True),
    ],
)
def test_outputs_whose_elements_share_memory_are_found(shape, strides, own):
    tensor = torch.zeros(40).as_strided(shape, strides)
    if own:
        expect_own_memory("recv", [tensor])
    else:
        with pytest.raises(InvalidInput, match=r"recv: an output of shape .* share memory"):
            expect_own_memory("recv", [tensor])


def test_a_flat_view_shows_what_the_tensor_shows():
    numbers = torch.tensor([[1 + 2j, 3 - 4j]])
    for tensor in (numbers, numbers.conj(), numbers.conj().imag, numbers[:, 1], numbers.t(), torch.zeros(0, 2)[:, 0]):
        flat = flat_view(tensor)
        assert flat.stride() == (1,) and flat.tolist() == tensor.flatten().tolist()
        assert flat.numel() == 0 or len(flat.view(torch.uint8)) == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("backend", OURS)
def test_any_view_may_be_sent_and_most_received(backend):
    ask(workers.expanded_and_conjugated, 2, backend)


@pytest.mark.parametrize("backend", OURS)
def test_a_mistake_is_refused_and_the_group_goes_on(backend):
    assert min(ask(workers.refused, 2, backend)) > 30


@pytest.mark.parametrize("backend", OURS)
def test_a_group_that_was_left_refuses(backend):
    ask(workers.refused_after_the_end, 2, backend)


ROUNDS = pytest.mark.parametrize("rounds", [13, pytest.param(25, marks=pytest.mark.slow)])
"""Without numbered keys it hung after 1 to 12 rounds."""


@ROUNDS
@pytest.mark.parametrize("backend", OURS)
def test_groups_are_made_and_left_many_times_over_one_store(backend, rounds, tmp_path):
    launched = "mpi4py" if backend == "mpi4py" else None  # MPI's ranks are started by its own launcher
    assert run(workers.rounds, 2, launched, backend, str(tmp_path), rounds) == [rounds] * 2


@ROUNDS
def test_groups_are_made_and_left_many_times_under_torchrun(rounds, tmp_path):
    need("ccl")
    script = tmp_path / "again.py"
    script.write_text(
        textwrap.dedent(
            """
            from datetime import timedelta
            import torch
            import torch.distributed as dist
            import effnn.comm

            for number in range(ROUNDS):
                dist.init_process_group("ccl", timeout=timedelta(seconds=20))
                one = torch.ones(3)
                dist.all_reduce(one)
                part = dist.new_group([0])
                both = dist.new_group()
                dist.all_reduce(one, group=both)
                dist.destroy_process_group(both)
                assert one.tolist() == [4.0] * 3
                dist.destroy_process_group()
                print("end of", number, flush=True)
            """
        ).replace("ROUNDS", str(rounds))
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("end of") == 2 * rounds


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_large_messages_over_mpi_go_in_pieces(size):
    need("mpi4py")
    found = run(workers.in_small_pieces, size, "mpi4py", comm_group_workers.run_checks, 100)
    assert [{name: trace for name, trace in rank.items() if trace} for rank in found] == [{}] * size
    assert run(workers.in_small_pieces, size, "mpi4py", comm_group_workers.stress, 100_000, size, 40) == [40] * size


def test_a_large_message_from_any_rank_is_refused_with_the_limit():
    need("mpi4py")
    run(workers.pieces_of, 2, "mpi4py", 64)


@pytest.mark.slow
@pytest.mark.parametrize("backend", OURS)
def test_a_message_of_more_than_two_gibibytes(backend):
    """Needs about 10 GB of memory."""
    found = run(workers.more_than_two_gibibytes, 2, backend, 2.2, timeout=300, group_timeout=200)
    assert found == [(2, 2)] * 2


@pytest.mark.parametrize("backend", OURS)
def test_collectives_issued_while_a_sparse_sum_runs(backend):
    ask(workers.collectives_after_a_sparse_sum, 3, backend, 15)


@pytest.mark.parametrize("backend", OURS)
def test_a_monitored_barrier_names_who_did_not_come(backend):
    said = ask(workers.a_barrier_that_names_the_missing, 3, backend)
    assert said[2] is None
    assert all("timed out in monitoredBarrier: rank" in one and " 2 did not come" in one for one in said[:2])


@pytest.mark.parametrize("backend", OURS)
def test_the_future_of_a_failed_call_fails(backend):
    found = run(workers.failed_futures, 2, backend, group_timeout=3)
    assert found[0] == [True] * 3
