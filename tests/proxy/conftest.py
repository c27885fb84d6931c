"""The data path is tested on the loop it runs on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvloop

from tests.proxy.bed import Bed

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE:  # newer pytest-asyncio calls the policy fixture deprecated, older has no other way
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestDeprecationWarning"))


@pytest.fixture(scope="session")
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy()


@pytest.fixture
async def bed() -> AsyncIterator[Bed]:
    """An empty test bed; what it opened is closed behind the test."""
    made = Bed()
    yield made
    await made.close()
