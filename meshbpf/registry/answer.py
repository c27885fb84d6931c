"""What another registry's answer says: its instances by service. Pure.

An answer is taken whole or not at all. An instance in it that breaks the rules is left out and named, since one bad
writer there must not stop everybody here. Fields that we do not know are of a later version and mean nothing to us.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from meshbpf.registry import instance as instances
from meshbpf.registry.instance import Instance, Refusal, Rules, ServiceId
from meshbpf.registry.leases import MAX_GENERATION, MAX_TOTAL

RULES = Rules()  # who may be called here is the merge's to judge, which knows this machine


@dataclass(frozen=True, slots=True)
class Said:
    """What the registry says of one service: `raw` as it came, `instances` oldest first, and who was `left_out` why."""

    raw: list[dict[str, Any]]
    instances: tuple[Instance, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    generation: int
    services: Mapping[ServiceId, Said]


def read(answer: Mapping[str, Any], known: Mapping[ServiceId, Said]) -> Answer | Refusal:
    """`known`: what the answer before said; a service of which this one says the same stays the same object."""
    try:
        return _read(answer, known)
    except RecursionError:  # JSON may be nested as deeply as our stack allows to parse it, which comparing it does not
        return Refusal("services", "is nested too deeply")


def _read(answer: Mapping[str, Any], known: Mapping[ServiceId, Said]) -> Answer | Refusal:
    generation, entries = answer.get("generation"), answer.get("services")
    if not isinstance(generation, int) or isinstance(generation, bool) or not 0 <= generation <= MAX_GENERATION:
        return Refusal("generation", f"must be a whole number, got {str(generation)[:40]}")
    if not isinstance(entries, list):
        return Refusal("services", "must be a list")
    found: dict[ServiceId, Said] = {}
    count = 0
    for index, entry in enumerate(entries):
        read = _service(entry, index)
        if isinstance(read, Refusal):
            return read
        service, raw = read
        if service in found:
            return Refusal(f"services[{index}]", f"{'.'.join(service)} is there twice")
        before = known.get(service)
        found[service] = before if before is not None and before.raw == raw else _said(service, raw)
        count += len(found[service].instances)
        if count > MAX_TOTAL:
            return Refusal("services", f"has more than the {MAX_TOTAL} instances that a registry holds")
    return Answer(generation, found)


def _service(entry: object, index: int) -> tuple[ServiceId, list[dict[str, Any]]] | Refusal:
    """Its identity, and its instances without what changes all the time and what we do not know."""
    where = f"services[{index}]"
    name = entry.get("service") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(name, str):
        return Refusal(where, "must name a service")
    service = instances.parse_service(name)
    if isinstance(service, Refusal):
        return Refusal(f"{where}.service", service.message)
    listed = entry.get("instances")
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        return Refusal(f"{where}.instances", "must be a list of objects")
    return service, [_stripped(one) for one in listed]


def _stripped(one: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in one.items() if key in instances.KEYS or key == "id"}
    ports = kept.get("ports")
    if isinstance(ports, dict):
        kept["ports"] = {name: _port(port) for name, port in ports.items()}
    return kept


def _port(port: object) -> object:
    if not isinstance(port, dict):
        return port
    return {key: value for key, value in port.items() if key in instances.PORT_KEYS}


def _said(service: ServiceId, raw: list[dict[str, Any]]) -> Said:
    found: dict[str, Instance] = {}
    left_out: list[str] = []
    for one in raw:
        id = one.get("id")
        body = {key: value for key, value in one.items() if key != "id"}
        name = id[: instances.MAX_ID] if isinstance(id, str) else "?"
        read = instances.parse(".".join(service), id, body, RULES) if isinstance(id, str) else Refusal("id", "no text")
        if isinstance(read, Instance) and read.id in found:
            read = Refusal("id", "is there twice")
        if isinstance(read, Refusal):
            left_out.append(f"{service[0]}.{service[1]}/{name!a}: {read.field}: {read.message}")
        else:
            found[read.id] = read
    return Said(raw, tuple(found.values()), tuple(left_out))
