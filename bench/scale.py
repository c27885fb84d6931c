"""The row `scale`: what ten thousand services with ten endpoints each cost to load, to start with and to change.

Rule: each cell is what a user would wait for: a whole `meshbpf run` from exec to its ready check, a change from its PUT
or from the saved file to the first connection that reaches the new endpoint. `python -m bench.scale ADDRESS` is the
caller, in a process of its own because the cgroup of a socket is that of the process which makes it.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench import crowd
from bench.backend import wait_for
from bench.connects import Listener, call
from bench.machine import spawn, stop
from bench.subjects import ATTACH_PATIENCE, Attach, meshbpf
from loader import dataplane
from loader.dataplane import Dataplane
from loader.instance import Instance
from meshbpf.model import Endpoint, Mesh, Service
from meshbpf.registry.content import PutRow
from meshbpf.registry.leases import MAX_TOTAL
from meshbpf.registry.store import Store

MANY = 10_000
SMALL_FILE = 100
CHANGES = 5  # of one start
TTL = 3600
Cells = dict[str, dict[str, float]]


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
    """One instance with the whole crowd in one file beside the Agent's, and a service that the registry changes."""

    form: Callable[[Service], str] = staticmethod(crowd.as_yaml)
    count = MANY
    changing = False  # whether changes are measured on it as well

    def configure(self) -> list[str]:
        options = super().configure()
        self.write_crowd(crowd.services(self.count))
        return [*options, "-c", str(self.crowd_file)]

    @property
    def crowd_file(self) -> Path:
        return self.file.with_name("crowd")

    def write_crowd(self, services: tuple[Service, ...]) -> None:
        """As editors save: whole, or not at all."""
        draft = self.crowd_file.with_suffix(".draft")
        draft.write_text(crowd.stream([self.form(service) for service in services]))
        draft.rename(self.crowd_file)

    def seconds(self) -> float:
        """Wall seconds from exec to ready, with nothing of ours attached before."""
        command = [meshbpf(), "run", *self.configure()]
        self.detach()
        log = self.run / f"{self.name}.out"
        begun = time.monotonic()
        self.child = spawn(command, self.group, None, log)
        wait_for(f"http://127.0.0.1:{self.admin}/readyz", self.child, log, patience=ATTACH_PATIENCE)
        return time.monotonic() - begun

    def changes(self) -> Iterator[float]:
        """Milliseconds from the change of an endpoint to the first connection that reaches it, on a running start."""
        listeners = [Listener(), Listener()]
        self.change(listeners[1].port)
        caller = spawn([sys.executable, "-m", "bench.scale", self.changing_address()], self.client_group)
        try:
            listeners[1].awaited()
            for number in range(CHANGES):
                new, old = listeners[number % 2], listeners[1 - number % 2]
                old.awaited()  # the last change is over, and so this one is a change of its own
                new.drain()
                begun = time.monotonic()
                self.change(new.port)
                new.awaited()
                yield 1000 * (time.monotonic() - begun)
                old.drain()
        finally:
            stop(caller)

    def change(self, port: int) -> None:
        """Have the changing service be answered on `port` alone."""
        registry = next(line for line in self.file.read_text().splitlines() if "embedded:" in line)
        where = registry.partition("listen: ")[2].partition(",")[0]
        request = urllib.request.Request(
            f"http://{where}/v1/services/changing/instances/one",
            json.dumps(_registration("127.0.0.1", port)).encode(), {"content-type": "application/json"}, method="PUT",
        )  # fmt: skip
        urllib.request.urlopen(request, timeout=10).close()

    def changing_address(self) -> str:
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


def _registration(address: str, port: int) -> dict[str, Any]:
    entry = {"port": port, "protocol": "tcp", "servicePort": 80}
    return {"address": address, "ports": {"main": entry}, "ttl": f"{TTL}s"}


class JsonStart(Start):
    form = staticmethod(crowd.as_json)
    changing = True


class RegistryStart(Start):
    """As many instances as the registry takes, found in its store; the file is empty."""

    count = 0

    def configure(self) -> list[str]:
        options = super().configure()
        asyncio.run(self._fill())
        return options

    async def _fill(self) -> None:
        store = Store(self.run / f"{self.name}.db")
        await store.open()
        deadline = time.time() + TTL
        await store.write([
            PutRow((service.name, "default", str(number)), json.dumps(_registration(e.address, 8080)), deadline)
            for service in crowd.services(MAX_TOTAL // crowd.ENDPOINTS)
            for number, e in enumerate(service.endpoints)
        ])  # fmt: skip
        await store.close()


class SmallFile(Start):
    """A file of a hundred services, one of which changes."""

    count = SMALL_FILE - 1
    changing = True

    def change(self, port: int) -> None:
        (last,) = crowd.services(SMALL_FILE)[-1:]
        endpoints = (Endpoint("127.0.0.1", {name: port for name in last.endpoints[0].ports}),)
        changed = Service(last.name, addresses=last.addresses, ports=last.ports, endpoints=endpoints)
        self.write_crowd((*crowd.services(self.count), changed))

    def changing_address(self) -> str:
        return crowd.address(SMALL_FILE)


KINDS = {"start-yaml": Start, "start-json": JsonStart, "start-registry": RegistryStart, "small-file": SmallFile}


def measure(make_group: Callable[[str], Path], run: Path, rounds: int) -> Iterator[Cells]:
    """All cells of the row."""
    for _ in range(rounds):
        yield maps(Instance("bench-maps"), make_group("scale-maps"))
    for number, (name, kind) in enumerate(KINDS.items()):
        subject = kind(
            name, mode="direct", acceleration="off", number=10 + number, run=run, make_group=make_group, cpus=None,
            endpoints=[8080],
        )  # fmt: skip
        for _ in range(rounds):
            try:
                yield {name: {"seconds": subject.seconds()}}
                if subject.changing:
                    for milliseconds in subject.changes():
                        yield {"change-file" if kind is SmallFile else "change": {"ms": milliseconds}}
            finally:
                subject.stop()


def main() -> None:
    while os.getppid() != 1:  # until we are ended; a caller every millisecond
        call(sys.argv[1])
        time.sleep(0.001)


if __name__ == "__main__":
    main()
