"""What the ranks of test_collectives.py run: checks of a process group, each against values worked out by hand here.

Every check runs on all ranks of the default group and raises an AssertionError. Values are small whole numbers that
depend on the rank, so sums are exact in every type.
"""

import os
import time
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional
from torch.distributed.distributed_c10d import _coalescing_manager

from effnn.base import InvalidInput
from effnn.comm import CollectiveFailed, CollectiveTimeout
from effnn.comm.groups.process_group import LaneProcessGroup
from effnn.comm.groups.tensors.reductions import REDUCED_TYPES

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def run_checks(names=None):
    """Run the checks one after another; returns name -> None or the traceback of what failed on this rank."""
    found = {}
    for name in names or CHECKS:
        try:
            CHECKS[name]()
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
        dist.barrier()
    return found


def place():
    return dist.get_rank(), dist.get_world_size()


def numbers(rank, count=11, dtype=torch.float32):
    return ((torch.arange(count) * (rank + 2)) % 5 + 1).to(dtype)


def everyone(count=11, dtype=torch.float32):
    return torch.stack([numbers(r, count, dtype) for r in range(dist.get_world_size())])


def same(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


COMBINED = {
    "SUM": lambda every: every.sum(0),
    "PRODUCT": lambda every: every.prod(0),
    "MIN": lambda every: every.amin(0),
    "MAX": lambda every: every.amax(0),
}


@check
def all_reduce_of_every_type_and_operation():
    rank, size = place()
    for dtype in REDUCED_TYPES:
        for name, combined in COMBINED.items():
            tensor = numbers(rank, 33, dtype)
            dist.all_reduce(tensor, getattr(dist.ReduceOp, name))
            same(tensor, combined(everyone(33, torch.float64)).to(dtype))
        if dtype.is_floating_point and isinstance(dist.group.WORLD, LaneProcessGroup):
            tensor = numbers(rank, 33, dtype)
            dist.all_reduce(tensor, dist.ReduceOp.AVG)
            torch.testing.assert_close(tensor, everyone(33, torch.float64).mean(0).to(dtype))


@check
def all_reduce_of_sparse_tensors():
    rank, size = place()

    def rows(r, dtype):
        ids = torch.arange(r, 2 * r + 1) if r else torch.zeros(0, dtype=torch.long)  # rank 0 has touched nothing
        return torch.sparse_coo_tensor(ids[None], torch.ones(len(ids), 3, dtype=dtype) * (r + 1), (20, 3))

    for dtype in (torch.float32, torch.int8, torch.float64):
        tensor = rows(rank, dtype)
        dist.all_reduce(tensor)
        same(tensor.to_dense(), sum(rows(r, dtype).to_dense() for r in range(size)))
    if isinstance(dist.group.WORLD, LaneProcessGroup):
        tensor = rows(rank, torch.float32)
        dist.all_reduce(tensor, dist.ReduceOp.AVG)
        same(tensor.to_dense(), sum(rows(r, torch.float32).to_dense() for r in range(size)) / size)
        table = torch.nn.parallel.DistributedDataParallel(torch.nn.Embedding(9, 2, sparse=True))
        table(torch.tensor([rank, rank + 1])).sum().backward()
        gradient = table.module.weight.grad.to_dense()
        wanted = torch.zeros(9, 2)
        for r in range(size):
            wanted[r : r + 2] += 1 / size
        torch.testing.assert_close(gradient, wanted)


@check
def reduce_of_every_operation_to_every_root():
    rank, size = place()
    for root in range(size):
        for name, combined in COMBINED.items():
            tensor = numbers(rank)
            dist.reduce(tensor, root, getattr(dist.ReduceOp, name))
            if rank == root:
                same(tensor, combined(everyone()))
    if isinstance(dist.group.WORLD, LaneProcessGroup):
        tensor = numbers(rank)
        dist.reduce(tensor, 0, dist.ReduceOp.AVG)
        same(tensor, everyone().mean(0) if rank == 0 else numbers(rank))  # the others keep what they sent


@check
def broadcast_moves_any_type():
    rank, size = place()
    more = isinstance(dist.group.WORLD, LaneProcessGroup)  # gloo knows numbers only
    for dtype in (
        torch.float32,
        torch.bfloat16,
        torch.int64,
        *((torch.int16, torch.bool, torch.complex64) if more else ()),
    ):
        tensor = numbers(rank).to(dtype)
        dist.broadcast(tensor, src=size - 1)
        same(tensor, numbers(size - 1).to(dtype))


@check
def tensors_that_are_not_contiguous():
    rank, size = place()
    wide = numbers(rank, 24).view(4, 6)
    view = wide.t()[1:, ::2]
    before = wide.clone()
    dist.all_reduce(view) if isinstance(dist.group.WORLD, LaneProcessGroup) else dist.all_reduce(wide)
    if isinstance(dist.group.WORLD, LaneProcessGroup):
        same(view, everyone(24).sum(0).view(4, 6).t()[1:, ::2])
        untouched = torch.ones_like(wide, dtype=torch.bool)
        untouched.t()[1:, ::2] = False
        same(wide[untouched], before[untouched])
        target = torch.zeros(6, 4).t()
        dist.broadcast(target if rank else numbers(0, 24).view(4, 6), src=0)
        same(target if rank else numbers(0, 24).view(4, 6), numbers(0, 24).view(4, 6))
        parts = [torch.zeros(6, 4).t() for _ in range(size)]
        dist.all_gather(parts, numbers(rank, 24).view(6, 4).t())
        for r, part in enumerate(parts):
            same(part, numbers(r, 24).view(6, 4).t())
        received = torch.zeros(3, 2).t()
        if rank == 0:
            dist.send(numbers(7, 6).view(3, 2).t(), dst=1)
        elif rank == 1:
            dist.recv(received, src=0)
            same(received, numbers(7, 6).view(3, 2).t())


@check
def outputs_that_share_memory_with_inputs():
    rank, size = place()
    if not isinstance(dist.group.WORLD, LaneProcessGroup):
        return
    every = torch.zeros(size, 11)
    every[rank] = numbers(rank)
    dist.all_gather_into_tensor(every, every[rank])
    same(every, everyone())
    sent = torch.stack([numbers(10 * rank + r) for r in range(size)])
    wanted = torch.stack([numbers(10 * r + rank) for r in range(size)])
    reduced = sent.clone()
    dist.reduce_scatter_tensor(reduced[rank], reduced)
    same(reduced[rank], wanted.sum(0))
    swapped = sent.clone()
    dist.all_to_all_single(swapped, swapped)
    same(swapped, wanted)
    rows = sent.clone()
    dist.all_to_all_single(rows, rows, [1] * size, [1] * size)
    same(rows, wanted)


@check
def inference_mode_and_tensors_that_require_gradients():
    rank, size = place()
    sent = torch.stack([numbers(10 * rank + r) for r in range(size)])
    wanted = torch.stack([numbers(10 * r + rank) for r in range(size)])
    with torch.inference_mode():
        mean, output = numbers(rank), torch.zeros(size, 11)
        if isinstance(dist.group.WORLD, LaneProcessGroup):
            dist.all_reduce(mean, dist.ReduceOp.AVG)
            same(mean, everyone().mean(0))
        dist.all_to_all_single(output, sent, [1] * size, [1] * size)
        same(output, wanted)
    weights = torch.nn.Parameter(numbers(rank))
    dist.all_reduce(weights)
    same(weights.data, everyone().sum(0))
    if isinstance(dist.group.WORLD, LaneProcessGroup):
        outputs = [torch.zeros(11, requires_grad=True) for _ in range(size)]
        dist.all_to_all(outputs, [*sent.requires_grad_()])
        same(torch.stack(outputs).detach(), wanted)


@check
def the_time_out_of_a_group_is_that_of_its_parts():
    if isinstance(dist.group.WORLD, LaneProcessGroup):
        parts = [dist.new_group(), dist.new_group(timeout=timedelta(seconds=7))]
        assert [part.timeout for part in parts] == [dist.group.WORLD.timeout, timedelta(seconds=7)]
        for part in parts:
            dist.destroy_process_group(part)


@check
def empty_and_scalar_tensors():
    rank, size = place()
    empty = torch.zeros(0)
    dist.all_reduce(empty)
    dist.broadcast(empty, src=0)
    dist.all_gather([torch.zeros(0) for _ in range(size)], empty)
    dist.all_gather_into_tensor(torch.zeros(0), empty)
    dist.reduce_scatter_tensor(empty, torch.zeros(0))
    dist.all_to_all_single(empty, torch.zeros(0))
    dist.gather(empty, [torch.zeros(0) for _ in range(size)] if rank == 0 else None, dst=0)
    dist.scatter(empty, [torch.zeros(0) for _ in range(size)] if rank == 0 else None, src=0)
    scalar = torch.tensor(float(rank))
    dist.all_reduce(scalar)
    assert scalar == sum(range(size)) and scalar.shape == ()


@check
def gathers():
    rank, size = place()
    parts = [torch.zeros(11) for _ in range(size)]
    dist.all_gather(parts, numbers(rank))
    same(torch.stack(parts), everyone())
    flat = torch.zeros(size * 11)
    dist.all_gather_into_tensor(flat, numbers(rank))
    same(flat, everyone().flatten())
    if isinstance(dist.group.WORLD, LaneProcessGroup):  # gloo wants the flat form
        stacked = torch.zeros(size, 11)
        dist.all_gather_into_tensor(stacked, numbers(rank))
        same(stacked, everyone())
    for root in range(size):
        parts = [torch.zeros(11) for _ in range(size)] if rank == root else None
        dist.gather(numbers(rank), parts, dst=root)
        if rank == root:
            same(torch.stack(parts), everyone())


@check
def all_gather_of_different_sizes():
    rank, size = place()
    if not isinstance(dist.group.WORLD, LaneProcessGroup):
        return  # gloo does not do this
    parts = [torch.zeros(r + 1) for r in range(size)]
    dist.all_gather(parts, numbers(rank, rank + 1))
    for r, part in enumerate(parts):
        same(part, numbers(r, r + 1))


@check
def scatters():
    rank, size = place()
    for root in range(size):
        tensor = torch.zeros(11)
        dist.scatter(tensor, [numbers(10 * root + r) for r in range(size)] if rank == root else None, src=root)
        same(tensor, numbers(10 * root + rank))


@check
def reduce_scatters():
    rank, size = place()
    wanted = torch.stack([numbers(10 * r + rank) for r in range(size)]).sum(0)
    tensor = torch.zeros(11)
    dist.reduce_scatter(tensor, [numbers(10 * rank + r) for r in range(size)])
    same(tensor, wanted)
    tensor.zero_()
    dist.reduce_scatter_tensor(tensor, torch.cat([numbers(10 * rank + r) for r in range(size)]))
    same(tensor, wanted)
    if isinstance(dist.group.WORLD, LaneProcessGroup):
        for dtype in (torch.bfloat16, torch.float16, torch.int64):
            tensor = torch.zeros(11, dtype=dtype)
            sent = torch.cat([numbers(10 * rank + r, dtype=dtype) for r in range(size)])
            dist.reduce_scatter_tensor(tensor, sent, op=dist.ReduceOp.MAX)
            same(tensor, torch.stack([numbers(10 * r + rank) for r in range(size)]).amax(0).to(dtype))
        tensor = torch.zeros(rank + 1)
        dist.reduce_scatter(tensor, [numbers(10 * rank + r, r + 1) for r in range(size)])
        same(tensor, torch.stack([numbers(10 * r + rank, rank + 1) for r in range(size)]).sum(0))


@check
def all_to_alls():
    rank, size = place()
    tensor = torch.zeros(size * 11)
    dist.all_to_all_single(tensor, torch.cat([numbers(10 * rank + r) for r in range(size)]))
    same(tensor, torch.cat([numbers(10 * r + rank) for r in range(size)]))
    sent, received = [rank + r for r in range(size)], [r + rank for r in range(size)]  # rank 0 sends itself nothing
    rows = torch.cat([numbers(10 * rank + r, 3 * n).view(n, 3) for r, n in enumerate(sent)])
    tensor = torch.zeros(sum(received), 3)
    dist.all_to_all_single(tensor, rows, received, sent)
    same(tensor, torch.cat([numbers(10 * r + rank, 3 * n).view(n, 3) for r, n in enumerate(received)]))
    if isinstance(dist.group.WORLD, LaneProcessGroup):
        outputs = [torch.zeros(r + rank + 1, dtype=torch.bfloat16) for r in range(size)]
        dist.all_to_all(outputs, [numbers(10 * rank + r, rank + r + 1, torch.bfloat16) for r in range(size)])
        for r, output in enumerate(outputs):
            same(output, numbers(10 * r + rank, r + rank + 1, torch.bfloat16))


@check
def messages_between_two_ranks():
    rank, size = place()
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        if rank == 0:
            for other in range(1, size):
                dist.send(numbers(other, dtype=dtype), dst=other, tag=other)
        else:
            tensor = torch.zeros(11, dtype=dtype)
            assert dist.recv(tensor, src=0, tag=rank) == 0
            same(tensor, numbers(rank, dtype=dtype))
    if rank == 0:
        seen = set()
        for _ in range(1, size):
            tensor = torch.zeros(11)
            source = dist.recv(tensor)
            same(tensor, numbers(source))
            seen.add(source)
        assert seen == set(range(1, size))
    else:
        dist.send(numbers(rank), dst=0)
    dist.barrier()  # a receive from any source would take the next message of a fast rank as well
    received = torch.zeros(11)
    operations = [
        dist.P2POp(dist.irecv, received, (rank - 1) % size),
        dist.P2POp(dist.isend, numbers(rank), (rank + 1) % size),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    same(received, numbers((rank - 1) % size))


@check
def handles_and_futures():
    rank, size = place()
    tensors = [numbers(rank, 1000 + n) for n in range(20)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    future = works[3].get_future().then(lambda done: done.value()[0].sum().item())
    for work in reversed(works):
        assert work.wait()
        assert work.is_completed() and work.is_success() and work.exception() is None
    for n, tensor in enumerate(tensors):
        same(tensor, everyone(1000 + n).sum(0))
    assert future.wait() == everyone(1003).sum().item()
    assert works[0].get_future().wait() is not None  # asked for after the end


@check
def a_callback_may_wait_for_another_collective():
    rank, size = place()
    if not isinstance(dist.group.WORLD, LaneProcessGroup):
        return
    second = numbers(rank)

    def then(_):
        dist.all_reduce(second)
        return second.sum().item()

    future = dist.all_reduce(numbers(rank), async_op=True).get_future().then(then)
    assert future.wait() == everyone().sum().item()


@check
def coalesced_calls():
    rank, size = place()
    tensors = [numbers(rank, n) for n in (3, 7, 5)]
    with _coalescing_manager(async_ops=True) as pending:
        for tensor in tensors:
            dist.all_reduce(tensor)
    pending.wait()
    for n, tensor in zip((3, 7, 5), tensors, strict=True):
        same(tensor, everyone(n).sum(0))
    outputs = [torch.zeros(size * n) for n in (3, 7)]
    with _coalescing_manager():
        for output, n in zip(outputs, (3, 7), strict=True):
            dist.all_gather_into_tensor(output, numbers(rank, n))
    for output, n in zip(outputs, (3, 7), strict=True):
        same(output, everyone(n).flatten())
    outputs = [torch.zeros(n) for n in (3, 7)]
    with _coalescing_manager():
        for output, n in zip(outputs, (3, 7), strict=True):
            dist.reduce_scatter_tensor(output, torch.cat([numbers(10 * rank + r, n) for r in range(size)]))
    for output, n in zip(outputs, (3, 7), strict=True):
        same(output, torch.stack([numbers(10 * r + rank, n) for r in range(size)]).sum(0))


@check
def objects():
    rank, size = place()
    gathered = [None] * size
    dist.all_gather_object(gathered, {"rank": rank, "text": "x" * rank})
    assert gathered == [{"rank": r, "text": "x" * r} for r in range(size)]
    shared = [{"a": 1}, "b"] if rank == 0 else [None, None]
    dist.broadcast_object_list(shared, src=0)
    assert shared == [{"a": 1}, "b"]
    mine = [None]
    dist.scatter_object_list(mine, [f"for {r}" for r in range(size)] if rank == 0 else None, src=0)
    assert mine == [f"for {rank}"]
    collected = [None] * size if rank == 0 else None
    dist.gather_object(("from", rank), collected, dst=0)
    assert rank or collected == [("from", r) for r in range(size)]


@check
def functional_collectives():
    rank, size = place()
    group = dist.group.WORLD
    same(functional.all_reduce(numbers(rank), "sum", group) + 0, everyone().sum(0))
    same(functional.all_gather_tensor(numbers(rank), 0, group) + 0, everyone().flatten())
    sent = torch.cat([numbers(10 * rank + r) for r in range(size)])
    wanted = torch.stack([numbers(10 * r + rank) for r in range(size)])
    same(functional.reduce_scatter_tensor(sent, "sum", 0, group) + 0, wanted.sum(0))
    same(functional.all_to_all_single(sent, None, None, group) + 0, wanted.flatten())
    same(functional.broadcast(numbers(rank), 0, group) + 0, numbers(0))


@check
def groups_of_some_ranks():
    rank, size = place()
    members = [list(range(0, size, 2)), list(range(1, size, 2)), [0, size - 1], [size - 1]]
    groups = [dist.new_group(ranks) for ranks in members]
    for ranks, group in zip(members, groups, strict=True):
        if rank in ranks:
            tensor = numbers(rank)
            dist.all_reduce(tensor, group=group)
            same(tensor, torch.stack([numbers(r) for r in ranks]).sum(0))
            dist.broadcast(tensor, src=ranks[-1], group=group)
            parts = [torch.zeros(11) for _ in ranks]
            dist.all_gather(parts, numbers(rank), group=group)
            same(torch.stack(parts), torch.stack([numbers(r) for r in ranks]))
    for group, ranks in zip(groups, members, strict=True):
        if rank in ranks:
            dist.destroy_process_group(group)


@check
def what_cannot_be_done_is_refused_and_harms_nothing():
    rank, size = place()
    if not isinstance(dist.group.WORLD, LaneProcessGroup):
        return
    attempts = {
        "takes float16": lambda: dist.all_reduce(torch.ones(3, dtype=torch.int16)),
        "made of the bits of": lambda: dist.all_reduce(torch.ones(3), dist.ReduceOp.BAND),
        "avg needs a floating type, not torch.bool": lambda: dist.all_reduce(
            torch.ones(3, dtype=torch.bool), dist.ReduceOp.AVG
        ),
        "avg needs a floating type": lambda: dist.all_reduce(torch.ones(3, dtype=torch.int32), dist.ReduceOp.AVG),
        "times the elements": lambda: dist.all_gather_into_tensor(torch.zeros(size * 3 + 1), torch.zeros(3)),
        "expected a tensor of 3": lambda: dist.all_gather([torch.zeros(2)] * size, torch.zeros(3)),
        "divisible by the world size": lambda: dist.all_to_all_single(torch.zeros(size + 1), torch.zeros(size + 1)),
        "numbers that sum to": lambda: dist.all_to_all_single(
            torch.zeros(size), torch.zeros(size), [1] * size, [2] * size
        ),
        "knows sum and avg": lambda: dist.all_reduce(torch.eye(3).to_sparse(), dist.ReduceOp.MAX),
        "on CPU tensors": lambda: dist.all_reduce(torch.zeros(3, device="meta")),
    }
    for words, attempt in attempts.items():
        with pytest.raises(InvalidInput, match=words):
            attempt()
    with pytest.raises(InvalidInput, match="is not a rank"):
        options = dist.distributed_c10d.BroadcastOptions()
        options.rootRank = size
        dist.group.WORLD.broadcast([torch.zeros(3)], options)
    tensor = numbers(rank)
    dist.all_reduce(tensor)
    same(tensor, everyone().sum(0))


@check
def waiting_for_a_given_time_only():
    rank, size = place()
    if not isinstance(dist.group.WORLD, LaneProcessGroup):
        return
    tensor = numbers(rank)
    if rank == 0:
        work = dist.all_reduce(tensor, async_op=True)
        with pytest.raises(CollectiveTimeout, match=r"0\.2 s that wait\(\) was given"):
            work.wait(timedelta(seconds=0.2))
        assert not work.is_completed()
        dist.group.WORLD._store.set("waited", "yes")
        work.wait()
    else:
        dist.group.WORLD._store.wait(["waited"])
        dist.all_reduce(tensor)
    same(tensor, everyone().sum(0))


@check
def a_forked_child_gets_a_clear_error():
    rank, size = place()
    if not isinstance(dist.group.WORLD, LaneProcessGroup):
        return
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            dist.all_reduce(torch.zeros(3))
            answer = "nothing raised"
        except BaseException as error:
            answer = f"{type(error).__name__} {error}"
        os.write(writing, answer.encode()[:1000])
        os._exit(0)
    os.waitpid(child, 0)
    answer = os.read(reading, 2000).decode()
    os.close(reading), os.close(writing)
    assert answer.startswith(CollectiveFailed.__name__) and "'spawn'" in answer, answer


class Net(torch.nn.Module):
    def __init__(self, with_unused):
        super().__init__()
        layers = [torch.nn.Linear(40, 60), torch.nn.ReLU(), torch.nn.Linear(60, 60), torch.nn.ReLU()]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(60, 10))
        self.unused = torch.nn.Linear(3, 3) if with_unused else None

    def forward(self, rows):
        return self.layers(rows)


def train(steps, bucket_mb, hook=None, group=None, backend_seed=0, **options):
    """Train a small net under DDP; returns all gradients of all steps and the weights at the end, as one tensor."""
    rank, _ = place()
    torch.manual_seed(0)
    net = Net(with_unused="find_unused_parameters" in options)
    model = torch.nn.parallel.DistributedDataParallel(net, process_group=group, bucket_cap_mb=bucket_mb, **options)
    if hook is not None:
        model.register_comm_hook(group, hook)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    data = torch.Generator().manual_seed(rank)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 40, generator=data)).square().mean()
        loss.backward()
        seen.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
        optimizer.step()
    return torch.stack(seen), torch.cat([p.detach().flatten() for p in net.parameters()])


def compare_ddp(steps, bucket_sizes, variants):
    """(variant, bucket size) -> whether gradients and weights are bit-equal to those of gloo, at every step."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    gloo = dist.new_group(backend="gloo")
    found = {}
    for name, options in variants.items():
        hook = fp16_compress_hook if name == "fp16 hook" else None
        for size in bucket_sizes:
            ours, theirs = (train(steps, size, hook, group, **options) for group in (dist.group.WORLD, gloo))
            found[name, size] = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    return found


def stress(seed, calls):
    """Random collectives of random sizes and types, sync and async mixed, each against gloo; returns how many ran."""
    rank, size = place()
    gloo = dist.new_group(backend="gloo")
    draws, data = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 * seed + rank)

    def draw(high):
        return int(torch.randint(high, (), generator=draws))

    pending = []
    for number in range(calls):
        dtype = REDUCED_TYPES[draw(len(REDUCED_TYPES))]
        count = [1, 7, 1000, 40_000, 0, 300_001][draw(6)]
        kind = ["all_reduce", "broadcast", "all_gather", "reduce_scatter", "all_to_all", "reduce", "gather", "scatter"][
            draw(8)
        ]
        # Whole numbers up to 3: sums and products of a few ranks are exact in every type, in every order.
        tensor = torch.randint(0, 4, (count,), generator=data).to(dtype)
        operation = [dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT, dist.ReduceOp.MIN, dist.ReduceOp.MAX][draw(4)]
        root, later = draw(size), draw(2)
        ours, done = issue(kind, tensor.clone(), operation, root, None, bool(later))
        theirs, _ = issue(kind, tensor.clone(), operation, root, gloo, False)
        pending.append((number, kind, dtype, count, ours, theirs, done, rank == root))
        if not later or len(pending) > 5:
            settle(pending)
    settle(pending)
    return calls


def issue(kind, tensor, operation, root, group, later):
    rank, size = place()
    if kind == "all_reduce":
        return [tensor], dist.all_reduce(tensor, operation, group, later)
    if kind == "reduce":
        return [tensor], dist.reduce(tensor, root, operation, group, later)
    if kind == "broadcast":
        return [tensor], dist.broadcast(tensor, root, group, later)
    if kind == "all_gather":
        parts = [torch.zeros_like(tensor) for _ in range(size)]
        return parts, dist.all_gather(parts, tensor, group, later)
    if kind == "gather":
        parts = [torch.zeros_like(tensor) for _ in range(size)] if rank == root else None
        return parts or [], dist.gather(tensor, parts, root, group, later)
    if kind == "scatter":
        parts = [tensor + r for r in range(size)] if rank == root else None
        output = torch.zeros_like(tensor)
        return [output], dist.scatter(output, parts, root, group, later)
    many = torch.cat([tensor + r for r in range(size)])
    if kind == "reduce_scatter":
        output = torch.zeros_like(tensor)
        return [output], dist.reduce_scatter_tensor(output, many, operation, group, later)
    output = torch.zeros_like(many)
    return [output], dist.all_to_all_single(output, many, group=group, async_op=later)


def settle(pending):
    for number, kind, dtype, count, ours, theirs, work, at_root in pending:
        if work is not None:
            work.wait()
        if kind != "reduce" or at_root:
            for mine, other in zip(ours, theirs, strict=True):
                assert torch.equal(mine, other), f"call {number}: {kind} of {count} {dtype} differs from gloo's"
    pending.clear()


def disagree():
    """Calls that do not fit together: what each rank is told, and that the next call works."""
    rank, size = place()
    found = []
    for tensor in (
        torch.ones(4, dtype=torch.float64 if rank else torch.float32),
        torch.ones(4 + rank),
    ):
        try:
            dist.all_reduce(tensor)
            found.append("nothing raised")
        except CollectiveFailed as error:
            found.append(str(error))
    try:
        dist.broadcast(torch.ones(4), 0) if rank else dist.all_reduce(torch.ones(4))
        found.append("nothing raised")
    except CollectiveFailed as error:
        found.append(str(error))
    tensor = numbers(rank)
    dist.all_reduce(tensor)
    same(tensor, everyone().sum(0))
    return found


def leave_alone(seconds):
    """Rank 0 leaves its group at once, the others much later; the store is gone by then."""
    dist.all_reduce(torch.ones(3))
    if dist.get_rank():
        time.sleep(seconds)
    dist.destroy_process_group()
    return dist.is_initialized()


def die_while_reducing(victim, how):
    """One rank is killed in the middle of a row of collectives; the others say what they saw."""
    rank, _ = place()
    if how == "ddp":
        net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(500, 500))
    tensor = torch.ones(1 << 20)
    for step in range(1_000_000):
        if rank == victim and step == 20:
            os.kill(os.getpid(), 9)
        try:
            if how == "ddp":
                net(torch.ones(2, 500)).sum().backward()
            else:
                dist.all_reduce(tensor)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None
