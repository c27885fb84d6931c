"""The tables of an instance: what is in each, how full it is, who writes it. What each is for stands in CATALOGUE; how
large it is, the kernel says of what is pinned, so that one which is not in the catalogue is shown all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loader import libbpf
from meshbpf.cli.calls import percent

# map_type of a map's fdinfo, and whether its entries can be counted: those of an array are always all there, and those
# of a storage are in the sockets
KINDS: Mapping[str, tuple[str, bool]] = {
    "1": ("hash", True), "2": ("array", False), "3": ("prog_array", False), "5": ("percpu_hash", True),
    "6": ("percpu_array", False), "9": ("lru_hash", True), "18": ("sockhash", True), "24": ("sk_storage", False),
    "27": ("ringbuf", False),
}  # fmt: skip
SIZED = ("hash", "percpu_hash", "lru_hash", "sockhash")  # those of which a field of `Agent.spec.maps` sets the size


@dataclass(frozen=True, slots=True)
class About:
    key: str
    value: str
    writer: str
    reader: str


# As in ARCHITECTURE.md; a unit test holds one against the other, and against bpf/maps.h.
CATALOGUE: Mapping[str, About] = {
    "services": About("address, port, protocol", "service id", "loader", "connect"),
    "policies": About("service id", "slot count, carrier, pick, onProxyDown", "loader", "connect"),
    "slots": About(
        "service id, index",
        "endpoint id (an endpoint as often as its weight says), or a Maglev table",
        "loader",
        "connect",
    ),
    "endpoints": About("endpoint id", "address, port, draining", "loader", "connect, CLI"),
    "rounds": About("service id", "round-robin position", "connect", "connect"),
    "agent": About("0", "exempt cgroup, proxy port (0: no proxy wants connections)", "loader", "connect"),
    "heartbeat": About("0", "when a worker last lived", "workers", "connect"),
    "listeners": About(
        "socket storage", "there for the proxy's listeners, for nobody else", "agent, by socket descriptor", "connect"
    ),
    "recent": About(
        "one of 4096 places, by socket cookie",
        "what connect decided about a direct socket; one that meets a taken place goes to `origins`",
        "connect, sockops",
        "getpeername, sockops, CLI",
    ),
    "origins": About(
        "socket storage",
        "what connect decided, and who connected",
        "connect",
        "getpeername, sockops, command, CLI",
    ),
    "flows": About("namespace, client address, port", "what was dialled, by whom", "sockops", "workers, CLI"),
    "connections": About("service id", "opened, closed by carrier (per CPU)", "sockops", "agent, CLI"),
    "counters": About("program, reason", "verdicts (per CPU)", "all programs", "agent, CLI"),
    "events": About("ring", "a caller in a namespace without listener", "connect", "agent"),
    "serving": About(
        "service id, endpoint id",
        "an endpoint of a port that notes who goes where (UDP, sessionAffinity)",
        "loader",
        "connect, sendmsg",
    ),
    "connected": About("socket cookie", "a connected UDP socket and its endpoint", "connect, release", "agent, CLI"),
    "talks": About("UDP socket, service address", "its endpoint", "sendmsg, recvmsg", "the same"),
    "answers": About("UDP socket, endpoint", "the service address it asked for", "sendmsg", "recvmsg"),
    "limits": About("service id", "connections open now, where there is a limit", "connect, sockops", "connect"),
    "affinities": About("client, service id", "the endpoint it had last, and when", "connect, sendmsg", "the same"),
    "socks": About("pair, side", "socket (sockhash)", "command", "redirect"),
    "members": About("socket storage", "the pair a socket is in, and what it sent", "command, redirect", "redirect"),
    "pairs": About(
        "pair", "its binding: proof of order and credit, both ways", "command, redirect, sockops", "redirect, workers"
    ),
    "stages": About(
        "0", "the current redirect program (the program on `socks` is a stub of one tail call)", "loader", "stub"
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Held:
    """A pinned table. `entries` is None where they cannot be counted; bytes are what the kernel has set aside."""

    name: str
    kind: str
    entries: int | None
    capacity: int
    memory: int


def held(folder: Path) -> list[Held]:
    """Every table pinned in the folder. Raises DataplaneError when a pin cannot be opened."""
    return [found for pin in sorted(folder.iterdir()) if (found := _held(pin)) is not None]


def _held(pin: Path) -> Held | None:
    """None for a program or link, which live in the same folder."""
    with libbpf.Map(pin, 0, 0) as opened:  # its sizes are the kernel's to say
        said = opened.info()
        if "map_type" not in said:
            return None
        kind, countable = KINDS.get(said["map_type"], (f"type {said['map_type']}", False))
        opened.key_size = int(said["key_size"])
        entries = sum(1 for _key in opened.keys()) if countable else None  # noqa: SIM118
        return Held(pin.name, kind, entries, int(said["max_entries"]), int(said.get("memlock", 0)))


def rows(tables: list[Held]) -> list[dict[str, Any]]:
    """In the order of the catalogue: as a connection meets them. Pure."""
    places = {name: place for place, name in enumerate(CATALOGUE)}
    found = []
    for table in sorted(tables, key=lambda table: (places.get(table.name, len(places)), table.name)):
        about = CATALOGUE.get(table.name, About("", "", "", ""))
        sized = table.kind in SIZED
        found.append(
            {
                "name": table.name, "key": about.key, "value": about.value, "entries": table.entries,
                "capacity": table.capacity if sized else None,
                "full_percent": percent(table.entries, table.capacity) if sized and table.entries is not None else None,
                "writer": about.writer, "reader": about.reader, "kind": table.kind, "memory_bytes": table.memory,
            }
        )  # fmt: skip
    return found
