"""Network namespaces and what joins them, for the demo and the tests: pyroute2 inside a namespace, never across one.

Its own way into a namespace (`netns=`, NetNS, netns.create) forks us and ends the child by SIGTERM. A child that still
runs then has our handler: it takes the demo away, while we wait for it. So this thread enters, and nothing is forked.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute, NetlinkError, netns

from meshbpf.errors import MeshError

CLONE_NEWNET = 0x40000000
NAMED = Path("/run/netns")
HERE = "thread-self"  # of /proc: a namespace is a thread's, not a process's
LOOPBACK = 1  # its index in every namespace
_libc = ct.CDLL(None, use_errno=True)


def _call(function: str, *arguments: int) -> None:
    if getattr(_libc, function)(*arguments) != 0:
        number = ct.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def inside(namespace: int) -> Iterator[None]:
    """Within: the calling thread lives in the namespace that the descriptor names."""
    with _opened(f"/proc/{HERE}/ns/net") as home:
        _call("setns", namespace, CLONE_NEWNET)
        try:
            yield
        finally:
            _call("setns", home, CLONE_NEWNET)


@contextlib.contextmanager
def fresh() -> Iterator[int]:
    """Within: the calling thread, and what it starts, live in a new namespace whose loopback is up.

    It has no name, and ends with the last socket, descriptor or process in it.
    """
    with _opened(f"/proc/{HERE}/ns/net") as home:
        _call("unshare", CLONE_NEWNET)
        try:
            with IPRoute() as links:
                links.link("set", index=LOOPBACK, state="up")
            with _opened(f"/proc/{HERE}/ns/net") as there:
                yield there
        finally:
            _call("setns", home, CLONE_NEWNET)


def create(name: str) -> None:
    """As `ip netns add`, with the loopback up. Raises MeshError."""
    try:
        with fresh():
            netns.attach(name, HERE, _libc)
    except (OSError, NetlinkError) as error:
        raise MeshError(f"cannot make the network namespace {name}: {error}") from error


def remove(name: str) -> None:
    """As `ip netns del`: it ends once nobody is in it. Raises MeshError."""
    try:
        netns.remove(name, _libc)
    except OSError as error:
        raise MeshError(f"cannot remove the network namespace {name}: {error}") from error


@contextlib.contextmanager
def _links(name: str) -> Iterator[Any]:
    """pyroute2's IPRoute of a namespace. Raises MeshError with what the kernel said."""
    try:
        with _opened(NAMED / name) as there, inside(there), IPRoute() as links:
            yield links
    except (OSError, NetlinkError) as error:
        raise MeshError(f"network namespace {name}: {error}") from error


def _up(links: Any, interface: str, **more: Any) -> int:
    """Its index."""
    (index,) = links.link_lookup(ifname=interface)
    links.link("set", index=index, state="up", **more)
    return int(index)


def join(hub: str, ends: Mapping[str, str], width: int) -> None:
    """Join namespaces that exist by a bridge in `hub`; `ends`: name → address of its eth0; `width`: its prefix length.

    Every one can reach every other one, and nothing else: there is no way in or out. Raises MeshError.
    """
    with _links(hub) as links:
        links.link("add", ifname="bridge", kind="bridge")
        bridge = _up(links, "bridge")
        for number, name in enumerate(ends):
            # Both ends are born where they belong, so that no interface ever shows up in the machine's own namespace.
            links.link("add", ifname=f"port{number}", kind="veth", peer={"ifname": "eth0", "net_ns_fd": name})
            _up(links, f"port{number}", master=bridge)
    for name, address in ends.items():
        with _links(name) as links:
            links.addr("add", index=_up(links, "eth0"), address=address, prefixlen=width)
