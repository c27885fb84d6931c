"""Rows for the reading commands, from the mesh last applied and the kernel's tables. Works with no agent running."""

from __future__ import annotations

from typing import Any

from loader import abi
from loader.dataplane import Dataplane
from loader.plan import service_key
from meshbpf.carrier import choose
from meshbpf.cli.calls import names
from meshbpf.errors import NotFound
from meshbpf.model import EndpointState, Mesh, Port, Service
from meshbpf.schema.words import meant


def find(mesh: Mesh, text: str) -> Service:
    """The service written `name` or `name.namespace`. Raises NotFound with the names there are."""
    for service in mesh.services:
        if text in (service.label, f"{service.name}.{service.namespace}"):
            return service
    raise unknown(mesh, text)


def unknown(mesh: Mesh, text: str) -> NotFound:
    """What to say of a name that is no service: the one that was probably meant, and those there are."""
    labels = [service.label for service in mesh.services]
    hint = meant(text, labels) if labels else ""
    known = ", ".join(labels[:10]) + (f" and {len(labels) - 10} more" if len(labels) > 10 else "")
    near = f"; {hint}" if hint.startswith("did you mean") else ""
    return NotFound(f"service {text!r} is unknown{near}; known: {known or 'none'}")


def in_kernel(plane: Dataplane, service: Service, port: Port) -> bool:
    """Whether the hooks know the port under every address of the service."""
    keys = [service_key(address, port.port, port.protocol) for address in service.addresses]
    return bool(keys) and all(plane.maps["services"].lookup(key) is not None for key in keys)


def services(plane: Dataplane, mesh: Mesh) -> list[dict[str, Any]]:
    counts = _counts(plane, mesh)
    rows = []
    for service in mesh.services:
        policy = mesh.policy_for(service)
        for port in service.ports:
            choice = choose(port, policy)
            ready = [
                e for e in service.endpoints if port.name in e.ports and e.state is EndpointState.READY and e.weight
            ]
            opened, closed = counts.get((service.id, port.name), (0, 0))
            rows.append(
                {
                    "service": service.label,
                    "address": ",".join(service.addresses),
                    "port": f"{port.port}/{port.protocol}",
                    "carrier": choice.carrier.value,
                    "why": choice.why if in_kernel(plane, service, port) else "not_in_kernel",
                    "endpoints": f"{len(ready)}/{sum(1 for e in service.endpoints if port.name in e.ports)}",
                    "open": max(0, opened - closed),
                    "connections": opened,
                    "source": service.source,
                }
            )
    return rows


def _counts(plane: Dataplane, mesh: Mesh) -> dict[tuple[tuple[str, str], str], tuple[int, int]]:
    """(service, port name) → (opened, closed), through the ids the kernel holds."""
    counted = plane.connections()
    found = {}
    for service_id, (service, port) in names(plane, mesh).items():
        direct, proxy, closed_direct, closed_proxy = counted.get(service_id, (0, 0, 0, 0))
        found[service.id, port.name] = (direct + proxy, closed_direct + closed_proxy)
    return found


def endpoints(
    plane: Dataplane, mesh: Mesh, only: Service | None, health: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """`health` is what the workers saw of each endpoint (`address:port` → outcome counts); empty with no agent."""
    held = {bytes(value[:18]) for _key, value in plane.maps["endpoints"].items()}
    rows = []
    for service in mesh.services:
        if only is not None and service.id != only.id:
            continue
        for endpoint in service.endpoints:
            for name, number in endpoint.ports.items():
                key = bytes(abi.EndpointValue(abi.pack_address(endpoint.address), number))[:18]
                host = f"[{endpoint.address}]:{number}" if ":" in endpoint.address else f"{endpoint.address}:{number}"
                seen = health.get(f"{service.label} {host}", {})
                rows.append(
                    {
                        "service": service.label,
                        "endpoint": host,
                        "port": name,
                        "state": endpoint.state.value if key in held else "not_in_kernel",
                        "weight": endpoint.weight,
                        "ok": seen.get("ok"),
                        "failed": seen.get("failed"),
                        "last_error": seen.get("last_error"),
                        "last_error_seconds": seen.get("last_error_seconds"),
                        "failing": seen.get("failing"),
                        "zone": endpoint.zone,
                        "source": endpoint.source,
                    }
                )
    return rows


def hosts(mesh: Mesh) -> str:
    """Lines for /etc/hosts: each address with the names by which people may call the service."""
    lines = []
    for service in mesh.services:
        names = dict.fromkeys([service.label, f"{service.name}.{service.namespace}"])
        lines += [f"{address}\t{' '.join(names)}" for address in service.addresses]
    return "\n".join(lines)
