"""Several sources at once: whose word counts, what a silent source leaves behind, and what `status` shows."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from meshbpf.model import Agent, EmbeddedRegistry, Endpoint, HttpRegistry, Mesh, Port, Protocol, Service
from meshbpf.registry.base import Snapshot, Source
from meshbpf.registry.embedded import EmbeddedSource
from meshbpf.registry.file import FileSource
from meshbpf.registry.http import HttpSource
from meshbpf.runtime.sources import Sources, registries

HTTP = Port("http", 80, Protocol.HTTP)


class Fake:
    """A source that says what it is told to say."""

    def __init__(self, name: str, *services: Service) -> None:
        self.name = name
        self._words: asyncio.Queue[Snapshot] = asyncio.Queue()
        self.says(*services)

    def says(self, *services: Service, error: str = "", stale: bool = False) -> None:
        self._words.put_nowait(Snapshot(services, error=error, stale=stale, source=self.name))

    async def watch(self) -> AsyncIterator[Snapshot]:
        while True:
            yield await self._words.get()


def orders(*addresses: str, port: Port = HTTP, weight: int = 100, own: str = "") -> Service:
    endpoints = tuple(Endpoint(address, {port.name: 8080}, weight=weight) for address in addresses)
    return Service("orders", addresses=(own,) if own else (), ports=(port,), endpoints=endpoints)


class Scene:
    """Sources with a clock of its own; the task that follows each of them."""

    def __init__(self, embedded: EmbeddedSource, files: Fake, *others: Source) -> None:
        self.now = 1000.0
        self.sources = Sources(cast(FileSource, files), embedded, others, 0, clock=lambda: self.now)
        self._tasks = self.sources.start()

    async def first(self) -> Mesh:
        async with asyncio.timeout(5):
            return await self.sources.first()

    async def next(self, last: Mesh) -> Mesh:
        async with asyncio.timeout(5):
            return await anext(self.sources.meshes(last))

    async def heard(self) -> None:
        for _ in range(5):  # each task takes its word in one step of the loop
            await asyncio.sleep(0)

    def shown(self) -> dict[str, dict[str, Any]]:
        return {source["name"]: source for source in self.sources.report()}

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)


def endpoints(mesh: Mesh) -> list[tuple[str, int, str]]:
    (service,) = mesh.services
    return [(found.address, found.weight, found.source) for found in service.endpoints]


async def test_the_earlier_source_has_its_way_and_endpoints_are_united(source: EmbeddedSource) -> None:
    files = Fake("files", orders("192.0.2.1", weight=1, own="127.96.0.10"))
    first = Fake("first", orders("192.0.2.1", "192.0.2.2", weight=2, own="127.96.0.11", port=Port("http", 81)))
    second = Fake("second", orders("192.0.2.2", "192.0.2.3", weight=3))
    scene = Scene(source, files, first, second)
    mesh = await scene.first()
    assert (mesh.services[0].addresses, mesh.services[0].ports) == (("127.96.0.10",), (HTTP,))
    assert endpoints(mesh) == [("192.0.2.1", 1, "files"), ("192.0.2.2", 2, "first"), ("192.0.2.3", 3, "second")]
    await scene.close()


async def test_when_the_earlier_source_takes_it_out_the_later_one_is_there(source: EmbeddedSource) -> None:
    first = Fake("first", orders("192.0.2.1", weight=1, own="127.96.0.10"))
    second = Fake("second", orders("192.0.2.1", weight=2, port=Port("web", 80)))
    scene = Scene(source, Fake("files"), first, second)
    mesh = await scene.first()
    assert endpoints(mesh) == [("192.0.2.1", 1, "first")], "its ports are the first one's: `web` is none of them"
    first.says()
    mesh = await scene.next(mesh)
    assert endpoints(mesh) == [("192.0.2.1", 2, "second")]
    assert mesh.services[0].ports == (Port("web", 80),)
    (given,) = mesh.services[0].addresses
    assert given.startswith("127.96.") and given != "127.96.0.10", "its own address went with the source that gave it"
    second.says()
    mesh = await scene.next(mesh)
    assert not mesh.services
    second.says(orders("192.0.2.9"))
    assert (await scene.next(mesh)).services[0].addresses == (given,), "an address that was given once stays"
    await scene.close()


async def test_a_source_in_trouble_takes_nothing_away_and_its_age_is_shown(
    source: EmbeddedSource, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sources")
    known = orders("192.0.2.1")
    other = Fake("http://192.0.2.7:15010", known)
    scene = Scene(source, Fake("files"), other)
    mesh = await scene.first()
    scene.now += 60
    other.says(known, error="cannot reach it", stale=True)
    await scene.heard()
    for jump in (0.0, -1e9, 1e9):  # somebody sets the machine's clock
        monkeypatch.setattr("time.time", lambda jump=jump: 1e9 + jump)
        scene.now += 200
        assert scene.shown()[other.name]["error"] == "cannot reach it"
    assert scene.shown()[other.name] == {
        "name": other.name, "age_seconds": 660.0, "stale_seconds": 600.0, "services": 1, "error": "cannot reach it",
    }  # fmt: skip
    assert scene.shown()["files"]["stale_seconds"] == 0.0
    other.says(known, error="does not answer", stale=True)
    await scene.heard()
    assert scene.shown()[other.name]["stale_seconds"] == 600.0, "another error is the same trouble"
    other.says(known)
    await scene.heard()
    assert (scene.shown()[other.name]["stale_seconds"], scene.shown()[other.name]["age_seconds"]) == (0.0, 660.0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(scene.sources.meshes(mesh)), 0.1)
    assert [record.getMessage() for record in caplog.records] == [
        f"source keeps its last good state source={other.name} error=cannot reach it",
        f"source keeps its last good state source={other.name} error=does not answer",
        f"source is well again source={other.name}",
    ]
    await scene.close()


async def test_the_start_waits_for_the_first_word_of_each(source: EmbeddedSource) -> None:
    class Silent(Fake):
        async def watch(self) -> AsyncIterator[Snapshot]:
            await asyncio.Event().wait()
            yield Snapshot()

    silent = Silent("silent")
    scene = Scene(source, Fake("files", orders("192.0.2.1")), silent)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(scene.sources.first(), 0.1)
    assert scene.shown()["silent"]["error"] == "has not answered yet"
    await scene.close()


def test_registries_are_in_the_order_of_the_list_and_this_machine_comes_first_if_it_is_not_in_it(
    tmp_path: Path,
) -> None:
    settings = EmbeddedRegistry(store=str(tmp_path / "registry.db"))
    embedded = EmbeddedSource(settings)
    a, b = HttpRegistry("http://192.0.2.1:1"), HttpRegistry("http://192.0.2.2:1")
    for listed, names in (
        ((), ["registry"]),
        ((settings, a), ["registry", a.url]),
        ((b, settings, a), [b.url, "registry", a.url]),
        ((a, b), ["registry", a.url, b.url]),
    ):
        found = registries(Agent(registries=listed), embedded)
        assert [one.name for one in found] == names
        assert found.count(embedded) == 1
        assert all(isinstance(one, HttpSource) for one in found if one is not embedded)
