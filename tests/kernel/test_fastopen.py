"""TCP Fast Open: callers that send with the SYN are led like all others and lose nothing; the proxy never takes it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loader import abi, dataplane
from meshbpf.model import Mode, OnProxyDown
from meshbpf.runtime import listeners
from meshbpf.runtime.netns import Own
from tests.support import netns
from tests.support.ground import SECONDS, Ground, Listener, mesh, service
from tests.support.machine import free_port, until

FOUR, SIX = "127.96.14.1", "fd00:96::14"
# name → what is dialled, family of the socket, address of the service, of the endpoint and proxy
CALLERS = {
    "v4": (FOUR, socket.AF_INET, FOUR, "127.0.0.1"),
    "mapped": (f"::ffff:{FOUR}", socket.AF_INET6, FOUR, "127.0.0.1"),
    "v6": (SIX, socket.AF_INET6, SIX, "::1"),
}
caller = pytest.mark.parametrize(("dialled", "family", "asked", "address"), CALLERS.values(), ids=CALLERS)
TCP_FASTOPEN_CONNECT = 30
OPTIONS, SYN_DATA = 5, 0x20  # of struct tcp_info: the byte tcpi_options, its bit TCPI_OPT_SYN_DATA
WITH_COOKIES, WITHOUT, EVERY_LISTENER = "3", "519", "1543"  # 0x3, 0x207 (data without a cookie), 0x607 (and 0x400)
FIRST = b"with the first packet"


def sendto(sock: socket.socket, dialled: str) -> None:
    sock.settimeout(None)  # else Python makes it a non-blocking one
    assert sock.sendto(FIRST, socket.MSG_FASTOPEN, (dialled, 80)) == len(FIRST)
    sock.settimeout(SECONDS)


def deferred(sock: socket.socket, dialled: str) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
    sock.connect((dialled, 80))
    sock.sendall(FIRST)


way = pytest.mark.parametrize("opening", [sendto, deferred])
Opening = Callable[[socket.socket, str], None]


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    Own.fd()  # where the agent's code is at home: not in a namespace of a test
    with Ground(f"fastopen-{os.getpid()}") as made:
        yield made


@pytest.fixture(autouse=True)
def namespace() -> Iterator[int]:
    with netns.fresh() as made:
        yield made


def allow(value: str) -> None:
    """What this namespace allows; see WITH_COOKIES and the others."""
    Path("/proc/sys/net/ipv4/tcp_fastopen").write_text(value)


def early(sock: socket.socket) -> bool:
    """Did data go with the SYN, and was it taken?"""
    return bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[OPTIONS] & SYN_DATA)


def talk(client: socket.socket, server: socket.socket) -> None:
    got = b""
    while len(got) < len(FIRST):
        got += server.recv(100)
    assert got == FIRST
    for sender, receiver in ((server, client), (client, server)):
        sender.sendall(b"x" * 100_000)
        left = 100_000
        while left:
            left -= len(receiver.recv(left))
    client.shutdown(socket.SHUT_WR)
    assert server.recv(1) == b""
    server.close()
    assert client.recv(1) == b""


@caller
@way
@pytest.mark.parametrize("allowed", [WITH_COOKIES, WITHOUT])
def test_direct(
    ground: Ground, allowed: str, opening: Opening, dialled: str, family: int, asked: str, address: str
) -> None:
    """Twice: with cookies, the second connection is the early one. The cookie is the endpoint's."""
    allow(allowed)
    with Listener(address) as endpoint:
        endpoint.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
        ground.attach(mesh(service("orders", asked, endpoint.endpoint())))
        opened, _, closed, _ = ground.counts(asked)
        for number in (0, 1):
            with ground.client(family) as sock:
                opening(sock, dialled)
                server = endpoint.accept()
                assert sock.getpeername()[:2] == (dialled, 80)
                talk(sock, server)
                assert early(sock) is (allowed == WITHOUT or number == 1)
        until(lambda: ground.counts(asked) == (opened + 2, 0, closed + 2, 0), "both are counted as closed")


@caller
@way
@pytest.mark.parametrize("allowed", [WITH_COOKIES, WITHOUT, EVERY_LISTENER])
def test_proxy(
    ground: Ground, namespace: int, allowed: str, opening: Opening, dialled: str, family: int, asked: str, address: str
) -> None:
    """The agent's listeners: whatever the namespace allows, nothing is accepted before the kernel knows its origin."""
    allow(allowed)
    port = free_port()
    with netns.inside(namespace):
        served = listeners.serve(os.dup(namespace), port)
    try:
        (listener,) = [one for one in served.sockets if one.getsockname()[0] == address]
        listener.settimeout(SECONDS)
        ground.attach(mesh(service("orders", asked), mode=Mode.PROXY))
        _, opened, _, closed = ground.counts(asked)
        for _ in range(2):
            with ground.client(family) as sock:
                ground.plane.mark(served.sockets)
                ground.plane.set_agent(port, 0)
                ground.plane.beat(time.monotonic_ns())
                opening(sock, dialled)
                server, peer = listener.accept()
                told = ground.origin(dataplane.netns_cookie(server), *peer[:2])
                assert told is not None and abi.unpack_address(told.asked) == asked
                assert sock.getpeername()[:2] == (dialled, 80)
                talk(sock, server)
                assert not early(sock)
        until(lambda: ground.counts(asked)[1::2] == (opened + 2, closed + 2), "both are counted as closed")
    finally:
        served.close()


@caller
@way
def test_refused(ground: Ground, opening: Opening, dialled: str, family: int, asked: str, address: str) -> None:
    allow(WITHOUT)
    ground.attach(mesh(service("orders", asked), mode=Mode.PROXY, down=OnProxyDown.REFUSE))
    with ground.client(family) as sock, pytest.raises(ConnectionRefusedError):
        opening(sock, dialled)
        sock.recv(1)


@caller
@way
def test_what_is_no_service_is_left_alone(
    ground: Ground, opening: Opening, dialled: str, family: int, asked: str, address: str
) -> None:
    allow(WITHOUT)
    ground.attach(mesh(service("orders", asked)))
    before = ground.reasons()
    elsewhere = "127.96.14.9" if address == "127.0.0.1" else "::1"
    with Listener(elsewhere, 80) as other, ground.client(family) as sock:
        other.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
        to = f"::ffff:{elsewhere}" if dialled.startswith("::ffff:") else elsewhere
        opening(sock, to)
        assert sock.getpeername()[:2] == (to, 80)
        talk(sock, other.accept())
        assert early(sock)
    assert ground.reasons() == before
