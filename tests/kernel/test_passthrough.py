"""What is no service crosses the wire as if we were not there, packet by packet."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from loader import dataplane
from meshbpf.model import Mode
from tests.support import netns
from tests.support.ground import Ground, Listener, inside, mesh, service
from tests.support.packets import Packet, captured

ADDRESS, BESIDE = "127.96.9.1", "127.96.9.2"


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with Ground(f"passing-{os.getpid()}") as made:
        yield made


def talk(c: socket.socket, s: socket.socket) -> None:
    """In lock step, so that two runs give the same packets."""
    for sock in (c, s):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for size in (1, 100, 1460, 9000):
        for sender, receiver in ((c, s), (s, c)):
            receiver.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            sender.sendall(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
            left = size
            while left:
                left -= len(receiver.recv(left))


def closing(c: socket.socket, s: socket.socket) -> None:
    talk(c, s)
    c.shutdown(socket.SHUT_WR)
    assert s.recv(1) == b""
    s.close()
    assert c.recv(1) == b""
    c.close()


def resetting(c: socket.socket, s: socket.socket) -> None:
    talk(c, s)
    c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    c.close()
    with pytest.raises(ConnectionResetError):
        s.recv(1)
    s.close()


def exchange(ground: Ground, end: Callable[[socket.socket, socket.socket], None]) -> list[Packet]:
    """Between two processes' worth of sockets in the cgroup, both ends, to an address beside the service's."""
    with inside(ground.cgroup), Listener(BESIDE, 80) as listener, captured() as packets:
        with socket.socket() as refused:
            assert refused.connect_ex((BESIDE, 81)) != 0
        c = socket.create_connection((BESIDE, 80))
        end(c, listener.accept())
    return packets


@pytest.mark.parametrize("end", [closing, resetting])
def test_an_exchange_with_no_service_is_the_same_with_and_without_us(
    ground: Ground, end: Callable[[socket.socket, socket.socket], None]
) -> None:
    with netns.fresh():
        dataplane.detach(ground.instance)
        exchange(ground, end)  # the first connection warms the namespace's TCP metrics
        without = exchange(ground, end)
        ground.attach(mesh(service("orders", ADDRESS), mode=Mode.PROXY))
        within = exchange(ground, end)
    assert [packet.flags for packet in within] == [packet.flags for packet in without]
    assert within == without
    assert without[0].flags == "S"
    assert without[1].flags == "RA"
    assert sum(len(packet.payload) for packet in without) == 2 * (1 + 100 + 1460 + 9000)
    assert without[-1].flags == ("RA" if end is resetting else "A")


def test_a_service_s_packets_go_to_its_endpoint_and_never_to_its_address(ground: Ground) -> None:
    with netns.fresh(), Listener("127.0.0.5") as endpoint:
        ground.attach(mesh(service("orders", ADDRESS, endpoint.endpoint())))
        with captured() as packets:
            c = ground.connect(ADDRESS)
            closing(c, endpoint.accept())
    assert {packet.receiver for packet in packets if "S" in packet.flags and "A" not in packet.flags} == {"127.0.0.5"}
    assert ADDRESS not in {name for packet in packets for name in (packet.sender, packet.receiver)}
