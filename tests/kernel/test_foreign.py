"""Neighbours' programs on our cgroup: they run beside us, and are there after us."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from loader import dataplane, neighbours
from meshbpf.errors import Busy
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
@pytest.mark.parametrize("above", [False, True], ids=["there", "above"])
def test_a_neighbour_that_wants_to_be_alone(ground: Ground, kind: int, hook: int, above: bool) -> None:
    """Attached exclusively: we cannot come in there or below, say who it is and how to look, and leave nothing
    half-done.
    """
    ours = ground.child("below") if above else ground.cgroup
    with foreign.attached(ground.cgroup, foreign.EXCLUSIVE, kind, hook) as neighbour:
        said = f"on {ours}: program {neighbour} was attached exclusively to {ground.cgroup}: .*"
        with pytest.raises(Busy, match=f"{said}\n.*bpftool prog show id {neighbour}"):
            ground.attach(mesh(service("orders", ADDRESS)), ours)
        assert programs(ground) == {neighbour}
        assert not ground.instance.pins.exists()
    ground.attach(mesh(service("orders", ADDRESS)), ours)


def test_a_neighbour_that_comes_later_and_wants_to_be_alone_above(ground: Ground) -> None:
    """We were first: we go on and can be upgraded, and it is told to nobody but us that it does not run below."""
    ours = ground.child("below")
    with Listener() as a:
        wanted = mesh(service("orders", ADDRESS, a.endpoint()))
        ground.attach(wanted, ours)
        denying = foreign.denies((a.address, a.port))
        with foreign.attached(
            ground.cgroup, foreign.EXCLUSIVE, foreign.CGROUP_SOCK_ADDR, foreign.INET4_CONNECT, denying
        ) as late:
            ground.attach(wanted, ours)
            with ground.client(cgroup=ours) as sock:
                sock.connect((ADDRESS, 80))
                assert reached(a) is a
            (line,) = neighbours.switched_off([ours], dataplane.CGROUP_HOOKS)
            assert line.startswith(f"program {late} on {ground.cgroup} does not run for connect4 of {ours}:")
            with ground.client() as sock, pytest.raises(PermissionError):
                sock.connect((a.address, a.port))


def test_a_neighbour_that_yields(ground: Ground) -> None:
    """Attached above with BPF_F_ALLOW_OVERRIDE: it lets us in, and then the kernel runs it no more for what we lead."""
    ours, other = ground.child("ours"), ground.child("other")
    with Listener() as a:
        denying = foreign.denies((a.address, a.port))
        with foreign.attached(
            ground.cgroup, foreign.OVERRIDE, foreign.CGROUP_SOCK_ADDR, foreign.INET4_CONNECT, denying
        ) as neighbour:
            ground.attach(mesh(service("orders", ADDRESS, a.endpoint())), ours)
            (line,) = neighbours.switched_off([ours], dataplane.CGROUP_HOOKS)
            assert line.startswith(f"program {neighbour} on {ground.cgroup} does not run for connect4 of {ours}:")
            with ground.client(cgroup=ours) as sock:
                sock.connect((ADDRESS, 80))
                assert reached(a) is a
            with ground.client(cgroup=other) as sock, pytest.raises(PermissionError):
                sock.connect((a.address, a.port))
            dataplane.detach(ground.instance)
            with ground.client(cgroup=ours) as sock, pytest.raises(PermissionError):
                sock.connect((a.address, a.port))
            with pytest.raises(Busy, match=f"program {neighbour} was attached there with BPF_F_ALLOW_OVERRIDE"):
                ground.attach(mesh(service("orders", ADDRESS)))


def test_neighbours_that_stand_beside_are_not_switched_off(ground: Ground) -> None:
    ours = ground.child("ours")
    with foreign.attached(ground.cgroup, None, foreign.CGROUP_SOCK_ADDR, foreign.INET4_CONNECT):
        ground.attach(mesh(service("orders", ADDRESS)), ours)
        assert list(neighbours.switched_off([ours], dataplane.CGROUP_HOOKS)) == []


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
