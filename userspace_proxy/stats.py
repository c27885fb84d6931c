"""What one worker counts: plain dicts and lists keyed by prepared tuples, read out as rows for the agent.

On the hot path `record` finds one prepared cell and adds to it; everything that costs (checking labels against the
mesh, caps, ageing) happens the first time a combination is seen, or when the agent asks. No label takes a value that a
client can choose: a service or endpoint the mesh does not know is `unknown`, what exceeds MAX_SERIES is `other`.
A snapshot is JSON: family name → rows of [label…, value]; a histogram's value is its bucket counts and then its sum.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

from meshbpf.model import Mesh, Service
from meshbpf.reason import Reason
from meshbpf.record import Record

Snapshot = dict[str, list[list[Any]]]

BUCKETS_MS = (0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0)
MAX_SERIES = 10_000  # of requests_total and of upstream_requests_total, per worker
KEEP = 600.0  # seconds that a series outlives its service or endpoint
GAUGES = frozenset({"requests_in_flight", "connections_open"})  # these die with their worker
UNKNOWN, OTHER, NONE = "unknown", "other", "-"

_Key = tuple[str, str, str, str | None, int, str | None, str]


def endpoint_label(address: str, port: int) -> str:
    """How an endpoint is written in `upstream_host` and in the label `endpoint`."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def merge(snapshots: Iterable[Snapshot]) -> Snapshot:
    """The sum of the snapshots, row by row. Pure."""
    sums: dict[str, dict[tuple[Any, ...], Any]] = {}
    for snapshot in snapshots:
        for family, rows in snapshot.items():
            into = sums.setdefault(family, {})
            for *labels, value in rows:
                key = tuple(labels)
                have = into.get(key)
                if have is None:
                    into[key] = list(value) if isinstance(value, list) else value
                elif isinstance(value, list):
                    into[key] = [a + b for a, b in zip(have, value, strict=True)]
                else:
                    into[key] = have + value
    return {family: [[*key, value] for key, value in rows.items()] for family, rows in sums.items()}


class Retention:
    """Which services and endpoints of past meshes are gone for so long that their series end. The clock is given."""

    def __init__(self) -> None:
        self.services: dict[str, Service] = {}
        self._gone: dict[tuple[str, str], float] = {}  # (service, endpoint) → since; endpoint "" is the service itself

    def adopt(self, mesh: Mesh, now: float) -> None:
        old, self.services = self.services, {service.label: service for service in mesh.services}
        for label in old.keys() | self.services.keys():
            before, after = old.get(label), self.services.get(label)
            if before is after or (before is None and not self._gone):
                continue
            was, is_ = endpoints_of(before), endpoints_of(after)
            self._gone.update(((label, endpoint), now) for endpoint in was - is_)
            for endpoint in is_:
                self._gone.pop((label, endpoint), None)
            if after is None:
                self._gone[(label, "")] = now
            else:
                self._gone.pop((label, ""), None)
        # Twice KEEP: a snapshot taken just before the end may still arrive, and must not bring the series back.
        self._gone = {key: since for key, since in self._gone.items() if now - since < 2 * KEEP}

    def ended(self, service: str, endpoint: str, now: float) -> bool:
        """Is the endpoint's series (or with endpoint "" the service's) to be shown no more?"""
        since = self._gone.get((service, endpoint))
        return since is not None and now - since >= KEEP


def endpoints_of(service: Service | None) -> set[str]:
    """The labels of all endpoints of `service`."""
    if service is None:
        return set()
    return {endpoint_label(host.address, port) for host in service.endpoints for port in host.ports.values()}


class _Requests:
    """One combination of request labels: its count, and the sums of its service that it adds to."""

    __slots__ = ("count", "durations", "idle_since", "moved", "seen")

    def __init__(self, durations: list[float], moved: list[int]) -> None:
        self.count = 0
        self.durations = durations
        self.moved = moved
        self.seen = -1
        self.idle_since = 0.0


def _labels(key: _Key) -> tuple[str, ...]:
    direction, workload, service, route, code, flags, carrier = key
    return (direction, workload, service, route or NONE, str(code) if code else NONE, flags or NONE, carrier)


class Stats:
    """The counters of one worker. Nothing here blocks, allocates per request or fails on odd values."""

    def __init__(self) -> None:
        self._retention = Retention()
        self._requests: dict[_Key, _Requests] = {}
        self._durations: dict[tuple[str, str, str], list[float]] = {}
        self._bytes: dict[str, list[int]] = {}
        self._upstream: dict[tuple[str, str, str], int] = {}
        self._in_flight: dict[str, list[int]] = {}
        self._opened: dict[tuple[str, str, str, str], int] = {}
        self._open: dict[tuple[str, str], int] = {}
        self._retries: dict[tuple[str, str], int] = {}
        self._verdicts: dict[tuple[str, str], int] = {}
        self._lost: dict[str, int] = {}

    def adopt(self, mesh: Mesh, now: float) -> None:
        """Take the names of `mesh` as those that labels may have from now on."""
        self._retention.adopt(mesh, now)

    def record(self, record: Record) -> None:
        """Count one ended request or TCP connection."""
        service = record.service
        if record.protocol == "TCP":  # a connection is no request: `opened` and `closed` count it
            moved = self._moved(self._service(service))
        else:
            key = (
                record.direction, record.workload, service, record.route_name,
                record.response_code, record.response_flags, record.carrier,
            )  # fmt: skip
            cell = self._requests.get(key) or self._admit(key)
            cell.count += 1
            milliseconds = record.duration_ms
            durations = cell.durations
            durations[bisect_left(BUCKETS_MS, milliseconds)] += 1
            durations[-1] += milliseconds
            moved = cell.moved
        moved[0] += record.bytes_received
        moved[1] += record.bytes_sent
        if record.endpoint_outcome is not None and record.upstream_host is not None:
            host = (service, record.upstream_host, record.endpoint_outcome)
            if host in self._upstream:
                self._upstream[host] += 1
            else:
                self.attempt(*host)
        if record.attempts > 1:
            outcome = "success" if record.endpoint_outcome == "ok" and record.response_code < 500 else "failed"
            self._add(self._retries, (self._service(service), outcome), record.attempts - 1)
        if record.reason is not None:
            self._add(self._verdicts, (self._service(service), record.reason))

    def attempt(self, service: str, endpoint: str, outcome: str) -> None:
        """Count an attempt that another followed; `record` counts the last one."""
        key = (service, endpoint, outcome)
        if key not in self._upstream:
            known = self._service(service)
            if endpoint not in endpoints_of(self._retention.services.get(known)):
                endpoint = UNKNOWN
            key = (known, endpoint, outcome)
            if key not in self._upstream and len(self._upstream) >= MAX_SERIES:
                key = (OTHER, OTHER, OTHER)
        self._add(self._upstream, key)

    def in_flight(self, service: str) -> list[int]:
        """The cell that holds how many requests of `service` are on their way: keep it, add 1 and take 1 off [0]."""
        return self._in_flight.setdefault(self._service(service), [0])

    def opened(self, direction: str, workload: str, service: str, carrier: str) -> None:
        """Count a connection that the proxy took. Give the same service and carrier to `closed` at its end."""
        key = (direction, workload, self._service(service), carrier)
        if key not in self._opened and len(self._opened) >= MAX_SERIES:
            key = (direction, OTHER, OTHER, carrier)
        self._add(self._opened, key)
        self._add(self._open, (service, carrier))

    def closed(self, service: str, carrier: str) -> None:
        # By the name given at `opened`: a service may have left the mesh in between. The row goes with its last one.
        left = self._open.get((service, carrier), 0) - 1
        if left > 0:
            self._open[(service, carrier)] = left
        else:
            self._open.pop((service, carrier), None)

    def verdict(self, reason: Reason, service: str = "") -> None:
        """Count a verdict that has no record: a direct hit on the proxy port, a connection refused before it began."""
        self._add(self._verdicts, (self._service(service), reason.word))

    def lost(self, source: str, count: int) -> None:
        self._add(self._lost, source, count)

    def snapshot(self, now: float) -> Snapshot:
        """All rows; first drops the series of what has been gone for KEEP seconds."""
        self._age(now)
        open_: dict[tuple[str, str], int] = {}
        for (service, carrier), count in self._open.items():
            self._add(open_, (self._service(service), carrier), count)
        requests = merge(
            {"requests_total": [[*_labels(key), cell.count]]} for key, cell in self._requests.items()
        )  # two raw keys may have the same labels (no flags, or flags "-"), rows may not
        return {
            "requests_total": requests.get("requests_total", []),
            "request_duration_seconds": [
                [*key, [*cell[:-1], cell[-1] / 1000.0]] for key, cell in self._durations.items()
            ],
            "upstream_requests_total": [[*key, count] for key, count in self._upstream.items()],
            "requests_in_flight": [[service, cell[0]] for service, cell in self._in_flight.items()],
            "connections_total": [[*key, count] for key, count in self._opened.items()],
            "connections_open": [[*key, count] for key, count in open_.items()],
            "bytes_total": [
                [service, way, cell[side]]
                for service, cell in self._bytes.items()
                for side, way in enumerate(("received", "sent"))
            ],
            "retries_total": [[*key, count] for key, count in self._retries.items()],
            "proxy_verdicts_total": [[*key, count] for key, count in self._verdicts.items()],
            "events_lost_total": [[source, count] for source, count in self._lost.items()],
        }

    def _service(self, service: str) -> str:
        return service if service in self._retention.services else UNKNOWN

    def _moved(self, service: str) -> list[int]:
        return self._bytes.setdefault(service, [0, 0])

    def _admit(self, key: _Key) -> _Requests:
        """The cell for a raw key that has none; a raw key with a foreign value never gets one of its own."""
        direction, workload, service, route, code, flags, carrier = key
        known = self._service(service)
        key = (direction, workload, known, route, code if 100 <= code <= 599 else 0, flags, carrier)
        durations = self._durations.setdefault((direction, known, carrier), [0.0] * (len(BUCKETS_MS) + 2))
        moved = self._moved(known)
        cell = self._requests.get(key)
        if cell is None:
            if len(self._requests) >= MAX_SERIES:  # one more per service at most: its own sums stay right
                key = (direction, OTHER, known, OTHER, 0, OTHER, carrier)
            cell = self._requests.setdefault(key, _Requests(durations, moved))
        return cell

    def _age(self, now: float) -> None:
        ended = self._retention.ended
        crowded = len(self._requests) > MAX_SERIES // 2
        for key, cell in list(self._requests.items()):
            if cell.count != cell.seen:
                cell.seen, cell.idle_since = cell.count, now
            # Workloads come and go (a container each): when it gets crowded, those silent for KEEP make room.
            if (crowded and now - cell.idle_since >= KEEP) or ended(key[2], "", now):
                del self._requests[key]
        for upstream in [k for k in self._upstream if ended(k[0], k[1], now) or ended(k[0], "", now)]:
            del self._upstream[upstream]
        by_place: tuple[tuple[dict[Any, Any], int], ...] = (
            (self._durations, 1), (self._opened, 2), (self._retries, 0), (self._verdicts, 0),
        )  # fmt: skip
        for table, place in by_place:
            for row in [k for k in table if ended(k[place], "", now)]:
                del table[row]
        for service in [s for s in self._bytes if ended(s, "", now)]:
            del self._bytes[service]
        # The proxy holds these cells by reference; one that is not at rest is still somebody's.
        for service in [s for s, cell in self._in_flight.items() if cell[0] == 0 and ended(s, "", now)]:
            del self._in_flight[service]

    @staticmethod
    def _add(table: dict[Any, int], key: object, count: int = 1) -> None:
        table[key] = table.get(key, 0) + count
