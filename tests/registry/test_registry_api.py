"""The registry's HTTP API against a real listener: every status code, blocking reads, who may ask."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from meshbpf.model import EmbeddedRegistry
from meshbpf.registry import api, leases
from meshbpf.registry.embedded import EmbeddedSource

ONE = "/v1/services/orders/instances/a"
SERVICE = "/v1/services/orders"


def body(port: int = 8081, **changes: Any) -> dict[str, Any]:
    return {"address": "127.0.0.1", "ports": {"http": {"port": port, "protocol": "http"}}, **changes}


async def ask(http: aiohttp.ClientSession, method: str, path: str, **options: Any) -> tuple[int, dict[str, Any]]:
    async with http.request(method, path, **options) as response:
        return response.status, await response.json() if await response.read() else {}


async def test_register_renew_heartbeat_deregister(http: aiohttp.ClientSession) -> None:
    status, answer = await ask(http, "PUT", ONE, json=body())
    assert (status, answer["schemaVersion"], answer["service"], answer["durable"]) == (201, 1, "orders", True)
    assert answer["lease"]["ttl"] == "10s"
    assert 9000 < answer["lease"]["expiresInMs"] <= 10_000
    assert answer["lease"]["ports"] == {"http": {"port": 8081, "protocol": "http", "servicePort": 8081}}
    assert (await ask(http, "PUT", ONE, json=body()))[0] == 200
    assert await ask(http, "PUT", ONE + "/heartbeat") == (204, {})
    assert await ask(http, "DELETE", ONE) == (204, {})
    for method, path in [("PUT", ONE + "/heartbeat"), ("DELETE", ONE), ("GET", SERVICE)]:
        status, answer = await ask(http, method, path)
        assert status == 404
        assert answer["error"]
        assert answer["field"] in ("id", "service")


async def test_lists_one_and_all(http: aiohttp.ClientSession) -> None:
    await ask(http, "PUT", ONE, json=body(zone="a", labels={"version": "v1"}))
    await ask(http, "PUT", "/v1/services/cart.shop/instances/127.0.0.1-1", json=body())
    status, everything = await ask(http, "GET", "/v1/services")
    assert status == 200
    assert [entry["service"] for entry in everything["services"]] == ["orders", "cart.shop"]
    assert (everything["schemaVersion"], everything["problem"]) == (1, "")
    status, one = await ask(http, "GET", "/v1/services/orders.default")
    assert status == 200
    assert (one["instances"][0]["id"], one["instances"][0]["labels"]) == ("a", {"version": "v1"})
    assert one["generation"] < everything["generation"]


@pytest.mark.parametrize(
    ("path", "content", "status", "field"),
    [
        (ONE, body(address="169.254.169.254"), 400, "address"),
        (ONE, body(port=15001), 400, "ports.http.port"),
        (ONE, body(ttl="1ms"), 400, "ttl"),
        (ONE, body(colour="red"), 400, "colour"),
        ("/v1/services/Orders/instances/a", body(), 400, "service"),
        ("/v1/services/orders/instances/a%20b", body(), 400, "id"),
        (ONE, b"{", 400, "body"),
        (ONE, b"\xff", 400, "body"),
        (ONE, b"", 400, "body"),
        (ONE, b"[" * 60_000, 400, "body"),
        (ONE, b" " * 65_537, 413, "body"),
        ("/v1/services/Orders/instances/a/heartbeat", None, 400, "service"),
        ("/v2/services", None, 404, "path"),
        ("/v1/services", None, 405, "path"),
    ],
)
async def test_bad_requests(http: aiohttp.ClientSession, path: str, content: object, status: int, field: str) -> None:
    options: dict[str, Any] = {"data": content} if isinstance(content, bytes) else {"json": content} if content else {}
    got, answer = await ask(http, "PUT", path, **options)
    assert (got, answer["field"]) == (status, field)
    assert answer["schemaVersion"] == 1
    assert answer["error"]


@pytest.mark.parametrize(("query", "field"), [("wait=x", "wait"), ("wait=1s&generation=-1", "generation")])
async def test_bad_waits(http: aiohttp.ClientSession, query: str, field: str) -> None:
    status, answer = await ask(http, "GET", f"{SERVICE}?{query}")
    assert (status, answer["field"]) == (400, field)


async def test_no_room_is_429(http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "MAX_PER_SERVICE", 1)
    assert (await ask(http, "PUT", ONE, json=body()))[0] == 201
    assert (await ask(http, "PUT", ONE + "2", json=body()))[0] == 429
    assert (await ask(http, "PUT", ONE, json=body(weight=5)))[0] == 200


async def test_a_lease_ends_at_its_ttl_and_tells_those_who_wait(http: aiohttp.ClientSession) -> None:
    begun = time.monotonic()
    _, put = await ask(http, "PUT", ONE, json=body(ttl="1s"))
    status, answer = await ask(http, "GET", f"{SERVICE}?wait=10s&generation={put['generation']}")
    took = time.monotonic() - begun
    assert status == 404
    assert answer["generation"] > put["generation"]
    assert 1.0 <= took < 2.0
    assert (await ask(http, "PUT", ONE + "/heartbeat"))[0] == 404
    assert (await ask(http, "PUT", ONE, json=body()))[0] == 201


async def test_a_blocking_read_waits_for_its_service_only(http: aiohttp.ClientSession, source: EmbeddedSource) -> None:
    _, put = await ask(http, "PUT", ONE, json=body())
    reader = asyncio.ensure_future(ask(http, "GET", f"{SERVICE}?wait=30s&generation={put['generation']}"))
    await until(lambda: source.registrar.waiting == 1)
    await ask(http, "PUT", "/v1/services/other/instances/a", json=body())
    await ask(http, "PUT", ONE + "/heartbeat")
    await ask(http, "PUT", ONE, json=body())  # the same again: nothing to see
    assert source.registrar.waiting == 1
    await ask(http, "PUT", ONE + "2", json=body(port=8082))
    status, answer = await reader
    assert (status, [entry["id"] for entry in answer["instances"]]) == (200, ["a", "a2"])
    # Who asks with an older generation, or one from another life of the registry, does not wait.
    for known in (put["generation"], 10**12):
        assert (await ask(http, "GET", f"{SERVICE}?wait=60s&generation={known}"))[0] == 200


async def test_a_read_may_wait_for_a_service_that_is_not_there_yet(
    http: aiohttp.ClientSession, source: EmbeddedSource
) -> None:
    reader = asyncio.ensure_future(ask(http, "GET", f"{SERVICE}?wait=30s"))
    everything = asyncio.ensure_future(ask(http, "GET", "/v1/services?wait=30s"))
    await until(lambda: source.registrar.waiting == 2)
    await ask(http, "PUT", ONE, json=body())
    assert (await reader)[0] == 200
    assert len((await everything)[1]["services"]) == 1


async def test_waiting_ends_in_time_and_places_are_bounded(
    http: aiohttp.ClientSession, source: EmbeddedSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await ask(http, "GET", "/v1/services?wait=50ms"))[0] == 200
    monkeypatch.setattr(api, "MAX_WAIT", 0.05)
    assert (await ask(http, "GET", "/v1/services?wait=99999h"))[0] == 200
    monkeypatch.undo()
    monkeypatch.setattr(api, "MAX_WAITERS", 1)
    hung_up = asyncio.ensure_future(ask(http, "GET", "/v1/services?wait=30s"))
    await until(lambda: source.registrar.waiting == 1)
    assert (await ask(http, "GET", "/v1/services?wait=30s"))[0] == 429
    hung_up.cancel()
    await until(lambda: source.registrar.waiting == 0)


async def test_closing_lets_waiting_readers_go(http: aiohttp.ClientSession, source: EmbeddedSource) -> None:
    reader = asyncio.ensure_future(ask(http, "GET", "/v1/services?wait=60s"))
    await until(lambda: source.registrar.waiting == 1)
    async with asyncio.timeout(5):
        await source.close()
        assert (await reader)[0] == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:15010", 200),
        ("127.0.0.1:1", 200),
        ("127.5.6.7", 200),
        ("[::1]:15010", 200),
        ("evil.example", 403),
        ("evil.example:15010", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("192.0.2.1", 403),
        ("", 403),
    ],
)
async def test_host(http: aiohttp.ClientSession, host: str, status: int) -> None:
    assert (await ask(http, "GET", "/v1/services", headers={"Host": host}))[0] == status


async def test_two_hosts_are_one_too_many(source: EmbeddedSource) -> None:
    assert source.address is not None
    reader, writer = await asyncio.open_connection(*source.address)
    writer.write(b"GET /v1/services HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
    assert (await reader.readline()).split()[1] in (b"400", b"403")
    writer.close()


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:15010"])
@pytest.mark.parametrize("method", ["GET", "PUT", "OPTIONS"])
async def test_web_pages_are_refused(http: aiohttp.ClientSession, origin: str, method: str) -> None:
    status, answer = await ask(http, method, "/v1/services", headers={"Origin": origin})
    assert (status, answer["field"]) == (403, "Origin")


async def test_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    settings = EmbeddedRegistry("127.0.0.1:0", str(tmp_path / "registry.db"), str(tmp_path / "token"))
    source = EmbeddedSource(settings)
    await source.start()
    assert source.address is not None
    async with aiohttp.ClientSession(f"http://127.0.0.1:{source.address[1]}") as http:
        for wrong in ({}, {"Authorization": "Bearer nope"}, {"Authorization": "Basic s3cret"}):
            async with http.get("/v1/services", headers=wrong) as response:
                assert response.status == 401
                assert response.headers["WWW-Authenticate"] == "Bearer"
        assert (await ask(http, "PUT", ONE, json=body()))[0] == 401
        right = {"Authorization": "Bearer s3cret"}
        assert (await ask(http, "PUT", ONE, json=body(), headers=right))[0] == 201
    await source.close()


async def test_the_unix_socket_has_the_same_routes_and_may_use_loopback(tmp_path: Path) -> None:
    settings = EmbeddedRegistry("127.0.0.1:0", str(tmp_path / "registry.db"), allow_loopback=False)
    source = EmbeddedSource(settings)
    await source.start()
    app = web.Application(middlewares=api.middlewares())
    app.add_routes(api.routes(source.registrar, local=True))
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "agent.sock")).start()
    assert source.address is not None
    async with aiohttp.ClientSession(f"http://127.0.0.1:{source.address[1]}") as tcp:
        status, answer = await ask(tcp, "PUT", ONE, json=body())
        assert (status, answer["field"]) == (400, "address")
    unix = aiohttp.UnixConnector(str(tmp_path / "agent.sock"))
    async with aiohttp.ClientSession("http://any.name", connector=unix) as http:
        assert (await ask(http, "PUT", ONE, json=body()))[0] == 201
        assert (await ask(http, "GET", "/v1/services", headers={"Origin": "null"}))[0] == 403
    await runner.cleanup()
    await source.close()


async def until(true: Any) -> None:
    """Let the loop run until `true()`; the test's timeout is the limit."""
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0)
