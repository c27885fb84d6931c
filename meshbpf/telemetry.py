"""Turns what workers and kernel counted into the text of /metrics: names, help and labels; nothing is counted here.

`Totals` keeps the sums of dead workers, so that a counter never goes back; `render` is pure. Names are the contract
(INTERFACE "Logs, metrics, traces"); `proxy_verdicts` is for the proxy's reasons what `kernel_verdicts` is for the
kernel's.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from meshbpf.model import Mesh
from userspace_proxy.stats import BUCKETS_MS, GAUGES, MAX_SERIES, UNKNOWN, Retention, Snapshot, merge

PREFIX = "meshbpf_"
ATTEMPTS = "upstream_requests_total"

# Families of a worker's snapshot, whose rows already have their labels in this order.
FROM_WORKERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "requests_total": (
        "Requests that ended, by who called which service and what came of it.",
        ("direction", "workload", "service", "route", "code", "flags", "carrier"),
    ),
    "request_duration_seconds": (
        "Time from the first byte of a request to the last byte of its response.",
        ("direction", "service", "carrier"),
    ),
    "upstream_requests_total": (
        "Attempts at an endpoint, by what came of them.",
        ("service", "endpoint", "outcome"),
    ),
    "requests_in_flight": ("Requests that are under way.", ("service",)),
    "connections_total": (
        "Connections of applications; who opened a direct one is not known.",
        ("direction", "workload", "service", "carrier"),
    ),
    "connections_open": ("Connections of applications that are open.", ("service", "carrier")),
    "bytes_total": (
        "Bytes of bodies and TCP streams, received from and sent to applications.",
        ("service", "direction"),
    ),
    "retries_total": ("Further attempts after a first one failed, by how the request ended.", ("service", "outcome")),
    "proxy_verdicts_total": (
        "Connections and requests that the proxy ended itself, by reason.",
        ("service", "reason"),
    ),
    "events_lost_total": ("Events and log lines that had to be dropped.", ("source",)),
}


@dataclass(frozen=True, slots=True)
class Facts:
    """All that one scrape shows. `stats` is Totals.merged; the rest the agent reads at that moment."""

    stats: Snapshot = field(default_factory=dict)
    verdicts: Mapping[tuple[str, str], int] = field(default_factory=dict)  # (program, reason)
    connections: Mapping[tuple[str, str], tuple[int, int]] = field(default_factory=dict)  # (service, carrier): kernel's
    maps: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # map → (entries, capacity)
    endpoints: Mapping[tuple[str, str], int] = field(default_factory=dict)  # (service, state)
    ages: Mapping[str, float] = field(default_factory=dict)  # source → seconds since its last good answer
    generation: int = 0
    events_lost: Mapping[str, int] = field(default_factory=dict)  # by the agent and the kernel; workers' are in stats
    build: Mapping[str, str] = field(default_factory=dict)  # version, kernel, …


def _since(snapshot: Snapshot, begun: Snapshot) -> Snapshot:
    """What has been counted since `begun`; gauges as they are."""
    found: Snapshot = {}
    for family, rows in snapshot.items():
        if family in GAUGES:
            found[family] = rows
            continue
        old = {tuple(labels): value for *labels, value in begun.get(family, ())}
        found[family] = [[*labels, _less(value, old.get(tuple(labels)))] for *labels, value in rows]
    return found


def _less(value: Any, old: Any) -> Any:
    if old is None:
        return value
    return [a - b for a, b in zip(value, old, strict=True)] if isinstance(value, list) else value - old


class Totals:
    """The sum over all workers that ever were. An incarnation is one process: a restarted worker is another one."""

    def __init__(self) -> None:
        self._base: Snapshot = {}
        self._latest: dict[Hashable, Snapshot] = {}
        self._begun: dict[Hashable, Snapshot] = {}  # what counted before us
        self._retention = Retention()
        self._failed: dict[tuple[str, str], tuple[float, str]] = {}  # (service, endpoint) → when last, and how
        self._served: dict[tuple[str, str], float] = {}  # of these, when last

    def adopt(self, mesh: Mesh, now: float) -> None:
        self._retention.adopt(mesh, now)

    def update(self, incarnation: Hashable, snapshot: Snapshot, now: float, *, earlier: bool = False) -> None:
        """`earlier`: a process that an agent before us began. What it has counted until its first word here did not
        just happen, and whoever scrapes had it from that agent: it is taken off.
        """
        if earlier:
            snapshot = _since(snapshot, self._begun.setdefault(incarnation, snapshot))
        before = {tuple(row[:-1]): row[-1] for row in self._latest.get(incarnation, {}).get(ATTEMPTS, ())}
        for service, endpoint, outcome, count in snapshot.get(ATTEMPTS, ()):
            if count == before.get((service, endpoint, outcome), 0):
                continue
            if outcome != "ok":
                self._fails((service, endpoint), now, outcome)
            elif (service, endpoint) in self._failed:
                self._served[service, endpoint] = now
        self._latest[incarnation] = snapshot

    def _fails(self, key: tuple[str, str], now: float, outcome: str) -> None:
        self._failed.pop(key, None)  # the one that failed last stands at the end
        self._failed[key] = now, outcome
        if len(self._failed) > MAX_SERIES:  # endpoints that came and went while nobody asked
            self._forget(next(iter(self._failed)))

    def _forget(self, key: tuple[str, str]) -> None:
        del self._failed[key]
        self._served.pop(key, None)

    def ended(self, incarnation: Hashable) -> None:
        """The process is dead: keep its counters, forget its gauges. To be called after its last update."""
        last = self._latest.pop(incarnation, {})
        self._begun.pop(incarnation, None)
        counters = {family: rows for family, rows in last.items() if family not in GAUGES}
        self._base = merge([self._base, counters])

    def merged(self, now: float) -> Snapshot:
        """The sums, without the series of what left the mesh long ago."""
        self._base = self._current(self._base, now)
        return self._current(merge([self._base, *self._latest.values()]), now)

    def endpoints(self, now: float) -> dict[str, dict[str, Any]]:
        """`service endpoint` → how often it served and failed, how it failed last and how long ago, and whether it is
        `failing`: when it was called last (a worker reports each second) an attempt failed.
        """
        found: dict[str, dict[str, Any]] = {}
        fresh = {"ok": 0, "failed": 0, "last_error": None, "last_error_seconds": None, "failing": False}
        for service, endpoint, outcome, count in self.merged(now).get(ATTEMPTS, []):
            seen = found.setdefault(f"{service} {endpoint}", dict(fresh))
            seen["ok" if outcome == "ok" else "failed"] += count
        for key in [key for key in self._failed if " ".join(key) not in found]:
            self._forget(key)
        for key, (failed_at, outcome) in self._failed.items():
            failing = failed_at >= self._served.get(key, failed_at)
            last = {"last_error": outcome, "last_error_seconds": round(now - failed_at, 1), "failing": failing}
            found[" ".join(key)] |= last
        return found

    def _current(self, snapshot: Snapshot, now: float) -> Snapshot:
        kept: Snapshot = {}
        for family, rows in snapshot.items():
            labels = FROM_WORKERS[family][1] if family in FROM_WORKERS else ()
            if "service" not in labels:
                kept[family] = rows
                continue
            service = labels.index("service")
            endpoint = labels.index("endpoint") if "endpoint" in labels else None
            ended = self._retention.ended
            kept[family] = [
                row
                for row in rows
                if not ended(row[service], "", now)
                and not (endpoint is not None and ended(row[service], row[endpoint], now))
            ]
        return kept


def render(facts: Facts, accept: str = "") -> tuple[bytes, str]:
    """The page and its content type: Prometheus text, or OpenMetrics when `accept` asks for it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(facts))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Collector(Collector):
    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    def collect(self) -> Iterator[Metric]:
        facts = self._facts
        stats = _with_kernel(facts)
        for family, (text, labels) in FROM_WORKERS.items():
            rows = stats.get(family, [])
            if family == "request_duration_seconds":
                yield _histogram(family, text, labels, rows)
            elif family in GAUGES:
                yield _gauge(family, text, labels, rows)
            else:
                yield _counter(family, text, labels, rows)
        yield _counter(
            "kernel_verdicts_total", "Verdicts of the kernel programs, by reason.", ("program", "reason"),
            ((*key, count) for key, count in facts.verdicts.items()),
        )  # fmt: skip
        yield _gauge(
            "endpoints", "Endpoints of the current mesh, by state.", ("service", "state"),
            ((*key, count) for key, count in facts.endpoints.items()),
        )  # fmt: skip
        yield _gauge("mesh_generation", "Generation of the mesh that is in force.", (), [(facts.generation,)])
        yield _gauge(
            "mesh_age_seconds", "Time since a source gave its last good answer.", ("source",), facts.ages.items()
        )
        yield _gauge(
            "map_entries", "Entries of a kernel map.", ("map",),
            ((name, entries) for name, (entries, _) in facts.maps.items()),
        )  # fmt: skip
        yield _gauge(
            "map_capacity", "Entries that a kernel map can hold.", ("map",),
            ((name, capacity) for name, (_, capacity) in facts.maps.items()),
        )  # fmt: skip
        yield _gauge("build_info", "What is running.", tuple(facts.build), [(*facts.build.values(), 1)])


def _with_kernel(facts: Facts) -> Snapshot:
    """The workers' rows plus what only the kernel sees. Its `proxy` connections are left out: the workers count those,
    and know the workload."""
    kernel: Snapshot = {
        "connections_total": [],
        "connections_open": [],
        "events_lost_total": [[source, count] for source, count in facts.events_lost.items()],
    }
    for (service, carrier), (opened, closed) in facts.connections.items():
        if carrier != "proxy":
            kernel["connections_total"].append(["outbound", UNKNOWN, service, carrier, opened])
            # Per-CPU counters are not read at one instant: a close may be seen before its open.
            kernel["connections_open"].append([service, carrier, max(0, opened - closed)])
    return merge([facts.stats, kernel])


_Rows = Iterable[Iterable[object]]


def _counter(name: str, text: str, labels: tuple[str, ...], rows: _Rows) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for *values, count in rows:
        assert isinstance(count, (int, float))
        family.add_metric([str(value) for value in values], count)
    return family


def _gauge(name: str, text: str, labels: tuple[str, ...], rows: _Rows) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for *values, level in rows:
        assert isinstance(level, (int, float))
        family.add_metric([str(value) for value in values], level)
    return family


def _histogram(name: str, text: str, labels: tuple[str, ...], rows: _Rows) -> Metric:
    family = HistogramMetricFamily(PREFIX + name, text, labels=labels)
    bounds = [*(f"{bound / 1000.0:g}" for bound in BUCKETS_MS), "+Inf"]
    for *values, cell in rows:
        assert isinstance(cell, list)
        *counts, total = cell
        below, buckets = 0.0, []
        for bound, count in zip(bounds, counts, strict=True):
            below += count
            buckets.append((bound, below))
        family.add_metric([str(value) for value in values], buckets, total)
    return family
