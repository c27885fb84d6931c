"""What the agent tells about itself: `status` for the CLI, /metrics, /healthz and /readyz for everybody else.

Reading the kernel's tables takes system calls by the thousand, so a scrape does it in a thread.
"""

from __future__ import annotations

import asyncio
import os
import time
from importlib import metadata
from typing import Any

from aiohttp import web

from loader.plan import service_names
from meshbpf import admin
from meshbpf.model import Mesh
from meshbpf.runtime.agent import Agent
from meshbpf.runtime.sources import Sources
from meshbpf.telemetry import Facts, render

COUNTS = ("connections_total", "requests_total", "proxy_verdicts_total")
TABLES = ("services", "policies", "slots", "endpoints", "flows")


class Metrics:
    def __init__(self, agent: Agent, sources: Sources) -> None:
        self._agent = agent
        self._sources = sources

    async def serve(self) -> web.AppRunner:
        """Listen where `Agent.spec.admin.listen` says. Raises Busy when the port is taken."""
        return await admin.serve(self._agent.following.mesh.agent.admin.listen, self._page, self._not_ready)

    def _not_ready(self) -> str | None:
        """Ready means: callers are served, and news is followed. A mesh that was refused (`error` of status) is no
        reason to take a node out of service that serves the last good one; a task that died is, for nothing it did
        comes back by itself.
        """
        agent = self._agent
        if dead := agent.dead:
            return dead
        if gone := self._gone():
            return gone
        return None if agent.ready else f"{agent.supervisor.ready} of {agent.workers} workers serve the newest mesh"

    async def _page(self, accept: str) -> tuple[bytes, str]:
        await self._agent.attached.wait()
        stats = self._agent.totals.merged(time.monotonic())
        sources = self._sources.report()
        return await asyncio.to_thread(self._render, accept, self._agent.following.mesh, stats, sources)

    def _render(self, accept: str, mesh: Mesh, stats: Any, sources: list[dict[str, Any]]) -> tuple[bytes, str]:
        plane = self._agent.plane
        facts = Facts(
            stats=stats,
            verdicts=plane.counters(),
            connections=self._connections(mesh),
            maps={name: (sum(1 for _key in plane.maps[name].keys()), plane.maps[name].size) for name in TABLES},  # noqa: SIM118
            endpoints=_endpoint_states(mesh),
            ages={source["name"]: source["stale_seconds"] for source in sources},
            generation=mesh.generation,
            build={"version": metadata.version("meshbpf"), "kernel": os.uname().release, "layout": plane.layout},
        )
        return render(facts, accept)

    def _connections(self, mesh: Mesh) -> dict[tuple[str, str], tuple[int, int]]:
        """(service, carrier) → (opened, closed), from the kernel's counts per service id."""
        plane = self._agent.plane
        per_id = plane.connections()
        found: dict[tuple[str, str], tuple[int, int]] = {}
        for service_id, (service, _port) in service_names(dict(plane.maps["services"].items()), mesh).items():
            opened_direct, opened_proxy, closed_direct, closed_proxy = per_id.get(service_id, (0, 0, 0, 0))
            for carrier, opened, closed in (
                ("direct", opened_direct, closed_direct),
                ("proxy", opened_proxy, closed_proxy),
            ):
                before = found.get((service.label, carrier), (0, 0))
                found[service.label, carrier] = (before[0] + opened, before[1] + closed)
        return found

    def status(self) -> dict[str, Any]:
        """What `meshbpf status` and `endpoints` add when an agent runs."""
        agent = self._agent
        return {
            "pid": os.getpid(),
            "ready": agent.supervisor.ready,
            "workers": agent.workers,
            "worker_pids": agent.supervisor.pids,
            "restarts": agent.supervisor.restarts,
            "acceleration": f"{agent.following.acceleration} ({agent.following.acceleration_why})",
            "generation": agent.following.mesh.generation,
            "sources": self._sources.report(),
            "error": self._trouble(),
            "restart": agent.following.waiting,
            "namespaces": len(agent.namespaces.served),
            "endpoints": agent.totals.endpoints(time.monotonic()),
        }

    def counts(self) -> dict[str, Any]:
        """What `meshbpf edges` and `reasons` add when an agent runs: rows of labels and a count, as in /metrics."""
        stats = self._agent.totals.merged(time.monotonic())
        return {family: stats.get(family, []) for family in COUNTS}

    def _trouble(self) -> str:
        """All that is not as it should be, worst first."""
        agent = self._agent
        found = (self._gone(), agent.dead, agent.following.error, agent.supervisor.refusal, agent.supervisor.trouble)
        return "; ".join(filter(None, (*found, self._sources.crowded)))

    def _gone(self) -> str:
        return f"cgroup is gone: {', '.join(self._agent.gone)}" if self._agent.gone else ""


def _endpoint_states(mesh: Mesh) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for service in mesh.services:
        for endpoint in service.endpoints:
            key = (service.label, endpoint.state.value)
            found[key] = found.get(key, 0) + 1
    return found
