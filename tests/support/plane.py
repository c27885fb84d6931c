"""A dataplane without a kernel: the tables that a plan would make, to be read like pinned ones."""

from __future__ import annotations

from typing import cast

from loader.dataplane import Dataplane
from loader.plan import TABLES, Table, Tables, plan, service_key
from meshbpf.model import Mesh, Protocol


class FakeMap:
    def __init__(self, rows: Table) -> None:
        self.rows = rows

    def lookup(self, key: bytes) -> bytes | None:
        return self.rows.get(key)

    def items(self) -> list[tuple[bytes, bytes]]:
        return list(self.rows.items())


class FakePlane:
    """Attached with `mesh`, and no proxy `serves`. `counted` may be filled: service id → opened and closed, direct and
    proxy.
    """

    serves = False

    def __init__(self, mesh: Mesh) -> None:
        self.tables = plan(mesh, Tables()).tables
        self.maps = {name: FakeMap(getattr(self.tables, name)) for name in TABLES}
        self.maps["limits"] = FakeMap({})
        self.counted: dict[int, tuple[int, int, int, int]] = {}

    def proxy_serves(self, now_ns: int) -> bool:
        return self.serves

    def connections(self) -> dict[int, tuple[int, int, int, int]]:
        return self.counted

    def count(self, address: str, port: int, counts: tuple[int, int, int, int]) -> None:
        raw = self.tables.services[service_key(address, port, Protocol.TCP)]
        self.counted[int.from_bytes(raw, "little")] = counts

    def forget(self, address: str, port: int) -> None:
        del self.tables.services[service_key(address, port, Protocol.TCP)]


def attached(mesh: Mesh) -> tuple[FakePlane, Dataplane]:
    """The same object twice: to be changed by a test, and to be handed to what reads it."""
    made = FakePlane(mesh)
    return made, cast(Dataplane, made)
