"""Two or more emulated nodes on one Linux machine: network namespaces, joined by links of a chosen rate.

Processes started inside the nodes talk over real sockets, so that traffic meets a real bandwidth limit: what TASC's
two-node figures need. Latency of a real switch is not added, and all nodes share this machine's cores and memory.
Where the kernel refuses, unavailable() says why, and effnn.comm.emulation.link_model computes what cannot be measured.
"""

import functools
import logging
import platform
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from effnn.base import InvalidInput, NotAvailable
from effnn.comm.emulation.link_model import TCP_EFFICIENCY
from effnn.comm.emulation.namespaces import PACKAGES, Namespace, NotPermitted, open_namespaces, program

logger = logging.getLogger(__name__)

# One packet is up to 1514 bytes (Ethernet). The filter drops what is larger than its bucket, and tc rounds that down.
MIN_BURST_BYTES = 1600
GSO_BYTES = 65536  # the kernel hands TCP over in segments of up to this
MAX_NODES = 200
MIN_RATE_MBIT = 0.1  # slower, and measuring alone takes a minute
MEASURE_S = 0.4  # long enough for a few per cent, short enough for every start

NO_VETH = "; the kernel must have veth (module veth)"
NO_BRIDGE = "; more than two nodes need the kernel's bridge (module bridge)"
NO_TBF = "; the kernel must have the token bucket filter (module sch_tbf, which `modprobe sch_tbf` loads)"

# Two programs run inside the nodes, in a Python of their own without site packages, to start within some 20 ms.
RECEIVE = """
import socket, sys, time
address, skip, total, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
server = socket.create_server((address, 0))
server.settimeout(limit)
print(server.getsockname()[1], flush=True)
peer, _ = server.accept()
peer.settimeout(limit)
buffer, got, start = bytearray(1 << 20), 0, None
while got < total:
    new = peer.recv_into(buffer)
    if not new:
        sys.exit(f"the sender stopped after {got} of {total} bytes")
    got += new
    if start is None and got >= skip:
        start, before = time.perf_counter(), got
print((got - before) * 8e-6 / max(time.perf_counter() - start, 1e-9))
"""
SEND = """
import socket, sys
address, port, left, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
with socket.create_connection((address, port), limit) as peer:
    while left > 0:
        left -= peer.send(bytes(min(left, 1 << 18)))
"""


@dataclass(frozen=True)
class Node:
    """One emulated node. address: IPv4; interface: its only one beside lo (for GLOO_SOCKET_IFNAME and the like).

    prefix: the words to put before a command so that it runs inside; such a process sees only this node's interfaces
    through the socket calls, while /sys still shows the machine's. pid: of the process that holds the node open.
    """

    name: str
    address: str
    interface: str
    prefix: tuple[str, ...]
    pid: int

    def tx_bytes(self) -> int:
        """Return the bytes that the interface has sent since the node was made; take differences.

        The kernel counts a large TCP segment with one header, however many packets it stands for, so the count is 0.3
        to 5 percent above the payload. It is the number of /sys/class/net/<interface>/statistics inside the node, read
        without starting a process. Raises NotAvailable after the network was closed.
        """
        try:
            for line in Path(f"/proc/{self.pid}/net/dev").read_text().splitlines():
                name, _, counters = line.partition(":")
                if name.strip() == self.interface:
                    return int(counters.split()[8])  # eight counters of receiving come first
        except OSError:
            pass
        raise NotAvailable(f"{self.name} has no interface {self.interface} any more: its network was closed")


class EmulatedNetwork:
    """Nodes joined by links of a chosen rate, for the length of a `with` block.

        with EmulatedNetwork(nodes=2, rate_mbit=200) as network:
            subprocess.run([*network.nodes[0].prefix, "python", "worker.py"], env=...)

    nodes: 2 are joined by one pair of interfaces, more by a bridge in a namespace of its own.
    rate_mbit: Mbit/s that each node may send (what it receives is limited by its peers); None leaves the links as fast
      as the machine. TCP/IP headers take 4 percent: a plain socket gets 0.957 of it.
    burst_bytes: what may pass at once after a pause, at machine speed. Small bursts cut the rate short, as the kernel
      must split segments of 64 kB and wake up for each refill: at 1 Gbit/s a burst of 8 kB passes 680 to 750 Mbit/s on
      a busy machine, and one of 1.6 kB some 500 on a quiet one. Large ones flatter short messages: all of 128 kB passes
      at no cost, worth 21 ms at 50 Mbit/s. None takes the larger of 64 kB and 1 ms of the rate.
    latency_ms: how long a packet may wait in the sender's queue before packets are dropped; no delay is added.

    Within the block: `nodes` (tuple of Node), `measured_mbit` (a plain TCP socket from the first node to the second,
    measured on entering; a warning is logged when it is off by more than 10 percent), `rootless` (opened without
    root's rights, see namespaces.py; programs in the nodes then see themselves as root).

    Whatever way the block is left, and if this process is killed, the nodes end; a process that still runs in a node
    keeps that node's namespace until it ends, so end your processes first.

    Raises InvalidInput for values that make no sense, and on entering NotAvailable with unavailable()'s sentence.
    """

    def __init__(
        self,
        nodes: int = 2,
        rate_mbit: float | None = 200.0,
        burst_bytes: int | None = None,
        latency_ms: float = 50.0,
    ):
        if not 2 <= nodes <= MAX_NODES:
            raise InvalidInput(f"nodes is {nodes}: a network has 2 to {MAX_NODES} of them")
        if rate_mbit is not None and not MIN_RATE_MBIT <= rate_mbit < float("inf"):
            raise InvalidInput(f"rate_mbit is {rate_mbit}: give at least {MIN_RATE_MBIT}, or None for no limit")
        if burst_bytes is not None and burst_bytes < MIN_BURST_BYTES:
            raise InvalidInput(
                f"burst_bytes is {burst_bytes}: a packet needs {MIN_BURST_BYTES}, and a smaller one stops"
            )
        if not 0 < latency_ms < float("inf"):
            raise InvalidInput(f"latency_ms is {latency_ms}: give the milliseconds that a packet may wait, above 0")
        self.count, self.rate_mbit, self.latency_ms = nodes, rate_mbit, latency_ms
        self.burst_bytes = burst_bytes
        if rate_mbit is not None and burst_bytes is None:
            self.burst_bytes = max(GSO_BYTES, round(rate_mbit * 125))  # 1 Mbit/s is 125 bytes in a millisecond
        self.nodes: tuple[Node, ...] = ()
        self.measured_mbit: float | None = None
        self.rootless: bool | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "EmulatedNetwork":
        if self.nodes:
            raise InvalidInput("this network is open already; make another EmulatedNetwork for a second one")
        self.rootless, reason = _way_in()
        if reason is not None:
            raise NotAvailable(reason)
        with ExitStack() as stack:  # an error, or Ctrl-C, on the way closes what was opened so far
            nodes = _build(self, self.rootless, stack)
            self.measured_mbit = _measure(nodes[0], nodes[1], self)
            self._stack = stack.pop_all()
        self.nodes = nodes
        self._check_rate()
        return self

    def __exit__(self, *_: object) -> None:
        self.nodes = ()
        self._stack.close()

    def _check_rate(self) -> None:
        expected = TCP_EFFICIENCY * self.rate_mbit if self.rate_mbit is not None else self.measured_mbit
        if abs(self.measured_mbit - expected) > 0.1 * expected:
            logger.warning("the link passes %.1f Mbit/s instead of %.1f", self.measured_mbit, expected)

    def describe(self) -> dict:
        """Return what a result made here should record: nodes, Mbit/s asked and measured, bytes, ms, way in, kernel."""
        return {
            "nodes": self.count,
            "rate_mbit": self.rate_mbit,
            "measured_mbit": self.measured_mbit,
            "burst_bytes": self.burst_bytes,
            "latency_ms": self.latency_ms,
            "rootless": self.rootless,
            "kernel": platform.release(),
        }


def unavailable() -> str | None:
    """Return in one sentence why emulated nodes are not available here, or None if they can.

    Found by setting up two shaped nodes and removing them again (about 0.1 s), once per process.
    """
    return _way_in()[1]


@functools.cache
def _way_in() -> tuple[bool, str | None]:
    """(rootless, why nothing works): root's way is tried first, as it leaves the user's identity as it is."""
    if sys.platform != "linux":
        return False, f"emulated nodes are network namespaces, which Linux has and {sys.platform} has not"
    try:
        for name in PACKAGES:
            program(name)
    except NotAvailable as missing:
        return False, str(missing)
    refusals: list[NotAvailable] = []
    for rootless in (False, True):
        try:
            with ExitStack() as stack:
                _build(EmulatedNetwork(), rootless, stack)
            return rootless, None
        except NotAvailable as error:
            refusals.append(error)
    # What a namespace that did open then lacked says more than the refusal to open the other kind.
    inside = [error for error in refusals if not isinstance(error, NotPermitted)]
    return False, str((inside or refusals[-1:])[0])


def _build(network: EmulatedNetwork, rootless: bool, stack: ExitStack) -> tuple[Node, ...]:
    """Open the namespaces, join them and shape the links.

    Every command runs inside a namespace, so the machine's own network is never touched; and as the addresses are seen
    only inside, every network uses the same ones.
    """
    spaces = open_namespaces(network.count + (network.count > 2), rootless, stack)
    nodes = []
    if network.count == 2:
        _pair(spaces[0], "veth0", spaces[1], "veth1")
    else:
        switch = spaces.pop()
        switch.run("ip", "link", "add", "bridge0", "type", "bridge", hint=NO_BRIDGE)
        switch.run("ip", "link", "set", "bridge0", "up")
        for i, space in enumerate(spaces):
            _pair(space, f"veth{i}", switch, f"port{i}")
            switch.run("ip", "link", "set", f"port{i}", "master", "bridge0", "up")
    for i, space in enumerate(spaces):
        node = Node(f"node{i}", f"10.77.0.{i + 1}", f"veth{i}", space.prefix, space.pid)
        space.run("ip", "address", "add", f"{node.address}/24", "dev", node.interface)
        space.run("ip", "link", "set", "lo", "up")  # ranks of one node talk through it
        if network.rate_mbit is not None:
            _shape(space, node.interface, network)
        space.run("ip", "link", "set", node.interface, "up")
        nodes.append(node)
    return tuple(nodes)


def _pair(a: Namespace, name_a: str, b: Namespace, name_b: str) -> None:
    """A cable: what enters one interface leaves the other."""
    end = ("peer", "name", name_b, "netns", str(b.pid))
    a.run("ip", "link", "add", name_a, "type", "veth", *end, hint=NO_VETH)


def _shape(space: Namespace, interface: str, network: EmulatedNetwork) -> None:
    """Limit what the interface sends with a token bucket, tc-tbf(8)."""
    bits = round(network.rate_mbit * 1e6)
    limits = ("rate", f"{bits}bit", "burst", str(network.burst_bytes), "latency", f"{network.latency_ms:g}ms")
    space.run("tc", "qdisc", "add", "dev", interface, "root", "tbf", *limits, hint=NO_TBF)


def _measure(sender: Node, receiver: Node, network: EmulatedNetwork) -> float:
    """Return the Mbit/s of a plain TCP socket, timed by the receiver after two bursts and TCP's start are over."""
    if network.rate_mbit is None:
        skip, timed, expected_s = 20_000_000, 200_000_000, 1.0
    else:
        skip = 2 * network.burst_bytes
        timed = max(GSO_BYTES, round(network.rate_mbit * 125e3 * MEASURE_S))
        expected_s = (skip + timed) / (network.rate_mbit * 125e3)
    limit = 60 + 3 * expected_s  # for machines that are busy with other work
    python = (sys.executable, "-I", "-S", "-c")
    listen = [*receiver.prefix, *python, RECEIVE, receiver.address, str(skip), str(skip + timed), str(limit)]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(listen, **pipes) as server:
        try:
            port = server.stdout.readline().strip()
            send = [*sender.prefix, *python, SEND, receiver.address, port, str(skip + timed), str(limit)]
            sent = subprocess.run(send, capture_output=True, text=True, timeout=2 * limit)
            result, errors = server.communicate(timeout=2 * limit)
        except subprocess.TimeoutExpired:
            raise NotAvailable(f"the nodes did not exchange {skip + timed} bytes within {2 * limit:.0f} s") from None
        finally:
            server.kill()
    if sent.returncode or server.returncode:
        raise NotAvailable(f"the nodes do not reach each other: {(sent.stderr + errors).strip()[-300:]}")
    return float(result)
