"""Which network interface the ranks talk over, for libraries that want it by name."""

import os
import socket
import struct
import sys


def communication_interface() -> str:
    """Name of an interface: what the user set (EFFNN_INTERFACE, GLOO_SOCKET_IFNAME), else the one towards MASTER_ADDR.

    Without MASTER_ADDR, or with one of 127.x.x.x, the loopback interface.
    """
    for variable in ("EFFNN_INTERFACE", "GLOO_SOCKET_IFNAME"):
        if os.environ.get(variable):
            return os.environ[variable].split(",")[0]
    return interface_towards(os.environ.get("MASTER_ADDR", "127.0.0.1")) or loopback()


def loopback() -> str:
    """Name of the loopback interface."""
    return "lo0" if sys.platform == "darwin" else "lo"


def interface_towards(host: str) -> str | None:
    """Name of the interface from which packets to `host` would leave (IPv4, Linux); None where that is not known."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing, but picks the route
            own = probe.getsockname()[0]
    except OSError:
        return None
    if own.startswith("127."):
        return loopback()
    return next((name for _, name in socket.if_nameindex() if _address_of(name) == own), None)


def _address_of(interface: str) -> str | None:
    if not sys.platform.startswith("linux"):
        return None
    import fcntl

    ask_for_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, ask_for_address, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])
