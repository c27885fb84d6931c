"""A real embedded registry on loopback, its store in a temporary directory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from meshbpf.model import EmbeddedRegistry
from meshbpf.registry.embedded import EmbeddedSource
from meshbpf.registry.instance import Rules


@pytest.fixture
async def source(tmp_path: Path) -> AsyncIterator[EmbeddedSource]:
    settings = EmbeddedRegistry(listen="127.0.0.1:0", store=str(tmp_path / "registry.db"))
    source = EmbeddedSource(settings, Rules(own_ports=frozenset({15001})))
    await source.start()
    yield source
    await source.close()


def url(source: EmbeddedSource) -> str:
    assert source.address is not None
    return f"http://{source.address[0]}:{source.address[1]}"


@pytest.fixture
async def http(source: EmbeddedSource) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(url(source)) as session:
        yield session
