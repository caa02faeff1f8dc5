"""What of a line listens where, and who gets in: the table that the live sockets are held against.

deploy/SECURITY.md shows it to people; tests compare both with what is seen.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lib.line.ports import PORTS, RANGE_SIZE

LOOPBACK = "loopback"
"""This machine only, whatever is set, of what `make up` starts."""
SETTING = "RAYLINE_HTTP_HOST"
"""Loopback, unless that setting opens it."""
NODE = "node address"
"""The address by which nodes know one another; on a line of one machine, loopback."""
ALL = "all addresses"
"""Can't be bound to one: a firewall has to close it."""

TOKEN = "Ray's token"
KEYS = "API keys, once there is one"
READ_ONLY = "none: numbers, read only"
MACHINE = "none: whoever has an account on this machine"
REPLICAS = "gateways: API keys; versions: nobody"


@dataclass(frozen=True, slots=True)
class Listener:
    """Where something listens, and what it asks of who comes."""

    binds: str
    auth: str


LISTENERS: dict[str, Listener] = {
    "http": Listener(SETTING, KEYS),
    "grpc": Listener(SETTING, KEYS),
    "dashboard": Listener(LOOPBACK, TOKEN),
    "mlflow": Listener(LOOPBACK, MACHINE),
    "prometheus": Listener(LOOPBACK, MACHINE),
    "ray": Listener(ALL, TOKEN),
    "ray_client": Listener(NODE, TOKEN),
    "agent": Listener(NODE, TOKEN),
    "ray_metrics": Listener(ALL, READ_ONLY),
    "autoscaler_metrics": Listener(ALL, READ_ONLY),
    "dashboard_metrics": Listener(ALL, READ_ONLY),
    "haproxy_stats": Listener(ALL, READ_ONLY),
    "haproxy_metrics": Listener(ALL, READ_ONLY),
    "fallback": Listener(SETTING, KEYS),
    "fallback_grpc": Listener(ALL, KEYS),
    "replicas": Listener(SETTING, REPLICAS),
    "replicas_grpc": Listener(ALL, REPLICAS),
}
"""By the names of `lib.line.ports.PORTS`."""

CHOSEN = Listener(ALL, TOKEN)
"""Ports that the system chooses for Ray: raylet, object store, workers, agents."""
_CHOSEN_FOR = ("/raylet/raylet ", "/gcs/gcs_server ", "ray::", "ray-dashboard-")
"""What the command lines of such processes have in them."""
_EVERY = {"::": "0.0.0.0"}
"""Who is told to listen at all addresses may do so by IPv6 too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Socket:
    """A TCP socket that waits for connections."""

    address: str
    port: int
    process: str
    """Command line of the process that has it."""


def name_of(port: int, ports: Mapping[str, int]) -> str | None:
    """Return the name of a port of the line, None for one that the system chose."""
    for name, first in ports.items():
        size = RANGE_SIZE if name.startswith("replicas") else 1
        if first <= port < first + size:
            return name
    return None


def unexpected(
    sockets: Iterable[Socket], ports: Mapping[str, int], *, host: str, node_ip: str
) -> list[str]:
    """Return a line for each socket that others can reach though the table does not say so.

    Args:
        sockets: All that the processes of the line listen on.
        ports: The line's ports, by name.
        host: RAYLINE_HTTP_HOST of the line.
        node_ip: The address by which Ray's nodes know this one.
    """
    found = []
    for socket in sockets:
        address = _plain(socket.address)
        if ipaddress.ip_address(address).is_loopback:
            continue
        name = name_of(socket.port, ports)
        if name is None:
            allowed = any(word in socket.process for word in _CHOSEN_FOR)
        else:
            opened = {ALL: address, SETTING: host, NODE: node_ip, LOOPBACK: None}
            allowed = opened[LISTENERS[name].binds] in (address, _EVERY.get(address, address))
        if not allowed:
            found.append(f"{socket.address}:{socket.port} ({name or 'unnamed'}): {socket.process}")
    return sorted(found)


def _plain(address: str) -> str:
    """Return an address without zone, and as IPv4 where it is one in IPv6's clothes."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return str(mapped or ip)


def table(ports: Mapping[str, int] | None = None) -> list[tuple[str, str, str, str, str]]:
    """Return the rows for people: name, port, what, where it listens, who gets in."""
    rows = []
    for name, port in PORTS.items():
        first = (ports or {}).get(name, port.default)
        shown = f"{first}–{first + RANGE_SIZE - 1}" if name.startswith("replicas") else str(first)
        listener = LISTENERS[name]
        rows.append((name, shown, port.use, listener.binds, listener.auth))
    rows.append(("–", "chosen", "Ray's workers, raylet, agents", CHOSEN.binds, CHOSEN.auth))
    return rows
