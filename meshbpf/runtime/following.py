"""The mesh that is served, and how a newer one comes to be it: workers first, then the kernel, then the state file.

In this order no connection is led to a worker that does not know its service. Who refuses it is heard, and the last
good mesh is told to all again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loader import dataplane, selftest
from loader.dataplane import Dataplane
from loader.instance import Instance
from meshbpf.errors import MeshError
from meshbpf.model import Acceleration, Mesh, ProxySettings
from meshbpf.runtime import about
from meshbpf.runtime.namespaces import Namespaces
from meshbpf.runtime.supervisor import Supervisor
from meshbpf.tasks import spawn
from meshbpf.telemetry import Totals

log = logging.getLogger("agent")
RESTART = ("registries", "maps", "admin", "proxy")  # of `Agent.spec`: what a running agent does not change
SETTLE_SECONDS = 1.0  # how long a worker that hangs may hold a new mesh up


class Following:
    """`settled` waits, for so many seconds at most, until every worker serves what it was told or one has refused;
    `left` hears that an endpoint of a UDP port has left.
    """

    plane: Dataplane  # once attached

    def __init__(
        self,
        instance: Instance,
        cgroups: Sequence[Path],
        mesh: Mesh,
        supervisor: Supervisor,
        namespaces: Namespaces,
        totals: Totals,
        settled: Callable[[float], Awaitable[bool]],
        left: Callable[[], None],
    ) -> None:
        self.mesh = mesh
        self.error = ""  # why the newest mesh is not served, or not noted
        self.waiting: list[str] = []  # of RESTART, what the configuration has otherwise than we do
        self.acceleration = "off"
        self.acceleration_why = "the self-test has not run yet"
        self._instance = instance
        self._cgroups = cgroups
        self._supervisor = supervisor
        self._namespaces = namespaces
        self._totals = totals
        self._totals.adopt(mesh, time.monotonic())
        self._settled = settled
        self._left = left
        self._ignored = mesh.agent
        self._applying = asyncio.Lock()  # else workers could be told an older mesh after a newer one
        self.redirect_lack: str | None = None  # as attach found; None: ask the state file
        self._audience = about.Audience(everything=instance.state_file.exists())
        self._told: Mesh | None = None  # what the workers were told last
        self._noting: asyncio.Task[None] | None = None
        self._behind = False  # the state file is older than the mesh
        self._unwritten = ""  # … and why it must be

    async def follow(self, meshes: AsyncIterator[Mesh]) -> None:
        """Apply each mesh; one that the kernel or a worker refuses is logged, and the last good one stays."""
        async for mesh in meshes:
            async with self._applying:
                await self.apply(mesh)

    async def apply(self, mesh: Mesh) -> None:
        """Never raises for what the machine does to us: the next mesh may fare better, and following must not end."""
        try:
            mesh = self._with_our_settings(mesh)
            await self.tell(mesh)
            await self._settled(SETTLE_SECONDS)
            if self._supervisor.refusal:
                raise MeshError(self._supervisor.refusal)
            applied = self.plane.apply(mesh)
        except (MeshError, OSError) as error:
            self.error = str(error)
            log.error("mesh refused, the last one stays generation=%d error=%s", mesh.generation, error)
            with contextlib.suppress(OSError):
                await self.tell(self.mesh)
            return
        if applied.left:
            self._left()
        self.error = ""
        self.mesh = mesh
        self._totals.adopt(mesh, time.monotonic())
        log.info(
            "mesh applied generation=%d services=%d writes=%d", mesh.generation, len(mesh.services), applied.writes
        )
        self._note()

    def _note(self) -> None:
        """Have the state file written, beside what else there is to do: the next change does not wait for it."""
        self._behind = True
        if self._noting is None or self._noting.done():
            self._noting = spawn(self._write_state(), "note the mesh")

    async def _write_state(self) -> None:
        """Until it is as new as the mesh. When that cannot be, say so, for `note_again`: the mesh serves."""
        while self._behind:
            self._behind = False
            try:
                where = self._instance, self.plane.layout, self._cgroups
                await asyncio.to_thread(dataplane.write_state, *where, self.mesh, self.redirect_lack)
            except OSError as error:
                log.error("state not written error=%s", error)
                self.error = f"the mesh serves, but {self._instance.state_file} is old: {error}"
                self._unwritten = self.error
            else:
                if self._unwritten and self.error == self._unwritten:
                    self.error = ""
                self._unwritten = ""

    async def noted(self) -> None:
        """Returns when the state file is not being written any more."""
        if self._noting is not None:
            await asyncio.wait([self._noting])

    def note_again(self) -> None:
        """Write the state file if that could not be before."""
        if self._unwritten:
            self._note()

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
        self.waiting = [name for name in RESTART if getattr(kept, name) != getattr(new, name)]
        if self.waiting and new != self._ignored:
            log.warning("settings that need a restart have changed fields=%s", ",".join(self.waiting))
        self._ignored = new
        return replace(mesh, agent=kept)

    async def tell(self, mesh: Mesh) -> None:
        """Have the workers serve `mesh`; those that have the one before are told what changed."""
        redirect = self.acceleration == "redirect" and mesh.agent.acceleration is not Acceleration.OFF
        more = self._more(self.plane.layout, redirect)
        mesh = self._audience.part(mesh)
        last, self._told = self._told, mesh
        change = about.pack_change(last, mesh, more) if last is not None else None

        def pack() -> bytes:
            return about.pack(mesh, more)

        if last is None or change is None:
            packed = await asyncio.to_thread(pack)
            self._supervisor.use(mesh.generation, lambda: packed)
        else:
            self._supervisor.use(mesh.generation, pack, change, last.generation)

    async def foretell(self) -> None:
        """Have the workers read the mesh while there are no tables yet for them to serve it with."""
        self._told = self._audience.part(self.mesh)
        packed = await self.about(self._told, layout="", redirect=False)
        self._supervisor.foretell(self.mesh.generation, packed)

    async def about(self, mesh: Mesh, layout: str, redirect: bool) -> bytes:
        """All that there is to know for a worker."""
        return await asyncio.to_thread(about.pack, mesh, self._more(layout, redirect))

    def _more(self, layout: str, redirect: bool) -> dict[str, Any]:
        """… besides the mesh."""
        home = next(s for s in self._namespaces.served.values() if s.identity == self._namespaces.home)
        return {
            "layout": layout,
            "cgroups": [str(path) for path in self._cgroups],
            "cookie": home.cookie,
            "redirect": redirect,
        }

    async def accelerate(self) -> None:
        """Let connections join the redirect table once this kernel has shown that it gets it right (promise 5).

        Not before: connections are served by plain TCP meanwhile, so the start does not wait for the self-test.
        """
        ok, why = await asyncio.to_thread(selftest.redirect_supported, self._instance)
        self.acceleration, self.acceleration_why = ("redirect", "self-test passed") if ok else ("off", why)
        log.info("acceleration=%s why=%s", self.acceleration, self.acceleration_why)
        if ok:
            async with self._applying:
                await self.tell(self.mesh)
