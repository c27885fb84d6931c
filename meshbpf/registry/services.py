"""How registered instances become a service. Pure; the embedded registry and those who follow one see the same.

Each port name that an instance has is a port of the service, at the instance's `servicePort`. Where instances
contradict each other the oldest is right, so that a newcomer cannot move a port under its callers. Addresses are left
out: the runtime gives them from the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from meshbpf.model import Endpoint, Port, Protocol, Service
from meshbpf.registry.instance import Instance, ServiceId


def service_of(identity: ServiceId, instances: Sequence[Instance], source: str) -> Service:
    """`instances`: oldest first. The endpoints are sorted by instance id."""
    ports: dict[str, Port] = {}
    taken: set[tuple[int, bool]] = set()
    for instance in instances:
        for port_name, port in instance.ports.items():
            number = (port.service_port, port.protocol is Protocol.UDP)
            if port_name not in ports and number not in taken:
                ports[port_name] = Port(port_name, port.service_port, port.protocol)
                taken.add(number)
    endpoints = tuple(
        Endpoint(
            address=instance.address,
            ports=MappingProxyType({port_name: port.port for port_name, port in instance.ports.items()}),
            weight=instance.weight,
            zone=instance.zone,
            labels=instance.labels,
            source=source,
        )
        for instance in sorted(instances, key=lambda instance: instance.id)
    )
    in_order = tuple(sorted(ports.values(), key=lambda port: (port.port, port.name)))
    return Service(*identity, ports=in_order, endpoints=endpoints, source=source)
