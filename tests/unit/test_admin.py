"""The admin listener answers three questions, to nobody else's pages, and changes nothing."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import aiohttp
import pytest

from meshbpf.admin import is_local, serve
from meshbpf.errors import Busy, ConfigError


@dataclass
class Told:
    why: str | None = None
    accepts: list[str] = field(default_factory=list)

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        self.accepts.append(accept)
        return b"meshbpf_build_info 1\n", "text/plain; version=0.0.4; charset=utf-8"

    def not_ready(self) -> str | None:
        return self.why


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
async def url(told: Told) -> AsyncIterator[str]:
    runner = await serve("127.0.0.1:0", told.metrics, told.not_ready)
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def test_metrics_are_those_of_the_callable(url: str, told: Told, client: aiohttp.ClientSession) -> None:
    async with client.get(f"{url}/metrics", headers={"Accept": "application/openmetrics-text"}) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert await response.read() == b"meshbpf_build_info 1\n"
    assert told.accepts == ["application/openmetrics-text"]


async def test_readiness_says_why_not(url: str, told: Told, client: aiohttp.ClientSession) -> None:
    async with client.get(f"{url}/readyz") as response:
        assert (response.status, await response.text()) == (200, "ready\n")
    told.why = "no worker is up"
    async with client.get(f"{url}/readyz") as response:
        assert (response.status, await response.text()) == (503, "not ready: no worker is up\n")
    async with client.get(f"{url}/healthz") as response:
        assert (response.status, await response.text()) == (200, "ok\n")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/metrics", 405), ("PUT", "/healthz", 405), ("DELETE", "/readyz", 405), ("GET", "/", 404),
        ("GET", "/config", 404), ("GET", "/metrics/", 404), ("HEAD", "/healthz", 200),
    ],
)  # fmt: skip
async def test_there_is_nothing_else(
    url: str, client: aiohttp.ClientSession, method: str, path: str, status: int
) -> None:
    async with client.request(method, url + path) as response:
        assert response.status == status


@pytest.mark.parametrize("path", ["/metrics", "/nothing"])
async def test_a_foreign_host_is_sent_away(url: str, client: aiohttp.ClientSession, path: str) -> None:
    async with client.get(url + path, headers={"Host": "rebound.example:15020"}) as response:
        assert response.status == 421


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True), ("LOCALHOST:15020", True), ("127.0.0.1:15020", True), ("127.9.9.9", True),
        ("[::1]:15020", True), ("[::1]", True), ("node-1:15020", True), ("192.0.2.7:15020", False), ("", False),
        ("localhost.evil.example", False), ("127.0.0.1.evil.example", False), ("evil", False), ("[::2]", False),
        ("localhost:port", False), ("[::1]evil", False), ("127.0.0.1@evil", False),
    ],
)  # fmt: skip
def test_who_is_local(host: str, local: bool) -> None:
    assert is_local(host, "node-1") is local


@pytest.mark.parametrize(("host", "local"), [("192.0.2.7:15020", True), ("[fd00::1]", True), ("evil.example", False)])
def test_listening_everywhere_takes_any_number_but_no_name(host: str, local: bool) -> None:
    assert is_local(host, "0.0.0.0") is local


async def test_a_taken_port_is_named(told: Told) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Busy, match=f"127.0.0.1:{port}"):
            await serve(f"127.0.0.1:{port}", told.metrics, told.not_ready)


async def test_a_listen_address_without_port_is_refused(told: Told) -> None:
    with pytest.raises(ConfigError):
        await serve("127.0.0.1", told.metrics, told.not_ready)
