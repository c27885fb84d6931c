"""Another agent's registry as a source, over real sockets: followed at once, and every bad day of the other side."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from meshbpf.model import EmbeddedRegistry, HttpRegistry
from meshbpf.registry import api, http, recall
from meshbpf.registry.base import Snapshot
from meshbpf.registry.embedded import EmbeddedSource
from meshbpf.registry.http import HttpSource
from meshbpf.registry.instance import Refusal
from tests.registry.conftest import url


def body(port: int = 8081, address: str = "198.51.100.8", **changes: Any) -> dict[str, Any]:
    return {"address": address, "ports": {"http": {"port": port, "servicePort": 80}}, "ttl": "60s", **changes}


async def put(source: EmbeddedSource, id: str, service: str = "orders", **changes: Any) -> None:
    assert not isinstance(await source.registrar.put(service, id, body(**changes), local=True), Refusal)


async def soon(snapshots: AsyncIterator[Snapshot], true: Callable[[Snapshot], bool]) -> Snapshot:
    """The first snapshot that is so."""
    async with asyncio.timeout(10):
        async for snapshot in snapshots:
            if true(snapshot):
                return snapshot
    raise AssertionError("it ended")


def well(snapshot: Snapshot) -> bool:
    return not snapshot.error


def ports(snapshot: Snapshot) -> list[int]:
    return [e.ports["http"] for service in snapshot.services for e in service.endpoints]


@contextlib.asynccontextmanager
async def following(settings: HttpRegistry | str, **options: Any) -> AsyncIterator[AsyncIterator[Snapshot]]:
    source = HttpSource(HttpRegistry(settings) if isinstance(settings, str) else settings, **options)
    snapshots = source.watch()
    async with contextlib.aclosing(snapshots):
        yield snapshots


async def test_a_change_there_is_known_here_at_once(source: EmbeddedSource) -> None:
    await put(source, "a")
    async with following(url(source)) as snapshots:
        first = await anext(snapshots)
        assert (ports(first), first.error, first.stale, first.source) == ([8081], "", False, url(source))
        took = []
        for number in range(8082, 8092):
            news = asyncio.ensure_future(soon(snapshots, lambda s, number=number: number in ports(s)))
            await asyncio.sleep(0.03)  # so that it waits there
            begun = time.monotonic()
            await put(source, "a", port=number)
            await news
            took.append(time.monotonic() - begun)
        print(f"change to news: {', '.join(f'{1000 * seconds:.1f}' for seconds in took)} ms")
        assert sorted(took)[5] < 0.1
        await source.registrar.delete(("orders", "default"), "a")
        assert (await soon(snapshots, lambda s: not s.services)).error == ""
    await until(lambda: source.registrar.waiting == 0)


async def test_a_silent_registry_is_asked_again_without_any_news(
    source: EmbeddedSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "MAX_WAIT", 0.05)
    async with following(url(source)) as snapshots:
        await anext(snapshots)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(snapshots), 0.5)


async def test_a_registry_on_ipv6_with_a_token_that_changes(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    settings = EmbeddedRegistry("[::1]:0", str(tmp_path / "registry.db"), str(token))
    source = EmbeddedSource(settings)
    await source.start()
    assert source.address is not None
    await put(source, "a")
    ours = tmp_path / "ours"
    where = f"http://[::1]:{source.address[1]}"
    async with following(HttpRegistry(where, str(ours))) as snapshots:
        assert str(ours) in (await anext(snapshots)).error
        ours.write_text("second\n")
        refused = await soon(snapshots, lambda s: "401" in s.error)
        assert f"is {ours} its token?" in refused.error
        assert "second" not in refused.error
        ours.write_text("first\n")
        assert ports(await soon(snapshots, well)) == [8081]
    async with following(where) as snapshots:
        assert "set Agent.spec.registries.http.tokenFile" in (await anext(snapshots)).error
    await source.close()


@pytest.mark.parametrize("content", ["", "two\nlines", "\udcff"])
async def test_a_bad_token_file_is_an_error_of_the_source(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content, errors="surrogateescape")
    async with following(HttpRegistry("http://127.0.0.1:9", str(path))) as snapshots:
        assert str(path) in (await anext(snapshots)).error


async def test_a_registry_that_is_away_comes_back(tmp_path: Path, source: EmbeddedSource) -> None:
    where = url(source)
    await put(source, "a")
    async with following(where) as snapshots:
        first = await soon(snapshots, well)
        await source.close()
        gone = await soon(snapshots, lambda s: bool(s.error))
        assert gone.services == first.services and gone.stale
        assert gone.error == f"cannot reach the registry at {where}: Connection refused"
        await asyncio.sleep(2.5)  # so that its pauses are as long as they get
        again = EmbeddedSource(EmbeddedRegistry(where.removeprefix("http://"), str(tmp_path / "registry.db")))
        await again.start()
        begun = time.monotonic()
        back = await soon(snapshots, well)
        assert time.monotonic() - begun < 5.0
        assert back.services == first.services
        await put(again, "b", port=8082)
        assert sorted(ports(await soon(snapshots, lambda s: len(ports(s)) == 2))) == [8081, 8082]
        await again.close()


async def test_a_registry_that_is_back_without_its_store_does_not_empty_the_mesh(
    tmp_path: Path, source: EmbeddedSource
) -> None:
    where = url(source)
    await put(source, "a")
    await put(source, "b", port=8082)
    async with following(where) as snapshots:
        await soon(snapshots, well)
        await source.close()
        await soon(snapshots, lambda s: bool(s.error))
        (tmp_path / "registry.db").write_bytes(b"garbage" * 1000)
        for leftover in tmp_path.glob("registry.db-*"):
            leftover.unlink()
        again = EmbeddedSource(EmbeddedRegistry(where.removeprefix("http://"), str(tmp_path / "registry.db")))
        await again.start()
        assert "memory only" in again.registrar.problem
        assert sorted(ports(await soon(snapshots, well))) == [8081, 8082]
        await put(again, "b", port=8083)
        assert sorted(ports(await soon(snapshots, lambda s: 8083 in ports(s)))) == [8081, 8083]
        await again.close()


async def test_too_many_who_wait_there_are_no_fault(source: EmbeddedSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_WAITERS", 0)
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.sleep(0.01)

    async with following(url(source), sleep=sleep, chance=lambda: 0.0) as snapshots:
        assert well(await anext(snapshots))
        for number in (8081, 8082):
            await put(source, "a", port=number)
            found = await soon(snapshots, lambda s: bool(s.services))
            assert (ports(found), found.error) == ([number], "")
    assert 1.0 in pauses


async def test_an_agent_that_starts_while_the_registry_is_away_knows_what_it_knew(
    tmp_path: Path, source: EmbeddedSource, caplog: pytest.LogCaptureFixture
) -> None:
    where, keep = url(source), recall.place(str(tmp_path / "ours.db"), url(source))
    assert keep.name == f"ours.db.127.0.0.1-{where.rpartition(':')[2]}.json"
    await put(source, "a")
    async with following(where, keep=keep) as snapshots:
        first = await soon(snapshots, well)
        with contextlib.suppress(TimeoutError):  # it is kept after it was told
            await asyncio.wait_for(anext(snapshots), 0.1)
    assert keep.stat().st_mode & 0o777 == 0o600
    await source.close()
    async with following(where, keep=keep) as snapshots:
        recalled = await anext(snapshots)
        assert recalled.services == first.services
        assert recalled.stale and "Connection refused" in recalled.error
        (tmp_path / "registry.db").unlink()  # and it comes back without its memory, too
        again = EmbeddedSource(EmbeddedRegistry(where.removeprefix("http://"), str(tmp_path / "registry.db")))
        await again.start()
        assert (await soon(snapshots, well)).services == first.services
        await put(again, "b", port=8082)
        assert sorted(ports(await soon(snapshots, lambda s: len(ports(s)) == 2))) == [8081, 8082]
        await again.close()
    assert not caplog.records
    for content in (b"", b"{", b"[]", b'{"generation": 1}', b"\xff"):
        keep.write_bytes(content)
        async with following(where, keep=keep) as snapshots:
            assert not (await anext(snapshots)).services
    assert "cannot be recalled" in caplog.text


async def test_news_is_kept_soon_although_nothing_more_happens(
    tmp_path: Path, source: EmbeddedSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "KEEP_SECONDS", 0.5)
    keep = tmp_path / "kept.json"
    async with following(url(source), keep=keep) as snapshots:
        await soon(snapshots, well)
        more = asyncio.ensure_future(soon(snapshots, lambda s: len(ports(s)) == 2))
        await until(keep.exists)
        await put(source, "a")
        await put(source, "b", port=8082)
        await more
        quiet = asyncio.ensure_future(anext(snapshots))
        await until(lambda: "8082" in keep.read_text())
        quiet.cancel()
        await asyncio.wait([quiet])


async def test_what_cannot_be_kept_is_said_once_and_changes_nothing(
    source: EmbeddedSource, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "KEEP_SECONDS", 0.0)
    async with following(url(source), keep=Path("/dev/null/kept.json")) as snapshots:
        for number in (1, 2, 3):
            await put(source, "a", port=number)
            await soon(snapshots, lambda s, number=number: ports(s) == [number])
    assert caplog.text.count("is not kept path=/dev/null/kept.json") == 1


async def test_time_and_chance_are_arguments() -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 8:
            raise asyncio.CancelledError

    source = HttpSource(HttpRegistry("http://127.0.0.1:9"), chance=lambda: 0.5, sleep=sleep, clock=lambda: 0.0)
    snapshots = source.watch()
    assert "Connection refused" in (await anext(snapshots)).error
    with pytest.raises(asyncio.CancelledError):
        await anext(snapshots)
    assert pauses == [most * 0.75 for most in (0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0)]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)
