"""Which network interface the ranks talk over, for libraries that want it by name."""

import os
import socket

import psutil

from effnn.base import InvalidInput

_CHOSEN = ("EFFNN_INTERFACE", "GLOO_SOCKET_IFNAME")
"""Variables by which a user names interfaces, separated by commas; the first that is set counts."""


def communication_interface() -> str:
    """Name of an interface: what the user set, else the one towards MASTER_ADDR.

    Without MASTER_ADDR, or with one of 127.x.x.x, the loopback interface.
    """
    chosen = next(filter(None, map(os.environ.get, _CHOSEN)), None)
    if chosen:
        return chosen.split(",")[0]
    return interface_towards(os.environ.get("MASTER_ADDR", "127.0.0.1")) or loopback()


def expect_interfaces() -> None:
    """Raise InvalidInput where a variable names an interface that this host does not have."""
    here = list(psutil.net_if_addrs())
    for variable in _CHOSEN:
        for name in filter(None, os.environ.get(variable, "").split(",")):
            if name not in here:
                raise InvalidInput(f"{variable} names {name}; the network interfaces of this host: {', '.join(here)}")


def loopback() -> str:
    """Name of the loopback interface."""
    return interface_of("127.0.0.1") or "lo"


def interface_towards(host: str) -> str | None:
    """Name of the interface from which packets to `host` would leave (IPv4); None where that is not known."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing, but picks the route
            own = probe.getsockname()[0]
    except OSError:
        return None
    return loopback() if own.startswith("127.") else interface_of(own)


def interface_of(address: str) -> str | None:
    """Name of the interface that has this address; None if none has."""
    found = psutil.net_if_addrs().items()
    return next((name for name, addresses in found if any(one.address == address for one in addresses)), None)
