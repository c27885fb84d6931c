"""Namespaces of the demo and the tests: joined, shut off from the machine's own, and made without forking."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshbpf.demo import plumbing
from meshbpf.errors import MeshError

ADDRESSES = ("198.18.77.1", "198.18.77.2")
Names = tuple[str, str, str]


@pytest.fixture
def names() -> Iterator[Names]:
    """A hub and two ends, not made yet; removed behind the test."""
    made = tuple(f"plumbing-{os.getpid()}-{part}" for part in ("hub", "one", "two"))
    yield made[0], made[1], made[2]
    for name in made:
        if (plumbing.NAMED / name).exists():
            plumbing.remove(name)


def build(names: Names) -> None:
    for name in names:
        plumbing.create(name)
    plumbing.join(names[0], dict(zip(names[1:], ADDRESSES, strict=True)), 24)


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    with (plumbing.NAMED / name).open() as there, plumbing.inside(there.fileno()):
        yield


def interfaces() -> set[str]:
    return {name for _index, name in socket.if_nameindex()}


def own() -> tuple[int, set[str]]:
    """The namespace that this thread is in, and what it has."""
    return os.stat("/proc/thread-self/ns/net").st_ino, interfaces()


def test_the_ends_reach_each_other_and_nothing_shows_up_here(names: Names) -> None:
    before = own()
    build(names)
    assert own() == before
    with inside(names[1]):
        assert interfaces() == {"lo", "eth0"}
        listener = socket.create_server((ADDRESSES[0], 0))
    address = listener.getsockname()
    with inside(names[2]), listener, socket.create_connection(address, timeout=5) as caller:
        assert caller.getsockname()[0] == ADDRESSES[1]
    with inside(names[0]):
        assert interfaces() == {"lo", "bridge", "port0", "port1"}  # no way in or out
    for name in names:
        plumbing.remove(name)
    assert not {path.name for path in Path("/run/netns").iterdir()} & set(names)


def test_the_loopback_is_up(names: Names) -> None:
    plumbing.create(names[0])
    with inside(names[0]), socket.create_server(("127.0.0.1", 0)) as listener:
        socket.create_connection(listener.getsockname(), timeout=5).close()


def test_nothing_is_forked(names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork of us has our signal handlers: pyroute2 ends it by SIGTERM, and it would take the demo away."""

    def forbidden() -> int:
        raise AssertionError("forked")

    monkeypatch.setattr(os, "fork", forbidden)
    build(names)


def test_errors_name_the_namespace(names: Names) -> None:
    home = own()
    plumbing.create(names[1])
    with pytest.raises(MeshError, match=rf"cannot make the network namespace {names[1]}: .*exists"):
        plumbing.create(names[1])
    with pytest.raises(MeshError, match=rf"network namespace {names[0]}: .*No such file"):
        plumbing.join(names[0], {}, 24)
    with pytest.raises(MeshError, match=rf"cannot remove the network namespace {names[0]}: .*No such file"):
        plumbing.remove(names[0])
    plumbing.create(names[0])
    with pytest.raises(MeshError, match=rf"network namespace {names[0]}: .*No such file"):
        plumbing.join(names[0], {names[2]: ADDRESSES[0]}, 24)
    assert own() == home
