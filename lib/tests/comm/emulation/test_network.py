"""Emulated nodes: they talk at the rate asked, see nothing but each other, and leave nothing behind, however they end.

One test runs this whole file again as an ordinary user, so that the way without root's rights is held to the same.
"""

import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from effnn.base import InvalidInput, NotAvailable
from effnn.comm.emulation import namespaces, network
from effnn.comm.emulation.network import EmulatedNetwork, unavailable

REASON = unavailable()
possible = pytest.mark.skipif(REASON is not None, reason=f"no emulated nodes: {REASON}")
ROOT = os.geteuid() == 0
NOBODY = 65534

ECHO = """
import socket, sys
server = socket.create_server((sys.argv[1], 0))
server.settimeout(20)
print(server.getsockname()[1], flush=True)
peer, (address, _) = server.accept()
while data := peer.recv(1 << 16):
    peer.sendall(data[:1])
print(address)
"""
SAY = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 20) as peer:
    for _ in range(5):
        peer.sendall(b"x")
        assert peer.recv(1) == b"x"
"""
OWNER = """
import json, os, sys, time
from effnn.comm.emulation.network import EmulatedNetwork
print("ready", flush=True)
with EmulatedNetwork(int(sys.argv[1]), rate_mbit=None) as net:
    print(json.dumps([os.readlink(f"/proc/{node.pid}/ns/net") for node in net.nodes]), flush=True)
    time.sleep(60)
"""


def python_in(node, code, *arguments):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*node.prefix, sys.executable, "-c", code, *map(str, arguments)], **pipes)


def address_seen(client, server):
    """Five small messages there and back; returns the client's address as the server saw it."""
    listener = python_in(server, ECHO, server.address)
    speaker = python_in(client, SAY, server.address, listener.stdout.readline().strip())
    assert speaker.wait(20) == 0, speaker.communicate()
    return listener.communicate(timeout=300)[0].strip()


def processes_in(spaces):
    """Processes that keep one of these network namespaces (texts such as net:[4026532178]) open."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found += [folder.name] if os.readlink(folder / "ns/net") in spaces else []
        except OSError:  # another user's, or gone in between
            continue
    return found


def holders(owner):
    """Holder processes of the networks that process `owner` opened."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        found += [folder.name] if f"effnn-node-of-{owner}".encode() in words else []
    return found


def machine():
    """What the machine's own network shows: interfaces, named namespaces, and mounted ones."""
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if " nsfs " in line]
    named = sorted(os.listdir("/run/netns")) if Path("/run/netns").is_dir() else []
    return sorted(os.listdir("/sys/class/net")), named, mounts


def spaces_of(net):
    return [os.readlink(f"/proc/{node.pid}/ns/net") for node in net.nodes]


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def fresh():
    """Forget what unavailable() found, before and after."""
    network._way_in.cache_clear()
    yield
    network._way_in.cache_clear()


@pytest.fixture(scope="module")
def two():
    """Two unshaped nodes for the tests that change nothing about them."""
    if REASON:
        pytest.skip(REASON)
    with EmulatedNetwork(2, rate_mbit=None) as net:
        yield net


def test_two_nodes_talk(two):
    first, second = two.nodes
    assert address_seen(first, second) == first.address
    assert address_seen(second, first) == second.address


def test_ranks_of_one_node_talk(two):
    assert address_seen(two.nodes[0], two.nodes[0]) == two.nodes[0].address


def test_a_process_sees_its_node_alone_and_ends_as_usual(two):
    code = "import socket, sys; print([name for _, name in socket.if_nameindex()]); sys.exit(3)"
    for node in two.nodes:
        process = python_in(node, code)
        assert process.communicate(timeout=300)[0].strip() == str(["lo", node.interface])
        assert process.returncode == 3
    sleeper = python_in(two.nodes[0], "import time; print('up', flush=True); time.sleep(60)")
    sleeper.stdout.readline()
    sleeper.kill()
    assert sleeper.wait(5) == -signal.SIGKILL


@possible
def test_the_rate_is_the_one_asked():
    for _ in range(3):  # a busy machine may disturb one measurement
        with EmulatedNetwork(2, rate_mbit=200) as net:
            about = net.describe()
        if abs(about["measured_mbit"] / (0.957 * 200) - 1) < 0.15:
            break
    else:
        pytest.fail(f"three links in a row are off: {about}")
    assert about["nodes"] == 2 and about["rate_mbit"] == 200 and about["burst_bytes"] == 65536
    assert about["rootless"] or ROOT
    json.dumps(about)


def test_without_a_limit_the_link_is_much_faster(two):
    assert two.measured_mbit > 3 * 200
    assert two.describe()["burst_bytes"] is None


def test_tx_bytes_counts_what_was_sent(two):
    first, second = two.nodes
    before, back = first.tx_bytes(), second.tx_bytes()
    sent = 20_000_000
    listener = python_in(second, network.RECEIVE, second.address, 1, sent, 20)
    port = listener.stdout.readline().strip()
    assert python_in(first, network.SEND, second.address, port, sent, 20).wait(30) == 0
    assert listener.wait(20) == 0
    assert sent < first.tx_bytes() - before < 1.06 * sent
    assert second.tx_bytes() - back < 0.05 * sent  # acknowledgements alone
    inside = subprocess.run([*first.prefix, "cat", "/proc/net/dev"], capture_output=True, text=True).stdout
    assert str(first.tx_bytes()) in inside


@possible
def test_three_nodes_reach_each_other():
    with EmulatedNetwork(3, rate_mbit=None) as net:
        assert len(net.nodes) == len({node.address for node in net.nodes}) == 3
        for client in net.nodes:
            for server in net.nodes:
                if client != server:
                    assert address_seen(client, server) == client.address


@possible
@pytest.mark.parametrize("count", [2, 3])
def test_nothing_is_left_after_the_block(count):
    before, processes = machine(), holders(os.getpid())
    with EmulatedNetwork(count, rate_mbit=None) as net:
        spaces, node = spaces_of(net), net.nodes[0]
        assert len(set(spaces)) == count and os.readlink("/proc/self/ns/net") not in spaces
        assert machine() == before, "the machine's own network was touched"
        assert len(holders(os.getpid())) >= len(processes) + count
    assert net.nodes == ()
    assert processes_in(spaces) == [] and machine() == before and holders(os.getpid()) == processes
    with pytest.raises(NotAvailable, match="closed"):
        node.tx_bytes()


@possible
def test_nothing_is_left_after_an_exception():
    with pytest.raises(ZeroDivisionError), EmulatedNetwork(2, rate_mbit=None) as net:
        spaces = spaces_of(net)
        _ = 1 / 0
    assert processes_in(spaces) == []


@possible
@pytest.mark.parametrize("count", [2, 3])
def test_nothing_is_left_when_the_owner_is_killed(count):
    before = machine()
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(count)], stdout=subprocess.PIPE, text=True)
    owner.stdout.readline()
    spaces = json.loads(owner.stdout.readline())
    assert len(processes_in(spaces)) == count and holders(owner.pid)
    owner.kill()
    owner.wait()
    assert wait_until(lambda: not processes_in(spaces) and not holders(owner.pid))
    assert machine() == before


@possible
@pytest.mark.parametrize("seconds", [0.02, 0.12])
def test_nothing_is_left_when_the_owner_is_killed_during_set_up(seconds):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, "3"], stdout=subprocess.PIPE, text=True)
    owner.stdout.readline()
    time.sleep(seconds)
    owner.kill()
    owner.wait()
    assert wait_until(lambda: not holders(owner.pid))


@possible
def test_two_networks_at_once_are_strangers():
    with EmulatedNetwork(2, rate_mbit=None) as one, EmulatedNetwork(2, rate_mbit=None) as other:
        assert not set(spaces_of(one)) & set(spaces_of(other))
        before = [node.tx_bytes() for node in other.nodes]
        assert address_seen(*one.nodes) == one.nodes[0].address
        assert [node.tx_bytes() for node in other.nodes] == pytest.approx(before, abs=2000)
        with pytest.raises(InvalidInput, match="open already"):
            one.__enter__()
    with EmulatedNetwork(2, rate_mbit=None) as again, one:
        assert address_seen(*again.nodes) and address_seen(*one.nodes)


@possible
@pytest.mark.skipif(not ROOT, reason="only root makes named namespaces")
def test_namespaces_of_others_stay():
    name = f"foreign-{os.getpid()}"
    namespaces.Namespace(os.getpid(), ()).run("ip", "netns", "add", name)
    try:
        inode = os.stat(f"/run/netns/{name}").st_ino
        with EmulatedNetwork(2, rate_mbit=None):
            pass
        assert os.stat(f"/run/netns/{name}").st_ino == inode
    finally:
        namespaces.Namespace(os.getpid(), ()).run("ip", "netns", "delete", name)


@possible
@pytest.mark.skipif(not ROOT, reason="run as an ordinary user already")
def test_all_of_this_without_the_rights_of_root(tmp_path):
    site = Path(importlib.util.find_spec("pytest").origin).parents[1]
    library = Path(network.__file__).parents[2]
    environment = {
        "PYTHONPATH": f"{site}:{library}",
        "PATH": "/usr/local/bin:/usr/bin:/bin",  # without sbin, as Debian's users have it
        "HOME": "/nonexistent",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    as_nobody = {"user": NOBODY, "group": NOBODY, "extra_groups": [], "env": environment, "cwd": "/"}
    as_nobody |= {"capture_output": True, "text": True, "timeout": 300}
    for python in (sys.executable, "/usr/bin/python3"):  # the environment's may lie in a folder of root's own
        try:
            if subprocess.run([python, "-c", "import pytest, torch, effnn.base"], **as_nobody).returncode == 0:
                break
        except OSError:
            continue
    else:
        pytest.skip("an ordinary user can run no Python that has torch here")
    check = "import effnn.comm.emulation.network as n; print(n.unavailable())"
    reason = subprocess.run([python, "-c", check], **as_nobody).stdout.strip()
    if reason != "None":
        pytest.skip(f"no emulated nodes for an ordinary user: {reason}")
    words = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "-c", "/dev/null", __file__]
    done = subprocess.run(words, **as_nobody)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout and "failed" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nodes": 1}, "2 to 200"),
        ({"nodes": 201}, "2 to 200"),
        ({"rate_mbit": 0}, "rate_mbit"),
        ({"rate_mbit": -5}, "rate_mbit"),
        ({"rate_mbit": float("nan")}, "rate_mbit"),
        ({"rate_mbit": float("inf")}, "None for no limit"),
        ({"burst_bytes": 1500}, "packet"),
        ({"latency_ms": 0}, "latency_ms"),
    ],
)
def test_values_that_make_no_sense(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        EmulatedNetwork(**arguments)


def test_the_default_burst_is_a_segment_or_a_millisecond():
    assert EmulatedNetwork(rate_mbit=50).burst_bytes == 65536
    assert EmulatedNetwork(rate_mbit=1000).burst_bytes == 125_000
    assert EmulatedNetwork(rate_mbit=1000, burst_bytes=8000).burst_bytes == 8000


def test_a_rate_that_is_missed_is_reported(caplog):
    net = EmulatedNetwork(rate_mbit=200)
    net.measured_mbit = 175.0
    net._check_rate()
    assert caplog.text == ""
    net.measured_mbit = 170.0
    with caplog.at_level(logging.WARNING):
        net._check_rate()
    assert "170.0 Mbit/s instead of 191.4" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system is the reason")
@pytest.mark.parametrize("missing", namespaces.PACKAGES)
def test_a_missing_program_is_named(missing, fresh, monkeypatch, tmp_path):
    for name in namespaces.PACKAGES.keys() - {missing}:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(namespaces, "ADMIN_FOLDERS", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert f"the program {missing} is missing; install the package" in unavailable()
    with pytest.raises(NotAvailable, match=missing), EmulatedNetwork():
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system is the reason")
def test_an_empty_path_is_explained():
    code = "from effnn.comm.emulation import network; print(network.unavailable())"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PATH": ""}, capture_output=True, text=True)
    assert any(f"the program {name} is missing" in done.stdout for name in namespaces.PACKAGES), done


def test_other_systems_are_told(fresh, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "Linux has and darwin has not" in unavailable()


@possible
@pytest.mark.parametrize(
    ("name", "script", "message"),
    [
        ("tc", "echo 'Error: Specified qdisc kind is unknown.' >&2; exit 2", "kind is unknown.*module sch_tbf"),
        ("tc", "exec sleep 30", "`tc qdisc add .*` did not end within 0.5 s"),
        ("ip", "echo 'Error: Unknown device type.' >&2; exit 2", "Unknown device type.*module veth"),
        ("unshare", "echo 'unshare: no such luck' >&2; exit 1", "not permitted here .unshare: no such luck.; .*root"),
    ],
)
def test_what_the_kernel_refuses_is_explained_and_cleared(name, script, message, fresh, monkeypatch, tmp_path):
    (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(namespaces, "LIMIT_S", 0.5)
    before = holders(os.getpid())
    with pytest.raises(NotAvailable, match=message), EmulatedNetwork():
        pass
    assert holders(os.getpid()) == before


@possible
@pytest.mark.skipif(not ROOT or not shutil.which("setpriv"), reason="needs root and setpriv to take the rights away")
def test_a_setting_that_forbids_is_named():
    """In a user namespace of the test's own, where the setting may be changed without the machine noticing."""
    code = "from effnn.comm.emulation import network; print(network.unavailable())"
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set -all "$@"'
    words = ["unshare", "-U", "-r", "sh", "-c", forbid, "sh", sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert "an administrator allows them with `sysctl user.max_user_namespaces=" in done.stdout, done
