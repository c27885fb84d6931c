"""Who calls what, as rows: `connections` and `edges`. Pure: from the kernel's counts and flows, from the sockets
themselves, and from what the agent has counted, as far as each is there. What nobody has counted is None, never 0.

Per service the kernel counts every connection. Who is behind one it notes for the proxy's sake (`flows`) and, for every
carrier, in the socket (`loader.sockets`). Nobody counts direct connections by workload as they come and go, because
nothing may be done for each of them: of those, an edge has the open ones only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loader import abi
from loader.dataplane import Dataplane
from loader.plan import service_names
from loader.sockets import Led
from meshbpf.carrier import Carrier
from meshbpf.model import Mesh, Port, Service
from meshbpf.schema.addresses import joined

CARRIERS = ((Carrier.DIRECT, 0), (Carrier.PROXY, 1))  # where each stands in a service's counts
Names = Mapping[int, tuple[Service, Port]]
Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Client:
    """One open connection and who is behind it. `endpoint` is where connect led it; empty where that was the proxy.
    `client` and `asked` are not known of UDP.
    """

    service_id: int
    carrier: Carrier
    cgroup: int
    pid: int
    netns: int
    client: str
    asked: str
    endpoint: str = ""


def names(plane: Dataplane, mesh: Mesh) -> Names:
    return service_names(dict(plane.maps["services"].items()), mesh)


def clients(plane: Dataplane, sockets: Sequence[Led] | None, cgroup_of: Callable[[int], int]) -> list[Client]:
    """Governed ones from `flows`, which needs no rights over other namespaces; direct ones of TCP from the sockets,
    None where those could not be asked; connected UDP sockets from their table, which knows a process and no cgroup:
    `cgroup_of` gives that, 0 when the process is gone.
    """
    found = [_flow(key, value) for key, value in plane.maps["flows"].items()]
    found += [_datagrams(value, cgroup_of) for _cookie, value in plane.maps["connected"].items()]
    found += [
        Client(
            led.service_id, Carrier.DIRECT, led.cgroup, led.pid, led.netns, joined(*led.client), joined(*led.asked),
            joined(*led.given),
        )
        for led in sockets or ()
        if led.carrier is abi.Carried.DIRECT
    ]  # fmt: skip
    return sorted(found, key=lambda one: (one.service_id, one.carrier, one.netns, one.client))


def _flow(raw_key: bytes, raw_value: bytes) -> Client:
    key, value = abi.FlowKey.from_buffer_copy(raw_key), abi.FlowValue.from_buffer_copy(raw_value)
    return Client(
        value.service_id, Carrier.PROXY, value.cgroup, value.pid, key.netns,
        joined(abi.unpack_address(key.address), key.port), joined(abi.unpack_address(value.asked), value.asked_port),
    )  # fmt: skip


def _datagrams(raw: bytes, cgroup_of: Callable[[int], int]) -> Client:
    value = abi.Connected.from_buffer_copy(raw)
    given = joined(abi.unpack_address(value.given), value.given_port)
    return Client(value.service_id, Carrier.DIRECT, cgroup_of(value.pid), value.pid, value.netns, "", "", given)


def connections(plane: Dataplane, known: Names, only: Service | None = None) -> Rows:
    """Per service port and carrier that has ever had one: how many are open; of UDP, connected sockets."""
    rows: Rows = []
    counts = plane.connections()
    for service_id, (service, port) in sorted(known.items(), key=lambda item: (item[1][0].label, item[1][1].port)):
        if only is not None and service.id != only.id:
            continue
        held = counts.get(service_id, (0, 0, 0, 0))
        for carrier, place in CARRIERS:
            if opened := held[place]:
                # Per-CPU counts are not read at one instant: a close may be seen before its open.
                still = max(0, opened - held[place + 2])
                rows.append({**_port(service, port), "carrier": carrier.value, "open": still, "opened": opened})
    return rows


def _port(service: Service, port: Port) -> dict[str, Any]:
    return {"service": service.label, "port": f"{port.port}/{port.protocol}"}


def client_rows(
    found: Iterable[Client], known: Names, label: Callable[[int], str], path: Callable[[int], str],
    only: Service | None = None,
) -> Rows:  # fmt: skip
    """`label` and `path` tell of a cgroup id who that is. What leads to a service that is gone is shown without."""
    rows = []
    for one in found:
        service, port = known.get(one.service_id, (None, None))
        if only is not None and (service is None or service.id != only.id):
            continue
        of = _port(service, port) if service is not None and port is not None else {"service": None, "port": None}
        rows.append(
            {
                **of, "carrier": one.carrier.value, "client": one.client or None,
                "workload": label(one.cgroup) if one.cgroup else None, "pid": one.pid or None,
                "asked": one.asked or None, "endpoint": one.endpoint or None, "cgroup": path(one.cgroup) or None,
                "cgroup_id": one.cgroup, "netns": one.netns or None,
            }
        )  # fmt: skip
    return rows


def edges(found: Iterable[dict[str, Any]], counts: Mapping[str, Any] | None, direct_known: bool) -> Rows:
    """Workload → service, by carrier. `found` are `client_rows`; `counts` what the agent counted, None without one;
    `direct_known` is whether the sockets could be asked.
    """
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}

    def row(workload: str, service: str, carrier: str) -> dict[str, Any]:
        nobody = dict.fromkeys(("connections", "requests", "failed", "success_percent"))
        still = 0 if carrier == Carrier.PROXY or direct_known else None
        fresh = {"workload": workload, "service": service, "carrier": carrier, "open": still, **nobody}
        return rows.setdefault((workload, service, carrier), fresh)

    for one in found:
        if one["service"] is not None and one["workload"] is not None:
            row(one["workload"], one["service"], one["carrier"])["open"] += 1
    said = counts or {}
    for _direction, workload, service, carrier, count in said.get("connections_total", ()):
        edge = row(workload, service, carrier)
        edge["connections"] = (edge["connections"] or 0) + int(count)
    for _direction, workload, service, _route, code, _flags, carrier, count in said.get("requests_total", ()):
        edge = row(workload, service, carrier)
        edge["requests"] = (edge["requests"] or 0) + int(count)
        # No code: the caller got no answer at all.
        edge["failed"] = (edge["failed"] or 0) + (int(count) if not code.isdigit() or int(code) >= 500 else 0)
    for edge in rows.values():
        if edge["requests"]:
            edge["success_percent"] = percent(edge["requests"] - edge["failed"], edge["requests"])
    return [rows[key] for key in sorted(rows)]


def percent(part: int, whole: int) -> float:
    """To a tenth, and never rounded up to all or down to nothing: one failure of a million is to be seen."""
    if not whole or part in (0, whole):
        return 100.0 if part else 0.0
    return round(min(max(100 * part / whole, 0.1), 99.9), 1)
