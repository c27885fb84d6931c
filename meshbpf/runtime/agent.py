"""The agent: attach, then stay. Joins sources, dataplane, namespaces, workers, metrics and the API; touches no payload.

Order of starting: listeners (so that a taken port changes nothing), tables, workers (which load meanwhile); only then
are callers led by what we have attached. With tables of another layout, workers of an earlier agent and ours know only
what hooks of their own kind led: so the earlier ones stop accepting before the hooks are replaced, and ours begin after
it; callers who come in between wait in the listeners' queues. Order of stopping: connect forgets the port (new
connections follow onProxyDown), workers finish what they have, all goes. Meshes that come meanwhile are `following`'s.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loader import dataplane, neighbours
from loader.dataplane import Compiler, Dataplane
from loader.events import Events
from loader.instance import Instance
from meshbpf import wire
from meshbpf.errors import MeshError
from meshbpf.model import Mesh
from meshbpf.runtime import cgroup, orphans, stranded
from meshbpf.runtime.following import Following
from meshbpf.runtime.listeners import Served
from meshbpf.runtime.namespaces import Namespaces
from meshbpf.runtime.supervisor import Supervisor
from meshbpf.tasks import spawn
from meshbpf.telemetry import Totals

log = logging.getLogger("agent")
SCAN_SECONDS = 5.0
READY_SECONDS = 30.0
SWEEP_SECONDS = 1.0  # sockets whose endpoint left are looked for, in the whole table, not with every change


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
    """One instance's agent: `listen`, `attach`, `start` and `run`, then `close`, in this order. `compiler`, which its
    maker closes, may have begun with what `attach` will want.
    """

    plane: Dataplane  # once attached

    def __init__(self, options: Options, mesh: Mesh, compiler: Compiler | None = None) -> None:
        self.options = options
        self._compiler = compiler
        self.totals = Totals()
        self.attached = asyncio.Event()  # from here on there is a `plane`
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()
        self._port = split_listen(mesh.agent.proxy.listen)[1]
        self.supervisor = Supervisor(
            options.instance,
            {"log_level": options.log_level, "log_format": options.log_format},
            self._report,
            self._changed.set,
        )
        self.namespaces = Namespaces(options.cgroups, self._port, self._serve, self.supervisor.unlisten)
        self.following = Following(
            options.instance, options.cgroups, mesh, self.supervisor, self.namespaces, self.totals, self._settled,
            self._endpoint_left,
        )  # fmt: skip
        self._events: Events | None = None
        self._orphans: list[orphans.Orphan] = []
        self._prepared: dataplane.Prepared | None = None  # between attach and leading
        self._serving = False  # workers may accept
        self._carried: dict[bytes, bytes] = {}  # flows of an earlier layout
        self._scanner: asyncio.Task[None] | None = None
        self._exempt = 0
        self.workers = options.workers or mesh.agent.proxy.workers
        self._trial: asyncio.Task[None] | None = None
        self.gone: list[str] = []  # cgroups that the last scan did not find
        self._needed: list[asyncio.Task[Any]] = []
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
        self._orphans = await orphans.greet(self.options.instance, self._report)
        for orphan in self._orphans:
            for cookie, fds in await orphan.hand_over():
                self.namespaces.adopt(cookie, fds)
        self.namespaces.start()

    async def attach(self) -> None:
        """Prepare tables and hooks, and open the tables for writing; the caller holds the lock."""
        mesh = self.following.mesh
        if self._orphans:  # they keep their layout, and soon end
            told = await self.following.about(mesh, layout="", redirect=False)
            await asyncio.gather(*(orphan.use(told) for orphan in self._orphans))
        planned = threading.Event()

        def prepare() -> dataplane.Prepared:
            try:
                return dataplane.prepare(self.options.instance, self.options.cgroups, mesh, self._compiler, planned.set)
            finally:
                planned.set()

        prepared, *others = await asyncio.gather(
            asyncio.to_thread(prepare),
            self._start_workers(planned),
            return_exceptions=True,  # what was prepared is known here, whatever else failed
        )
        if isinstance(prepared, BaseException):
            raise prepared
        self._prepared = prepared
        for failed in others:
            if isinstance(failed, BaseException):
                raise failed
        self.plane = Dataplane(self.options.instance, prepared.layout, mesh.agent.maps, prepared.planner)
        self.attached.set()
        self.following.redirect_lack = prepared.lack
        self.following.plane = self.plane
        for served in self.namespaces.served.values():
            self.plane.mark(served.sockets)

    async def _start_workers(self, planned: threading.Event) -> None:
        """They load what they need, and read the mesh, while the programs are compiled."""
        # First, because they are born where we are.
        self._exempt = cgroup.exempt(self.options.cgroups, self.options.instance.name)
        await self.supervisor.start(self.workers)
        await self.following.foretell()
        # As the state file will want them: while the kernel fills the tables, because two threads plan no faster.
        await asyncio.to_thread(planned.wait)
        await asyncio.to_thread(wire.texts, self.following.mesh)

    def _serve(self, *more: Served) -> None:
        """Have workers accept in these namespaces, once they may."""
        for served in more:
            if self._serving:
                self.plane.mark(served.sockets)
                self.supervisor.listen(served)

    def _serve_all(self) -> None:
        if not self._serving:
            self._serving = True
            self._serve(*self.namespaces.served.values())

    async def start(self) -> None:
        """From prepared tables to a proxy that serves."""
        loop = asyncio.get_running_loop()
        mesh = self.following.mesh
        await self.following.tell(mesh)
        if not await self._settled(READY_SECONDS):
            if self.supervisor.refusal:
                raise MeshError(self.supervisor.refusal)
            raise MeshError(f"the workers did not start within {READY_SECONDS:.0f} s: see the lines above")
        await self._lead()
        if self._stop.is_set():
            return
        self._events = Events(
            self.plane.maps_folder / "events", lambda event: self.namespaces.serve_caller(event.pid, event.netns)
        )
        loop.add_reader(self._events.fileno(), self._events.read)
        self._scanner = spawn(self._scan(), "scan namespaces")
        self.need(self._scanner)
        self._trial = spawn(self.following.accelerate(), "try acceleration")
        log.info(
            "ready instance=%s pid=%d workers=%d generation=%d services=%d",
            self.options.instance.name, os.getpid(), self.workers, mesh.generation, len(mesh.services),
        )  # fmt: skip

    async def _lead(self) -> None:
        """Callers come to us from here on: no moment in which nobody accepts, and none in which the wrong ones do."""
        assert self._prepared is not None
        if self._prepared.same_tables:
            self._serve_all()
        drain = self.following.mesh.agent.proxy.drain
        await asyncio.gather(*(orphan.turn_deaf(drain) for orphan in self._orphans))
        self.plane.set_agent(self._port, self._exempt)
        self._carried = dataplane.lead(self._prepared)
        self._prepared = None
        try:
            for line in neighbours.switched_off(self.options.cgroups, dataplane.CGROUP_HOOKS):
                log.warning("neighbour switched off: %s", line)
        except (MeshError, OSError) as error:  # callers are led by now: who cannot be told of is no reason to stop
            log.warning("neighbours not looked at error=%s", error)
        self._serve_all()
        for orphan in self._orphans:
            spawn(orphan.end(drain), f"drain earlier worker {orphan.pid}")

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

    def _report(self, incarnation: str, snapshot: Any) -> None:
        if snapshot is None:
            self.totals.ended(incarnation)
        else:
            earlier = incarnation.startswith(orphans.NAME)
            self.totals.update(incarnation, snapshot, time.monotonic(), earlier=earlier)

    async def _scan(self) -> None:
        while True:
            await asyncio.sleep(SCAN_SECONDS)
            try:
                self.plane.forget(self._carried)
                self._carried = {}
                self._lead_anew()
                self.namespaces.scan()
                if self._left:
                    self._left = False
                    self._end_stranded()
            except (MeshError, OSError) as error:
                log.error("scan failed error=%s", error)
            self.following.note_again()

    def _endpoint_left(self) -> None:
        self._left = True  # for the next scan, too: a connect() may be just reading the tables as they were
        if time.monotonic() - self._swept >= SWEEP_SECONDS:
            self._end_stranded()

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
        drain = self.following.mesh.agent.proxy.drain
        log.info("draining bound_seconds=%.1f", drain)
        self.plane.set_agent(0, self._exempt)  # from here on no connection is led to the proxy
        await self.supervisor.drain(drain)
        # Who ends `run` by Ctrl-C may believe that the mesh is gone with it.
        log.info(
            "still attached: direct ports go on, governed ones follow onProxyDown; meshbpf detach%s takes it away",
            self.options.instance.option,
        )
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
        await self.following.noted()
        self.namespaces.close()
        if self._prepared is not None:
            dataplane.abandon(self._prepared)
