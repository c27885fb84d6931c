"""The embedded registry as a source: whole snapshots, coalesced; a store in trouble; a restart after SIGKILL."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from meshbpf.errors import Busy, ConfigError
from meshbpf.model import EmbeddedRegistry, Port, Protocol
from meshbpf.registry import embedded
from meshbpf.registry.base import Snapshot, Source
from meshbpf.registry.client import RegistryAway, RegistryClient, RegistryRefused
from meshbpf.registry.embedded import EmbeddedSource
from meshbpf.registry.instance import Refusal
from meshbpf.registry.registrar import Registrar


def body(port: int = 8081, **changes: Any) -> dict[str, Any]:
    return {"address": "127.0.0.1", "ports": {"http": {"port": port, "protocol": "http"}}, **changes}


def make(tmp_path: Path, **changes: Any) -> EmbeddedSource:
    return EmbeddedSource(EmbeddedRegistry(**{"listen": "", "store": str(tmp_path / "registry.db"), **changes}))


async def put(registrar: Registrar, service: str, id: str, content: dict[str, Any]) -> None:
    assert not isinstance(await registrar.put(service, id, content, local=True), Refusal)


async def newest(snapshots: AsyncIterator[Snapshot]) -> Snapshot:
    async with asyncio.timeout(5):
        return await anext(snapshots)


async def test_snapshots_are_whole_and_coalesced(tmp_path: Path) -> None:
    source: Source = (made := make(tmp_path))
    snapshots = source.watch()
    assert await newest(snapshots) == Snapshot(source="registry")
    for number in range(50):
        await put(made.registrar, "orders", f"i{number:02}", body(9000 + number, weight=7, zone="a"))
    first = await newest(snapshots)
    assert len(first.services[0].endpoints) == 50
    endpoint = first.services[0].endpoints[0]
    assert (endpoint.address, dict(endpoint.ports), endpoint.weight, endpoint.zone) == (
        "127.0.0.1",
        {"http": 9000},
        7,
        "a",
    )
    assert endpoint.source == "registry"
    await made.registrar.delete(("orders", "default"), "i00")
    assert len((await newest(snapshots)).services[0].endpoints) == 49
    await snapshots.aclose()  # type: ignore[attr-defined]


async def test_a_change_after_a_quiet_time_is_told_at_once_and_those_that_follow_it_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "COALESCE", 0.5)
    source, clock = make(tmp_path), asyncio.get_running_loop().time
    snapshots = source.watch()
    await newest(snapshots)
    await asyncio.sleep(embedded.COALESCE)
    begun = clock()
    for number in range(3):
        await put(source.registrar, "orders", f"i{number}", body(9000 + number))
        if number == 0:
            assert len((await newest(snapshots)).services[0].endpoints) == 1
            assert clock() - begun < embedded.COALESCE / 2
    assert len((await newest(snapshots)).services[0].endpoints) == 3
    assert clock() - begun >= embedded.COALESCE
    await snapshots.aclose()  # type: ignore[attr-defined]


async def test_ports_come_from_instances_and_the_oldest_is_right(tmp_path: Path) -> None:
    source = make(tmp_path)
    await source.start()
    await put(source.registrar, "orders", "z", body(ports={"http": {"port": 8081, "servicePort": 80}}))
    newcomer = {"http": {"port": 8082, "protocol": "tcp", "servicePort": 81}, "web": {"port": 8083, "servicePort": 80}}
    await put(source.registrar, "orders", "a", body(ports={**newcomer, "grpc": {"port": 9000, "protocol": "grpc"}}))
    snapshots = source.watch()
    (service,) = (await newest(snapshots)).services
    assert service.ports == (Port("http", 80, Protocol.HTTP), Port("grpc", 9000, Protocol.GRPC))
    assert [dict(endpoint.ports) for endpoint in service.endpoints] == [
        {"grpc": 9000, "http": 8082, "web": 8083},
        {"http": 8081},
    ]
    assert service.addresses == ()
    await source.close()


async def test_expiry_makes_a_snapshot(tmp_path: Path) -> None:
    source = make(tmp_path)
    snapshots = source.watch()
    await newest(snapshots)
    await put(source.registrar, "orders", "short", body(ttl="1s"))
    await put(source.registrar, "orders", "long", body(ttl="1h"))
    assert len((await newest(snapshots)).services[0].endpoints) == 2
    assert len((await newest(snapshots)).services[0].endpoints) == 1
    await snapshots.aclose()  # type: ignore[attr-defined]


async def test_a_corrupt_store_is_said_and_everything_works(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_bytes(b"garbage" * 1000)
    source = make(tmp_path, listen="127.0.0.1:0")
    snapshots = source.watch()
    assert "memory only" in (await newest(snapshots)).error
    assert source.address is not None
    async with RegistryClient(url=f"http://127.0.0.1:{source.address[1]}") as client:
        assert await client.put("orders", "a", body())
        assert await client.heartbeat("orders", "a")
        assert "memory only" in (await client.services())["problem"]
    after = await newest(snapshots)
    assert len(after.services) == 1
    assert after.error
    await snapshots.aclose()  # type: ignore[attr-defined]


async def test_listeners_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenFile"):
        await make(tmp_path, listen="0.0.0.0:0").start()
    with pytest.raises(ConfigError, match="listen"):
        await make(tmp_path, listen="15010").start()
    with pytest.raises(ConfigError, match="tokenFile"):
        await make(tmp_path, listen="127.0.0.1:0", token_file=str(tmp_path / "none")).start()
    first = make(tmp_path, listen="127.0.0.1:0")
    await first.start()
    assert first.address is not None
    with pytest.raises(Busy, match=r"\(Agent.spec.registries\[\].embedded.listen\): the port is taken"):
        await make(tmp_path, listen=f"127.0.0.1:{first.address[1]}", store=str(tmp_path / "other.db")).start()
    await first.close()


SERVER = """
import asyncio, sys
from meshbpf.model import EmbeddedRegistry
from meshbpf.registry.embedded import EmbeddedSource
async def main():
    source = EmbeddedSource(EmbeddedRegistry("127.0.0.1:0", sys.argv[1]))
    await source.start()
    import ipaddress
    given = await source.registrar.store.addresses([("orders", "default")], ipaddress.ip_network("127.96.0.0/16"))
    print(source.address[1], given[("orders", "default")], flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def serve(store: Path) -> tuple[asyncio.subprocess.Process, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, str(store), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    port, address = (await process.stdout.readline()).decode().split()
    return process, f"http://127.0.0.1:{port}", address


async def test_a_killed_registry_comes_back_with_its_instances_and_addresses(tmp_path: Path) -> None:
    store = tmp_path / "registry.db"
    process, url, address = await serve(store)
    async with RegistryClient(url=url) as client:
        await client.put("orders", "kept", body(ttl="1h"))
        await client.put("orders", "short", body(8082, ttl="3s"))
        await client.put("orders", "gone", body(8083))
        await client.delete("orders", "gone")
        generation = (await client.services())["generation"]
        process.send_signal(signal.SIGKILL)
        await process.wait()
        with pytest.raises(RegistryAway):
            await client.heartbeat("orders", "kept")
    process, url, again = await serve(store)
    assert again == address
    async with RegistryClient(url=url) as client:
        after = await client.services()
        assert after["generation"] > generation
        (orders,) = after["services"]
        assert [entry["id"] for entry in orders["instances"]] == ["kept", "short"]
        assert orders["instances"][0]["expiresInMs"] > 3_500_000
        assert 0 < orders["instances"][1]["expiresInMs"] <= 3000
        # Nobody renews the short one, and no grace is longer than its TTL.
        orders = await client.instances("orders", wait=10, generation=orders["generation"])
        assert [entry["id"] for entry in orders["instances"]] == ["kept"]
        assert await client.heartbeat("orders", "kept")
    process.terminate()
    await process.wait()


async def test_client_errors_say_what_is_wrong(tmp_path: Path) -> None:
    async with RegistryClient(unix=tmp_path / "none.sock", timeout=1) as client:
        with pytest.raises(RegistryAway, match=r"none\.sock"):
            await client.put("orders", "a", body())
    source = make(tmp_path, listen="127.0.0.1:0")
    await source.start()
    assert source.address is not None
    async with RegistryClient(url=f"http://127.0.0.1:{source.address[1]}") as client:
        with pytest.raises(RegistryRefused) as refused:
            await client.put("orders", "a", body(weight=-1))
        assert (refused.value.status, refused.value.field, refused.value.passing) == (400, "weight", False)
        assert not await client.heartbeat("orders", "a")
        assert not await client.delete("orders", "a")
        assert await client.put("orders", "a", body())
        assert not await client.put("orders", "a", body())
    await source.close()
    with pytest.raises(ValueError, match="either"):
        RegistryClient()
