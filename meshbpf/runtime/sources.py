"""All sources of services → one mesh after another. Whatever a source says is merged; equal meshes are said once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loader.instance import Instance
from meshbpf import garbage, wire
from meshbpf.model import Agent, EmbeddedRegistry, MapSizes, Mesh
from meshbpf.registry import merge, recall
from meshbpf.registry.base import Snapshot, Source
from meshbpf.registry.embedded import EmbeddedSource
from meshbpf.registry.file import FileSource
from meshbpf.registry.http import HttpSource
from meshbpf.registry.instance import ServiceId
from meshbpf.registry.store import Store
from meshbpf.runtime import room
from meshbpf.tasks import spawn

log = logging.getLogger("sources")
DEFAULT_STORES = "/var/lib/meshbpf"


@dataclass(slots=True)
class Known:
    """The last word of one source. Times are monotonic: the machine's clock may be set while we run."""

    source: Source
    changed_at: float
    snapshot: Snapshot | None = None
    stale_since: float | None = None  # from here on it may know better than it has told us

    def hear(self, snapshot: Snapshot, now: float) -> None:
        before = self.snapshot
        if before is None or _content(before) != _content(snapshot):
            self.changed_at = now
        if not snapshot.stale:
            self.stale_since = None
        elif self.stale_since is None:
            self.stale_since = now
        if snapshot.error and (before is None or before.error != snapshot.error):
            what = "source keeps its last good state" if snapshot.stale else "source has a fault"
            log.error("%s source=%s error=%s", what, self.source.name, snapshot.error)
        elif before is not None and before.error and not snapshot.error:
            log.info("source is well again source=%s", self.source.name)
        self.snapshot = snapshot

    def report(self, now: float) -> dict[str, Any]:
        """`age_seconds` is since the last change, `stale_seconds` since when it gives no good answer."""
        return {
            "name": self.source.name,
            "age_seconds": round(now - self.changed_at, 1),
            "stale_seconds": 0.0 if self.stale_since is None else round(now - self.stale_since, 1),
            "services": len(self.snapshot.services) if self.snapshot else 0,
            "error": self.snapshot.error if self.snapshot else "has not answered yet",
        }


def _content(snapshot: Snapshot) -> Snapshot:
    return replace(snapshot, error="", stale=False)


class Sources:
    """`first` waits for every source's first word, then `meshes` yields each different mesh that follows.

    Files come first, then `registries` in the order of their precedence; `embedded` is one of them.
    """

    def __init__(
        self,
        files: FileSource,
        embedded: EmbeddedSource,
        registries: Sequence[Source],
        generation: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.files = files
        self.embedded = embedded
        self._clock = clock
        self._known = [Known(source, clock()) for source in (files, *registries)]
        self._news = asyncio.Event()
        self._generation = generation
        self._problems: tuple[str, ...] = ()
        self._sizes: MapSizes | None = None
        self._merger = merge.Merger()
        self._fitter = room.Fitter()
        self._given: tuple[merge.Wanted, dict[ServiceId, str]] | None = None
        self.crowded = ""  # what of the newest mesh has no room

    def start(self) -> list[asyncio.Task[None]]:
        """The tasks that must live for news to come."""
        return [spawn(self._follow(known), f"source {known.source.name}") for known in self._known]

    async def _follow(self, known: Known) -> None:
        async for snapshot in known.source.watch():
            known.hear(snapshot, self._clock())
            self._news.set()

    async def first(self) -> Mesh:
        """The first mesh, once every source has spoken."""
        while any(known.snapshot is None for known in self._known):
            self._news.clear()
            await self._news.wait()
        return await self._merged()

    async def meshes(self, last: Mesh) -> AsyncIterator[Mesh]:
        """Every mesh that differs from the one before it, beginning after `last`."""
        while True:
            await self._news.wait()
            self._news.clear()
            mesh = await self._merged()
            if replace(mesh, generation=0) != replace(last, generation=0):
                last = mesh
                yield mesh

    async def _merged(self) -> Mesh:
        snapshots = [known.snapshot for known in self._known if known.snapshot is not None]
        self._generation += 1
        merged = await self._united(snapshots)
        self._sizes = self._sizes or merged.mesh.agent.maps  # the tables are made once
        files = self._known[0].snapshot
        services = files.services if files is not None else ()
        mesh, crowded = self._fitter.fit(merged.mesh, services, self._sizes, self.files.name)
        told = tuple(f"service={p.service} what={p.what} why={p.why}" for p in (*merged.problems, *crowded))
        for problem in told:
            if problem not in self._problems:
                log.warning("left out of the mesh %s", problem)
        self._problems = told
        self.crowded = "; ".join(f"{p.service} left out: {p.what} {p.why}" for p in crowded)
        return mesh

    async def _united(self, snapshots: Sequence[Snapshot]) -> merge.Merged:
        """The mesh of all snapshots, every service that names no address with its own of the pool, which the store
        keeps.
        """
        with garbage.paused():
            wanted = self._merger.wanted(snapshots)
        if self._given is None or self._given[0] is not wanted:
            store = self.embedded.registrar.store
            self._given = (wanted, await store.addresses(*wanted) if wanted.services else {})
        with garbage.paused():
            return self._merger.mesh(snapshots, self._given[1], self._generation)

    def report(self) -> list[dict[str, Any]]:
        """What `status` shows of every source."""
        now = self._clock()
        return [known.report(now) for known in self._known]


def registries(agent: Agent, embedded: EmbeddedSource) -> list[Source]:
    """The configured ones in their order. What registers on this machine comes first where it has no place in it."""
    store = embedded.settings.store
    found: list[Source] = [
        embedded
        if isinstance(registry, EmbeddedRegistry)
        else HttpSource(registry, keep=recall.place(store, registry.url))
        for registry in agent.registries
    ]
    return found if embedded in found else [embedded, *found]


async def once(configured: Mesh, instance: str, generation: int) -> Mesh:
    """The mesh of what the files say, alone, for `attach`."""
    snapshot = Snapshot(configured.services, tuple(configured.policies.values()), configured.agent, source="files")
    store = Store(embedded_settings(configured, instance).store)
    if all(service.addresses for service in configured.services):
        return merge.mesh([snapshot], {}, generation).mesh
    await store.open()
    try:
        given = await store.addresses(*merge.wanted([snapshot]))
        return merge.mesh([snapshot], given, generation).mesh
    finally:
        await store.close()


def embedded_settings(mesh: Mesh, instance: str) -> EmbeddedRegistry:
    """The configured embedded registry, or one that only the agent's unix socket reaches."""
    return mesh.agent.embedded or EmbeddedRegistry(listen="", store=f"{DEFAULT_STORES}/{instance}.db")


def store_of(instance: Instance) -> Path:
    """The file in which the registry of what is attached keeps what it knows; it outlives a detach."""
    try:
        agent = wire.decode(Agent, instance.read_state()["mesh"]["agent"])
    except (KeyError, TypeError, ValueError):  # none, or another version's
        agent = Agent()
    return Path(embedded_settings(Mesh(agent), instance.name).store)


@contextlib.contextmanager
def new_store_undone(instance: Instance, path: Path) -> Iterator[None]:
    """A start that fails before anything is attached takes the store away that it made: nobody has seen an address of
    it. Whoever opened it within has closed it by then.
    """
    made = [place for place in (path, path.parent) if not place.exists()]
    try:
        yield
    except BaseException:
        if path in made and not instance.read_state():
            for suffix in ("", "-wal", "-shm"):
                Path(f"{path}{suffix}").unlink(missing_ok=True)
            if path.parent in made:
                with contextlib.suppress(OSError):  # somebody else's file is in it by now
                    path.parent.rmdir()
        raise


def last_generation(instance: Instance) -> int:
    """The generation that the kernel holds now: the next mesh's is higher, also after a restart."""
    return int(instance.read_state().get("mesh", {}).get("generation", 0))
