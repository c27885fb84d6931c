"""The data path is tested on the loop it runs on."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.proxy.bed import Bed
from userspace_proxy.exchange import Exchange
from userspace_proxy.life import ENDED, MOVES, OPEN, State
from userspace_proxy.poller import Poller

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == HERE:  # newer pytest-asyncio calls the policy fixture deprecated, older has no other way
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestDeprecationWarning"))


@pytest.fixture(scope="session")
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy()


class Watched:
    """In the place of `Exchange.state`: notes every move that the table of states does not have."""

    def __init__(self, slot: Any) -> None:
        self._slot = slot
        self.wrong: list[tuple[State, State]] = []

    def __get__(self, exchange: Exchange, _owner: type) -> Any:
        return self._slot.__get__(exchange)

    def __set__(self, exchange: Exchange, state: State) -> None:
        before = getattr(exchange, "state", None)
        if state not in (MOVES[before] if before is not None else {OPEN}):
            self.wrong.append((before or ENDED, state))
        self._slot.__set__(exchange, state)


@pytest.fixture(autouse=True)
def states(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No exchange of any test goes from a state to one that may not follow it."""
    watched = Watched(vars(Exchange)["state"])
    monkeypatch.setattr(Exchange, "state", watched)
    yield
    assert not watched.wrong


@pytest.fixture
async def poller() -> Poller:
    return Poller(asyncio.get_running_loop())


@pytest.fixture
async def listener() -> AsyncIterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


@pytest.fixture
async def bed() -> AsyncIterator[Bed]:
    """An empty test bed; what it opened is closed behind the test."""
    made = Bed()
    yield made
    await made.close()
