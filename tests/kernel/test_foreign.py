"""Neighbours' programs on our cgroup: they run beside us, and are there after us."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from loader import dataplane
from meshbpf.errors import DataplaneError
from tests.support import bpftool, foreign
from tests.support.ground import Ground, Listener, mesh, reached, service
from tests.support.machine import until

ADDRESS = "127.96.6.1"
HOOKS = [
    pytest.param(foreign.CGROUP_SOCK_ADDR, foreign.INET4_CONNECT, id="connect4"),
    pytest.param(foreign.SOCK_OPS, foreign.CGROUP_SOCK_OPS, id="sockops"),
]


@pytest.fixture
def ground() -> Iterator[Ground]:
    with Ground(f"foreign-{os.getpid()}") as made:
        yield made


def programs(ground: Ground) -> set[int]:
    return {entry["id"] for entry in bpftool.hooks_on(ground.cgroup)}


@pytest.mark.parametrize(("kind", "hook"), HOOKS)
@pytest.mark.parametrize("flags", [None, foreign.MULTI], ids=["link", "attach"])
@pytest.mark.parametrize("first", [True, False], ids=["before-us", "after-us"])
def test_a_neighbour_stays(ground: Ground, kind: int, hook: int, flags: int | None, first: bool) -> None:
    with Listener() as a:
        wanted = mesh(service("orders", ADDRESS, a.endpoint()))
        if not first:
            ground.attach(wanted)
        with foreign.attached(ground.cgroup, flags, kind, hook) as neighbour:
            ground.attach(wanted)
            assert len(programs(ground)) == len(dataplane.CGROUP_HOOKS) + 1
            with ground.connect(ADDRESS):
                assert reached(a) is a
            removed = dataplane.detach(ground.instance)
            assert sum(line.startswith("link") for line in removed) == len(dataplane.CGROUP_HOOKS)
            assert programs(ground) == {neighbour}
        until(lambda: programs(ground) == set(), "the neighbour is gone too")


@pytest.mark.parametrize(("kind", "hook"), HOOKS)
def test_a_neighbour_that_wants_to_be_alone(ground: Ground, kind: int, hook: int) -> None:
    """Attached exclusively: we cannot come in, say where and how to look, and leave nothing half-done."""
    with foreign.attached(ground.cgroup, foreign.EXCLUSIVE, kind, hook) as neighbour:
        with pytest.raises(DataplaneError, match=f"on {ground.cgroup}: .*bpftool cgroup show"):
            ground.attach(mesh(service("orders", ADDRESS)))
        assert programs(ground) == {neighbour}
        assert not ground.instance.pins.exists()
    ground.attach(mesh(service("orders", ADDRESS)))


def test_a_neighbour_keeps_the_callbacks_it_asked_for(ground: Ground) -> None:
    """Its sockops runs before ours, and ours asks for another callback of the same socket."""
    with Listener() as a:
        with foreign.attached(
            ground.cgroup, None, foreign.SOCK_OPS, foreign.CGROUP_SOCK_OPS, foreign.WANTS_ROUND_TRIPS
        ):
            ground.attach(mesh(service("orders", ADDRESS, a.endpoint())))
            with ground.connect(ADDRESS) as sock, a.accept() as accepted:
                for _ in range(3):
                    sock.sendall(b"question")
                    assert accepted.recv(100) == b"question"
                    accepted.sendall(b"answer")
                    assert sock.recv(100) == b"answer"
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == foreign.MARK
            until(lambda: ground.counts(ADDRESS) == (1, 0, 1, 0), "and we got ours")


def test_a_neighbour_forgets_what_we_asked_for(ground: Ground) -> None:
    """Its sockops runs after ours and sets its own flags in place of ours: we ask again when the handshake is over."""
    with Listener() as a:
        ground.attach(mesh(service("orders", ADDRESS, a.endpoint())))
        with foreign.attached(
            ground.cgroup, None, foreign.SOCK_OPS, foreign.CGROUP_SOCK_OPS, foreign.WANTS_ONLY_ROUND_TRIPS
        ):
            opened, _, closed, _ = ground.counts(ADDRESS)
            with ground.connect(ADDRESS):
                a.accept().close()
            until(lambda: ground.counts(ADDRESS) == (opened + 1, 0, closed + 1, 0), "its end was counted")
