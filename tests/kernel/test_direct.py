"""The direct carrier: where a connect() goes with no process of ours alive, and what its application is told."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshbpf.model import Balance, EndpointState
from tests.support.ground import Ground, Listener, inside, mesh, reached, service, untouched
from tests.support.machine import until

ADDRESS, OTHER = "127.96.1.1", "127.96.1.2"
IPPROTO_MPTCP = 262
TCP_STATE_CLOSE_WAIT = 8


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with Ground(f"direct-{os.getpid()}") as made:
        yield made


@pytest.fixture
def listeners() -> Iterator[list[Listener]]:
    made = [Listener(f"127.0.0.{n}") for n in (1, 2, 3)]
    yield made
    for listener in made:
        listener.close()


def spread(ground: Ground, listeners: list[Listener], connects: int) -> dict[Listener, int]:
    found: Counter[Listener] = Counter()
    for sock in ground.clients(connects):
        with sock:
            sock.connect((ADDRESS, 80))
            found[reached(*listeners)] += 1
    return dict(found)


def test_round_robin_is_exact(ground: Ground, listeners: list[Listener]) -> None:
    a, b, c = listeners
    ground.attach(mesh(service("orders", ADDRESS, a.endpoint(300), b.endpoint(200), c.endpoint(100))))
    assert spread(ground, listeners, 60) == {a: 30, b: 20, c: 10}


def test_random_follows_the_weights(ground: Ground, listeners: list[Listener]) -> None:
    a, b, c = listeners
    wanted = mesh(service("orders", ADDRESS, a.endpoint(3), b.endpoint(1), c.endpoint(0)), simple=Balance.RANDOM)
    ground.attach(wanted)
    found = spread(ground, listeners, 400)
    # 300 expected, standard deviation 8.7: one run in a million is off by 5 of them
    assert 256 <= found[a] <= 344
    assert found[b] == 400 - found[a]


def test_draining_and_weightless_endpoints_get_nothing(ground: Ground, listeners: list[Listener]) -> None:
    a, b, c = listeners
    ground.attach(
        mesh(service("orders", ADDRESS, a.endpoint(state=EndpointState.DRAINING), b.endpoint(0), c.endpoint(1)))
    )
    assert spread(ground, listeners, 20) == {c: 20}


def test_an_endpoint_that_drains_here_serves_there(ground: Ground, listeners: list[Listener]) -> None:
    a = listeners[0]
    ground.attach(
        mesh(
            service("one", ADDRESS, a.endpoint()),
            service("two", OTHER, a.endpoint(state=EndpointState.DRAINING)),
        )
    )
    with ground.connect(ADDRESS):
        assert reached(*listeners) is a
    with pytest.raises(ConnectionRefusedError):
        ground.connect(OTHER)


@pytest.mark.parametrize(
    ("family", "address"), [(socket.AF_INET, ADDRESS), (socket.AF_INET6, f"::ffff:{ADDRESS}")], ids=["ipv4", "mapped"]
)
def test_no_endpoint_is_refused_like_a_closed_port(ground: Ground, family: int, address: str) -> None:
    ground.attach(mesh(service("orders", ADDRESS)))
    before = ground.reasons().get("no_endpoint", 0)
    with ground.client(family) as sock, pytest.raises(ConnectionRefusedError):
        sock.settimeout(None)  # a connect() that blocks
        sock.connect((address, 80))
    with ground.client(family) as sock:
        sock.setblocking(False)
        assert sock.connect_ex((address, 80)) in (errno.EINPROGRESS, errno.ECONNREFUSED)
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        assert poll.poll(5000)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in (0, errno.ECONNREFUSED)
        with pytest.raises(OSError, match="not connected"):
            sock.getpeername()
    assert ground.reasons()["no_endpoint"] == before + 2


def test_mapped_address_through_an_ipv6_socket(ground: Ground, listeners: list[Listener]) -> None:
    ground.attach(mesh(service("orders", ADDRESS, listeners[0].endpoint())))
    with ground.connect(f"::ffff:{ADDRESS}", family=socket.AF_INET6) as sock:
        assert reached(*listeners) is listeners[0]
        assert sock.getpeername()[:2] == (f"::ffff:{ADDRESS}", 80)


def test_peer_name_is_what_was_dialled(ground: Ground, listeners: list[Listener]) -> None:
    ground.attach(mesh(service("orders", ADDRESS, listeners[0].endpoint())))
    with ground.connect(ADDRESS) as sock, listeners[0].accept() as accepted:
        assert sock.getpeername() == (ADDRESS, 80)
        assert accepted.getpeername() == sock.getsockname()
        assert accepted.getsockname() == (listeners[0].address, listeners[0].port)


def disconnect(sock: socket.socket) -> None:
    """connect() to AF_UNSPEC: the socket is as new. Python's own connect cannot say it."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.connect(sock.fileno(), struct.pack("H14x", socket.AF_UNSPEC), 16) == 0


def test_a_socket_connected_again_elsewhere(ground: Ground, listeners: list[Listener]) -> None:
    a = listeners[0]
    ground.attach(mesh(service("orders", ADDRESS, a.endpoint())))
    opened, _, closed, _ = ground.counts(ADDRESS)
    with Listener("127.0.0.9", a.port) as twin, ground.client() as sock:
        sock.connect((ADDRESS, 80))
        assert reached(*listeners) is a
        disconnect(sock)
        assert ground.counts(ADDRESS) == (opened + 1, 0, closed + 1, 0)
        sock.connect((twin.address, twin.port))  # the same port as the endpoint's: only the address tells
        twin.accept().close()
        assert sock.getpeername() == (twin.address, twin.port)
        assert ground.counts(ADDRESS) == (opened + 1, 0, closed + 1, 0)
        disconnect(sock)
        sock.connect((ADDRESS, 80))
        assert reached(*listeners) is a
        assert sock.getpeername() == (ADDRESS, 80)
    until(lambda: ground.counts(ADDRESS) == (opened + 2, 0, closed + 2, 0), "both connections are counted as closed")


def test_what_is_no_service_is_untouched(ground: Ground, listeners: list[Listener]) -> None:
    a, b, _ = listeners
    ground.attach(mesh(service("orders", ADDRESS, a.endpoint())))
    before = ground.reasons()
    with ground.connect(b.address, b.port) as sock:
        assert reached(*listeners) is b
        assert sock.getpeername() == (b.address, b.port)
    with pytest.raises(ConnectionRefusedError):
        ground.connect(ADDRESS, 81)  # a service's address, another port
    with pytest.raises(ConnectionRefusedError):
        ground.connect(OTHER, 80)
    assert ground.reasons() == before
    assert untouched(*listeners)


def test_mptcp_is_not_broken(ground: Ground, listeners: list[Listener]) -> None:
    """Led or left alone, both are right; but whoever it reaches, it must be able to talk to."""
    a = listeners[0]
    ground.attach(mesh(service("orders", ADDRESS, a.endpoint())))
    try:
        sock = ground.client(protocol=IPPROTO_MPTCP)
    except OSError as error:
        pytest.skip(f"this kernel has no MPTCP: {error.strerror}")
    with sock, Listener(ADDRESS, 80) as alone:
        sock.connect((ADDRESS, 80))
        (ready,) = select.select([a, alone], [], [], 5)[0]
        with ready.accept() as accepted:
            sock.sendall(b"question")
            assert accepted.recv(100) == b"question"
            accepted.sendall(b"answer")
            assert sock.recv(100) == b"answer"
    assert ground.counts(ADDRESS)[1] == 0


def test_connections_opened_before_the_attach_stay(listeners: list[Listener]) -> None:
    a, b, _ = listeners
    with Ground(f"before-{os.getpid()}") as ground, ground.connect(a.address, a.port) as sock, a.accept() as accepted:
        ground.attach(mesh(service("orders", (a.address, ADDRESS), b.endpoint(), port=a.port)))
        sock.sendall(b"question")
        assert accepted.recv(100) == b"question"
        accepted.sendall(b"answer")
        assert sock.recv(100) == b"answer"
        assert sock.getpeername() == (a.address, a.port)
        with ground.connect(a.address, a.port):  # the address has become a service: new ones are led
            assert reached(a, b) is b


def test_counts_of_many_short_connections(ground: Ground, listeners: list[Listener]) -> None:
    a = listeners[0]
    ground.attach(mesh(service("orders", ADDRESS, a.endpoint())))
    opened, _, closed, _ = ground.counts(ADDRESS)
    for number, sock in enumerate(ground.clients(300)):
        sock.connect((ADDRESS, 80))
        if number % 3 == 0:  # the client's RST
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        accepted = a.accept()
        if number % 3 == 1:  # the endpoint's RST
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            accepted.close()
        sock.close()
        accepted.close()
    until(lambda: ground.counts(ADDRESS) == (opened + 300, 0, closed + 300, 0), "every connection is counted as closed")


def test_a_refused_connection_is_not_opened(ground: Ground) -> None:
    with Listener() as gone:
        dead = gone.endpoint()
    ground.attach(mesh(service("orders", ADDRESS, dead)))
    before = ground.counts(ADDRESS)
    with pytest.raises(ConnectionRefusedError):
        ground.connect(ADDRESS)
    assert ground.counts(ADDRESS) == before


def test_an_open_connection_keeps_its_own_service_s_count(ground: Ground, listeners: list[Listener]) -> None:
    """Ids are never given again: what ends late must not be counted for a service that came after."""
    a = listeners[0]
    ground.attach(mesh(service("early", ADDRESS, a.endpoint())))
    sock = ground.connect(ADDRESS)
    accepted = a.accept()
    ground.attach(mesh())
    ground.attach(mesh(service("late", OTHER, a.endpoint())))
    sock.close()
    accepted.close()
    with ground.connect(OTHER):
        assert reached(*listeners) is a
    until(lambda: ground.counts(OTHER) == (1, 0, 1, 0), "only its own connection is counted")


def test_only_the_cgroup_and_its_children_are_led(ground: Ground, listeners: list[Listener], tmp_path: Path) -> None:
    ground.attach(mesh(service("orders", ADDRESS, listeners[0].endpoint())))
    child = ground.child("child")
    grandchild = ground.child("child/grandchild")
    for folder in (ground.cgroup, child, grandchild):
        with ground.client(cgroup=folder) as sock:
            sock.connect((ADDRESS, 80))
            assert reached(*listeners) is listeners[0]
    with socket.socket() as outside, pytest.raises(ConnectionRefusedError):
        outside.connect((ADDRESS, 80))
    with inside(ground.cgroup):  # a child process inherits the cgroup
        pid = os.fork()
        if pid == 0:
            with socket.socket() as forked:
                os._exit(forked.connect_ex((ADDRESS, 80)))
    assert os.waitpid(pid, 0)[1] == 0
    assert reached(*listeners) is listeners[0]
