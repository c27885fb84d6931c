"""Where connect keeps its decision: a place in `recent` while one is free, the socket's own storage else, and every
place is given back. Looked at through the table itself; what applications see must not depend on it.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from loader import abi, libbpf
from meshbpf.model import Mode
from tests.support.ground import Ground, Listener, mesh, service
from tests.support.machine import until

ADDRESS, GONE, GOVERNED = "127.96.4.1", "127.96.4.2", "127.96.4.3"
STRANGER = 1 << 63  # a cookie that no socket will have


class Recent:
    """The table: whose places are taken, and by us for others."""

    def __init__(self, ground: Ground) -> None:
        path = ground.plane.maps_folder / "recent"
        self.table = libbpf.Map(path, 4, abi.ct.sizeof(abi.Recent), abi.RECENT_PLACES)

    def taken(self) -> list[abi.Recent]:
        places = (abi.Recent.from_buffer_copy(value) for _key, value in self.table.items())
        return [place for place in places if place.cookie]

    def owners(self) -> Counter[int]:
        return Counter(place.cookie for place in self.taken())

    def fill(self, place: abi.Recent) -> None:
        """Every place is like this one, since for ever."""
        for index in range(abi.RECENT_PLACES):
            self.table.update(index.to_bytes(4, "little"), bytes(place))


def cookie(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, 57, 8), "little")  # SO_COOKIE


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    with Listener() as made:
        yield made


@pytest.fixture(scope="module")
def ground(listener: Listener) -> Iterator[Ground]:
    with Listener() as dead:
        port = dead.endpoint()
    with Ground(f"decided-{os.getpid()}") as made:
        wanted = mesh(service("orders", ADDRESS, listener.endpoint()), service("gone", GONE, port))
        governed = mesh(service("governed", GOVERNED, listener.endpoint()), mode=Mode.PROXY)
        services, policies = wanted.services + governed.services, {**wanted.policies, **governed.policies}
        made.attach(replace(wanted, services=services, policies=policies))
        yield made


@pytest.fixture
def recent(ground: Ground) -> Iterator[Recent]:
    made = Recent(ground)
    made.fill(abi.Recent())
    with made.table:
        yield made


def works(ground: Ground, listener: Listener) -> None:
    """A connection is led, told of and counted."""
    opened, _, closed, _ = ground.counts(ADDRESS)
    with ground.connect(ADDRESS) as client:
        listener.accept().close()
        assert client.getpeername() == (ADDRESS, 80)
        assert ground.counts(ADDRESS)[0] == opened + 1
        assert client.recv(1) == b""
    until(lambda: ground.counts(ADDRESS)[2] == closed + 1, "the connection's end is counted")


def test_a_direct_connection_takes_a_place_and_gives_it_back(
    ground: Ground, recent: Recent, listener: Listener
) -> None:
    with ground.connect(ADDRESS) as client:
        listener.accept().close()
        assert recent.owners() == {cookie(client): 1}
        assert client.getpeername() == (ADDRESS, 80)
    until(lambda: not recent.taken(), "the place is free again")


def test_a_refused_connection_gives_its_place_back(ground: Ground, recent: Recent) -> None:
    with pytest.raises(ConnectionRefusedError):
        ground.connect(GONE)
    assert not recent.taken()


def test_a_reset_connection_gives_its_place_back(ground: Ground, recent: Recent, listener: Listener) -> None:
    with ground.connect(ADDRESS) as client:
        with listener.accept() as served:
            served.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        assert not recent.taken()


def test_a_taken_place_sends_the_decision_to_the_socket(ground: Ground, recent: Recent, listener: Listener) -> None:
    recent.fill(abi.Recent(cookie=STRANGER, decision=abi.Decision(watched=1)))
    counted = ground.reasons().get("place_taken", 0)
    works(ground, listener)
    assert recent.owners() == {STRANGER: abi.RECENT_PLACES}
    assert ground.reasons()["place_taken"] == counted + 1


def test_a_place_that_was_abandoned_is_taken_over(ground: Ground, recent: Recent, listener: Listener) -> None:
    with ground.connect(ADDRESS):
        listener.accept().close()
        (now,) = (place.since for place in recent.taken())
    for age, owner in ((abi.RECENT_UNWATCHED_JIFFIES - 10_000, False), (abi.RECENT_UNWATCHED_JIFFIES + 1, True)):
        recent.fill(abi.Recent(cookie=STRANGER, since=(now - age) % 2**32))
        with ground.connect(ADDRESS) as client:
            listener.accept().close()
            assert (cookie(client) in recent.owners()) is owner
        works(ground, listener)


def test_a_connect_that_never_reached_tcp_keeps_no_more_than_its_place(
    ground: Ground, recent: Recent, listener: Listener
) -> None:
    """The port is taken by the very same connection: connect() fails after our hook and before the first packet."""
    with ground.connect(ADDRESS) as first, ground.client() as second:
        listener.accept().close()
        second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with first, pytest.raises(OSError) as raised:
            second.bind(first.getsockname())
            second.connect((ADDRESS, 80))
        assert raised.value.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE)
    works(ground, listener)


def test_one_socket_after_another_decision(ground: Ground, recent: Recent, listener: Listener) -> None:
    """Dissolved and connected again, to a service, to no service, and to a service: always the truth."""
    with ground.client() as client:
        there = (listener.address, listener.port)
        for address in ((ADDRESS, 80), there, (GOVERNED, 80), there, (ADDRESS, 80)):
            client.connect(address)
            listener.accept().close()
            assert client.getpeername() == address
            dissolve(client)
            assert not recent.taken()


def dissolve(sock: socket.socket) -> None:
    """connect() to AF_UNSPEC, which Python's own connect cannot say."""
    code = abi.ct.CDLL(None, use_errno=True).connect(sock.fileno(), bytes(16), 16)
    assert code == 0, errno.errorcode[abi.ct.get_errno()]


def test_a_left_place_is_silent_about_a_governed_connection(ground: Ground, recent: Recent, listener: Listener) -> None:
    """A place that was left behind never speaks for a later decision that the socket itself holds."""
    with ground.client() as client:
        stale = abi.Decision(given=abi.pack_address("127.0.0.1"), given_port=listener.port, asked_port=9)
        recent.fill(abi.Recent(cookie=cookie(client), decision=stale))
        client.connect((GOVERNED, 80))  # no proxy is here, so it goes to the endpoint, decided like a governed one
        listener.accept().close()
        assert client.getpeername() == (GOVERNED, 80)
        assert recent.owners() == {cookie(client): abi.RECENT_PLACES - 1}  # its own place, and no other
