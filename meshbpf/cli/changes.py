"""Two meshes → what is different, as rows for `meshbpf diff`. Pure.

Field names are those of the configuration. `affects` is who has to do something: `maps` (tables of the kernel), `proxy`
(the workers), `restart` (a running agent keeps its own until it is started again), `names` (only what is shown).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from meshbpf.carrier import Carrier, choose
from meshbpf.cli.output import counted
from meshbpf.model import DEFAULT_POLICY, Agent, Endpoint, Mesh, Service

Row = dict[str, Any]
UNSAID = ("name", "namespace", "service", "source")  # of a policy: which one it is, not what it does
STEERS_KERNEL = ("mode", "loadBalancer.simple", "onProxyDown")
RESTART = ("registries", "maps", "admin", "proxy")
LIVE = ("proxy.drain",)
BOTH = "maps, proxy"


def changes(old: Mesh, new: Mesh) -> list[Row]:
    """By service, then settings of the agent. Where something stands in a file is no difference."""
    rows: list[Row] = []
    before, after = ({service.id: service for service in mesh.services} for mesh in (old, new))
    for identity in sorted(before.keys() | after.keys(), key=lambda identity: identity[::-1]):
        was, is_ = before.get(identity), after.get(identity)
        if was is not None and is_ is not None:
            rows += _service(was, is_, BOTH if _governed(old, was) or _governed(new, is_) else "maps")
        elif is_ is not None:
            rows.append(_row("added", "service", is_.label, None, None, _summary(is_), _affects(new, is_)))
        elif was is not None:
            rows.append(_row("removed", "service", was.label, None, _summary(was), None, _affects(old, was)))
        if is_ is not None:
            policy = old.policy_for(was) if was is not None else DEFAULT_POLICY
            rows += _policy(is_.label, _flat(policy), _flat(new.policy_for(is_)))
    rows += _agent(old.agent, new.agent)
    return rows


def _row(change: str, kind: str, name: str, field: str | None, before: object, after: object, affects: str) -> Row:
    return {
        "change": change, "kind": kind, "name": name, "field": field, "before": before, "after": after,
        "affects": affects,
    }  # fmt: skip


def _governed(mesh: Mesh, service: Service) -> bool:
    policy = mesh.policy_for(service)
    return any(choose(port, policy).carrier is not Carrier.DIRECT for port in service.ports)


def _affects(mesh: Mesh, service: Service) -> str:
    return BOTH if _governed(mesh, service) else "maps"


def _summary(service: Service) -> str:
    ports = ", ".join(f"{port.port}/{port.protocol}" for port in service.ports)
    return f"{', '.join(service.addresses) or 'no address'}; {ports}; {counted(len(service.endpoints), 'endpoint')}"


def _service(was: Service, is_: Service, affects: str) -> Iterator[Row]:
    name = is_.label
    if was.addresses != is_.addresses:
        yield _row("changed", "service", name, "addresses", ", ".join(was.addresses), ", ".join(is_.addresses), affects)
    if was.labels != is_.labels:
        yield _row("changed", "service", name, "labels", _pairs(was.labels), _pairs(is_.labels), "names")
    had, has = ({port.name: f"{port.port}/{port.protocol}" for port in service.ports} for service in (was, is_))
    yield from _mapping("port", name, had, has, affects)
    before, after = ({_place(endpoint): endpoint for endpoint in service.endpoints} for service in (was, is_))
    for place in sorted(before.keys() | after.keys()):
        yield from _endpoint(name, place, before.get(place), after.get(place), affects)


def _mapping(kind: str, name: str, before: Mapping[str, Any], after: Mapping[str, Any], affects: str) -> Iterator[Row]:
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            change = "added" if key not in before else "removed" if key not in after else "changed"
            yield _row(change, kind, name, key, before.get(key), after.get(key), affects)


def _place(endpoint: Endpoint) -> str:
    """What makes it this endpoint and no other."""
    numbers = ",".join(dict.fromkeys(str(number) for _name, number in sorted(endpoint.ports.items())))
    return f"[{endpoint.address}]:{numbers}" if ":" in endpoint.address else f"{endpoint.address}:{numbers}"


def _endpoint(name: str, place: str, was: Endpoint | None, is_: Endpoint | None, affects: str) -> Iterator[Row]:
    if was is None or is_ is None:
        one = was or is_
        assert one is not None
        said = f"{one.state}, weight {one.weight}"
        change = "removed" if is_ is None else "added"
        yield _row(
            change, "endpoint", name, place, None if was is None else said, None if is_ is None else said, affects
        )
        return
    for field in ("weight", "state", "zone", "labels", "ports"):
        before, after = getattr(was, field), getattr(is_, field)
        if before != after:
            steers = affects if field in ("weight", "state", "ports") else "names"
            yield _row("changed", "endpoint", name, f"{place} {field}", _plain(before), _plain(after), steers)


def _policy(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Row]:
    for key, value in after.items():
        if key not in UNSAID and before[key] != value:
            affects = BOTH if key in STEERS_KERNEL else "proxy"
            yield _row("changed", "policy", name, key, before[key], value, affects)


def _agent(was: Agent, is_: Agent) -> Iterator[Row]:
    before, after = _flat(was), _flat(is_)
    for key in dict.fromkeys([*before, *after]):
        if before.get(key) != after.get(key):
            affects = "restart" if re.split(r"[.\[]", key)[0] in RESTART and key not in LIVE else "proxy"
            yield _row("changed", "agent", "Agent", key, before.get(key), after.get(key), affects)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A model value as its configuration has it: `loadBalancer.simple` → `ROUND_ROBIN`."""
    found: dict[str, Any] = {}
    for field in fields(value):
        name, one = prefix + _camel(field.name), getattr(value, field.name)
        if is_dataclass(one):
            found.update(_flat(one, f"{name}."))
        elif isinstance(one, tuple):
            for place, each in enumerate(one):
                found.update(_flat(each, f"{name}[{place}].") if is_dataclass(each) else {f"{name}[{place}]": each})
        else:
            found[name] = _plain(one)
    return found


def _plain(value: Any) -> Any:
    """What JSON can say, as people would."""
    if isinstance(value, Mapping):
        return _pairs(value)
    return value if isinstance(value, (bool, int, float)) or value is None else str(value)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(values.items()))


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)
