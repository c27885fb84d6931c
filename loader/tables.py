"""The tables of an attached instance, reached by their pins: filling them with a mesh, and reading them.

The rules: what is not pinned does not exist for us; a failure half-way is read back from the kernel before the next
apply, so that every apply begins with what is really there.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from loader import abi, environment, libbpf
from loader.instance import Instance
from loader.plan import TABLES, Ids, Plan, Tables
from loader.planner import Planner
from meshbpf import wire
from meshbpf.model import MapSizes, Mesh
from meshbpf.reason import Reason

# table → key size, value size, per CPU
SHAPES: dict[str, tuple[int, int, bool]] = {
    "services": (20, 4, False),
    "policies": (4, 20, False),
    "slots": (8, 4, False),
    "endpoints": (4, 20, False),
    "rounds": (4, 8, False),
    "agent": (4, 24, False),
    "heartbeat": (4, 8, False),
    "flows": (32, 40, False),
    "listeners": (4, 4, False),  # keys are socket descriptors
    "connections": (4, 32, True),
    "serving": (8, 4, False),
    "connected": (8, 40, False),
    "talks": (32, 40, False),
    "answers": (32, 20, False),
    "limits": (4, 8, False),
    "affinities": (32, 16, False),
    "counters": (4, 8, True),
}


@dataclass(frozen=True, slots=True)
class Applied:
    """What an apply did: writes made, the names of the ids now in the kernel, and whether an endpoint left a port
    that notes them: then UDP sockets may be connected to it."""

    writes: int
    plan: Plan
    left: bool = False


class Dataplane:
    """One attached instance. Make it with `attach` (writes) or `open_pins` (reads). `planner` is that of another one,
    which nobody writes with any more: else the first change costs a look at all that the kernel holds.
    """

    def __init__(self, instance: Instance, layout: str, sizes: MapSizes, planner: Planner | None = None) -> None:
        self.instance = instance
        self.layout = layout
        self.sizes = sizes
        self.maps_folder = instance.maps(layout)
        room = {field.name: getattr(sizes, field.name) for field in fields(sizes)}
        self.maps: dict[str, libbpf.Map] = {}
        for name, (key, value, per_cpu) in SHAPES.items():
            path = self.maps_folder / name
            self.maps[name] = libbpf.Map(path, key, value, room.get(name, 0), per_cpu)
        self.planner = planner
        self._left = False  # also by an apply that failed half-way

    # --- writing ---------------------------------------------------------------------------------------------

    def apply(self, mesh: Mesh, planned: Callable[[], None] = lambda: None) -> Applied:
        """Make the kernel hold `mesh`. Raises MapFull (nothing lost: what was there stays served). `planned` is called
        when what is left to do is mostly the kernel's.
        """
        state = self._agent_state()
        planner, self.planner = self.planner, None  # a failure half-way is read back from the kernel next time
        if planner is None:
            planner = Planner(self.read_tables(), Ids(state.next_service, state.next_endpoint))
        step = planner.follow(mesh)
        planned()
        free = step.plan.free
        if (state.next_service, state.next_endpoint) != (free.service, free.endpoint):
            state.next_service, state.next_endpoint = free.service, free.endpoint
            self.maps["agent"].update(bytes(4), bytes(state))
        if step.whole:
            self._make_rows(step.plan)
        writes = 0
        for run in step.runs:
            self._left |= run.table == "serving" and bool(run.gone)
            self.maps[run.table].update_many(run.rows)
            self.maps[run.table].delete_many(run.gone)
            writes += len(run)
        if step.whole:
            self._drop_rows(step.plan)
        self.planner = planner
        left, self._left = self._left, False
        return Applied(writes, step.plan, left)

    def _make_rows(self, planned: Plan) -> None:
        """Every service id has its round-robin position and its connection counts before a hook can look."""
        for name in ("rounds", "connections"):
            there = set(self.maps[name].keys())
            keys = [service_id.to_bytes(4, "little") for service_id in planned.service_ids]
            zero = bytes(self.maps[name].value_size)
            self.maps[name].update_many([(key, zero) for key in keys if key not in there])  # the others go on counting

    def _drop_rows(self, planned: Plan) -> None:
        for name in ("rounds", "connections", "limits"):
            keys = list(self.maps[name].keys())
            self.maps[name].delete_many([k for k in keys if int.from_bytes(k, "little") not in planned.service_ids])

    def set_agent(self, proxy_port: int, exempt_cgroup: int) -> None:
        """Tell connect where the proxy listens and whose connections are our own (0: nobody's)."""
        state = self._agent_state()
        state.exempt_cgroup, state.proxy_port = exempt_cgroup, proxy_port
        self.maps["agent"].update(bytes(4), bytes(state))

    def mark(self, listeners: Iterable[socket.socket]) -> None:
        """Have connect know these sockets, of whatever namespace, for the proxy's."""
        for listener in listeners:
            self.maps["listeners"].update(listener.fileno().to_bytes(4, "little"), bytes(abi.Listener(1)))

    def forget(self, flows: Mapping[bytes, bytes]) -> None:
        """Remove these, which no sockops of ours removes when they end."""
        for client, flow in flows.items():
            if self.maps["flows"].lookup(client) == flow:
                self.maps["flows"].delete(client)

    def _agent_state(self) -> abi.AgentState:
        return abi.AgentState.from_buffer_copy(self.maps["agent"].lookup(bytes(4)) or bytes(24))

    def beat(self, now_ns: int) -> None:
        """A worker lives: CLOCK_MONOTONIC in nanoseconds."""
        self.maps["heartbeat"].update(bytes(4), now_ns.to_bytes(8, "little"))

    # --- reading ---------------------------------------------------------------------------------------------

    def proxy_serves(self, now_ns: int) -> bool:
        """Whether connect takes a proxy for alive now (CLOCK_MONOTONIC), which may have outlived its agent."""
        beat = int.from_bytes(self.maps["heartbeat"].lookup(bytes(4)) or b"", "little")
        return bool(self._agent_state().proxy_port) and beat > 0 and now_ns - beat < abi.HEARTBEAT_MAX_NS

    def read_tables(self) -> Tables:
        return Tables(**{name: dict(self.maps[name].items()) for name in TABLES})

    def counters(self) -> dict[tuple[str, str], int]:
        """(program, reason) → verdicts since attach, all CPUs; zero counts are left out."""
        found = {}
        for index in range(abi.COUNTERS):
            raw = self.maps["counters"].lookup(index.to_bytes(4, "little")) or b""
            total = sum(int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8))
            if total:
                program = abi.Program(index // abi.REASON_STRIDE).name.lower()
                found[program, Reason(index % abi.REASON_STRIDE).word] = total
        return found

    def connections(self) -> dict[int, tuple[int, int, int, int]]:
        """Service id → (opened direct, opened proxy, closed direct, closed proxy), all CPUs."""
        found = {}
        for key, raw in self.maps["connections"].items():
            words = [int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8)]
            a, b, c, d = (sum(words[i::4]) for i in range(4))
            found[int.from_bytes(key, "little")] = (a, b, c, d)
        return found

    def close(self) -> None:
        for table in self.maps.values():
            table.close()


def open_pins(instance: Instance) -> tuple[Dataplane, Mesh] | None:
    """The attached instance and the mesh last applied, for reading; None when nothing is attached."""
    state = instance.read_state()
    if not state or not instance.maps(state["layout"]).is_dir():
        return None
    mesh = wire.decode(Mesh, state["mesh"])
    return Dataplane(instance, state["layout"], mesh.agent.maps), mesh


def netns_cookie(sock: socket.socket) -> int:
    """The namespace of `sock` as the kernel programs name it; 0 where this kernel cannot tell."""
    if not environment.has_netns_cookies():
        return 0
    raw: Any = sock.getsockopt(socket.SOL_SOCKET, environment.SO_NETNS_COOKIE, 8)
    return int.from_bytes(raw, "little")
