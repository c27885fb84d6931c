"""The machine's clock is set while the registry runs, or between two of its lives: no lease ends of that."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshbpf.registry.instance import Refusal, Rules
from meshbpf.registry.registrar import Registrar
from meshbpf.registry.store import Store

DAY = 86_400.0
ORDERS = ("orders", "default")


class Clocks:
    def __init__(self) -> None:
        self.monotonic, self.wall = 5000.0, 1e9

    def pass_(self, seconds: float) -> None:
        self.monotonic += seconds
        self.wall += seconds

    async def registrar(self, path: Path) -> Registrar:
        made = Registrar(Store(path), Rules(), clock=lambda: self.monotonic, wall=lambda: self.wall)
        await made.start()
        return made


async def put(registrar: Registrar) -> None:
    body = {"address": "192.0.2.1", "ports": {"http": {"port": 80}}, "ttl": "60s"}
    assert not isinstance(await registrar.put("orders", "a", body, local=True), Refusal)


@pytest.mark.parametrize("jump", [-400 * DAY, -30.0, 30.0, 400 * DAY])
async def test_a_jump_of_the_clock_neither_ends_a_lease_nor_makes_it_longer(tmp_path: Path, jump: float) -> None:
    clocks = Clocks()
    registrar = await clocks.registrar(tmp_path / "registry.db")
    await put(registrar)
    generation = registrar.generation(None)
    clocks.wall += jump
    clocks.pass_(59)
    assert await registrar.heartbeat(ORDERS, "a")
    clocks.pass_(59)
    assert await registrar.heartbeat(ORDERS, "a")
    assert registrar.generation(None) == generation, "nobody was told anything"
    clocks.wall -= jump / 2
    await registrar.close()
    clocks.wall += jump
    again = await clocks.registrar(tmp_path / "registry.db")
    (lease,) = again.leases.of(ORDERS)
    assert 30.0 <= lease.deadline - clocks.monotonic <= 60.0
    clocks.pass_(61)
    assert not await again.heartbeat(ORDERS, "a"), "it ends after its ttl all the same"
    await again.close()
