"""The agent: attach, then stay. Joins sources, dataplane, namespaces, workers, metrics and the API; touches no payload.

Order of starting: listeners (so that a taken port changes nothing), tables and hooks, workers; only then does connect
learn the proxy's port. Order of stopping: connect forgets the port (new connections follow onProxyDown), workers finish
what they have, all goes. Order of a new mesh: workers first, then the kernel, so that no connection is led to a worker
that does not know its service; workers of an earlier agent count as workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loader import dataplane, selftest
from loader.dataplane import Dataplane
from loader.events import Events
from loader.instance import Instance
from meshbpf.errors import MeshError
from meshbpf.model import Acceleration, Mesh, ProxySettings
from meshbpf.runtime import about, cgroup, orphans, stranded
from meshbpf.runtime.namespaces import Namespaces
from meshbpf.runtime.supervisor import Supervisor
from meshbpf.tasks import spawn
from meshbpf.telemetry import Totals

log = logging.getLogger("agent")
SCAN_SECONDS = 5.0
READY_SECONDS = 30.0
RESTART = ("registries", "maps", "admin", "proxy")  # of `Agent.spec`: what a running agent does not change
SWEEP_SECONDS = 1.0  # sockets whose endpoint left are looked for, in the whole table, not with every change
SETTLE_SECONDS = 1.0  # how long a worker that hangs may hold a new mesh up


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
    """One instance's agent: `listen`, `attach`, `start`, `follow` and `run`, then `close`, in this order."""

    plane: Dataplane  # once attached

    def __init__(self, options: Options, mesh: Mesh) -> None:
        self.options = options
        self.mesh = mesh
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
        self._orphans: list[orphans.Orphan] = []
        self._scanner: asyncio.Task[None] | None = None
        self._exempt = 0
        self._ignored = mesh.agent
        self.workers = options.workers or mesh.agent.proxy.workers
        self.acceleration = "off"
        self.acceleration_why = "the self-test has not run yet"
        self._trial: asyncio.Task[None] | None = None
        self.gone: list[str] = []  # cgroups that the last scan did not find
        self._needed: list[asyncio.Task[Any]] = []
        self._applying = asyncio.Lock()  # else workers could be told an older mesh after a newer one
        self._unwritten = False  # the state file is older than the mesh
        self._left = True  # an endpoint of a UDP port may have left since the last scan
        self._swept = -SWEEP_SECONDS

    @property
    def ready(self) -> bool:
        return self.supervisor.ready >= self.workers and not self._stop.is_set()

    def need(self, *tasks: asyncio.Task[Any]) -> None:
        """Without these we do not do what we are for."""
        self._needed += tasks

    @property
    def dead(self) -> str:
        """Which of the needed tasks have ended although we still run, and why."""
        if self._stop.is_set():
            return ""
        return "; ".join(
            f"{task.get_name()} has died: {'cancelled' if task.cancelled() else repr(task.exception())}"
            for task in self._needed
            if task.done()
        )

    def stop(self) -> None:
        self._stop.set()

    async def listen(self) -> None:
        """Take over what workers of an earlier agent listen on, else listen. Raises Busy when the port is taken."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.stop)
        self._orphans = await orphans.greet(self.options.instance)
        for orphan in self._orphans:
            for cookie, fds in await orphan.hand_over():
                self.namespaces.adopt(cookie, fds)
        for served in self.namespaces.served.values():
            self.supervisor.listen(served)
        self.namespaces.start()

    async def attach(self) -> None:
        """Attach or upgrade, and open the pins for writing; the caller holds the lock."""
        told = await self._about(self.mesh, layout="", redirect=False)  # they keep their layout, and soon end
        await asyncio.gather(*(orphan.use(told) for orphan in self._orphans))
        dataplane.attach(self.options.instance, self.options.cgroups, self.mesh)
        opened = dataplane.open_pins(self.options.instance)
        assert opened is not None
        self.plane = opened[0]

    async def start(self) -> None:
        """From attached tables to a proxy that serves."""
        loop = asyncio.get_running_loop()
        self._exempt = cgroup.exempt(self.options.cgroups, self.options.instance.name)
        await self._tell_workers(self.mesh)
        await self.supervisor.start(self.workers)
        if not await self._settled(READY_SECONDS):
            if self.supervisor.refusal:
                raise MeshError(self.supervisor.refusal)
            raise MeshError(f"the workers did not start within {READY_SECONDS:.0f} s: see the lines above")
        drain = self.mesh.agent.proxy.drain
        # They must not accept what hooks with newer tables lead here: they could not look it up.
        await asyncio.gather(*(orphan.turn_deaf(drain) for orphan in self._orphans))
        for orphan in self._orphans:
            spawn(orphan.end(drain), f"drain earlier worker {orphan.pid}")
        if self._stop.is_set():
            return
        self.plane.set_agent(self._port, self._exempt)
        self._events = Events(
            self.plane.maps_folder / "events", lambda event: self.namespaces.serve_caller(event.pid, event.netns)
        )
        loop.add_reader(self._events.fileno(), self._events.read)
        self._scanner = spawn(self._scan(), "scan namespaces")
        self.need(self._scanner)
        self._trial = spawn(self._accelerate(), "try acceleration")
        log.info(
            "ready instance=%s pid=%d workers=%d generation=%d services=%d",
            self.options.instance.name, os.getpid(), self.workers, self.mesh.generation, len(self.mesh.services),
        )  # fmt: skip

    async def _settled(self, seconds: float) -> bool:
        """Whether, in time, every worker serves the newest mesh; also True when it is time to stop.

        False at once when one refuses it.
        """
        try:
            async with asyncio.timeout(seconds):
                while self.supervisor.ready < self.workers and not self._stop.is_set():
                    if self.supervisor.refusal:
                        return False
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def follow(self, meshes: AsyncIterator[Mesh]) -> None:
        """Apply each mesh; one that the kernel or a worker refuses is logged, and the last good one stays."""
        async for mesh in meshes:
            async with self._applying:
                await self.apply(mesh)

    async def apply(self, mesh: Mesh) -> None:
        """Workers, then the kernel, then the state file. Never raises for what the machine does to us: the next mesh
        may fare better, and following must not end.
        """
        try:
            mesh = self._with_our_settings(mesh)
            await self._tell_workers(mesh)
            await self._settled(SETTLE_SECONDS)
            if self.supervisor.refusal:
                raise MeshError(self.supervisor.refusal)
            applied = self.plane.apply(mesh)
        except (MeshError, OSError) as error:
            self.apply_error = str(error)
            log.error("mesh refused, the last one stays generation=%d error=%s", mesh.generation, error)
            with contextlib.suppress(OSError):
                await self._tell_workers(self.mesh)
            return
        if applied.left:
            self._left = True  # for the next scan, too: a connect() may be just reading the tables as they were
            if time.monotonic() - self._swept >= SWEEP_SECONDS:
                self._end_stranded()
        self.apply_error = ""
        self.mesh = mesh
        self.applied_at = time.time()
        self.totals.adopt(mesh, time.monotonic())
        log.info(
            "mesh applied generation=%d services=%d writes=%d", mesh.generation, len(mesh.services), applied.writes
        )
        await self._note()

    async def _note(self) -> None:
        """Write the state file. When that cannot be, say so and try again with the next scan: the mesh serves."""
        try:
            await asyncio.to_thread(
                dataplane.write_state, self.options.instance, self.plane.layout, self.options.cgroups, self.mesh
            )
        except OSError as error:
            self.apply_error = f"the mesh serves, but {self.options.instance.state_file} is old: {error}"
            log.error("state not written error=%s", error)
            self._unwritten = True
        else:
            if self._unwritten:
                self.apply_error, self._unwritten = "", False

    def _with_our_settings(self, mesh: Mesh) -> Mesh:
        """What only a start can change stays as it is; a change of it is logged."""
        ours, new = self.mesh.agent, mesh.agent
        kept = replace(
            new,
            registries=ours.registries,
            maps=ours.maps,
            admin=ours.admin,
            proxy=ProxySettings(ours.proxy.listen, ours.proxy.workers, new.proxy.drain),
        )
        if new not in (kept, self._ignored):
            names = [name for name in RESTART if getattr(kept, name) != getattr(new, name)]
            log.warning("settings that need a restart have changed fields=%s", ",".join(names))
        self._ignored = new
        return replace(mesh, agent=kept)

    async def _tell_workers(self, mesh: Mesh) -> None:
        redirect = self.acceleration == "redirect" and mesh.agent.acceleration is not Acceleration.OFF
        self.supervisor.use(mesh.generation, await self._about(mesh, self.plane.layout, redirect))

    async def _about(self, mesh: Mesh, layout: str, redirect: bool) -> bytes:
        """All that a worker has to know."""
        home = next(s for s in self.namespaces.served.values() if s.identity == self.namespaces.home)
        more = {
            "layout": layout,
            "cgroups": [str(path) for path in self.options.cgroups],
            "cookie": home.cookie,
            "redirect": redirect,
        }
        return await asyncio.to_thread(about.pack, mesh, more)

    async def _accelerate(self) -> None:
        """Let connections join the redirect table once this kernel has shown that it gets it right (promise 5).

        Not before: connections are served by plain TCP meanwhile, so the start does not wait for the self-test.
        """
        ok, why = await asyncio.to_thread(selftest.redirect_supported, self.options.instance)
        self.acceleration, self.acceleration_why = ("redirect", "self-test passed") if ok else ("off", why)
        log.info("acceleration=%s why=%s", self.acceleration, self.acceleration_why)
        if ok:
            async with self._applying:
                await self._tell_workers(self.mesh)

    def _report(self, incarnation: str, snapshot: Any) -> None:
        if snapshot is None:
            self.totals.ended(incarnation)
        else:
            self.totals.update(incarnation, snapshot)

    async def _scan(self) -> None:
        while True:
            await asyncio.sleep(SCAN_SECONDS)
            try:
                self._lead_anew()
                self.namespaces.scan()
                if self._left:
                    self._left = False
                    self._end_stranded()
            except (MeshError, OSError) as error:
                log.error("scan failed error=%s", error)
            if self._unwritten:
                await self._note()

    def _end_stranded(self) -> None:
        self._swept = time.monotonic()
        try:
            stranded.end(self.plane.maps)
        except (MeshError, OSError) as error:
            log.error("connected UDP sockets not looked at error=%s", error)

    def _lead_anew(self) -> None:
        """A cgroup is removed and made anew when its unit restarts: nothing leads the new one until we do."""
        for path in dataplane.reattach(self.options.instance, self.options.cgroups):
            log.warning("cgroup was made anew: leading it again cgroup=%s", path)
        gone = [str(path) for path in self.options.cgroups if not path.is_dir()]
        if gone and gone != self.gone:
            log.warning("cgroup is gone: its programs are not led cgroups=%s", ",".join(gone))
        self.gone = gone

    async def run(self) -> None:
        """Until SIGTERM or SIGINT, then drain."""
        await self._stop.wait()
        drain = self.mesh.agent.proxy.drain
        log.info("draining seconds=%.1f", drain)
        self.plane.set_agent(0, self._exempt)  # from here on no connection is led to the proxy
        await self.supervisor.drain(drain)
        log.info("stopped pid=%d", os.getpid())

    async def close(self) -> None:
        """Leave nothing open, wherever the start has got to."""
        if self._scanner is not None:
            self._scanner.cancel()
        if self._trial is not None:
            self._trial.cancel()
        if self._events is not None:
            asyncio.get_running_loop().remove_reader(self._events.fileno())
            self._events.close()
            self._events = None
        await self.supervisor.drain(0.0)
        self.namespaces.close()
