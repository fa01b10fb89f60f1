"""oneCCL's library: where it is found, what it is told, what its errors become; and the interface that ranks use."""

import ctypes
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.backends import need
from workers import units as workers

from effnn.base import NotAvailable
from effnn.comm import launch
from effnn.comm.groups import interfaces
from effnn.comm.groups.lane.call import CollectiveFailed, LibraryError
from effnn.comm.groups.oneccl import library as oneccl_library
from effnn.comm.groups.oneccl.library import Communicator, Library

# Where it is found


class Listed:
    """An entry of a wheel's list of files."""

    def __init__(self, path):
        self.path, self.name = path, path.name

    def locate(self):
        return self.path


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A stand-in for the installed wheel: files made in a folder, listed as "a/../lib/name" as pip does."""
    folder = tmp_path / "lib"
    (tmp_path / "a").mkdir()
    folder.mkdir()

    def install(names):
        for name in names:
            (folder / name).touch()
        listed = [Listed(tmp_path / "a" / ".." / "lib" / name) for name in ["other.txt", *names]]
        monkeypatch.setattr(importlib.metadata, "files", lambda package: listed)
        return folder

    monkeypatch.setattr(oneccl_library.sys, "platform", "linux")
    monkeypatch.setattr(oneccl_library.platform, "machine", lambda: "x86_64")
    return install


def test_the_folder_comes_from_the_wheels_list_of_files(wheel):
    folder = wheel([*oneccl_library._LIBRARIES, oneccl_library._FABRIC])
    assert oneccl_library.library_folder() == folder.resolve()
    assert oneccl_library.unavailable() is None


def test_missing_libraries_are_named(wheel):
    wheel([name for name in oneccl_library._LIBRARIES if name not in ("libimf.so", "libsycl.so.9")])
    missing = "oneCCL is installed without libimf.so, libsycl.so.9, libfabric.so.1: pip install"
    assert oneccl_library.unavailable().startswith(missing)
    with pytest.raises(NotAvailable, match="without libimf.so, libsycl.so.9"):
        Library()


def test_a_wheel_without_the_library_or_without_a_list(wheel, monkeypatch):
    wheel(["libccl.so.9"])
    with pytest.raises(NotAvailable, match=r"has no libccl\.so\.2: pip install 'effnn\[ccl\]'"):
        oneccl_library.library_folder()
    monkeypatch.setattr(importlib.metadata, "files", lambda package: None)
    assert "has no libccl.so.2" in oneccl_library.unavailable()


def test_files_that_are_no_libraries_do_not_load(wheel, monkeypatch):
    wheel([*oneccl_library._LIBRARIES, oneccl_library._FABRIC])
    monkeypatch.setattr(oneccl_library, "_set_environment", lambda folder: None)
    with pytest.raises(NotAvailable, match=r"oneCCL does not load \(.*libintlc.*\): pip install"):
        Library()


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("win32", "AMD64"), ("linux", "aarch64")])
def test_other_platforms_are_told_which_ones_have_it(monkeypatch, system, machine):
    monkeypatch.setattr(oneccl_library.sys, "platform", system)
    monkeypatch.setattr(oneccl_library.platform, "machine", lambda: machine)
    assert (
        f"Linux on x86-64 only; this is {oneccl_library.platform.system()} on {machine}" in oneccl_library.unavailable()
    )


# What it is told


def test_variables_that_the_user_has_set_stay(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("CCL_", "FI_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(
        os, "environ", dict(os.environ, EFFNN_INTERFACE="veth7", CCL_LOG_LEVEL="info", FI_PROVIDER="shm")
    )
    oneccl_library._set_environment(tmp_path)
    assert os.environ["CCL_LOG_LEVEL"] == "info" and os.environ["FI_PROVIDER"] == "shm"
    assert os.environ["CCL_KVS_IFACE"] == os.environ["FI_TCP_IFACE"] == "veth7"
    assert os.environ["CCL_PLUGIN"] == "ONECCL_LEGACY_CPU" and os.environ["FI_PROVIDER_PATH"] == str(tmp_path)


def test_a_process_loads_the_library_with_the_users_variables():
    need("ccl")
    script = """
    import json, os
    from effnn.comm.groups.oneccl.library import library

    loaded = library()
    one, other = loaded.unique_id(), loaded.unique_id()
    assert len(one) == 4096 and one != other and library() is loaded
    print(json.dumps([loaded.version(), os.environ["CCL_LOG_LEVEL"], os.environ["CCL_ATL_TRANSPORT"]]))
    """
    environment = os.environ | {"CCL_LOG_LEVEL": "warn"}
    environment.pop("CCL_ATL_TRANSPORT", None)
    script = "\n".join(line.strip() for line in script.splitlines())
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr
    version, level, transport = json.loads(ran.stdout.splitlines()[-1])
    assert importlib.metadata.version("oneccl").startswith(version)
    assert (level, transport) == ("warn", "ofi")


# Its errors


def test_a_refused_call_becomes_an_error_and_ends_the_use_of_the_library():
    need("ccl")
    for refused, later in launch.run(workers.errors_of_the_library, 2, "ccl", timeout=300, group_timeout=20):
        assert refused.startswith("LibraryError: oneCCL: onecclAllReduce failed with status "), refused
        assert refused.rpartition(": ")[2], "the library's words are missing"
        assert later.startswith("CollectiveFailed: all_reduce of 2 ranks: oneCCL is not used any more"), later
        assert "onecclAllReduce failed" in later


class StandIn:
    """A C API that fails, and says why only in one of its two ways."""

    def __init__(self, last=None, general=b"unhandled system error"):
        self.last, self.general, self.asked = last, general, []

    def onecclGetLastError(self, handle):  # noqa: N802
        self.asked.append(handle)
        return self.last

    def onecclGetErrorString(self, status):  # noqa: N802
        return self.general

    def onecclAllReduce(self, *arguments):  # noqa: N802
        self.arguments = arguments
        return 3

    onecclCommFinalize = onecclGetUniqueId = onecclGetVersion = onecclCommInitRank = onecclAllReduce  # noqa: N815


@pytest.mark.parametrize(
    ("last", "general", "words"),
    [
        (b" no such type\n", b"not this", "no such type"),
        (None, b"unhandled system error", "unhandled system error"),
        (b"", b"in latin-1: \xe9", "in latin-1: \N{REPLACEMENT CHARACTER}"),
        (None, None, ""),
    ],
)
def test_an_error_carries_the_librarys_words(last, general, words):
    api = StandIn(last, general)
    library = object.__new__(Library)
    library._api = api
    handle = ctypes.c_void_p(77)
    communicator = Communicator(library, handle)
    with pytest.raises(LibraryError) as caught:
        communicator.call("AllReduce", 1, 2, 3)
    assert str(caught.value) == f"oneCCL: onecclAllReduce failed with status 3: {words}"
    assert api.asked == [handle] and api.arguments == (1, 2, 3, handle, None)
    calls = {
        "onecclCommFinalize": communicator.destroy,
        "onecclGetUniqueId": library.unique_id,
        "onecclGetVersion": library.version,
        "onecclCommInitRank": lambda: library.communicator(bytes(4096), 0, 2),
    }
    for name, call in calls.items():
        with pytest.raises(CollectiveFailed, match=f"{name} failed with status 3"):
            call()


# The interface


@pytest.fixture
def nothing_set(monkeypatch):
    for name in ("EFFNN_INTERFACE", "GLOO_SOCKET_IFNAME", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_interface_that_the_user_names_wins(nothing_set):
    assert interfaces.communication_interface() == interfaces.loopback()
    nothing_set.setenv("MASTER_ADDR", "127.0.0.1")
    assert interfaces.communication_interface() == interfaces.loopback()
    nothing_set.setenv("GLOO_SOCKET_IFNAME", "eth7,eth8")
    assert interfaces.communication_interface() == "eth7"
    nothing_set.setenv("EFFNN_INTERFACE", "veth0")
    assert interfaces.communication_interface() == "veth0"
    nothing_set.setenv("EFFNN_INTERFACE", "")
    assert interfaces.communication_interface() == "eth7"


def test_the_interface_towards_an_address(nothing_set):
    assert interfaces.interface_towards("127.0.0.1") == interfaces.loopback()
    nothing_set.setattr(socket.socket, "connect", lambda *_: (_ for _ in ()).throw(OSError("unreachable")))
    assert interfaces.interface_towards("192.0.2.77") is None
    nothing_set.setenv("MASTER_ADDR", "192.0.2.77")
    assert interfaces.communication_interface() == interfaces.loopback()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's table of routes")
def test_an_interface_is_found_by_its_address(nothing_set):
    assert interfaces.interface_of("127.0.0.1") == interfaces.loopback() == "lo"
    assert interfaces.interface_of("192.0.2.77") is None
    routes = Path("/proc/net/route").read_text().splitlines()[1:]
    default = [line.split()[0] for line in routes if line.split()[1] == "00000000"]
    if not default:
        pytest.skip("this machine has no route to others")
    assert interfaces.interface_towards("192.0.2.77") in default  # of the block for documentation: nobody has it
