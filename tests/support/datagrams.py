"""UDP for tests: endpoints that say who they are, clients in a cgroup, and time that passes without waiting."""

from __future__ import annotations

import select
import socket
from collections.abc import Sequence

from loader import abi
from meshbpf.model import Endpoint, Port, Protocol, Service
from tests.support.ground import SECONDS, Ground


class Server:
    """A UDP endpoint. It answers when it is told to: with what it got and who it is."""

    def __init__(self, address: str = "127.0.0.1", port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.bind((address, port))
        self.socket.settimeout(SECONDS)
        self.address, self.port = self.socket.getsockname()[:2]

    def endpoint(self, weight: int = 100, **more: object) -> Endpoint:
        return Endpoint(self.address, {"main": self.port}, weight, **more)  # type: ignore[arg-type]

    def take(self) -> tuple[bytes, tuple[str, int]]:
        """A datagram, and where it is from."""
        data, source = self.socket.recvfrom(2000)
        return data, source

    def answer(self) -> None:
        data, source = self.take()
        self.socket.sendto(b"answer to " + data, source)

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def asked(*servers: Server) -> Server:
    """Which of them has a datagram waiting; takes it."""
    ready = select.select(servers, [], [], SECONDS)[0]
    assert len(ready) == 1, f"{len(ready)} endpoints were asked"
    found: Server = ready[0]
    found.take()
    return found


def service(name: str, addresses: str | Sequence[str], *endpoints: Endpoint, port: int = 53) -> Service:
    """A UDP service with one port, `main`."""
    every = (addresses,) if isinstance(addresses, str) else tuple(addresses)
    return Service(name, addresses=every, ports=(Port("main", port, Protocol.UDP),), endpoints=endpoints)


def client(ground: Ground, family: int = socket.AF_INET) -> socket.socket:
    """An application's socket."""
    return ground.client(family, kind=socket.SOCK_DGRAM)


def reasons(ground: Ground, program: str) -> dict[str, int]:
    counted = ground.plane.counters().items()
    return {reason: count for (where, reason), count in counted if where == program}


def pass_a_second(ground: Ground) -> None:
    """For every socket that waits for an answer: its last datagram was sent a second earlier than it was."""
    talks = ground.plane.maps["talks"]
    for key, value in list(talks.items()):
        talk = abi.Talk.from_buffer_copy(value)
        if talk.sent:
            talk.sent -= abi.RETRY_NS
            talks.update(key, bytes(talk))
