"""Mesh after mesh → plans and writes; what did not change is not planned again. Pure: `plan` and `diff`, remembered.

The rule: every step ends with exactly the tables that `plan` gives for the same mesh and the same kernel. Where that
could touch more than the services that changed (one comes or goes, an address moves, many change), `plan` is asked.
A step that was not written to its end leaves a planner that knows more than the kernel: make a new one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from loader.diff import Run, runs
from loader.plan import TABLES, EndpointIds, Ids, Plan, PortRows, Tables, carried, plan, rows_of, sized_by
from loader.slots import IDENTITY
from meshbpf.errors import MapFull
from meshbpf.model import MapSizes, Mesh, Port, Service, ServicePolicy

MOST = 1000  # changed services; from there on the whole plan costs no more


@dataclass(frozen=True, slots=True)
class Step:
    """`whole`: services may have come or gone; else every service id is the one it was."""

    plan: Plan
    runs: Iterable[Run]
    whole: bool


@dataclass(frozen=True, slots=True)
class _Change:
    """One port of a service that is called as before."""

    service_id: int
    port: Port
    old: Service
    new: Service
    old_policy: ServicePolicy
    policy: ServicePolicy


class Planner:
    def __init__(self, have: Tables, free: Ids) -> None:
        self._tables = have
        self._free = free
        self._mesh: Mesh | None = None
        self._names: dict[int, tuple[Service, Port]] = {}
        self._endpoints = EndpointIds({}, 1)
        self._named: Counter[bytes] = Counter()  # endpoint → how many service ports name it
        self._drained: Counter[bytes] = Counter()  # … and say that it drains

    def follow(self, mesh: Mesh) -> Step:
        """What to write for `mesh`. Raises MapFull, and then has to be made anew."""
        changes = self._changes(mesh)
        if changes is None:
            return self._whole(mesh)
        have, want = self._rows(changes)
        _check_room(self._tables, want, mesh.agent.maps)
        for name in TABLES:
            table, new = getattr(self._tables, name), getattr(want, name)
            for key in getattr(have, name):
                if key not in new:
                    del table[key]
            table.update(new)
        for change in changes:
            self._names[change.service_id] = (change.new, change.port)
        self._mesh = mesh
        self._free = replace(self._free, endpoint=self._endpoints.free)
        return Step(Plan(self._tables, self._names, self._free), runs(have, want), whole=False)

    def _whole(self, mesh: Mesh) -> Step:
        have, planned = self._tables, plan(mesh, self._tables, self._free)
        self._tables, self._free, self._mesh = planned.tables, planned.free, mesh
        self._names = dict(planned.service_ids)
        self._endpoints = EndpointIds(planned.tables.endpoints, planned.free.endpoint)
        self._named = Counter([key for key, _value in planned.named])
        self._drained = Counter([key for key, value in planned.named if value[IDENTITY]])
        return Step(planned, runs(have, planned.tables), whole=True)

    def _changes(self, mesh: Mesh) -> list[_Change] | None:
        """The service ports to plan anew; None when that is not all there is to do."""
        last = self._mesh
        if last is None or last.agent.maps != mesh.agent.maps or len(last.services) != len(mesh.services):
            return None
        same_policies = last.policies == mesh.policies
        pairs = []
        for old, new in zip(last.services, mesh.services, strict=True):
            if old is new and same_policies:
                continue
            if (old.id, old.addresses, old.ports) != (new.id, new.addresses, new.ports) or not new.addresses:
                return None
            if old != new or last.policy_for(old) != mesh.policy_for(new):
                pairs.append((old, new))
        if len(pairs) > MOST:
            return None
        return [change for old, new in pairs for change in self._ports(old, new, last, mesh)]

    def _ports(self, old: Service, new: Service, last: Mesh, mesh: Mesh) -> Iterator[_Change]:
        for _service, port, keys in carried(Mesh(services=(new,))):
            service_id = int.from_bytes(self._tables.services[keys[0]], "little")
            yield _Change(service_id, port, old, new, last.policy_for(old), mesh.policy_for(new))

    def _rows(self, changes: list[_Change]) -> tuple[Tables, Tables]:
        """The rows of what changed, as they are and as they must be. Endpoints may be named by others as well."""
        have, want = Tables(), Tables()
        touched: dict[bytes, bytes] = {}
        for change in changes:
            key = change.service_id.to_bytes(4, "little")
            have.policies[key] = self._tables.policies[key]
            old = rows_of(change.old, change.port, change.old_policy, change.service_id, self._endpoints)
            have.slots.update((slot, self._tables.slots[slot]) for slot, _endpoint in old.slots)
            have.serving.update(old.serving)
            touched.update(self._count(old, -1))
        for change in changes:
            rows = rows_of(change.new, change.port, change.policy, change.service_id, self._endpoints)
            want.policies[change.service_id.to_bytes(4, "little")] = rows.policy
            want.slots.update(rows.slots)
            want.serving.update(rows.serving)
            touched.update(self._count(rows, 1))
        for key, value in touched.items():
            if key in self._tables.endpoints:
                have.endpoints[key] = self._tables.endpoints[key]
            if not self._named[key]:
                self._endpoints.forget(value)
                continue
            drains = self._drained[key] == self._named[key]
            want.endpoints[key] = value[:IDENTITY] + bytes([drains, 0])
        return have, want

    def _count(self, rows: PortRows, by: int) -> list[tuple[bytes, bytes]]:
        """Note that a service port names its endpoints, or no longer does; returns those."""
        for key, value in rows.endpoints:
            self._named[key] += by
            if value[IDENTITY]:
                self._drained[key] += by
        return rows.endpoints


def _check_room(tables: Tables, want: Tables, sizes: MapSizes) -> None:
    """Old and new rows are there together for a moment."""
    for name in TABLES:
        table = getattr(tables, name)
        more = sum(1 for key in getattr(want, name) if key not in table)
        if len(table) + more > getattr(sizes, sized_by(name)):
            raise MapFull(sized_by(name), getattr(sizes, sized_by(name)))
