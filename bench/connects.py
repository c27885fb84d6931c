"""The row `connect`: what one connect() costs with 10, 1 000 and 10 000 services, by our hook, iptables and nft.

Rule: every way has a fresh namespace, so that nobody pays for the rules or the connection tracking of another, and the
cells of a round are taken in turn. `python -m bench.connects ADDRESS …` is the caller, in a process of its own because
the cgroup of a socket is that of the process which makes it.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import crowd, portals
from bench.figures import SIZES
from bench.machine import program, spawn
from loader import dataplane
from loader.instance import Instance
from meshbpf.demo import plumbing
from meshbpf.model import Endpoint, Mesh, Port, Protocol, Service

DIALLED = 10  # services that somebody answers, of every crowd
CALLS = 2000  # of one cell
PATIENCE = 120
Cells = dict[str, dict[str, float]]


def dialled(port: int) -> tuple[Service, ...]:
    ports, endpoints = (Port("main", 80, Protocol.TCP),), (Endpoint("127.0.0.1", {"main": port}),)
    return tuple(
        Service(f"dialled{n}", addresses=(f"127.96.239.{n + 1}",), ports=ports, endpoints=endpoints)
        for n in range(DIALLED)
    )


class Listener:
    """Answers by accepting, when asked to: nothing of it runs while a connect() is measured."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.port = int(self.socket.getsockname()[1])

    def drain(self) -> None:
        """Take and close what waits."""
        while select.select([self.socket], [], [], 0)[0]:
            self.socket.accept()[0].close()

    def awaited(self) -> None:
        """Returns when somebody has called. Raises RuntimeError when nobody does."""
        if not select.select([self.socket], [], [], PATIENCE)[0]:
            raise RuntimeError("the new endpoint was not reached")
        self.drain()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a caller lives: a namespace with somebody who answers, and the cgroup that is attached, if one is."""

    namespace: int
    listener: Listener
    group: Path | None = None

    def cell(self, cpus: set[int] | None) -> dict[str, float]:
        addresses = [service.addresses[0] for service in dialled(0)]
        with plumbing.inside(self.namespace):
            child = spawn([sys.executable, "-m", "bench.connects", *addresses], self.group, cpus)
        out, err = child.communicate(timeout=PATIENCE)
        self.listener.drain()
        if child.returncode != 0:
            raise RuntimeError(f"connect(): {err.strip()}")
        return {"connect_us": float(out)}


def measure(make_group: Callable[[str], Path], rounds: int, cpus: set[int] | None, seed: int) -> Iterator[Cells]:
    dice = random.Random(seed)
    with contextlib.ExitStack() as stack:
        places: dict[str, Place] = {}
        for count in SIZES:
            for way in (_hook, _iptables, _nft):
                name = f"{way.__name__[1:]}-{count}"
                places[name] = way(name, count, make_group, stack)
        for _ in range(rounds):
            yield _round(places, cpus, dice)


def _round(places: Mapping[str, Place], cpus: set[int] | None, dice: random.Random) -> Cells:
    return {name: places[name].cell(cpus) for name in dice.sample(list(places), len(places))}


def _place(stack: contextlib.ExitStack, load: Callable[[int], None], group: Path | None = None) -> Place:
    """In a fresh namespace: somebody who listens, and then `load(its port)`."""
    with plumbing.fresh() as there:
        namespace = os.dup(there)
        stack.callback(os.close, namespace)
        listener = Listener()
        stack.callback(listener.socket.close)
        load(listener.port)
    return Place(namespace, listener, group)


def _hook(name: str, count: int, make_group: Callable[[str], Path], stack: contextlib.ExitStack) -> Place:
    group, instance = make_group(f"connect-{name}"), Instance(f"bench-{name}")

    def load(port: int) -> None:
        stack.callback(dataplane.detach, instance)
        with instance.lock():
            services = (*crowd.services(count - DIALLED), *dialled(port))
            dataplane.attach(instance, (group,), Mesh(services=services))

    return _place(stack, load, group)


def _iptables(_name: str, count: int, _groups: Callable[[str], Path], stack: contextlib.ExitStack) -> Place:
    def load(port: int) -> None:
        _feed("iptables-restore", text=portals.iptables(dialled(port), crowd.services(count - DIALLED)))

    return _place(stack, load)


def _nft(_name: str, count: int, _groups: Callable[[str], Path], stack: contextlib.ExitStack) -> Place:
    def load(port: int) -> None:
        _feed("nft", "-f", "-", text=portals.nft(dialled(port), crowd.services(count - DIALLED)))

    return _place(stack, load)


def _feed(name: str, *options: str, text: str) -> None:
    done = subprocess.run([program(name), *options], input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name}: {done.stderr.strip()[:500]}")


def call(address: str) -> int:
    """Nanoseconds of one connect(). The connection is reset: no TIME_WAIT piles up."""
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        begun = time.perf_counter_ns()
        made.connect((address, 80))
        return time.perf_counter_ns() - begun


def main() -> None:
    addresses = sys.argv[1:]
    taken = [call(addresses[number % len(addresses)]) for number in range(CALLS)]
    print(median(taken[CALLS // 10 :]) / 1000)


if __name__ == "__main__":
    main()
