"""What the ranks of test_waiting.py run."""

import os
import threading
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist

from effnn.comm.groups.oneccl import waiting


def threads_of_the_library(size=None):
    """Cores of the threads that making a ccl group adds and ties to one core each; names of oneCCL's variables.

    size: of the group, which has the first ranks; None for all.
    """
    before = set(os.listdir("/proc/self/task"))
    size = size or dist.get_world_size()
    group = dist.new_group(range(size), backend="ccl")
    if dist.get_rank() < size:
        tensor = torch.full((1000,), float(dist.get_rank() + 1))
        dist.all_reduce(tensor, group=group)
        assert tensor.tolist() == [size * (size + 1) / 2] * 1000
    added = [int(thread) for thread in set(os.listdir("/proc/self/task")) - before]
    masks = [os.sched_getaffinity(thread) for thread in added]
    dist.barrier()
    return [core for mask in masks for core in mask if len(mask) == 1], [n for n in os.environ if n.startswith("CCL_")]


def answers(sleepers):
    """Sums of many sizes and types over ranks of which `sleepers` sleep and the others wait actively, as checksums."""
    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ["EFFNN_LOCAL_RANKS"] = "1000000" if rank in sleepers else "1"
    group = dist.new_group(backend="ccl")
    found = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64):
        for numel in (1, 7, 1000, 70_001, 1 << 19):
            values = torch.randn(numel, generator=torch.Generator().manual_seed(numel + rank)) * 100
            tensor = values.to(dtype, copy=True)
            dist.all_reduce(tensor, group=group)
            gathered = torch.empty(numel * size, dtype=dtype)
            dist.all_gather_into_tensor(gathered, values.to(dtype), group=group)
            exact = torch.zeros(numel, dtype=torch.float64)
            for part in gathered.view(size, numel):
                exact += part.double()
            rounding = 8.0 if dtype == torch.bfloat16 else 1e-3  # sums of three numbers of up to about 500
            worst = float((tensor.double() - exact).abs().max())
            assert worst < rounding, (dtype, numel, worst)
            found.append(zlib.crc32(tensor.view(torch.uint8).numpy().tobytes()))
    dist.barrier()
    return found


def checksums(sizes):
    """Checksums of sums of random numbers, which tell the order of addition; sizes in bytes."""
    found = []
    for size in sizes:
        tensor = torch.randn(size // 4, generator=torch.Generator().manual_seed(size + dist.get_rank()))
        dist.all_reduce(tensor)
        found.append(zlib.crc32(tensor.numpy().tobytes()))
    return found


def threads_while_idle(looks=20):
    """What the other threads do while the rank is idle.

    Whether each is the library's worker, in how many looks it was running, and how often it woke up meanwhile.
    """
    dist.all_reduce(torch.ones(1000))
    time.sleep(0.5)
    mine, found = str(threading.get_native_id()), []
    for _ in range(looks):
        found.append({thread: look_at(thread) for thread in os.listdir("/proc/self/task") if thread != mine})
        time.sleep(0.1)
    dist.barrier()
    return [
        (
            waiting.is_worker(int(thread)),
            sum(look[thread][0] == "R" for look in found),
            found[-1][thread][1] - found[0][thread][1],
        )
        for thread in set(found[0]).intersection(*found)
    ]


def look_at(thread):
    """State of a thread (R: it runs or wants to), and how often it has gone to sleep."""
    lines = Path(f"/proc/self/task/{thread}/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return values["State"].split()[0], int(values["voluntary_ctxt_switches"])


def unequal_sizes(numel):
    """Name and text of the error of an all_reduce to which every rank brings another size; then of the next one."""
    found = "none", ""
    try:
        dist.all_reduce(torch.ones(numel * (dist.get_rank() + 1)))
        time.sleep(1)
        dist.all_reduce(torch.ones(numel))
    except Exception as error:
        found = type(error).__name__, str(error)
        time.sleep(8)  # the others come to their time-out before this rank leaves
    return found
