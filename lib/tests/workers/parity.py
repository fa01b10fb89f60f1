"""What the ranks of test_parity.py run: calls that gloo answers, each returning what can be compared.

Every call runs on the default group, whatever its backend. What a call returns, or the name of the error that it
raises, is compared with what gloo gave.
"""

import copy
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

CALLS = {}
BITWISE = ("BAND", "BOR", "BXOR")


def call(function):
    CALLS[function.__name__] = function
    return function


def run_calls():
    """Run all calls; returns name -> what it returned, or the error as text. Later calls show whether one did harm."""
    found = {}
    for name, function in CALLS.items():
        try:
            found[name] = function()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        one = torch.ones(3)
        dist.all_reduce(one)
        assert one.tolist() == [dist.get_world_size()] * 3, name
    return found


def place():
    return dist.get_rank(), dist.get_world_size()


def reduced(operation, values):
    """What all_reduce, reduce and the two reduce_scatters make of one row of values per rank."""
    rank, size = place()
    operation = getattr(dist.ReduceOp, operation)
    found = []
    every = values.clone()
    dist.all_reduce(every, operation)
    found.append(every)
    for root in range(size):
        one = values.clone()
        dist.reduce(one, root, operation)
        if rank == root:
            found.append(one)
    row = torch.empty_like(values)
    dist.reduce_scatter_tensor(row, torch.cat([values.roll(other) for other in range(size)]), operation)
    found.append(row)
    row = torch.empty_like(values)
    dist.reduce_scatter(row, [values.roll(other) for other in range(size)], operation)
    found.append(row)
    later = values.clone()
    dist.all_reduce(later, operation, async_op=True).wait()
    found.append(later)
    return [one.tolist() for one in found]


@call
def reductions_of_flags():
    rank, _ = place()
    flags = torch.tensor([True, False, rank == 0, rank == 1, rank != 0, rank < 2])
    return {name: reduced(name, flags) for name in ("SUM", "PRODUCT", "MIN", "MAX", *BITWISE)}


@call
def reductions_of_bits():
    rank, _ = place()
    found = {}
    for dtype in (torch.uint8, torch.int8, torch.int32, torch.int64):
        bits = torch.tensor([1 << rank, 0b1011 + rank, 0, 127 - rank], dtype=dtype)
        found |= {(name, str(dtype)): reduced(name, bits) for name in BITWISE}
    return found


@call
def reductions_of_many_bits():
    rank, size = place()
    bits = torch.arange(300_001) * (rank + 3)
    dist.all_reduce(bits, dist.ReduceOp.BXOR)
    return int(bits.sum()), bits[::50_000].tolist()


@call
def sums_of_complex_numbers():
    rank, _ = place()
    return {dtype: reduced("SUM", torch.tensor([1 + 2j, rank * 1j], dtype=dtype)) for dtype in (torch.complex64,)}


@call
def averages():
    rank, _ = place()
    found = {}
    for dtype in (torch.float32, torch.float64, torch.complex64):
        mean = torch.tensor([1.0, rank, 2 * rank], dtype=dtype)
        dist.all_reduce(mean, dist.ReduceOp.AVG)
        found[str(dtype)] = mean
    return found


@call
def infinities():
    rank, _ = place()
    infinity = float("inf")
    values = torch.tensor([infinity, -infinity, infinity * (1 - 2 * (rank == 0)), rank])
    return {name: reduced(name, values) for name in ("PRODUCT", "MIN", "MAX")}


@call
def flags_that_are_moved():
    rank, size = place()
    flags = torch.tensor([rank == 0, True, False, rank == 1])
    sent = flags.clone()
    dist.broadcast(sent, 1)
    parts = [torch.zeros(4, dtype=torch.bool) for _ in range(size)]
    dist.all_gather(parts, flags)
    flat = torch.zeros(4 * size, dtype=torch.bool)
    dist.all_gather_into_tensor(flat, flags)
    swapped = torch.zeros(size, dtype=torch.bool)
    dist.all_to_all_single(swapped, torch.tensor([rank == other for other in range(size)]))
    mine = torch.zeros(4, dtype=torch.bool)
    dist.scatter(mine, [flags.roll(other) for other in range(size)] if rank == 0 else None, 0)
    gathered = [torch.zeros(4, dtype=torch.bool) for _ in range(size)] if rank == 0 else None
    dist.gather(flags, gathered, 0)
    return sent, parts, flat, swapped, mine, gathered


@call
def one_element_columns():
    """One element with a stride of four: contiguous to torch, not to a view of its bytes."""
    rank, size = place()

    def column(value=rank + 1.0):
        return torch.full((1, 4), value)[:, 0]

    reduced, sent, gathered, scattered = column(), column(), column(), column()
    dist.all_reduce(reduced)
    dist.broadcast(sent, size - 1)
    parts = [column(0.0) for _ in range(size)]
    dist.all_gather(parts, gathered)
    dist.scatter(scattered, [column(other + 5.0) for other in range(size)] if rank == 0 else None, 0)
    collected = [column(0.0) for _ in range(size)] if rank == 0 else None
    dist.gather(column(), collected, 0)
    received = column(0.0)
    message(column(), received)
    return reduced, sent, parts, scattered, collected, received


def message(sent, received):
    """From rank 0 to rank 1."""
    rank, _ = place()
    if rank == 0:
        dist.send(sent, 1)
    elif rank == 1:
        dist.recv(received, 0)


@call
def scalars_and_nothing():
    rank, size = place()
    scalar, nothing = torch.tensor(rank + 1.0), torch.zeros(0, 3)
    dist.all_reduce(scalar)
    dist.broadcast(nothing, 0)
    dist.all_reduce(nothing)
    received = torch.tensor(0.0)
    message(scalar, received)
    empty = torch.zeros(0)
    message(empty, empty)
    return scalar, nothing.shape, received


@call
def weights_that_require_gradients():
    rank, size = place()
    weights = torch.nn.Parameter(torch.full((3,), rank + 1.0))
    dist.all_reduce(weights.data)
    dist.broadcast(weights.data, size - 1)
    parts = [torch.zeros(3) for _ in range(size)]
    dist.all_gather(parts, weights)
    return weights.detach(), parts


@call
def tensors_made_in_inference_mode():
    rank, size = place()
    with torch.inference_mode():
        made = torch.full((4,), rank + 1.0)
    dist.all_reduce(made)
    parts = [torch.zeros(4) for _ in range(size)]
    dist.all_gather(parts, made)
    return made.tolist(), parts


@call
def futures():
    """Before wait(), after it, with a callback, and of a call that is not an all_reduce."""
    rank, size = place()
    found = []
    for start in (
        lambda: dist.all_reduce(torch.full((2,), rank + 1.0), async_op=True),
        lambda: dist.broadcast(torch.full((2,), rank + 1.0), 0, async_op=True),
        lambda: dist.all_to_all_single(torch.zeros(size), torch.ones(size), async_op=True),
    ):
        work = start()
        before = work.get_future()
        doubled = before.then(lambda done: [2 * tensor for tensor in done.value()])
        work.wait()
        after = work.get_future()
        found += [before.done(), before.value(), after.done(), after.value(), after.wait(), doubled.wait()]
        late = start()
        late.wait()
        found += [late.get_future().done(), late.get_future().value(), late.is_completed(), late.result()]
    return found


@call
def objects():
    rank, size = place()
    gathered = [None] * size
    dist.all_gather_object(gathered, {"rank": rank, "text": "x" * rank})
    return gathered


@call
def messages_in_a_batch():
    rank, size = place()
    received = [torch.zeros(5, dtype=torch.bool), torch.zeros(2, 2)]
    sent = [torch.full((5,), rank == 0), torch.full((2, 2), float(rank))]
    to, source = (rank + 1) % size, (rank - 1) % size
    operations = [dist.P2POp(dist.isend, one, to, tag=n) for n, one in enumerate(sent)]
    operations += [dist.P2POp(dist.irecv, one, source, tag=n) for n, one in enumerate(received)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return received


@call
def barriers():
    dist.barrier(device_ids=[0])
    dist.barrier(async_op=True).wait()
    dist.barrier(dist.group.WORLD)


@call
def devices_of_the_group():
    return "cpu" in dist.distributed_c10d._device_capability(), dist.distributed_c10d._get_object_coll_device()


def trained(hook=None, state=None, built_in=None, optimizer=torch.optim.SGD, **options):
    """Weights after five steps of a small net under DDP."""
    rank, _ = place()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8))
    model = DistributedDataParallel(net, **options)
    if built_in is not None:
        model._register_builtin_comm_hook(built_in)
    if hook is not None:
        model.register_comm_hook(state, hook)
    step = optimizer(model.parameters(), lr=0.1)
    rows = torch.Generator().manual_seed(rank)
    for _ in range(5):
        step.zero_grad()
        model(torch.randn(4, 24, generator=rows)).square().mean().backward()
        step.step()
    return torch.cat([weight.detach().flatten() for weight in net.parameters()])


@call
def built_in_hooks_of_ddp():
    """In C++: with the smallest and with the largest buckets."""
    kinds = dist.BuiltinCommHookType
    return [
        trained(built_in=kind, bucket_cap_mb=size)
        for kind in (kinds.ALLREDUCE, kinds.FP16_COMPRESS)
        for size in (0.001, 25)
    ]


@call
def hooks_of_ddp():
    wrapped = default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook)
    return [trained(hook) for hook in (default_hooks.allreduce_hook, default_hooks.fp16_compress_hook, wrapped)]


@call
def power_sgd():
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=1
    )
    return trained(powerSGD_hook.powerSGD_hook, state)


@call
def zero_redundancy_optimizer():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return trained(
        optimizer=lambda weights, lr: ZeroRedundancyOptimizer(weights, optimizer_class=torch.optim.Adam, lr=lr)
    )


@call
def join_of_uneven_inputs():
    rank, size = place()
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(4, 2))
    with model.join():
        for _ in range(2 + rank):
            model(torch.ones(3, 4)).sum().backward()
    return model.module.weight.grad


@call
def device_mesh():
    from torch.distributed.device_mesh import init_device_mesh

    rank, size = place()
    line = init_device_mesh("cpu", (size,), mesh_dim_names=("rows",))
    grid = init_device_mesh("cpu", (1, size), mesh_dim_names=("copies", "shards"))
    found = []
    for group in (line.get_group(), grid.get_group("copies"), grid["shards"].get_group()):
        tensor = torch.full((2,), rank + 1.0)
        dist.all_reduce(tensor, group=group)
        found.append((dist.get_world_size(group), tensor))
    return found


@call
def distributed_tensors():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    matrix = torch.arange(42.0).view(7, 6)
    rows, columns = distribute_tensor(matrix, mesh, [Shard(0)]), distribute_tensor(matrix, mesh, [Shard(1)])
    whole = columns.redistribute(mesh, [Replicate()]).to_local()
    return rows.full_tensor(), whole, rows.redistribute(mesh, [Shard(1)]).to_local(), (rows.t() @ rows).full_tensor()


@call
def fully_shard():
    from torch.distributed.fsdp import fully_shard as shard

    rank, _ = place()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    shard(net[0], mesh=None)
    shard(net)
    step = torch.optim.Adam(net.parameters(), lr=0.1)
    rows = torch.Generator().manual_seed(rank)
    for _ in range(3):
        net(torch.randn(4, 5, generator=rows)).square().mean().backward()
        step.step()
        step.zero_grad()
    return [weight.full_tensor().detach() for weight in net.parameters()]


@call
def checkpoints_in_the_background():
    import torch.distributed.checkpoint as checkpoint

    rank, _ = place()
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder, 0)
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(6, 3))
    state = {"model": model.module.state_dict(), "step": 7}
    checkpoint.async_save(copy.copy(state), checkpoint_id=folder[0]).result(timeout=60)
    dist.barrier()
    loaded = {"model": {name: torch.zeros_like(tensor) for name, tensor in state["model"].items()}, "step": 0}
    checkpoint.load(loaded, checkpoint_id=folder[0])
    return loaded, [path.name for path in sorted(Path(folder[0]).iterdir())]


@call
def a_time_out_of_a_call():
    rank, _ = place()
    one = torch.ones(2)
    work = dist.all_reduce(one, async_op=True)
    work.wait(timedelta(seconds=5))
    return one
