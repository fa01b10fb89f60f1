"""What the ranks of test_edges.py run: values and arguments at the edge of what a group takes."""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from effnn.base import InvalidInput
from effnn.comm import CollectiveFailed, CollectiveTimeout
from effnn.comm.groups.tensors import pieces
from effnn.comm.groups.tensors.reductions import FLOATS

NAN, INFINITY = float("nan"), float("inf")

# Patterns of bits that are all NaN: quiet and signalling, of both signs, with much and with little else.
NAN_BITS = {
    torch.float16: (0x7E00, -0x200, 0x7C01, 0x7FFF),
    torch.bfloat16: (0x7FC0, -0x40, 0x7F81, 0x7FFF),
    torch.float32: (0x7FC00000, -0x400000, 0x7F800001, 0x7FFFFFFF),
    torch.float64: (0x7FF8 << 48, -(8 << 48), (0x7FF << 52) + 1, (1 << 63) - 1),
}
AS_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

COMBINED = {
    "MIN": lambda every: every.amin(0),
    "MAX": lambda every: every.amax(0),
    "SUM": lambda every: every.sum(0),
    "PRODUCT": lambda every: every.prod(0),
    "AVG": lambda every: every.mean(0),
}


def place():
    return dist.get_rank(), dist.get_world_size()


def works():
    """The group goes on: an all_reduce gives the sum."""
    rank, size = place()
    tensor = torch.full((7,), rank + 1.0)
    dist.all_reduce(tensor)
    assert tensor.tolist() == [size * (size + 1) / 2] * 7


# NaN


def everyones_values(count, dtype, size, seed):
    """[size, count]: small whole numbers, among them NaNs of one rank, of several, of all, and infinities."""
    draws = torch.Generator().manual_seed(seed)
    every = torch.randint(-3, 4, (size, count), generator=draws).to(dtype)
    bits = every.view(AS_BITS[dtype.itemsize])
    patterns = NAN_BITS[dtype]
    if count == 1:
        rank = seed % size  # of a scalar: on one rank at a time
        bits[rank, 0] = patterns[seed % len(patterns)]
        return every
    for number, rank in enumerate([*range(size), *range(size)]):
        row = torch.randint(count, (1 + count // 50,), generator=draws)
        bits[rank, row] = patterns[number % len(patterns)]
    bits[seed % size, [0, count // 2, count - 1]] = patterns[seed % len(patterns)]
    every[:, count // 3] = NAN
    every[seed % size, count // 4] = INFINITY
    every[(seed + 1) % size, count // 4 + 1] = -INFINITY
    return every


def agree(results, expected, what):
    """Raise unless this rank's values are the expected ones, which all ranks know."""
    for got in results:
        if not torch.equal(got.isnan(), expected.isnan()):
            wrong = (got.isnan() != expected.isnan()).nonzero().flatten()
            raise AssertionError(f"{what}: {len(wrong)} NaNs are wrong, the first at {wrong[0].item()} of {len(got)}")
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")


def reductions_of_nan(sizes, dtypes=FLOATS, operations=tuple(COMBINED), seeds=(0, 1)):
    """Every reducing call, with NaN here and there; returns how many were compared."""
    rank, size = place()
    compared = 0
    for dtype in dtypes:
        for count in sizes:
            for seed in range(size) if count == 1 else seeds:
                every = everyones_values(count, dtype, size, seed)
                for name in operations:
                    compared += reductions_of(every, name)
    works()
    return compared


def reductions_of(every, name):
    rank, size = place()
    count, dtype = every.shape[1], every.dtype
    operation, what = getattr(dist.ReduceOp, name), f"{name} of {every.shape[1]} {every.dtype}"
    expected = COMBINED[name](every.double()).to(dtype)
    one, later = every[rank].clone(), every[rank].clone()
    dist.all_reduce(one, operation)
    dist.all_reduce(later, operation, async_op=True).wait()
    agree([one, later], expected, f"all_reduce {what}")
    root = count % size
    sent = every[rank].clone()
    dist.reduce(sent, root, operation)
    if rank == root:
        agree([sent], expected, f"reduce {what}")
    row, listed = torch.zeros(count, dtype=dtype), torch.zeros(count, dtype=dtype)
    dist.reduce_scatter_tensor(row, every[rank].repeat(size), operation)
    dist.reduce_scatter(listed, [every[rank]] * size, operation)
    agree([row, listed], expected, f"reduce_scatter {what}")
    return 5


def zeros_of_both_signs():
    """Of a minimum and a maximum, as bits: all ranks get the same zero."""
    rank, _ = place()
    found = {}
    for dtype in FLOATS:
        for name in ("MIN", "MAX"):
            zeros = torch.tensor([0.0, -0.0, 0.0 if rank == 0 else -0.0, -0.0 if rank == 0 else 0.0], dtype=dtype)
            dist.all_reduce(zeros, getattr(dist.ReduceOp, name))
            found[name, str(dtype)] = torch.signbit(zeros).tolist()
    return found


# Arguments that torch allows


def expanded_and_conjugated():
    """What is sent may be any view; what a view shows is what arrives."""
    rank, size = place()
    row = torch.full((3,), rank + 1.0).expand(4, 3)
    parts = [torch.zeros(4, 3) for _ in range(size)]
    dist.all_gather(parts, row)
    assert [part.unique().tolist() for part in parts] == [[r + 1.0] for r in range(size)]
    numbers = torch.tensor([1 + 2j, 3 - 1j])
    for view in (numbers.conj(), numbers.conj().imag):  # their memory holds other values than they show
        shown, kept = view.resolve_conj().resolve_neg().clone(), numbers.clone()
        target = kept.conj() if view.is_complex() else kept.conj().imag
        if rank:
            target.zero_()
        dist.group.WORLD.broadcast(
            [target], dist.distributed_c10d.BroadcastOptions()
        ).wait()  # torch refuses one of them
        torch.testing.assert_close(target.resolve_conj().resolve_neg(), shown)
        torch.testing.assert_close(kept.conj().imag.resolve_neg(), numbers.conj().imag.resolve_neg())
        received = torch.zeros_like(target)
        if rank == 0:
            dist.group.WORLD.send([view], 1, 0).wait()
        elif rank == 1:
            dist.group.WORLD.recv([received], 0, 0).wait()
            torch.testing.assert_close(received.resolve_conj().resolve_neg(), shown)
    total = numbers.conj().imag
    dist.all_reduce(total)
    torch.testing.assert_close(numbers.imag, size * torch.tensor([2.0, -1.0]))
    parts = [torch.zeros(2) for _ in range(size)]
    dist.all_gather(parts, total)
    torch.testing.assert_close(parts, [size * torch.tensor([-2.0, 1.0])] * size)
    with torch.inference_mode():
        made = torch.zeros(4, 6).t()[::2]
    dist.broadcast(made if rank else torch.ones(3, 4), 0)
    assert rank == 0 or made.unique().tolist() == [1.0]
    windows = torch.arange(12.0).as_strided((3, 2), (2, 3))  # strides that look as if rows overlapped; they do not
    before = windows.clone()
    dist.all_reduce(windows)
    torch.testing.assert_close(windows, size * before)
    works()


# Arguments that cannot be served


def refused():
    """A mistake on every rank alike; the message is one of ours (or torch's own, for what torch looks at first)."""
    rank, size = place()
    group = dist.group.WORLD
    three, shared = torch.ones(3), torch.ones(3).expand(2, 3)
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    sparse, rows = torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    options = dist.distributed_c10d
    far_root, far_reduce, far_gather, far_scatter = (
        kind()
        for kind in (options.BroadcastOptions, options.ReduceOptions, options.GatherOptions, options.ScatterOptions)
    )
    for one in (far_root, far_reduce, far_gather, far_scatter):
        one.rootRank = size
    weighted = options.AllreduceOptions()
    weighted.reduceOp = dist._make_nccl_premul_sum(2.0)
    attempts = {
        "share memory": lambda: dist.all_reduce(shared),
        "share memory, as expand": lambda: dist.broadcast(torch.ones(4, 1).expand(4, 2) if rank else shared, 1 - rank),
        "have elements|has elements": lambda: dist.all_gather([torch.zeros(1).expand(3) for _ in range(size)], three),
        "has elements that share": lambda: dist.recv(shared, (rank + 1) % size),
        "sparse_csr": lambda: dist.all_reduce(rows),
        "sparse_coo one; pass its to_dense": lambda: dist.broadcast(sparse, 0),
        "got a quantized one; pass its int_repr": lambda: dist.broadcast(quantized, 0),
        "got a nested one|got a torch.jagged one": lambda: dist.broadcast(nested, 0),
        "list of tensors, found NoneType": lambda: group.allreduce([None]),
        "expected one tensor": lambda: group.allreduce([three, three]),
        "expected tensors of one type": lambda: group.allreduce_coalesced([three, three.double()]),
        "root .* is not a rank": lambda: group.broadcast([three], far_root),
        "root .* is not a rank of": lambda: group.reduce([three], far_reduce),
        "gather: root": lambda: group.gather([[]], [three], far_gather),
        "scatter: root": lambda: group.scatter([three], [[]], far_scatter),
        "another operation": lambda: group.allreduce([three], weighted),
        "send: rank .* is not a rank": lambda: group.send([three], size, 0),
        "recv: rank -1 is not a rank": lambda: group.recv([three], -1, 0),
        "is this rank itself": lambda: group.recv([three], rank, 0),
        "expected a tag from 0 to": lambda: group.send([three], (rank + 1) % size, -1),
        "tag from 0": lambda: group.recv([three], (rank + 1) % size, 2**31),
        "one per rank, got 1": lambda: group.allgather([[torch.zeros(3)]], [three]),
        "every tensor to be torch.float32": lambda: group.allgather([[torch.zeros(3).int()] * size], [three]),
        "its type; got": lambda: dist.all_gather_into_tensor(torch.zeros(3 * size).int(), three),
        "as many outputs as inputs": lambda: group.allgather_into_tensor_coalesced(
            [torch.zeros(3 * size)], [three] * 2
        ),
        "times the elements": lambda: dist.reduce_scatter_tensor(torch.zeros(4), torch.ones(3 * size)),
        "all tensors must be of one type": lambda: group.alltoall([three.int()] * size, [three] * size),
        "expected lists of": lambda: group.alltoall([three], [three]),
        "output is torch.int32": lambda: group.alltoall_base(torch.zeros(size).int(), torch.zeros(size), [], []),
        "split sizes": lambda: dist.all_to_all_single(torch.zeros(size), torch.zeros(size), [-1] * size, [1] * size),
        "not torch.int16; send it": lambda: dist.all_reduce(torch.ones(3, dtype=torch.int16)),
        "made of the bits": lambda: dist.reduce(three, 0, dist.ReduceOp.BXOR),
        "complex tensors knows sum and avg": lambda: dist.reduce_scatter_tensor(
            torch.zeros(3) * 1j, torch.zeros(3 * size) * 1j, dist.ReduceOp.MAX
        ),
        "torch.bool; take sum": lambda: dist.all_reduce(torch.ones(3) > 0, dist.ReduceOp.AVG),
        "expected one device": lambda: group.allgather([[three] * size], [torch.zeros(3, device="meta")]),
    }
    for words, attempt in attempts.items():
        with pytest.raises(InvalidInput, match=words):
            attempt()
        works()
    for attempt in (
        lambda: dist.all_reduce(None),
        lambda: dist.broadcast(three, src=size),
        lambda: dist.send(three, dst=rank),
        lambda: dist.scatter(three, [three] * (size + 1), src=rank),
    ):
        with pytest.raises((InvalidInput, TypeError, ValueError, RuntimeError)):
            attempt()
        works()
    return len(attempts)


def refused_after_the_end():
    """A group that was left says so."""
    group = dist.new_group()
    dist.destroy_process_group(group)
    with pytest.raises(InvalidInput, match="was destroyed"):
        group.allreduce([torch.ones(2)])
    works()


# Groups made and left


def rounds(backend, folder, count):
    """Make and leave the group, sub-groups and two groups at once, over one store that outlives them all."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if dist.is_initialized():
        dist.destroy_process_group()
    store = dist.FileStore(f"{folder}/meeting", size)
    for number in range(count):
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=20)
        )  # the same keys each time, as under torchrun
        works()
        pair = dist.new_group([0, size - 1])
        other = dist.new_group()
        for group in (pair, other, pair):
            if rank in dist.get_process_group_ranks(group):
                one = torch.ones(3)
                dist.all_reduce(one, group=group)
                assert one[0] == dist.get_world_size(group)
        message = torch.full((2,), float(number))
        if rank == 0:
            dist.send(message, size - 1, group=other)
        elif rank == size - 1:
            message.zero_()
            dist.recv(message, 0, group=other)
            assert message[0] == number
        if rank in dist.get_process_group_ranks(pair) and number % 2:
            dist.destroy_process_group(pair)
        works()
        dist.destroy_process_group()
    return count


# Large messages


def in_small_pieces(function, limit, *arguments):
    """Run a function while a call of MPI gets `limit` bytes at most."""
    before, pieces.LARGEST = pieces.LARGEST, limit
    try:
        return function(*arguments)
    finally:
        pieces.LARGEST = before


def larger_than_a_call(limit):
    """A message to any rank that is too large is refused; the group goes on."""
    rank, size = place()
    with pytest.raises(InvalidInput, match=rf"takes {limit} bytes at most, got {4 * limit}; name the rank"):
        dist.recv(torch.zeros(limit))
    works()


def pieces_of(limit):
    in_small_pieces(larger_than_a_call, limit, limit)


def more_than_two_gibibytes(gigabytes):
    """The ends of a large broadcast."""
    rank, _ = place()
    values = torch.full((int(gigabytes * 1e9),), rank + 1, dtype=torch.uint8)
    dist.broadcast(values, 1)
    return values[0].item(), values[-1].item()


# Sparse sums and other collectives


def collectives_after_a_sparse_sum(count):
    """Issued while the sparse sum is yet to begin its later steps, on ranks that come at different times."""
    rank, size = place()
    for number in range(count):
        sparse = torch.eye(40)[rank : rank + 3].to_sparse() * (number + 1)
        dense = [torch.full((n,), rank + 1.0) for n in (3, 50_000, 5)]
        works_so_far = [dist.all_reduce(sparse, async_op=True)]
        works_so_far += [dist.all_reduce(one, async_op=True) for one in dense]
        for work in works_so_far:
            work.wait()
        assert all(one.unique().tolist() == [size * (size + 1) / 2] for one in dense)
        expected = sum(torch.eye(40)[other : other + 3] for other in range(size)) * (number + 1)
        torch.testing.assert_close(sparse.to_dense(), expected, rtol=0, atol=0)


# Who did not come


def a_barrier_that_names_the_missing():
    """The last rank stays away from the first barrier; all come to the second."""
    rank, size = place()
    group, said = dist.group.WORLD, None
    group.monitored_barrier()
    if rank < size - 1:
        with pytest.raises(CollectiveTimeout) as caught:
            group.monitored_barrier(timedelta(seconds=1), wait_all_ranks=True)
        said = str(caught.value)
        group._store.set("tried", "")
    else:
        group._store.wait(["tried"])
        group._barriers += 1  # it knows of the one it missed
    group.monitored_barrier(timedelta(seconds=20))
    works()
    return said


def failed_futures():
    """Of a call that cannot end: the future fails as the call does, before and after."""
    rank, _ = place()
    if rank:
        dist.group.WORLD._store.wait(["seen"])
        return None
    work = dist.all_reduce(torch.ones(3), async_op=True)
    before = work.get_future()
    with pytest.raises(CollectiveTimeout):
        work.wait()
    said = []
    for future in (before, work.get_future(), before.then(lambda done: done.value())):
        with pytest.raises(RuntimeError, match="did not end within"):
            future.wait()
        said.append(future.done())
    with pytest.raises(CollectiveFailed, match="not used any more"):
        dist.all_reduce(torch.ones(3))
    dist.group.WORLD._store.set("seen", "")
    return said
