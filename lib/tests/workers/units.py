"""What the ranks of the tests of effnn.comm run: plain torch.distributed, mixed devices, sparse sums, checks."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup

from effnn.base import InvalidInput, NotAvailable
from effnn.comm import backends
from effnn.comm.groups.process_group import LaneProcessGroup
from effnn.comm.groups.tensors import sparse
from effnn.comm.probing import operations


def place():
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def joined(backend, folder):
    """Join a group of all ranks with torch's own function; the ranks meet through a file."""
    rank, size = place()
    name = backend.replace(":", "-").replace(",", "-")
    dist.init_process_group(backend, init_method=f"file://{folder}/{name}", rank=rank, world_size=size)


def sums(group=None):
    """Whether an all_reduce over the group gives the sum over the ranks."""
    rank, size = place()
    tensor = torch.full((5,), float(rank + 1))
    dist.all_reduce(tensor, group=group)
    return tensor.tolist() == [size * (size + 1) / 2] * 5


def ours(group):
    return isinstance(group, LaneProcessGroup) and group.getBackendName() == "ccl"


# Backends


def plain_torch(folder):
    """Groups made by plain torch.distributed, as effnn.comm has been imported; name -> (is ours, sums are right)."""
    found = {}
    for backend in ("ccl", "cpu:ccl,cuda:nccl"):
        joined(backend, folder)
        found[backend] = ours(dist.group.WORLD), sums()
        gloo = dist.new_group(backend="gloo")
        found[f"gloo beside {backend}"] = ours(gloo), sums(gloo)
        found[f"{backend} again"] = ours(dist.group.WORLD), sums()
        dist.destroy_process_group()
    joined("gloo", folder)
    group = dist.new_group(backend="ccl")
    found["gloo"] = ours(dist.group.WORLD), sums()
    found["ccl beside gloo"] = ours(group), sums(group)
    dist.destroy_process_group(group)
    found["gloo again"] = ours(dist.group.WORLD), sums()
    dist.destroy_process_group()
    return found


def provider(folder):
    """Who provides "ccl" in a rank, whether the group is ours, and whether it sums."""
    joined("ccl", folder)
    found = backends.ccl_provider(), ours(dist.group.WORLD), sums(), backends.unavailable("ccl", "cpu")
    dist.barrier()
    return found


def meta(*shape):
    return torch.ones(*shape, device="meta")


def message(call):
    """Make a call that must not reach the group for messages between CPUs: it would read and write at address 0."""

    def refuse():
        raise AssertionError("a tensor of another device came to the CPU's messages")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist.group.WORLD, "_gloo", refuse, raising=False)
        call()


ON_ANOTHER_DEVICE = {
    "all_reduce": lambda size: dist.all_reduce(meta(3)),
    "broadcast": lambda size: dist.broadcast(meta(3), 0),
    "reduce": lambda size: dist.reduce(meta(3), 0),
    "all_gather": lambda size: dist.all_gather([meta(3) for _ in range(size)], meta(3)),
    "gather": lambda size: dist.gather(meta(3), [meta(3)] * size if dist.get_rank() == 0 else None, 0),
    "scatter": lambda size: dist.scatter(meta(3), [meta(3)] * size if dist.get_rank() == 0 else None, 0),
    "reduce_scatter": lambda size: dist.reduce_scatter(meta(3), [meta(3) for _ in range(size)]),
    "all_to_all": lambda size: dist.all_to_all([meta(3)] * size, [meta(3)] * size),
    "all_to_all_single": lambda size: dist.all_to_all_single(meta(3 * size), meta(3 * size)),
    "all_to_all_single, split": lambda size: dist.all_to_all_single(
        meta(3 * size), meta(3 * size), [3] * size, [3] * size
    ),
    "send": lambda size: message(lambda: dist.send(meta(3), (dist.get_rank() + 1) % size)),
    "recv": lambda size: message(lambda: dist.recv(meta(3), (dist.get_rank() + 1) % size)),
}
"""Calls on tensors that are not on the CPU. "meta" is a device that every machine has."""


def mixed_devices(folder):
    """What became of each call of a mixed configuration: configuration -> call -> None or the error."""
    from torch.testing._internal.distributed import fake_pg  # noqa: F401  (registers "fake")

    rank, size = place()
    made = []

    def creator(store, rank, size, timeout):
        made.append((rank, size))
        return FakeProcessGroup._create_internal(rank, size)  # every call ends at once and does nothing

    dist.Backend.register_backend("recorder", creator, devices=["meta"])
    found = {}
    for backend in ("ccl", "cpu:ccl,meta:nothing", "cpu:ccl,meta:nccl", "cpu:ccl,meta:fake", "cpu:ccl,meta:recorder"):
        if "nothing" in backend:
            dist.Backend.register_backend("nothing", creator, devices=["meta"])
        joined(backend, folder)
        found[backend] = {"made before": len(made)}
        if "nothing" in backend:
            del dist.Backend._plugins["NOTHING"]
        calls = ON_ANOTHER_DEVICE if "recorder" in backend else ["broadcast"]
        for name in calls:
            try:
                ON_ANOTHER_DEVICE[name](size)
                found[backend][name] = None
            except (InvalidInput, NotAvailable) as error:
                found[backend][name] = f"{type(error).__name__}: {error}"
            except Exception as error:
                found[backend][name] = f"unexpected {type(error).__name__}: {error}"[:300]
        found[backend]["sums"] = sums()
        dist.barrier()
        dist.destroy_process_group()
    return found, made


# Sparse gradients


def pairs(rank, case):
    """ids and values of one rank: a different number on each, rank 1 has none; "all empty": nobody has any."""
    count = 0 if case == "all empty" or rank == 1 else 3 + 2 * rank
    ids = torch.arange(count) % 4 * (rank + 1)  # with duplicates
    width = (2, 3) if case == "two dimensions" else ()
    return ids, ((torch.arange(count).view(-1, *(1 for _ in width)) + rank + 1.0) * torch.ones(count, *width)).to(
        {"bfloat16": torch.bfloat16, "int8": torch.int8}.get(case, torch.float32)
    )


SPARSE_CASES = ("one dimension", "two dimensions", "bfloat16", "int8", "all empty")


def sparse_sums():
    """Check all_gather_pairs and all_reduce against what the ranks are known to hold; returns sums of random rows."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for case in SPARSE_CASES:
        gathered = sparse.all_gather_pairs(*pairs(rank, case))
        assert len(gathered) == size
        for r, (ids, values) in enumerate(gathered):
            wanted_ids, wanted = pairs(r, case)
            torch.testing.assert_close(ids, wanted_ids, rtol=0, atol=0)
            torch.testing.assert_close(values, wanted, rtol=0, atol=0)
        tensors = []
        for r in range(size):
            ids, values = pairs(r, case)
            tensors.append(torch.sparse_coo_tensor(ids[None], values, (40, *values.shape[1:]), check_invariants=False))
        before = tensors[rank].clone()
        total = sparse.all_reduce(tensors[rank])
        assert total.is_coalesced() and total.shape == before.shape and total.dtype == before.dtype
        torch.testing.assert_close(total.to_dense(), sum(t.to_dense() for t in tensors), rtol=0, atol=0)
        torch.testing.assert_close(tensors[rank].to_dense(), before.to_dense(), rtol=0, atol=0)  # left alone
        assert total.indices()[0].tolist() == sorted({int(i) for r in range(size) for i in pairs(r, case)[0]})
    alone = dist.new_group([0])
    if rank == 0:
        ids, values = pairs(0, "one dimension")
        ((got_ids, got),) = sparse.all_gather_pairs(ids, values, alone)
        torch.testing.assert_close((got_ids, got), (ids, values), rtol=0, atol=0)
    for ids, values in (
        (torch.zeros(2, 1), torch.zeros(2)),
        (torch.zeros(2), torch.zeros(3)),
        (pairs(0, "")[0], torch.tensor(1.0)),
    ):
        with pytest.raises(InvalidInput, match=r"expected ids \[n\] and values"):
            sparse.all_gather_pairs(ids, values)
    for tensor in (torch.zeros(3), torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()):
        with pytest.raises(InvalidInput, match="one sparse dimension"):
            sparse.all_reduce(tensor)
    return sparse.all_reduce(random_rows(rank)).to_dense()


def random_rows(rank, rows=300):
    """Rows that most ranks hold too, of sizes that make a sum depend on the order of its terms."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randperm(rows, generator=generator)[: rows * 3 // 4]
    values = torch.randn(len(ids), 2, generator=generator) * 10.0 ** torch.randint(
        0, 6, (len(ids), 1), generator=generator
    )
    return torch.sparse_coo_tensor(ids[None], values, (rows, 2), check_invariants=False)


# The support matrix


class Done:
    def wait(self, *_):
        return True


NEEDS = {
    "send": ["send", "recv"],
    "recv": ["irecv", "isend"],
    "broadcast": ["broadcast"],
    "all_reduce": ["all_reduce"],
    "reduce": ["reduce"],
    "all_gather": ["all_gather", "all_gather_single"],
    "gather": ["gather"],
    "scatter": ["scatter"],
    "reduce_scatter": ["reduce_scatter", "reduce_scatter_single"],
    "all_to_all": ["all_to_all_single"],
    "barrier": ["barrier"],
    "sparse all_reduce, float32": ["all_reduce"],
    "sparse all_reduce, int8": ["all_reduce"],
    "all_gather of (ids, values)": ["all_gather"],
}
"""Row of the matrix -> the functions of torch.distributed that its check calls."""


def checks_of_idle_functions():
    """Run each check with functions of torch.distributed that do nothing: (row, function) -> this rank's verdict.

    First all the functions of a row at once, then, where a row has several, each alone; last with the real ones.
    """
    known = operations.OPERATIONS | operations.SPARSE
    found = {}
    for row, check in known.items():
        together = row in ("send", "recv")  # one alone leaves the other waiting
        for functions in [NEEDS[row], *([[name] for name in NEEDS[row]] if not together else [])]:
            with pytest.MonkeyPatch.context() as patch:
                for name in functions:
                    patch.setattr(dist, name, lambda *_, **__: Done())
                found[row, ",".join(functions)] = verdict(check)
            dist.barrier()
    for row, check in known.items():
        found[row, "real"] = verdict(check)
        dist.barrier()
    return found


def verdict(check):
    try:
        check(torch.device("cpu"))
        return "ok"
    except operations.WrongResult as error:
        return f"wrong result: {error}"


def works(device):
    tensor = torch.ones(3, device=device)
    dist.all_reduce(tensor)
    assert tensor.tolist() == [dist.get_world_size()] * 3


def computes_something_else(device):
    if dist.get_rank() == 1:
        raise operations.WrongResult("element 0 is 1.0, expected 2.0")


def raises(device):
    if dist.get_rank() == 1:
        raise ValueError("in rank 1\nand more of it")
    works(device)  # rank 0 loses its connection, and says so later


def waits_for_ever(device):
    if dist.get_rank() == 1:
        time.sleep(1000)
    works(device)


def waits_in_a_collective(device):
    dist.recv(torch.zeros(3, device=device), src=1 - dist.get_rank())  # nobody sends


def kills_its_process(device):
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    works(device)


STAND_INS = {
    "first": works,
    "wrong": computes_something_else,
    "second": works,
    "kills": kills_its_process,
    "raises": raises,
    "third": works,
    "hangs": waits_for_ever,
    "waits": waits_in_a_collective,
}


# The oneCCL library


def errors_of_the_library():
    """What a call that the library refuses becomes, and that the group is not used again afterwards."""
    group = dist.group.WORLD
    assert sums()
    found = []
    for attempt in (lambda: group._lane.run(refused_call(group)), sums):
        try:
            attempt()
            found.append("nothing raised")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def refused_call(group):
    from effnn.comm.groups.lane.call import Call
    from effnn.comm.groups.oneccl.library import TYPES

    tensor = torch.ones(4)
    average = 4  # onecclAvg
    arguments = tensor.data_ptr(), tensor.data_ptr(), 4, TYPES[torch.float32], average
    return Call("average", lambda: group._communicator.call("AllReduce", *arguments), [tensor], timeout=20)
