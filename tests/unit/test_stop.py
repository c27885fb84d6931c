"""What is told to who ends an instance, or only its agent: what goes, and what stays."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from pathlib import Path
from typing import cast

import pytest

from loader.dataplane import Dataplane
from loader.instance import Instance
from meshbpf.errors import Busy
from meshbpf.model import Mesh
from meshbpf.registry.store import Store
from meshbpf.runtime.agent import Agent, Options
from meshbpf.runtime.sources import new_store_undone
from tests.support.plane import FakePlane


class Plane(FakePlane):
    def set_agent(self, port: int, exempt: int) -> None:
        self.port = port


def test_an_agent_that_stops_says_that_the_hooks_stay(caplog: pytest.LogCaptureFixture) -> None:
    async def stopped() -> Plane:
        agent, plane = Agent(Options(Instance("eval7"), (), 1), Mesh()), Plane(Mesh())
        agent.plane = cast(Dataplane, plane)
        agent.stop()
        await agent.run()
        return plane

    caplog.set_level(logging.INFO, "agent")
    assert asyncio.run(stopped()).port == 0
    said = "still attached: direct ports go on, governed ones follow onProxyDown; meshbpf detach --instance eval7"
    assert [message.startswith(said) for message in caplog.messages] == [False, True, False]


@pytest.mark.parametrize("attached", [False, True])
def test_a_failed_start_takes_the_store_that_it_made(
    attached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loader.instance.RUN", tmp_path / "run")
    instance, path = Instance("eval7"), tmp_path / "lib/registry.db"

    async def begun() -> None:
        store = Store(path)
        await store.open()
        await store.addresses([("default", "orders")], ipaddress.ip_network("127.96.0.0/16"))
        assert path.exists()
        await store.close()

    def fail() -> None:
        with pytest.raises(Busy), new_store_undone(instance, path):
            asyncio.run(begun())
            raise Busy("taken")

    if attached:
        instance.write_state({"cgroups": []})
    fail()
    assert path.parent.exists() == attached
    if not attached:
        asyncio.run(begun())
        fail()  # not the one that was there
        assert path.exists()
