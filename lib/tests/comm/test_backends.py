"""Names of backends: what is available, why not, who provides "ccl", and mixed configurations."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import textwrap
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from helpers.backends import need
from workers import units as workers

from effnn.base import InvalidInput, NotAvailable
from effnn.comm import backends, launch
from effnn.comm.groups import identity, mpi
from effnn.comm.groups.oneccl import library as oneccl_library

EXTRA = r"pip install 'effnn\[ccl\]'"
ENDED = timedelta(seconds=20)


@pytest.fixture
def nothing_built(monkeypatch):
    """A torch with neither MPI nor nccl."""
    monkeypatch.setattr(dist, "is_mpi_available", lambda: False)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)


@pytest.fixture
def our_ccl(monkeypatch):
    """Nobody else provides "ccl"."""
    monkeypatch.setattr(backends, "ccl_provider", lambda: "effnn")


# What is available here


def test_every_backend_is_had_or_refused_in_one_sentence():
    for name in backends.BACKENDS:
        for device in (None, "cpu", "cuda"):
            reason = backends.unavailable(name, device)
            assert reason is None or (isinstance(reason, str) and reason and "\n" not in reason)
            assert (name in backends.available(device)) == (reason is None)
    assert backends.unavailable("gloo") is None and "gloo" in backends.available("cpu")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InvalidInput, match="'glue': expected one of gloo, mpi, mpi4py, ccl, nccl"):
        backends.unavailable("glue")


def test_a_device_that_a_backend_does_not_take(monkeypatch, our_ccl):
    monkeypatch.setattr(oneccl_library, "unavailable", lambda: None)
    monkeypatch.setattr(mpi, "unavailable", lambda: None)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends.unavailable("ccl", "cuda") == "ccl takes cpu tensors only"
    assert backends.unavailable("mpi4py", "cuda") == "mpi4py takes cpu tensors only"
    assert backends.unavailable("nccl", "cpu") == "nccl takes cuda tensors only"
    assert backends.unavailable("gloo", "meta") == "gloo takes cpu and cuda tensors only"
    assert backends.unavailable("gloo", "cuda") is None is backends.unavailable("nccl", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.unavailable("gloo", "cuda") == backends.unavailable("nccl") == "no CUDA device on this machine"


def test_what_torch_was_built_without(nothing_built, monkeypatch):
    assert "built without MPI" in backends.unavailable("mpi")
    assert "built without nccl" in backends.unavailable("nccl")
    monkeypatch.setattr(dist, "is_gloo_available", lambda: False)
    assert "built without gloo" in backends.unavailable("gloo")
    monkeypatch.setattr(dist, "is_available", lambda: False)
    assert "built without torch.distributed" in backends.unavailable("ccl")


def test_ccl_on_another_platform(monkeypatch, our_ccl):
    monkeypatch.setattr(oneccl_library.platform, "machine", lambda: "aarch64")
    assert "Linux on x86-64 only; this is" in backends.unavailable("ccl")
    assert "aarch64" in backends.unavailable("ccl")
    monkeypatch.undo()
    monkeypatch.setattr(oneccl_library.sys, "platform", "darwin")
    assert "Linux on x86-64 only" in oneccl_library.unavailable()


def test_ccl_without_its_package(monkeypatch, our_ccl):
    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(oneccl_library.sys, "platform", "linux")
    monkeypatch.setattr(oneccl_library.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(importlib.metadata, "files", files)
    reason = backends.unavailable("ccl", "cpu")
    assert reason.startswith("the oneccl package is not installed: pip install 'effnn[ccl]'")
    with pytest.raises(NotAvailable, match=f"ccl: the oneccl package is not installed: {EXTRA}"):
        backends.init_process_group("ccl", rank=0, world_size=1)
    assert not dist.is_initialized()


def test_mpi4py_without_its_package_or_a_launcher(monkeypatch):
    monkeypatch.setattr(mpi, "launcher", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    assert backends.unavailable("mpi4py").startswith("no mpiexec beside this Python or on the PATH: pip install 'effnn")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backends.unavailable("mpi4py").startswith("the mpi4py package is not installed: pip install 'effnn[ccl]'")


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("mpi", "mpi: this torch was built without MPI"),
        ("nccl", "nccl: this torch was built without nccl"),
        ("cpu:gloo,cuda:nccl", "cpu:gloo,cuda:nccl: this torch was built without nccl"),
        ("cpu:mpi,cuda:nccl", "built without MPI"),
    ],
)
def test_a_group_that_cannot_be_had_is_refused_with_the_sentence(nothing_built, backend, words):
    with pytest.raises(NotAvailable, match=words):
        backends.init_process_group(backend, rank=0, world_size=1)
    assert not dist.is_initialized()


# Groups of plain torch.distributed


def test_plain_torch_distributed_makes_our_groups_beside_gloos(tmp_path):
    need("ccl")
    for found in launch.run(workers.plain_torch, 2, None, args=(str(tmp_path),), timeout=300):
        is_ours = {name for name, (is_ours, _) in found.items() if is_ours}
        assert is_ours == {"ccl", "ccl again", "cpu:ccl,cuda:nccl", "cpu:ccl,cuda:nccl again", "ccl beside gloo"}
        assert len(found) == 9 and all(sums for _, sums in found.values()), found


def stand_in(folder, text):
    """A package oneccl_bindings_for_pytorch that is found before any other; returns the ranks' environment."""
    package = folder / "path" / backends.INTEL_BINDINGS
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(textwrap.dedent(text))
    return {"PYTHONPATH": os.pathsep.join([str(package.parent), *filter(None, sys.path)])}


def test_intels_bindings_serve_when_they_import(tmp_path):
    env = stand_in(
        tmp_path,
        """
        import torch.distributed as dist

        def create(store, rank, size, timeout):
            return dist.ProcessGroupGloo(store, rank, size, timeout)

        dist.Backend.register_backend("ccl", create, devices=["cpu"])
        """,
    )
    found = launch.run(workers.provider, 2, None, args=(str(tmp_path),), env=env, timeout=300)
    assert found == [(backends.INTEL_BINDINGS, False, True, None)] * 2


def test_our_own_binding_serves_when_intels_does_not_import(tmp_path):
    need("ccl")
    env = stand_in(
        tmp_path,
        """
        import os

        if os.environ["RANK"] == "0":
            raise ImportError("undefined symbol: _ZN3c10")
        raise OSError("libccl.so.1: cannot open shared object file")
        """,
    )
    found = launch.run(workers.provider, 2, None, args=(str(tmp_path),), env=env, timeout=300)
    assert found == [("effnn", True, True, None)] * 2


def test_a_ccl_that_the_user_has_registered_is_left_alone(tmp_path):
    script = f"""
    import torch
    import torch.distributed as dist

    def create(store, rank, size, timeout):
        return dist.ProcessGroupGloo(store, rank, size, timeout)

    dist.Backend.register_backend("ccl", create, devices=["cpu"])
    before = dict(dist.Backend.default_device_backend_map)
    from effnn.comm import backends

    assert dist.Backend._plugins["CCL"].creator_fn is create
    assert backends.ccl_provider() == "__main__" and backends.unavailable("ccl", "cpu") is None
    assert dist.Backend.default_device_backend_map == before  # torch's own choice of a backend stays
    backends.init_process_group("ccl", init_method="file://{tmp_path}/meeting", rank=0, world_size=1)
    tensor = torch.ones(2)
    dist.all_reduce(tensor)
    assert tensor.tolist() == [1, 1] and dist.get_backend() == "ccl"
    dist.destroy_process_group()
    del dist.Backend._plugins["CCL"]
    assert backends.ccl_provider() is None
    backends.register()
    assert backends.ccl_provider() == "effnn"
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr


# Tensors of another device


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """What became of calls on tensors of another device in two ranks: (configuration -> call -> error), groups made."""
    need("ccl")
    folder = str(tmp_path_factory.mktemp("mixed"))
    return launch.run(workers.mixed_devices, 2, None, args=(folder,), timeout=300)


def test_tensors_of_another_device_need_a_backend_of_their_own(mixed):
    for found, _ in mixed:
        hint = r"InvalidInput: ccl runs on CPU tensors; for meta tensors name a backend as well, as in"
        assert found["ccl"]["broadcast"].startswith(hint)
        assert found["cpu:ccl,meta:nothing"]["broadcast"].startswith("NotAvailable: nothing: no such backend")
        if not dist.is_nccl_available():
            assert found["cpu:ccl,meta:nccl"]["broadcast"].startswith(
                "NotAvailable: nccl: this torch was built without"
            )
        assert found["cpu:ccl,meta:fake"]["broadcast"] is None
        assert all(calls["sums"] for calls in found.values())  # on the CPU it goes on


@pytest.mark.parametrize("call", list(workers.ON_ANOTHER_DEVICE))
def test_the_backend_that_a_configuration_names_for_a_device_gets_its_tensors(mixed, call):
    for found, _ in mixed:
        assert found["cpu:ccl,meta:recorder"][call] is None


def test_the_other_backend_is_made_once_and_only_when_it_is_used(mixed):
    for rank, (found, made) in enumerate(mixed):
        assert found["cpu:ccl,meta:recorder"]["made before"] == 0
        assert made == [(rank, 2)]


class Owner:
    def getBackendName(self):  # noqa: N802
        return "ccl"


def test_a_group_for_another_device(monkeypatch, nothing_built):
    made = []

    def with_options(options, more):
        made.append((options.group_rank, options.group_size, options.timeout, more))
        return workers.FakeProcessGroup._create_internal(options.group_rank, options.group_size)

    monkeypatch.setitem(dist.Backend._plugins, "EXTENDED", dist.Backend._BackendPlugin(with_options, True))
    monkeypatch.setattr(identity, "configured", lambda owner: {"cuda": "nccl", "xpu": "xccl", "meta": "extended"})
    arguments = dist.HashStore(), 0, 2, ENDED
    with pytest.raises(NotAvailable, match="nccl: this torch was built without it; install a CUDA build"):
        identity.other_device_group(Owner(), "cuda", *arguments)
    with pytest.raises(NotAvailable, match="xccl: no such backend is registered"):
        identity.other_device_group(Owner(), "xpu", *arguments)
    with pytest.raises(InvalidInput, match=r"for mps tensors name a backend as well, as in .*cpu:ccl,cuda:nccl"):
        identity.other_device_group(Owner(), "mps", *arguments)
    group = identity.other_device_group(Owner(), "meta", *arguments)
    assert made == [(0, 2, ENDED, None)]
    assert group.allreduce([torch.ones(3, device="meta")]).wait()
