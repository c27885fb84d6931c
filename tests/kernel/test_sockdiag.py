"""The kernel's list of connected UDP sockets, and ending one of them and nobody else."""

from __future__ import annotations

import ipaddress
import socket

import pytest

from loader.sockdiag import Found, SockDiag
from tests.support import netns
from tests.support.datagrams import Server

SO_COOKIE = 57


def connected(server: Server, family: int, address: str = "") -> socket.socket:
    made = socket.socket(family, socket.SOCK_DGRAM)
    made.connect((address or server.address, server.port))
    made.setblocking(False)
    return made


def of(diag: SockDiag, sock: socket.socket) -> Found | None:
    cookie = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), "little")
    return next((found for found in diag.connected() if found.cookie == cookie), None)


@pytest.mark.parametrize(
    ("server", "family", "dialled", "peer"),
    [
        ("127.0.0.1", socket.AF_INET, "127.0.0.1", "::ffff:127.0.0.1"),
        ("127.0.0.1", socket.AF_INET6, "::ffff:127.0.0.1", "::ffff:127.0.0.1"),
        ("::1", socket.AF_INET6, "::1", "::1"),
    ],
)
def test_one_of_two_is_ended(server: str, family: int, dialled: str, peer: str) -> None:
    with netns.fresh(), Server(server) as one, SockDiag() as diag:
        with connected(one, family, dialled) as first, connected(one, family, dialled) as second:
            found = of(diag, first)
            assert found is not None
            assert found.peer == ipaddress.IPv6Address(peer).packed
            assert int.from_bytes(found.port, "big") == one.port
            assert diag.end(found)
            with pytest.raises(ConnectionAbortedError):
                first.recv(1)
            with pytest.raises(BlockingIOError):
                second.recv(1)
            assert of(diag, first) is None  # it has no peer any more
            assert of(diag, second) is not None


def test_a_socket_that_connected_elsewhere_meanwhile_is_left_alone() -> None:
    with netns.fresh(), Server() as one, Server() as other, SockDiag() as diag:
        with connected(one, socket.AF_INET) as sock:
            found = of(diag, sock)
            assert found is not None
            sock.connect((other.address, other.port))
            assert not diag.end(found)
            sock.send(b"question")
            other.answer()
            sock.setblocking(True)
            assert sock.recv(100) == b"answer to question"


def test_another_socket_on_the_same_addresses_is_left_alone() -> None:
    """The cookie tells them apart."""
    with netns.fresh(), Server() as one, SockDiag() as diag:
        with connected(one, socket.AF_INET) as gone:
            found = of(diag, gone)
            assert found is not None
            source = gone.getsockname()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as heir:
            heir.bind(source)
            heir.connect((one.address, one.port))
            heir.setblocking(False)
            assert not diag.end(found)
            with pytest.raises(BlockingIOError):
                heir.recv(1)


def test_many_sockets_in_one_list() -> None:
    with netns.fresh(), Server() as one, SockDiag() as diag:
        socks = [connected(one, socket.AF_INET) for _ in range(900)]
        assert len({found.cookie for found in diag.connected()}) == len(socks)
        for sock in socks:
            sock.close()
