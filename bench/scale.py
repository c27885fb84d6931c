"""The row `scale`: what ten thousand services with ten endpoints each cost to load, to start with, to change, to call.

Rule: each cell is what a user would wait for: a whole `meshbpf run` from exec to its ready check, a registration from
its PUT to the first connection that reaches the new endpoint. `python -m bench.scale connect|call …` is the caller, in
a process of its own because the cgroup of a socket is that of the process which makes it.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from bench import crowd
from bench.backend import wait_for
from bench.machine import spawn, stop
from bench.subjects import ATTACH_PATIENCE, Attach, meshbpf
from loader import dataplane
from loader.dataplane import Dataplane
from loader.instance import Instance
from meshbpf.model import Endpoint, Mesh, Port, Protocol, Service

MANY, FEW = 10_000, 10
CALLS = 2000  # of one connect() cell
CHANGES = 5  # of one change cell
Cells = dict[str, dict[str, float]]


def dialled(port: int) -> tuple[Service, ...]:
    """Ten services that somebody answers, in both crowds."""
    ports, endpoints = (Port("main", 80, Protocol.TCP),), (Endpoint("127.0.0.1", {"main": port}),)
    return tuple(
        Service(f"dialled{n}", addresses=(f"127.96.239.{n + 1}",), ports=ports, endpoints=endpoints) for n in range(FEW)
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
        if not select.select([self.socket], [], [], ATTACH_PATIENCE)[0]:
            raise RuntimeError("the new endpoint was not reached")
        self.drain()


def maps(instance: Instance, group: Path) -> Cells:
    """A hundred thousand endpoints planned and written into empty tables."""
    services = crowd.services(MANY)
    with instance.lock():
        dataplane.attach(instance, (group,), Mesh())
    try:
        plane = _plane(instance)
        begun = time.monotonic()
        writes = plane.apply(Mesh(services=services)).writes
        seconds = time.monotonic() - begun
        plane.close()
    finally:
        dataplane.detach(instance)
    return {"maps": {"seconds": seconds, "writes": writes}}


def _plane(instance: Instance) -> Dataplane:
    opened = dataplane.open_pins(instance)
    assert opened is not None
    return opened[0]


class Start(Attach):
    """One instance with the whole crowd in one file beside the Agent's."""

    form: Callable[[Service], str] = staticmethod(crowd.as_yaml)

    def configure(self) -> list[str]:
        options = super().configure()
        (self.run / f"{self.name}.crowd").write_text(crowd.stream([self.form(s) for s in crowd.services(MANY)]))
        return [*options, "-c", str(self.run / f"{self.name}.crowd")]

    def seconds(self) -> float:
        """Wall seconds from exec to ready, with nothing of ours attached before."""
        options = self.configure()
        self.detach()
        log = self.run / f"{self.name}.out"
        begun = time.monotonic()
        self.child = spawn([meshbpf(), "run", *options], self.group, None, log)
        wait_for(f"http://127.0.0.1:{self.admin}/readyz", self.child, log, patience=ATTACH_PATIENCE)
        return time.monotonic() - begun

    def changes(self) -> list[float]:
        """Milliseconds from the PUT of another endpoint to the first connection that reaches it, on a running start."""
        found, listeners = [], [Listener(), Listener()]
        self._put(listeners[1].port)
        caller = spawn([sys.executable, "-m", "bench.scale", "call", self._address()], self.client_group)
        try:
            listeners[1].awaited()
            for number in range(CHANGES):
                new, old = listeners[number % 2], listeners[1 - number % 2]
                old.awaited()  # the last change is over, and so this one is a change of its own
                new.drain()
                begun = time.monotonic()
                self._put(new.port)
                new.awaited()
                found.append(1000 * (time.monotonic() - begun))
                old.drain()
        finally:
            stop(caller)
        return found

    def _put(self, port: int) -> None:
        registry = next(line for line in self.file.read_text().splitlines() if "embedded:" in line)
        where = registry.partition("listen: ")[2].partition(",")[0]
        entry = {"port": port, "protocol": "tcp", "servicePort": 80}
        body = {"address": "127.0.0.1", "ports": {"main": entry}, "ttl": "1h"}
        request = urllib.request.Request(
            f"http://{where}/v1/services/changing/instances/one",
            json.dumps(body).encode(), {"content-type": "application/json"}, method="PUT",
        )  # fmt: skip
        urllib.request.urlopen(request, timeout=10).close()

    def _address(self) -> str:
        """What the pool gave to the service, as `services -o hosts` says it, once it is there."""
        command = [meshbpf(), "services", "-o", "hosts", "--instance", self.instance]
        deadline = time.monotonic() + ATTACH_PATIENCE
        while time.monotonic() < deadline:
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
            for line in lines:
                address, _tab, names = line.partition("\t")
                if "changing" in names.split():
                    return address
        raise RuntimeError("a registered service has not come into the mesh")


class JsonStart(Start):
    form = staticmethod(crowd.as_json)


def connects(attached: dict[str, Path], listener: Listener, rounds: int, cpus: set[int] | None) -> Iterator[Cells]:
    """Rounds of connect() cells, the crowds in turn, who begins in turn; `attached`: name → cgroup."""
    addresses = [service.addresses[0] for service in dialled(0)]
    for number in range(rounds):
        cells = {}
        for name in sorted(attached, reverse=bool(number % 2)):
            child = spawn([sys.executable, "-m", "bench.scale", "connect", *addresses], attached[name], cpus)
            while child.poll() is None:
                select.select([listener.socket], [], [], 0.05)
                listener.drain()
            out, err = child.communicate()
            if child.returncode != 0:
                raise RuntimeError(f"connect() of {name}: {err.strip()}")
            cells[name] = {"connect_us": float(out)}
        yield cells


def measure(
    start: Start, json_start: Start, groups: dict[str, Path], rounds: int, cpus: set[int] | None
) -> Iterator[Cells]:
    """All cells of the row; `groups` are cgroups of our own by name: maps, many, few."""
    for _ in range(rounds):
        yield maps(Instance("bench-maps"), groups["maps"])
    for name, subject in (("start-yaml", start), ("start-json", json_start)):
        for _ in range(rounds):
            try:
                yield {name: {"seconds": subject.seconds()}}
                if subject is json_start:
                    for milliseconds in subject.changes():
                        yield {"change": {"ms": milliseconds}}
            finally:
                subject.stop()
    listener, attached = Listener(), {}
    instances = {"many": Instance("bench-many"), "few": Instance("bench-few")}
    try:
        for name, count in (("many", MANY - FEW), ("few", 0)):
            with instances[name].lock():
                services = (*crowd.services(count), *dialled(listener.port))
                dataplane.attach(instances[name], (groups[name],), Mesh(services=services))
            attached[name] = groups[name]
        yield from connects(attached, listener, 3 * rounds, cpus)
    finally:
        for instance in instances.values():
            dataplane.detach(instance)


def call(address: str) -> int:
    """Nanoseconds of one connect(). The connection is reset: no TIME_WAIT piles up."""
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        begun = time.perf_counter_ns()
        made.connect((address, 80))
        return time.perf_counter_ns() - begun


def main() -> None:
    what, *arguments = sys.argv[1:]
    if what == "connect":
        taken = [call(arguments[number % len(arguments)]) for number in range(CALLS)]
        print(median(taken[CALLS // 10 :]) / 1000)
    elif what == "call":
        while True:  # until we are ended; a caller every millisecond
            call(arguments[0])
            time.sleep(0.001)


if __name__ == "__main__":
    main()
