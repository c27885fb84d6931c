"""What the agent tells workers of a mesh, as bytes. Meshes are large, and mostly what they were before.

Every service travels as text of its own, and one that is the same object as before has the same text: packing costs
what changed. To somebody who knows the mesh before, `pack_change` says only what is different; whoever has read the
same text before takes the service of then, so that everything which knows services by identity sees at a glance what
did not change. What never comes to a worker it is not told of (`Audience`).
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import compress
from typing import Any

from meshbpf import changes, wire
from meshbpf.carrier import Carrier, choose
from meshbpf.model import Mesh, Service, ServicePolicy

MOST = 1000  # changed services; from there on the whole mesh is packed


class Audience:
    """Which services workers are told of: those of which a port may be led to them. One that they know stays known as
    long as it is in the mesh, because connections from before its policy became `direct` still go through them.

    `everything`: all services, where an earlier agent may have led connections that wait to be accepted.
    """

    def __init__(self, everything: bool) -> None:
        self._everything = everything
        self._last = Mesh()
        self._told: list[bool] = []  # of its services

    def part(self, mesh: Mesh) -> Mesh:
        """`mesh` with these services only; one that is the same object as before is not judged again."""
        if self._everything:
            return mesh
        last, self._last = self._last, mesh
        changed = changes.places(last, mesh)
        if changed is None:
            known = {service.id for service in compress(last.services, self._told)}
            self._told = [service.id in known or _led(service, mesh.policy_for(service)) for service in mesh.services]
        for place in changed or ():
            service = mesh.services[place]
            self._told[place] = self._told[place] or _led(service, mesh.policy_for(service))
        return replace(mesh, services=tuple(compress(mesh.services, self._told)))


def _led(service: Service, policy: ServicePolicy) -> bool:
    return any(choose(port, policy).carrier is not Carrier.DIRECT for port in service.ports)


def pack(mesh: Mesh, about: dict[str, Any]) -> bytes:
    """The mesh and what else there is to say. Takes long for a large mesh: not for an event loop."""
    rest = wire.encode(replace(mesh, services=()))
    return json.dumps({**about, "generation": mesh.generation, "mesh": rest, "services": wire.texts(mesh)}).encode()


def pack_change(last: Mesh, mesh: Mesh, about: dict[str, Any]) -> bytes | None:
    """What is different from `last`, for who has that; None when it is more than some services."""
    places = changes.places(last, mesh)
    if places is None or len(places) > MOST:
        return None
    changed = {place: wire.service_text(mesh.services[place]) for place in places}
    rest = wire.encode(replace(mesh, services=(), policies={}))
    return json.dumps(
        {**about, "generation": mesh.generation, "base": last.generation, "mesh": rest, "changed": changed}
    ).encode()


class Reader:
    """Reads what `pack` and `pack_change` gave; remembers the last mesh. One thread at a time."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._services: dict[str, Service] = {}
        self._last = Mesh()

    def mesh(self, about: dict[str, Any]) -> Mesh:
        """Raises KeyError, TypeError or ValueError for what another version has packed, or for a change of a mesh that
        is not the last one.
        """
        rest = wire.decode(Mesh, about["mesh"])
        known = self._services
        if "base" in about:
            if about["base"] != self._last.generation:
                raise ValueError(f"change of generation {about['base']}, but {self._last.generation} is the last one")
            services = list(self._last.services)
            for place, text in about["changed"].items():
                service = services[int(place)] = wire.decode(Service, json.loads(text))
                known.pop(self._texts[int(place)], None)
                known[text], self._texts[int(place)] = service, text
            self._last = replace(rest, services=tuple(services), policies=self._last.policies)
            return self._last
        self._texts = about["services"]
        self._services = {
            text: known[text] if text in known else wire.decode(Service, json.loads(text)) for text in self._texts
        }
        self._last = replace(rest, services=tuple(self._services.values()))
        return self._last
