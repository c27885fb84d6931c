"""A storm of connects while the mesh is attached anew again and again: each one reaches who it should."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from loader import dataplane
from loader.flows import Flows
from meshbpf.model import MapSizes, Mesh, Mode, Service, ServicePolicy
from tests.support.ground import AGENT, SIZES, Ground, Listener, inside, service
from tests.support.machine import until

DIRECT, GOVERNED = "127.96.7.1", "127.96.7.2"
UPGRADES, STORMERS = 20, 3
LARGER = MapSizes(services=512, slots=4096, endpoints=512, policies=128, flows=4096, members=64)
ABORT = struct.pack("ii", 1, 0)


@pytest.fixture
def ground() -> Iterator[Ground]:
    with Ground(f"upgrade-{os.getpid()}") as made:
        yield made


class Server(threading.Thread):
    """Says one letter to whoever connects; `proxy` says P, and n when nobody knows what the caller dialled."""

    def __init__(self, letter: bytes) -> None:
        super().__init__()
        self.listener = Listener()
        self._letter = letter
        self._flows: Flows | None = None
        self.end, self._end = socket.socketpair()
        self.start()

    def watch(self, plane: dataplane.Dataplane) -> None:
        self._flows = Flows(plane.maps["flows"].fd)

    def run(self) -> None:
        while True:
            ready, _, _ = select.select([self.listener, self._end], [], [])
            if self._end in ready:
                break
            with self.listener.accept() as accepted:
                letter = self._letter
                if self._flows is not None:
                    told = self._flows(dataplane.netns_cookie(accepted), *accepted.getpeername())
                    letter = b"P" if told and told[:2] == (GOVERNED, 80) else b"n"
                accepted.send(letter)

    def close(self) -> None:
        self.end.close()
        self.join()
        self._end.close()
        self.listener.close()


def storm(results: int, stop: int) -> None:
    """In a process of its own: connect, hear the letter, again, until told to stop; one letter per connect. A letter in
    lower case is what went wrong. Paced, so that the upgrades get on.
    """
    letters = bytearray()
    while not select.select([stop], [], [], 0.001)[0]:
        for address in (DIRECT, GOVERNED):
            with socket.socket() as sock:
                sock.settimeout(10)
                try:
                    sock.connect((address, 80))
                    letters += sock.recv(1) or b"e"  # closed without a word
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
                except ConnectionRefusedError:
                    letters += b"r"
                except OSError:
                    letters += b"o"
    at = 0
    while at < len(letters):
        at += os.write(results, letters[at:])


@contextmanager
def storming(ground: Ground, heard: bytearray) -> Iterator[None]:
    """Within: processes in the cgroup connect and connect. After: what they heard."""
    stop, stopping = os.pipe()
    results, told = os.pipe()
    pids = []
    with inside(ground.cgroup):
        for _ in range(STORMERS):
            pid = os.fork()
            if pid == 0:
                try:
                    os.close(stopping)
                    os.close(results)
                    storm(told, stop)
                finally:
                    os._exit(0)
            pids.append(pid)
    os.close(stop)
    os.close(told)
    try:
        yield
    finally:
        os.close(stopping)
        while data := os.read(results, 65536):
            heard += data
        os.close(results)
        for pid in pids:
            os.waitpid(pid, 0)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [SIZES, LARGER], ids=["same-tables", "other-tables"])
def test_no_connect_escapes_or_fails_during_upgrades(ground: Ground, sizes: MapSizes) -> None:
    servers = [Server(b"A"), Server(b"B"), Server(b"P")]
    a, b, proxy = servers
    heard = bytearray()
    alive = threading.Event()

    def mesh(which: Server, sizes: MapSizes) -> Mesh:
        services: tuple[Service, ...] = tuple(
            service(name, address, which.listener.endpoint())
            for name, address in (("direct", DIRECT), ("governed", GOVERNED))
        )
        policies = {("governed", "default"): ServicePolicy(service="governed", mode=Mode.PROXY)}
        return Mesh(type(AGENT)(maps=sizes), services, policies)

    def beat() -> None:
        while not alive.wait(0.1):
            plane.beat(time.monotonic_ns())

    ground.attach(mesh(a, SIZES))
    plane = ground.plane
    proxy.watch(plane)
    ground.proxy(proxy.listener)
    pulse = threading.Thread(target=beat)
    pulse.start()
    took = []
    try:
        with storming(ground, heard):
            for number in range(UPGRADES):
                begin = time.monotonic()
                ground.attach(mesh(b if number % 2 == 0 else a, SIZES if number % 2 else sizes))
                took.append(time.monotonic() - begin)
    finally:
        alive.set()
        pulse.join()
        for server in servers:
            server.close()
    found = {chr(letter): heard.count(letter) for letter in set(heard)}
    assert set(found) <= set("ABP"), f"escaped, failed or misled: {found}"
    assert sum(found.values()) > 1000
    assert found["A"] > 10
    assert found["B"] > 10
    assert found["P"] > 10
    if sizes == SIZES:
        # every governed one went to the proxy, every direct one was counted
        until(lambda: ground.counts(DIRECT)[0] == found["A"] + found["B"], "direct connects are counted")
        assert ground.counts(GOVERNED)[:2] == (0, found["P"])
    print(f"{sum(found.values())} connects, {UPGRADES} upgrades of {min(took):.2f} to {max(took):.2f} s")
