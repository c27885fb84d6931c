"""What is told to who ends an instance, or only its agent: what goes, and what stays."""

from __future__ import annotations

import asyncio
import logging
from typing import cast

import pytest

from loader.dataplane import Dataplane
from loader.instance import Instance
from meshbpf.model import Mesh
from meshbpf.runtime.agent import Agent, Options
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
