"""What torch asks a process group about itself: names, place, store, time-out, devices. No communication.

A process group written in Python takes the place of a whole mixed group ("cpu:ccl,cuda:nccl") in torch, which then
never makes the backends of the other devices. They are made here, when the first tensor of such a device arrives.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from effnn.base import InvalidInput, NotAvailable


class NamedGroup(dist.ProcessGroup):
    """A process group of torch that knows its place. The names of the methods are torch's own.

    store: shared by the ranks. It may outlive a group and serve its successor under the same keys (torchrun's does), so
    each group writes below a number: that of the groups that this rank has made on this store so far.
    """

    NAME: str

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta):
        super().__init__(rank, size)
        number = store.add(f"effnn_{self.NAME}_groups_of_rank_{rank}", 1)
        self._store = dist.PrefixStore(f"effnn_{self.NAME}_{number}/", store)
        self._rank, self._size, self._timeout = rank, size, timeout.total_seconds()
        self._name = self._description = ""

    def getBackendName(self) -> str:  # noqa: N802
        return self.NAME

    def _get_backend_name(self) -> str:
        return self.NAME

    def getRank(self) -> int:  # noqa: N802
        return self._rank

    def getSize(self) -> int:  # noqa: N802
        return self._size

    def setGroupName(self, name: str) -> None:  # noqa: N802
        self._name = name

    def getGroupName(self) -> str:  # noqa: N802
        return self._name

    def setGroupDesc(self, description: str) -> None:  # noqa: N802
        self._description = description

    def getGroupDesc(self) -> str:  # noqa: N802
        return self._description

    def get_group_store(self) -> dist.Store:
        return self._store

    @property
    def _device_types(self) -> list[torch.device]:
        """The CPU, and the devices for which the configuration names another backend."""
        others = [device for device in configured(self) if device != "cpu"]
        return [torch.device(device) for device in ("cpu", *others)]

    @property
    def timeout(self) -> timedelta:
        """Time-out of a call that brings none of its own."""
        return timedelta(seconds=self._timeout)

    def set_timeout(self, timeout: timedelta) -> None:
        """Time-out of calls issued from now on."""
        self._timeout = timeout.total_seconds()

    def _set_default_timeout(self, timeout: timedelta) -> None:
        self.set_timeout(timeout)


def other_device_group(
    owner: dist.ProcessGroup, device: str, store: dist.Store, rank: int, size: int, timeout: timedelta
) -> dist.ProcessGroup:
    """Return a group for the tensors of another device.

    owner: the group in whose configuration the backend of that device is named.
    device: its type, such as "cuda".
    store, rank, size, timeout: as of any group.

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
