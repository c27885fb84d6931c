"""Governed services and the proxy: who is taken for it, and what happens while it is not there."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from loader import abi, dataplane
from loader.events import Events
from loader.flows import Flows
from meshbpf.model import Mode, OnProxyDown
from tests.support import netns
from tests.support.ground import Ground, Listener, inside, mesh, reached, service, untouched
from tests.support.machine import until

ADDRESS = "127.96.8.1"
LONG_AGO_NS = 2 * abi.HEARTBEAT_MAX_NS


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with Ground(f"fallback-{os.getpid()}") as made:
        yield made


@pytest.fixture
def endpoint() -> Iterator[Listener]:
    with Listener() as made:
        yield made


@pytest.fixture
def proxy() -> Iterator[Listener]:
    with Listener() as made:
        yield made


def attach(ground: Ground, endpoint: Listener, down: OnProxyDown = OnProxyDown.DIRECT) -> None:
    ground.attach(mesh(service("orders", ADDRESS, endpoint.endpoint()), mode=Mode.PROXY, down=down))


@contextlib.contextmanager
def counted(ground: Ground, **expected: int) -> Iterator[None]:
    """These reasons of connect, and no others, fall within."""
    before = ground.reasons()
    yield
    after = ground.reasons()
    assert {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name)} == expected


@contextlib.contextmanager
def nobody(ground: Ground, proxy: Listener) -> Iterator[str]:
    """No agent has started."""
    ground.plane.set_agent(0, 0)
    yield "proxy_absent"


@contextlib.contextmanager
def stopped(ground: Ground, proxy: Listener) -> Iterator[str]:
    """Its listener is gone, and it beats no more."""
    port = proxy.port
    proxy.close()
    ground.plane.set_agent(port, 0)
    ground.plane.beat(time.monotonic_ns() - LONG_AGO_NS)
    yield "proxy_absent"


@contextlib.contextmanager
def hung(ground: Ground, proxy: Listener) -> Iterator[str]:
    """It listens, and does not beat."""
    ground.proxy(proxy, beat=False)
    ground.plane.beat(time.monotonic_ns() - LONG_AGO_NS)
    yield "proxy_hung"


@contextlib.contextmanager
def elsewhere(ground: Ground, proxy: Listener) -> Iterator[str]:
    """It beats, and listens in another namespace only."""
    ground.proxy(proxy)
    proxy.close()
    yield "proxy_not_in_netns"


@contextlib.contextmanager
def stranger(ground: Ground, proxy: Listener) -> Iterator[str]:
    """It beats, and on its port listens somebody else, marked by all that a container's CAP_NET_RAW can mark."""
    ground.proxy(proxy)
    proxy.close()
    with Listener(port=proxy.port) as posing:
        posing.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, 0x6D62)
        posing.socket.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x6D62)
        yield "proxy_not_in_netns"
        assert untouched(posing)


STATES = [nobody, stopped, hung, elsewhere, stranger]


@pytest.mark.parametrize("state", STATES, ids=[state.__name__ for state in STATES])
@pytest.mark.parametrize("down", list(OnProxyDown))
def test_without_a_proxy(ground: Ground, endpoint: Listener, proxy: Listener, down: OnProxyDown, state: object) -> None:
    attach(ground, endpoint, down)
    with state(ground, proxy) as why:  # type: ignore[operator]
        if down is OnProxyDown.DIRECT:
            with counted(ground, **{why: 1, "direct": 1}), ground.connect(ADDRESS) as sock:
                assert reached(endpoint) is endpoint
                assert sock.getpeername() == (ADDRESS, 80)
        else:
            with counted(ground, **{why: 1, "proxy_down_refused": 1}), pytest.raises(ConnectionRefusedError):
                ground.connect(ADDRESS)
            assert untouched(endpoint)
        if why != "proxy_hung":
            return
        assert untouched(proxy)


def test_with_a_proxy(ground: Ground, endpoint: Listener, proxy: Listener) -> None:
    """It gets the connection, and the kernel tells it what the caller dialled and who it is; afterwards no more."""
    attach(ground, endpoint)
    _, before, _, ended = ground.counts(ADDRESS)
    with inside(ground.cgroup):
        sock = socket.socket()
        ground.proxy(proxy)
        with counted(ground, proxy=1):
            sock.connect((ADDRESS, 80))
    with sock, proxy.accept() as accepted:
        assert sock.getpeername() == (ADDRESS, 80)
        assert accepted.getpeername() == sock.getsockname()
        where = (dataplane.netns_cookie(accepted), *accepted.getpeername())
        told = ground.origin(*where)
        assert told is not None
        assert (abi.unpack_address(told.asked), told.asked_port) == (ADDRESS, 80)
        assert told.cgroup == ground.cgroup.stat().st_ino
        assert told.pid == os.getpid()
        assert Flows(ground.plane.maps["flows"].fd)(*where) == (ADDRESS, 80, told.cgroup)
        assert ground.origin(where[0] + 1, *where[1:]) is None
        assert ground.counts(ADDRESS)[1] == before + 1
    until(lambda: ground.counts(ADDRESS)[3] == ended + 1, "the connection is counted as closed")
    assert ground.origin(*where) is None
    assert untouched(endpoint)


def test_who_dials_the_proxy_has_no_origin(ground: Ground, endpoint: Listener, proxy: Listener) -> None:
    attach(ground, endpoint)
    ground.proxy(proxy)
    with ground.connect("127.0.0.1", proxy.port) as sock, proxy.accept() as accepted:
        where = (dataplane.netns_cookie(accepted), *accepted.getpeername())
        assert ground.origin(*where) is None
        assert sock.getpeername() == ("127.0.0.1", proxy.port)


def test_the_agent_s_own_connections_are_left_alone(ground: Ground, endpoint: Listener, proxy: Listener) -> None:
    attach(ground, endpoint)
    ground.proxy(proxy)
    ground.plane.set_agent(proxy.port, ground.cgroup.stat().st_ino)
    ground.plane.beat(time.monotonic_ns())
    with Listener(ADDRESS, 80) as alone, inside(ground.cgroup), socket.socket() as sock:
        with counted(ground, agent_exempt=1):
            sock.connect((ADDRESS, 80))
        assert reached(alone, endpoint, proxy) is alone


def test_a_caller_in_a_namespace_without_listener_is_told_of(
    ground: Ground, endpoint: Listener, proxy: Listener
) -> None:
    """The call follows onProxyDown at once; the agent hears from whom and where it came."""
    attach(ground, endpoint)
    heard: list[abi.Event] = []
    events = Events(ground.plane.maps_folder / "events", heard.append)
    try:
        events.read()
        heard.clear()
        with netns.fresh(), Listener(port=endpoint.port) as there:
            sock = ground.client()
            ground.proxy(proxy)
            with sock, counted(ground, proxy_not_in_netns=1, direct=1):
                sock.connect((ADDRESS, 80))
                assert reached(there) is there
                cookie = dataplane.netns_cookie(sock)
        assert select.select([events], [], [], 5)[0]
        events.read()
    finally:
        events.close()
    assert [(event.netns, event.pid) for event in heard] == [(cookie, os.getpid())]
    assert untouched(proxy)
    assert untouched(endpoint)


# --- who cannot reach the loopback -----------------------------------------------------------------------------------


@contextlib.contextmanager
def wired() -> Iterator[int]:
    """Within: a fresh namespace with a cable `near` (198.18.0.1) to another (198.18.0.2), whose descriptor this is."""
    with netns.fresh() as far, netns.fresh():
        there = f"nsenter --net=/proc/{os.getpid()}/fd/{far}"
        for command in (
            f"{there} ip link add far type veth peer name near netns {os.getpid()}",
            f"{there} ip address add 198.18.0.2/24 dev far",
            f"{there} ip link set far up",
            "ip address add 198.18.0.1/24 dev near",
            "ip link set near up",
        ):
            subprocess.run(command.split(), check=True)
        yield far


@pytest.mark.parametrize("down", list(OnProxyDown))
def test_a_socket_bound_to_a_device_goes_direct(ground: Ground, down: OnProxyDown) -> None:
    """`curl --interface near`: it would never hear from the proxy's listener, which is on the loopback."""
    with wired() as far, Listener() as proxy:
        with netns.inside(far):
            endpoint = Listener("198.18.0.2")
        with endpoint:
            attach(ground, endpoint, down)
            ground.proxy(proxy)
            with ground.client() as sock, counted(ground, bound_to_device=1, direct=1):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"near")
                sock.settimeout(3)
                sock.connect((ADDRESS, 80))
                assert reached(endpoint, proxy) is endpoint
            with ground.client() as sock, counted(ground, proxy=1):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
                sock.connect((ADDRESS, 80))
                assert reached(endpoint, proxy) is proxy
