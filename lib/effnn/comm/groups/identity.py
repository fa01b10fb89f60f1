"""What torch asks a process group about itself: names, place, store, time-out, devices. No communication."""

from datetime import timedelta

import torch
import torch.distributed as dist

from effnn.comm.groups.other_devices import configured


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
