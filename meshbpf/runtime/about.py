"""What the agent tells workers of a mesh, as bytes. Meshes are large, and mostly what they were before.

Every service travels as text of its own: who has read the same text before takes the service of then, so that a
change costs what changed, and everything that knows services by identity sees at a glance what did not.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from meshbpf import wire
from meshbpf.model import Mesh, Service


def pack(mesh: Mesh, about: dict[str, Any]) -> bytes:
    """The mesh and what else there is to say. Takes long for a large mesh: not for an event loop."""
    rest = wire.encode(replace(mesh, services=()))
    services = [json.dumps(wire.encode(service), separators=(",", ":")) for service in mesh.services]
    return json.dumps({**about, "generation": mesh.generation, "mesh": rest, "services": services}).encode()


class Reader:
    """Reads what `pack` gave; remembers the last one's services. One thread at a time."""

    def __init__(self) -> None:
        self._services: dict[str, Service] = {}

    def mesh(self, about: dict[str, Any]) -> Mesh:
        """Raises KeyError, TypeError or ValueError for what another version has packed."""
        known = self._services
        services = {
            text: known[text] if text in known else wire.decode(Service, json.loads(text)) for text in about["services"]
        }
        self._services = services
        return replace(wire.decode(Mesh, about["mesh"]), services=tuple(services.values()))
