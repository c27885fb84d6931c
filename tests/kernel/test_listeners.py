"""The mark by which connect knows the proxy's listeners, and what an upgrade to other tables does with callers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace

import pytest

from loader import dataplane
from meshbpf.model import MapSizes, Mesh, Mode, OnProxyDown
from tests.support import netns
from tests.support.ground import SIZES, Ground, Listener, mesh, service, untouched

ADDRESS = "127.96.9.1"
LARGER = replace(SIZES, flows=4096)


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with Ground(f"listeners-{os.getpid()}") as made:
        yield made


@pytest.fixture
def endpoint() -> Iterator[Listener]:
    with Listener() as made:
        yield made


def marked(ground: Ground, fd: int) -> bool:
    return ground.plane.maps["listeners"].lookup(fd.to_bytes(4, "little")) is not None


def refusing(endpoint: Listener, sizes: MapSizes = SIZES) -> Mesh:
    one = service("orders", ADDRESS, endpoint.endpoint())
    return mesh(one, mode=Mode.PROXY, down=OnProxyDown.REFUSE, sizes=sizes)


def test_nobody_inherits_the_mark(ground: Ground, endpoint: Listener) -> None:
    """Connections that are accepted from a listener, and whoever has its port after it, are strangers."""
    ground.attach(refusing(endpoint))
    with Listener() as proxy:
        ground.proxy(proxy)
        with ground.connect(ADDRESS), proxy.accept() as accepted:
            assert marked(ground, proxy.fileno())
            assert not marked(ground, accepted.fileno())
    with Listener(port=proxy.port) as stranger:
        assert not marked(ground, stranger.fileno())
        with pytest.raises(ConnectionRefusedError):
            ground.connect(ADDRESS)
        assert untouched(stranger)


def test_a_listener_of_another_namespace_is_marked_from_here(ground: Ground, endpoint: Listener) -> None:
    ground.attach(refusing(endpoint))
    with netns.fresh():
        listener, sock = Listener(), ground.client()
    with listener, sock:
        ground.proxy(listener)
        sock.connect((ADDRESS, 80))
        listener.accept().close()


def test_an_upgrade_with_the_same_tables_keeps_the_mark(ground: Ground, endpoint: Listener) -> None:
    ground.attach(refusing(endpoint))
    with Listener() as proxy:
        ground.proxy(proxy)
        ground.attach(refusing(endpoint))
        ground.plane.beat(time.monotonic_ns())
        with ground.connect(ADDRESS), proxy.accept():
            assert untouched(endpoint)


def test_other_tables_know_listeners_and_callers_from_the_first_moment(ground: Ground, endpoint: Listener) -> None:
    """Whoever waits in the listener's queue was led by the hooks before: the tables of the new ones know the caller."""
    ground.attach(refusing(endpoint))
    with Listener() as proxy, ExitStack() as opened:
        ground.proxy(proxy)
        callers = [opened.enter_context(ground.connect(ADDRESS))]
        with ground.instance.lock():
            prepared = dataplane.prepare(ground.instance, [ground.cgroup], refusing(endpoint, LARGER))
            assert not prepared.same_tables
            ground.plane.beat(time.monotonic_ns())
            callers.append(opened.enter_context(ground.connect(ADDRESS)))  # what ran before still leads
            with closing(dataplane.Dataplane(ground.instance, prepared.layout, LARGER)) as plane:
                plane.mark([proxy.socket])
                plane.set_agent(proxy.port, 0)
                plane.beat(time.monotonic_ns())
            carried = dataplane.lead(prepared)
        callers.append(opened.enter_context(ground.connect(ADDRESS)))
        accepted = [opened.enter_context(proxy.accept()) for _ in callers]
        peers = [(dataplane.netns_cookie(sock), *sock.getpeername()) for sock in accepted]
        assert {peer[1:] for peer in peers} == {sock.getsockname() for sock in callers}
        assert all(ground.origin(*peer) for peer in peers)
        ground.plane.forget(carried)
        assert [ground.origin(*peer) is not None for peer in peers] == [False, False, True]
        assert untouched(endpoint)
    assert len(list(ground.instance.links.glob("*-sockops*"))) == 1
