"""The rest of a mixed configuration: in "cpu:ccl,cuda:nccl", the NCCL part.

A process group written in Python takes the place of the whole mixed group in torch, which then never makes the backends
of the other devices. They are made here, when the first tensor of such a device comes along.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from effnn.base import InvalidInput, NotAvailable


def other_device_group(
    owner: dist.ProcessGroup, device: str, store: dist.Store, rank: int, size: int, timeout: timedelta
) -> dist.ProcessGroup:
    """Return a group over the backend that the configuration of `owner` names for `device`.

    Raises InvalidInput when it names none, NotAvailable when this torch was built without it.
    """
    named = configured(owner)
    if device not in named:
        raise InvalidInput(
            f"{owner.getBackendName()} runs on CPU tensors; for {device} tensors name a backend as well, as in "
            f"init_process_group('cpu:{owner.getBackendName()},cuda:nccl')"
        )
    group = dist.ProcessGroup(store, rank, size)
    backend, kind = _backend(named[device], dist.PrefixStore(f"{device}/", store), rank, size, timeout)
    group._set_default_backend(kind)
    group._register_backend(torch.device(device), kind, backend)
    return group


def configured(owner: dist.ProcessGroup) -> dict[str, str]:
    """Device type -> name of the backend, as the group was asked for."""
    text = str(c10d._world.pg_backend_config.get(owner, ""))
    return dict(part.split(":", 1) for part in text.split(",") if ":" in part)


def _backend(name: str, store: dist.Store, rank: int, size: int, timeout: timedelta):
    kinds = dist.ProcessGroup.BackendType
    if name == "nccl":
        if not dist.is_nccl_available():
            raise NotAvailable("nccl: this torch was built without it; install a CUDA build of torch")
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options), kinds.NCCL
    if name == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, timeout), kinds.GLOO
    plugin = dist.Backend._plugins.get(name.upper())
    if plugin is None:
        raise NotAvailable(f"{name}: no such backend is registered with torch.distributed")
    if not plugin.extended_api:
        return plugin.creator_fn(store, rank, size, timeout), kinds.CUSTOM
    options = c10d._DistributedBackendOptions()
    options.store, options.group_rank, options.group_size, options.timeout = store, rank, size, timeout
    return plugin.creator_fn(options, None), kinds.CUSTOM
