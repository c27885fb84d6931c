"""What the agent tells about itself: `status` for the CLI, /metrics, /healthz and /readyz for everybody else."""

from __future__ import annotations

import os
from typing import Any

from meshbpf.runtime.agent import Agent
from meshbpf.runtime.sources import Sources


class Metrics:
    def __init__(self, agent: Agent, sources: Sources) -> None:
        self._agent = agent
        self._sources = sources

    def status(self) -> dict[str, Any]:
        """What `meshbpf status` and `endpoints` add when an agent runs."""
        agent = self._agent
        return {
            "pid": os.getpid(),
            "ready": agent.supervisor.ready,
            "workers": agent.workers,
            "worker_pids": agent.supervisor.pids,
            "restarts": agent.supervisor.restarts,
            "acceleration": agent.mesh.agent.acceleration.value,
            "generation": agent.mesh.generation,
            "sources": self._sources.report(),
            "error": agent.apply_error,
            "namespaces": len(agent.namespaces.served),
            "endpoints": self._endpoints(),
        }

    def _endpoints(self) -> dict[str, dict[str, Any]]:
        """`service endpoint` → how often it served and failed, and how it failed last."""
        found: dict[str, dict[str, Any]] = {}
        for snapshot in self._agent.reports.values():
            for service, endpoint, outcome, count in snapshot.get("upstream_requests_total", []):
                seen = found.setdefault(f"{service} {endpoint}", {"ok": 0, "failed": 0, "last_error": None})
                if outcome == "ok":
                    seen["ok"] += count
                else:
                    seen["failed"] += count
                    seen["last_error"] = outcome
        return found
