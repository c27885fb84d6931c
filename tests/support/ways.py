"""The ways a call can take through the mesh, each with a service address of its own in front of one server.

A test calls every one of them and compares with a call without the mesh; `opened` tells that a call really went the
way that its address names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from loader import dataplane
from loader.plan import service_key
from meshbpf.model import Protocol
from tests.support.machine import Machine, policy, service

# `redirect`: from socket to socket where the self-test allows it; of HTTP only.
DIRECT, PROXY, REDIRECT = "direct", "proxy", "redirect"
ADDRESSES = {DIRECT: "127.96.0.10", PROXY: "127.96.0.11", REDIRECT: "127.96.0.12"}
POLICIES = {
    DIRECT: {"mode": "direct"},
    PROXY: {"mode": "proxy", "acceleration": "off"},
    REDIRECT: {"mode": "proxy", "acceleration": "redirect"},
}


class Ways:
    """An agent that runs, with a service for each way on `port`, whose server is at 127.0.0.1:`server`. Use as a
    context manager inside the machine's."""

    def __init__(self, machine: Machine, server: int, *, port: int, protocol: str) -> None:
        self.machine, self.server, self.port, self.protocol = machine, server, port, protocol
        self.configure([server])

    def configure(self, servers: Sequence[int]) -> None:
        """These are the services' endpoints."""
        documents: list[dict[str, Any]] = []
        for name, address in ADDRESSES.items():
            documents += [service(name, address, servers, self.protocol, self.port), policy(name, **POLICIES[name])]
        self.machine.configure(*documents)

    def __enter__(self) -> Ways:
        self.machine.run_agent()
        self.machine.until_logged(" acceleration=")
        self.redirects = " acceleration=redirect " in self.machine.log()
        opened = dataplane.open_pins(self.machine.instance)
        assert opened is not None
        self._plane = opened[0]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._plane.close()

    def opened(self, way: str) -> int:
        """How many connections the kernel has led so, with the carrier that belongs to it."""
        service_id = self._plane.maps["services"].lookup(service_key(ADDRESSES[way], self.port, Protocol.TCP))
        assert service_id is not None
        direct, proxy, *_closed = self._plane.connections()[int.from_bytes(service_id, "little")]
        return direct if way == DIRECT else proxy

    def verdicts(self, reason: str) -> int:
        """How often a program of ours gave this reason."""
        return sum(count for (_program, word), count in self._plane.counters().items() if word == reason)

    @contextlib.contextmanager
    def carrying(self, way: str, connections: int = 0) -> Iterator[None]:
        """What is done inside leads so many connections (0: some, or more) this way."""
        before = self.opened(way)
        yield
        opened = self.opened(way) - before
        assert opened and opened == (connections or opened), f"{opened} connections went {way}"
