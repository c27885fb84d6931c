"""Who takes part in a run: the subjects of the loads, and the rows that bring with them what they measure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import connects, memory, scale, streams
from bench.envoy import Envoy
from bench.figures import ATTACH, CONNECT, MEMORY, SCALE, STREAMS
from bench.intercept import Hooked, Redirected
from bench.peers import HAProxy, Nginx
from bench.subjects import Attach, Mesh, NoMesh, Subject

Single = Callable[[], Iterator[dict[str, dict[str, float]]]]


@dataclass(frozen=True, slots=True)
class Stage:
    """Where they live: `client` and `own` are the CPUs of the load generator's side and of the subjects'."""

    run: Path
    make_group: Callable[[str], Path]
    client: set[int] | None
    own: set[int] | None
    endpoints: list[int]

    def _common(self, mode: str, acceleration: str, number: int) -> dict[str, Any]:
        return {
            "mode": mode, "acceleration": acceleration, "number": number, "run": self.run,
            "make_group": self.make_group, "cpus": self.own, "endpoints": self.endpoints,
        }  # fmt: skip

    def subjects(self) -> list[Subject]:
        return [
            NoMesh(self.endpoints[0]),
            Mesh("direct", **self._common("direct", "off", 1)),
            Mesh("proxy", **self._common("proxy", "redirect", 2)),
            Mesh("proxy-off", **self._common("proxy", "off", 3)),
            *(
                peer(self.run, self.make_group(f"{peer.name}-agent"), self.own, self.endpoints)
                for peer in (Envoy, HAProxy, Nginx)
            ),
            *(kind(self.run, self.make_group, self.client, self.own) for kind in (Hooked, Redirected)),
        ]

    def singles(self, short: bool, seed: int) -> dict[str, Single]:
        """The rows without a load; each starts, measures and stops its own when it is called."""
        attach = Attach("attach", **self._common("direct", "off", 4))
        idle = Mesh("memory", **self._common("proxy", "redirect", 5))
        streamed = streams.Streamed("streams", **{**self._common("proxy", "redirect", 6), "cpus": None})
        return {
            ATTACH: lambda: attach.measure(1 if short else 7),
            SCALE: lambda: scale.measure(self.make_group, self.run, 1 if short else 5),
            CONNECT: lambda: connects.measure(self.make_group, 2 if short else 15, self.client, seed),
            MEMORY: lambda: memory.measure(idle, 1 if short else 5),
            STREAMS: lambda: streams.measure(streamed, self.make_group, 1 if short else 5),
        }
