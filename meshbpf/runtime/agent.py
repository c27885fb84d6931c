"""The agent: attach, then stay. Joins sources, dataplane, namespaces, workers, metrics and the API; touches no payload.

Order of starting: tables and hooks, listeners, workers; only then does connect learn the proxy's port. Order of
stopping: connect forgets the port (new connections follow onProxyDown), workers finish what they have, all goes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loader import dataplane, environment
from loader.dataplane import Dataplane
from loader.events import Events
from loader.instance import Instance
from meshbpf import wire
from meshbpf.errors import MeshError
from meshbpf.model import Mesh
from meshbpf.runtime import cgroup
from meshbpf.runtime.namespaces import Namespaces
from meshbpf.runtime.supervisor import Orphan, Supervisor, orphans
from meshbpf.tasks import spawn
from meshbpf.telemetry import Totals

log = logging.getLogger("agent")
SCAN_SECONDS = 5.0
READY_SECONDS = 30.0


def split_listen(listen: str) -> tuple[str, int]:
    """`host:port`, the host without brackets."""
    host, _colon, port = listen.rpartition(":")
    return host.strip("[]"), int(port)


@dataclass(frozen=True, slots=True)
class Options:
    instance: Instance
    cgroups: tuple[Path, ...]
    workers: int | None  # None: as configured
    log_level: str = "info"
    log_format: str = "text"


class Agent:
    """One instance's agent. `meshes` yields every new mesh, the first of which has been attached already."""

    def __init__(self, options: Options, mesh: Mesh, plane: Dataplane) -> None:
        self.options = options
        self.mesh = mesh
        self.plane = plane
        self.started = time.time()
        self.applied_at = time.time()
        self.apply_error = ""
        self.service_ids: dict[int, tuple[str, str]] = {}
        self.totals = Totals()
        self.totals.adopt(mesh, time.monotonic())
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()
        self._port = split_listen(mesh.agent.proxy.listen)[1]
        self.supervisor = Supervisor(
            options.instance,
            {"log_level": options.log_level, "log_format": options.log_format},
            self._report,
            self._changed.set,
        )
        self.namespaces = Namespaces(options.cgroups, self._port, self.supervisor.listen, self.supervisor.unlisten)
        self._events: Events | None = None
        self._orphans: list[Orphan] = []

    @property
    def workers(self) -> int:
        return self.options.workers or self.mesh.agent.proxy.workers

    @property
    def ready(self) -> bool:
        return self.supervisor.ready >= self.workers and not self._stop.is_set()

    def stop(self) -> None:
        self._stop.set()

    async def start(self) -> None:
        """From attached tables to a proxy that serves. Raises Busy when the proxy's port is taken."""
        loop = asyncio.get_running_loop()
        exempt = cgroup.exempt(self.options.cgroups, self.options.instance.name)
        self._orphans = [Orphan(pid, sock) for pid, sock in orphans(self.options.instance)]
        for orphan in self._orphans:
            for cookie, fds in await orphan.hand_over():
                self.namespaces.adopt(cookie, fds)
        for served in self.namespaces.served.values():
            self.supervisor.listen(served)
        self.namespaces.start()
        self._publish()
        await self.supervisor.start(self.workers)
        async with asyncio.timeout(READY_SECONDS):
            while not self.ready:
                self._changed.clear()
                await self._changed.wait()
        self.plane.set_agent(self._port, exempt)
        self._events = Events(self.plane.maps_folder / "events", lambda event: self.namespaces.serve_process(event.pid))
        loop.add_reader(self._events.fileno(), self._events.read)
        spawn(self._scan(), "scan namespaces")
        for orphan in self._orphans:
            spawn(orphan.end(self.mesh.agent.proxy.drain), f"drain earlier worker {orphan.pid}")
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        log.info(
            "ready instance=%s pid=%d workers=%d generation=%d services=%d",
            self.options.instance.name, os.getpid(), self.workers, self.mesh.generation, len(self.mesh.services),
        )  # fmt: skip

    async def follow(self, meshes: AsyncIterator[Mesh]) -> None:
        """Apply each mesh; one that the kernel refuses is logged, and the last good one stays."""
        async for mesh in meshes:
            self.apply(mesh)

    def apply(self, mesh: Mesh) -> None:
        try:
            applied = self.plane.apply(mesh)
        except MeshError as error:
            self.apply_error = str(error)
            log.error("mesh refused, the last one stays generation=%d error=%s", mesh.generation, error)
            return
        self.apply_error = ""
        self.mesh = mesh
        self.applied_at = time.time()
        self.totals.adopt(mesh, time.monotonic())
        self._publish()
        log.info(
            "mesh applied generation=%d services=%d writes=%d", mesh.generation, len(mesh.services), applied.writes
        )

    def _publish(self) -> None:
        """The mesh for workers and for commands that read while no agent runs."""
        home = next(s for s in self.namespaces.served.values() if s.identity == self.namespaces.home)
        self.supervisor.use(
            {
                "mesh": wire.encode(self.mesh),
                "layout": self.plane.layout,
                "cgroups": [str(path) for path in self.options.cgroups],
                "cookie": home.cookie,
            }
        )
        dataplane.write_state(self.options.instance, self.plane.layout, self.options.cgroups, self.mesh)

    def _report(self, incarnation: str, snapshot: Any) -> None:
        if snapshot is None:
            self.totals.ended(incarnation)
        else:
            self.totals.update(incarnation, snapshot)

    async def _scan(self) -> None:
        while True:
            await asyncio.sleep(SCAN_SECONDS)
            self.namespaces.scan()

    async def run(self) -> None:
        """Until SIGTERM or SIGINT, then drain."""
        await self._stop.wait()
        drain = self.mesh.agent.proxy.drain
        log.info("draining seconds=%.1f", drain)
        self.plane.set_agent(0, 0)  # from here on no connection is led to the proxy
        if self._events is not None:
            asyncio.get_running_loop().remove_reader(self._events.fileno())
        await self.supervisor.drain(drain)
        self.namespaces.close()
        if self._events is not None:
            self._events.close()
        log.info("stopped pid=%d", os.getpid())


def attach(options: Options, mesh: Mesh) -> Dataplane:
    """Attach and open the pins for writing; the caller holds the lock."""
    dataplane.attach(options.instance, options.cgroups, mesh)
    opened = dataplane.open_pins(options.instance)
    assert opened is not None
    return opened[0]


def cgroup_paths(paths: Sequence[Path], allow_root: bool) -> tuple[Path, ...]:
    return tuple(environment.check_cgroup(path, allow_root) for path in paths)
