"""One way to make a process group for every backend, or to learn in one sentence why it is not available here.

The names: gloo and nccl (torch's own), mpi (torch's own, only in a torch built with MPI), mpi4py (ours, over mpi4py)
and ccl (oneCCL: Intel's oneccl_bindings_for_pytorch when it imports, our own binding of the `oneccl` wheel otherwise).
Importing `effnn.comm` registers ccl and mpi4py with torch, so that plain
`torch.distributed.init_process_group("ccl")` and `"cpu:ccl,cuda:nccl"` work as well.
"""

import importlib
import importlib.util
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from effnn.base import InvalidInput, NotAvailable

BACKENDS = ("gloo", "mpi", "mpi4py", "ccl", "nccl")
"""Every backend that this room knows, CPU ones first."""

DEVICES = {"gloo": ("cpu", "cuda"), "mpi": ("cpu", "cuda"), "mpi4py": ("cpu",), "ccl": ("cpu",), "nccl": ("cuda",)}
"""Devices whose tensors a backend can take, where everything is installed."""

INTEL_BINDINGS = "oneccl_bindings_for_pytorch"

DEFAULT_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class Refusal:
    """Why a backend is not available, in one sentence. built: whether it is here, and only lacks a device."""

    reason: str
    built: bool = False


def refusal(backend: str, device: str | None = None, ranks: int = 1) -> Refusal | None:
    """Return why a backend is not available here; None if it is.

    device: also ask whether it takes this machine's tensors of that device ("cpu" or "cuda"). ranks: how many of them
    are to run on this machine. Raises InvalidInput for a name that is not in BACKENDS.
    """
    if backend not in BACKENDS:
        raise InvalidInput(f"backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    if not dist.is_available():
        return Refusal("this torch was built without torch.distributed")
    reason = _REASONS[backend]()
    if reason is not None:
        return Refusal(reason)
    devices = DEVICES[backend]
    if (device == "cuda" and device in devices or devices == ("cuda",)) and not torch.cuda.is_available():
        return Refusal("no CUDA device on this machine", built=True)
    if device is not None and device not in devices:
        return Refusal(f"{backend} takes {' and '.join(devices)} tensors only", built=True)
    if ranks > 1 and backend == "nccl" and torch.cuda.device_count() < ranks:
        return Refusal(
            f"nccl needs one GPU for each of the {ranks} ranks; this machine has {torch.cuda.device_count()}",
            built=True,
        )
    return None


def unavailable(backend: str, device: str | None = None) -> str | None:
    """Return the sentence of `refusal`, None if the backend is available."""
    found = refusal(backend, device)
    return None if found is None else found.reason


def available(device: str | None = None) -> list[str]:
    """Names of the backends that are available here (for tensors of `device`)."""
    return [backend for backend in BACKENDS if unavailable(backend, device) is None]


def init_process_group(
    backend: str,
    init_method: str | None = None,
    rank: int = -1,
    world_size: int = -1,
    timeout: timedelta = DEFAULT_TIMEOUT,
    **options: object,
) -> None:
    """torch.distributed.init_process_group, with a clear refusal and with what MPI's launcher leaves out.

    backend: a name of BACKENDS, or a mixed configuration such as "cpu:ccl,cuda:nccl".
    init_method: where the ranks meet, as of torch.
    rank, world_size: by default from the environment (torchrun's RANK and WORLD_SIZE); for mpi4py, from MPI itself.
    timeout: of every call that brings none of its own.
    options: other arguments of torch's function.

    Raises NotAvailable with the sentence of `unavailable`.
    """
    register()
    ours = False
    for name in _names(backend):
        if name in BACKENDS:
            reason = unavailable(name)
            # Behind a group of ours a mixed configuration may name what is not here: it is made only when it is used.
            if reason is not None and not (ours and DEVICES[name] == ("cuda",)):
                raise NotAvailable(f"{backend}: {reason}")
        ours = ours or name == "mpi4py" or (name == "ccl" and ccl_provider() == "effnn")
    if backend == "mpi4py" and init_method is None and "MASTER_ADDR" not in os.environ:
        from effnn.comm.groups import mpi

        rank, world_size = mpi.rank_and_size()
        options["store"] = mpi.shared_store(timeout)
    dist.init_process_group(
        backend, init_method=init_method, rank=rank, world_size=world_size, timeout=timeout, **options
    )


def register() -> None:
    """Make "ccl" and "mpi4py" known to torch.distributed; done once, when `effnn.comm` is imported.

    Nothing is loaded by it but Intel's bindings, which register "ccl" themselves when they import.
    """
    if not dist.is_available():
        return
    if not _registered("mpi4py"):
        dist.Backend.register_backend("mpi4py", _mpi4py_group, devices=["cpu"])
    if not _registered("ccl"):
        import_intels_bindings()
    if not _registered("ccl"):
        dist.Backend.register_backend("ccl", _oneccl_group, devices=["cpu"])


def ccl_provider() -> str | None:
    """Who provides "ccl" in this process: "oneccl_bindings_for_pytorch", "effnn", another module's name, or None."""
    plugin = dist.Backend._plugins.get("CCL")
    if plugin is None:
        return None
    module = getattr(plugin.creator_fn, "__module__", "") or ""
    if module.startswith("effnn."):
        return "effnn"
    return INTEL_BINDINGS if INTEL_BINDINGS in module or _bindings_registered else module


_bindings_registered = False


def import_intels_bindings() -> bool:
    """Import oneccl_bindings_for_pytorch if it is installed and fits this torch; returns whether it registered ccl."""
    global _bindings_registered
    try:
        if importlib.util.find_spec(INTEL_BINDINGS) is None:
            return False
        importlib.import_module(INTEL_BINDINGS)
    except Exception:  # built for another torch: undefined symbols, missing libraries, anything
        dist.Backend._plugins.pop("CCL", None)  # what it may have registered before it failed
        return False
    _bindings_registered = _registered("ccl")
    return _bindings_registered


def _oneccl_group(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
    from effnn.comm.groups.oneccl.group import OneCCLProcessGroup

    return OneCCLProcessGroup(store, rank, size, _timeout(timeout))


def _mpi4py_group(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
    from effnn.comm.groups.mpi import MPIProcessGroup

    return MPIProcessGroup(store, rank, size, _timeout(timeout))


def _timeout(asked: timedelta) -> timedelta:
    """The time-out of a new group: torch gives a sub-group its default of half an hour, not that of the whole."""
    world = dist.group.WORLD
    if asked == dist.distributed_c10d.default_pg_timeout and hasattr(world, "timeout"):
        return world.timeout
    return asked


def _registered(name: str) -> bool:
    return name.upper() in dist.Backend._plugins


def _names(backend: str) -> list[str]:
    return [part.rpartition(":")[2] for part in backend.split(",")]


def _no_gloo() -> str | None:
    return None if dist.is_gloo_available() else "this torch was built without gloo"


def _no_nccl() -> str | None:
    return None if dist.is_nccl_available() else "this torch was built without nccl; a CUDA build of torch has it"


def _no_mpi() -> str | None:
    if dist.is_mpi_available():
        return None
    return "this torch was built without MPI; only one built from source on a machine with MPI has it (or take mpi4py)"


def _no_mpi4py() -> str | None:
    from effnn.comm.groups import mpi

    return mpi.unavailable()


def _no_ccl() -> str | None:
    if ccl_provider() not in (None, "effnn"):
        return None
    from effnn.comm.groups.oneccl import library

    return library.unavailable()


_REASONS = {"gloo": _no_gloo, "nccl": _no_nccl, "mpi": _no_mpi, "mpi4py": _no_mpi4py, "ccl": _no_ccl}
