"""IPv6 services, in namespaces of our own: led, refused, governed, and one tuple in two namespaces."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from loader import abi, dataplane
from meshbpf.model import Mesh, Mode, OnProxyDown, Port, Protocol, Service
from tests.support import netns
from tests.support.ground import AGENT, Ground, Listener, mesh, reached, service, untouched
from tests.support.machine import until

ADDRESS, BOTH = "fd00:96::1", "127.96.10.1"


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with Ground(f"ipv6-{os.getpid()}") as made:
        yield made


@pytest.fixture(autouse=True)
def namespace() -> Iterator[int]:
    with netns.fresh() as made:
        yield made


def test_an_ipv6_service(ground: Ground) -> None:
    with Listener("::1") as a, Listener("::1") as b:
        ground.attach(mesh(service("orders", ADDRESS, a.endpoint(2), b.endpoint(1))))
        found = []
        for _ in range(6):
            with ground.connect(ADDRESS) as sock:
                found.append(reached(a, b))
                assert sock.getpeername()[:2] == (ADDRESS, 80)
        assert (found.count(a), found.count(b)) == (4, 2)
        until(lambda: ground.counts(ADDRESS) == (6, 0, 6, 0), "all are counted as closed")


def test_an_ipv6_caller_reaches_endpoints_of_both_families(ground: Ground) -> None:
    with Listener("::1") as a, Listener("127.0.0.1") as b:
        ground.attach(mesh(service("orders", ADDRESS, a.endpoint(), b.endpoint())))
        found = set()
        for _ in range(4):
            with ground.connect(ADDRESS) as sock:
                found.add(reached(a, b))
                assert sock.getpeername()[:2] == (ADDRESS, 80)
        assert found == {a, b}


def test_an_ipv4_caller_reaches_the_ipv4_endpoint_among_many(ground: Ground) -> None:
    """More IPv6 slots in a row than one connect tries."""
    several = [Listener("::1") for _ in range(8)]
    with Listener("127.0.0.1") as only:
        endpoints = [listener.endpoint() for listener in several]
        ground.attach(mesh(service("orders", BOTH, *endpoints, only.endpoint())))
        before = ground.reasons().get("endpoint_vanished", 0)
        for _ in range(9):
            with ground.connect(BOTH):
                assert reached(only, *several) is only
        assert ground.reasons().get("endpoint_vanished", 0) == before
        with ground.connect(f"::ffff:{BOTH}", family=socket.AF_INET6):
            reached(only, *several)
    for listener in several:
        listener.close()


def test_an_ipv4_caller_and_only_ipv6_endpoints(ground: Ground) -> None:
    with Listener("::1") as a:
        ground.attach(mesh(service("orders", BOTH, a.endpoint())))
        with pytest.raises(ConnectionRefusedError):
            ground.connect(BOTH)
        assert untouched(a)


@pytest.mark.parametrize("blocking", [True, False])
def test_no_endpoint_is_refused(ground: Ground, blocking: bool) -> None:
    ground.attach(mesh(service("orders", ADDRESS)))
    with ground.client(socket.AF_INET6) as sock:
        sock.settimeout(None if blocking else 5)  # with a timeout, Python's connect is a non-blocking one and a poll
        with pytest.raises(ConnectionRefusedError):
            sock.connect((ADDRESS, 80))


def test_governed_on_both_loopbacks(ground: Ground) -> None:
    """One service, both families: each caller comes to the proxy on the loopback of its own family."""
    with Listener("::1") as six, Listener() as endpoint:
        with Listener("127.0.0.1", six.port) as four:
            ground.attach(mesh(service("orders", (ADDRESS, BOTH), endpoint.endpoint()), mode=Mode.PROXY))
            for address, family, listener in (
                (ADDRESS, socket.AF_INET6, six),
                (BOTH, socket.AF_INET, four),
                (f"::ffff:{BOTH}", socket.AF_INET6, four),
            ):
                sock = ground.client(family)
                ground.proxy(six, four)
                sock.connect((address, 80))
                with sock, listener.accept() as accepted:
                    told = ground.origin(dataplane.netns_cookie(accepted), *accepted.getpeername()[:2])
                    assert told is not None, address
                    assert abi.unpack_address(told.asked) == address.removeprefix("::ffff:")
                    assert sock.getpeername()[:2] == (address, 80)


@pytest.mark.parametrize("down", list(OnProxyDown))
def test_a_stranger_on_the_ipv6_loopback_is_not_the_proxy(ground: Ground, down: OnProxyDown) -> None:
    with Listener("::1") as stranger, Listener("127.0.0.1", stranger.port) as proxy, Listener("::1") as endpoint:
        ground.attach(mesh(service("orders", ADDRESS, endpoint.endpoint()), mode=Mode.PROXY, down=down))
        sock = ground.client(socket.AF_INET6)
        ground.proxy(proxy)
        with sock:
            if down is OnProxyDown.DIRECT:
                sock.connect((ADDRESS, 80))
                assert reached(endpoint, stranger) is endpoint
            else:
                with pytest.raises(ConnectionRefusedError):
                    sock.connect((ADDRESS, 80))
                assert untouched(endpoint)
        assert untouched(stranger)


def test_one_tuple_in_two_namespaces(ground: Ground, namespace: int) -> None:
    """The same client and proxy address and port, twice at the same time: each has its own origin."""
    ports = (Port("main", 80, Protocol.TCP),)
    both = tuple(Service(f"s{n}", addresses=(f"fd00:96::{n}",), ports=ports) for n in (1, 2))
    governed = mesh(*both, mode=Mode.PROXY)
    ground.attach(Mesh(AGENT, both, governed.policies))
    told = []
    opened: list[socket.socket | Listener] = []
    port, client_port = 0, 0
    with netns.fresh() as other:
        for where, number in ((namespace, 1), (other, 2)):
            with netns.inside(where):
                listener = Listener("::1", port)
                sock = ground.client(socket.AF_INET6)
                sock.bind(("::1", client_port))
                port, client_port = listener.port, sock.getsockname()[1]
                ground.proxy(listener)
                sock.connect((f"fd00:96::{number}", 80))
                accepted = listener.accept()
                opened += [listener, sock, accepted]
                told.append((accepted.getpeername()[:2], dataplane.netns_cookie(accepted)))
        assert told[0][0] == told[1][0]
        asked = []
        for (address, number), cookie in told:
            flow = ground.origin(cookie, address, number)
            assert flow is not None
            asked.append(abi.unpack_address(flow.asked))
        assert asked == ["fd00:96::1", "fd00:96::2"]
    for one in opened:
        one.close()
