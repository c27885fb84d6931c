"""Many services with ten endpoints each: as model values, as a file, and by what a connect() would find."""

from __future__ import annotations

import json

from meshbpf.model import Endpoint, Port, Protocol, Service

ENDPOINTS = 10


def address(number: int) -> str:
    """The service's, in the test pool."""
    return f"127.96.{number >> 8}.{number & 255}"


def host(number: int) -> str:
    """The endpoint's; nobody calls it."""
    return f"127.{97 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"


def services(count: int, protocol: Protocol = Protocol.TCP) -> tuple[Service, ...]:
    ports = (Port("main", 80, protocol),)
    return tuple(
        Service(
            f"s{n:05d}",
            addresses=(address(n + 1),),
            ports=ports,
            endpoints=tuple(Endpoint(host(n * ENDPOINTS + e), {"main": 8080}) for e in range(ENDPOINTS)),
        )
        for n in range(count)
    )


def as_json(service: Service) -> str:
    """A document."""
    return json.dumps(
        {
            "apiVersion": "meshbpf.io/v1",
            "kind": "Service",
            "metadata": {"name": service.name},
            "spec": {
                "addresses": list(service.addresses),
                "ports": [{"name": p.name, "port": p.port, "protocol": str(p.protocol)} for p in service.ports],
                "endpoints": [{"address": e.address, "ports": dict(e.ports)} for e in service.endpoints],
            },
        }
    )


def as_yaml(service: Service) -> str:
    """The same as people write it."""
    lines = [
        "apiVersion: meshbpf.io/v1",
        "kind: Service",
        "metadata:",
        f"  name: {service.name}",
        "spec:",
        f"  addresses: [{', '.join(service.addresses)}]",
        "  ports:",
        *(f"    - {{name: {p.name}, port: {p.port}, protocol: {p.protocol}}}" for p in service.ports),
        "  endpoints:",
    ]
    for endpoint in service.endpoints:
        ports = ", ".join(f"{name}: {number}" for name, number in endpoint.ports.items())
        lines.append(f"    - {{address: {endpoint.address}, ports: {{{ports}}}}}")
    return "\n".join(lines)


def stream(documents: list[str]) -> str:
    """One file of many documents."""
    return "".join(f"---\n{document}\n" for document in documents)
