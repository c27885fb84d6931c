"""What a worker counts, under which labels, and when a series ends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from meshbpf.model import Endpoint, Mesh, Service
from meshbpf.reason import Reason
from meshbpf.record import Record
from userspace_proxy import stats as module
from userspace_proxy.stats import BUCKETS_MS, KEEP, Snapshot, Stats, merge


def mesh(**services: tuple[str, ...]) -> Mesh:
    return Mesh(
        services=tuple(
            Service(name, endpoints=tuple(Endpoint(address, {"http": 8080}) for address in addresses))
            for name, addresses in services.items()
        )
    )


def record(service: str = "orders", **fields: Any) -> Record:
    made = Record(service, 1_700_000_000.0, "web.service", "127.0.0.1:40000")
    made.protocol = "HTTP/1.1"
    made.response_code = 200
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def rows(snapshot: Snapshot, family: str) -> Mapping[tuple[Any, ...], Any]:
    return {tuple(labels): value for *labels, value in snapshot[family]}


@pytest.fixture
def stats() -> Stats:
    made = Stats()
    made.adopt(mesh(orders=("127.0.0.1", "127.0.0.2"), users=("::1",)), 0.0)
    return made


def test_a_request_is_counted_in_every_family(stats: Stats) -> None:
    stats.record(
        record(
            duration_ms=3.0, bytes_received=10, bytes_sent=20, upstream_host="127.0.0.1:8080", endpoint_outcome="ok",
            attempts=1, route_name="all",
        )
    )  # fmt: skip
    snapshot = stats.snapshot(1.0)
    labels = ("outbound", "web.service", "orders", "all", "200", "-", "proxy")
    assert rows(snapshot, "requests_total") == {labels: 1}
    assert rows(snapshot, "upstream_requests_total") == {("orders", "127.0.0.1:8080", "ok"): 1}
    assert rows(snapshot, "bytes_total") == {("orders", "received"): 10, ("orders", "sent"): 20}
    buckets = rows(snapshot, "request_duration_seconds")[("outbound", "orders", "proxy")]
    assert buckets[BUCKETS_MS.index(5.0)] == 1
    assert sum(buckets[:-1]) == 1
    assert buckets[-1] == pytest.approx(0.003)
    assert snapshot == json.loads(json.dumps(snapshot))


@pytest.mark.parametrize(
    ("milliseconds", "bucket"),
    [(0.0, 0), (0.5, 0), (0.51, 1), (10000.0, len(BUCKETS_MS) - 1), (10001.0, len(BUCKETS_MS))],
)
def test_a_bucket_holds_what_is_at_most_its_bound(stats: Stats, milliseconds: float, bucket: int) -> None:
    stats.record(record(duration_ms=milliseconds))
    assert stats.snapshot(1.0)["request_duration_seconds"][0][-1][bucket] == 1


def test_names_that_the_mesh_does_not_know_are_unknown(stats: Stats) -> None:
    for number in range(50):
        stats.record(record(f"evil-{number}", upstream_host=f"192.0.2.{number}:1", endpoint_outcome="ok"))
        stats.verdict(Reason.NO_SERVICE, f"evil-{number}")
        stats.opened("outbound", "web.service", f"evil-{number}", "proxy")
    snapshot = stats.snapshot(1.0)
    assert rows(snapshot, "requests_total") == {("outbound", "web.service", "unknown", "-", "200", "-", "proxy"): 50}
    assert rows(snapshot, "upstream_requests_total") == {("unknown", "unknown", "ok"): 50}
    assert rows(snapshot, "proxy_verdicts_total") == {("unknown", "no_service"): 50}
    assert rows(snapshot, "connections_total") == {("outbound", "web.service", "unknown", "proxy"): 50}
    assert rows(snapshot, "connections_open") == {("unknown", "proxy"): 50}


def test_an_impossible_status_makes_no_series_of_its_own(stats: Stats) -> None:
    for code in (0, 7, 999, 12345):
        stats.record(record(response_code=code))
    assert rows(stats.snapshot(1.0), "requests_total") == {
        ("outbound", "web.service", "orders", "-", "-", "-", "proxy"): 4
    }


def test_beyond_the_cap_everything_is_other_and_the_sums_stay_right(
    stats: Stats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SERIES", 10)
    for number in range(100):
        stats.record(record("orders", workload=f"w{number}", bytes_sent=1))
        stats.record(record("users", workload=f"w{number}", bytes_sent=2))
    snapshot = stats.snapshot(1.0)
    assert len(snapshot["requests_total"]) == 12
    assert sum(value for *_, value in snapshot["requests_total"]) == 200
    assert rows(snapshot, "bytes_total")[("orders", "sent")] == 100
    assert rows(snapshot, "bytes_total")[("users", "sent")] == 200


def test_silent_workloads_make_room_when_it_gets_crowded(stats: Stats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SERIES", 10)
    for number in range(9):
        stats.record(record(workload=f"w{number}"))
    stats.snapshot(0.0)
    stats.record(record(workload="w3"))
    stats.snapshot(KEEP / 2)
    assert [row[1] for row in stats.snapshot(KEEP + 1)["requests_total"]] == ["w3"]
    assert sum(stats.snapshot(KEEP + 2)["request_duration_seconds"][0][-1][:-1]) == 10  # aggregates never go back


def test_the_series_of_a_gone_endpoint_ends_after_ten_minutes(stats: Stats) -> None:
    for host in ("127.0.0.1:8080", "127.0.0.2:8080"):
        stats.record(record(upstream_host=host, endpoint_outcome="ok"))
    stats.adopt(mesh(orders=("127.0.0.1",)), 100.0)
    assert len(stats.snapshot(100.0 + KEEP - 1)["upstream_requests_total"]) == 2
    assert rows(stats.snapshot(100.0 + KEEP), "upstream_requests_total") == {("orders", "127.0.0.1:8080", "ok"): 1}


def test_an_endpoint_that_came_back_keeps_its_series(stats: Stats) -> None:
    stats.record(record(upstream_host="127.0.0.2:8080", endpoint_outcome="ok"))
    stats.adopt(mesh(orders=("127.0.0.1",)), 100.0)
    stats.adopt(mesh(orders=("127.0.0.1", "127.0.0.2")), 200.0)
    assert len(stats.snapshot(100.0 + 3 * KEEP)["upstream_requests_total"]) == 1


def test_all_series_of_a_gone_service_end(stats: Stats) -> None:
    stats.in_flight("orders")
    stats.opened("outbound", "web.service", "orders", "proxy")
    stats.closed("orders", "proxy")
    stats.record(record(reason="draining", attempts=2, upstream_host="127.0.0.1:8080", endpoint_outcome="ok"))
    stats.adopt(mesh(), 100.0)
    snapshot = stats.snapshot(100.0 + KEEP)
    assert {family for family, held in snapshot.items() if held} == set()


def test_connections_and_requests_in_flight_are_gauges(stats: Stats) -> None:
    cell = stats.in_flight("orders")
    cell[0] += 2
    stats.opened("outbound", "web.service", "orders", "proxy")
    stats.opened("outbound", "web.service", "orders", "proxy")
    stats.closed("orders", "proxy")
    snapshot = stats.snapshot(1.0)
    assert rows(snapshot, "requests_in_flight") == {("orders",): 2}
    assert rows(snapshot, "connections_total") == {("outbound", "web.service", "orders", "proxy"): 2}
    assert rows(snapshot, "connections_open") == {("orders", "proxy"): 1}


def test_a_connection_opened_before_its_service_left_still_closes(stats: Stats) -> None:
    stats.opened("outbound", "web.service", "orders", "proxy")
    stats.adopt(mesh(), 1.0)
    assert rows(stats.snapshot(2.0), "connections_open") == {("unknown", "proxy"): 1}
    stats.closed("orders", "proxy")
    assert stats.snapshot(3.0)["connections_open"] == []


def test_a_tcp_connection_is_no_request(stats: Stats) -> None:
    stats.record(record(protocol="TCP", response_code=0, bytes_sent=5, duration_ms=9e6, reason="idle_timeout"))
    snapshot = stats.snapshot(1.0)
    assert snapshot["requests_total"] == []
    assert snapshot["request_duration_seconds"] == []
    assert rows(snapshot, "bytes_total")[("orders", "sent")] == 5
    assert rows(snapshot, "proxy_verdicts_total") == {("orders", "idle_timeout"): 1}


def test_retries_are_counted_by_how_the_request_ended(stats: Stats) -> None:
    stats.record(record(attempts=3, endpoint_outcome="ok", upstream_host="127.0.0.1:8080"))
    stats.record(record(attempts=2, endpoint_outcome="connect_failed", upstream_host="127.0.0.1:8080"))
    stats.attempt("orders", "127.0.0.2:8080", "connect_failed")
    snapshot = stats.snapshot(1.0)
    assert rows(snapshot, "retries_total") == {("orders", "success"): 2, ("orders", "failed"): 1}
    assert rows(snapshot, "upstream_requests_total")[("orders", "127.0.0.2:8080", "connect_failed")] == 1


def test_direct_hits_and_lost_lines_are_counted(stats: Stats) -> None:
    stats.verdict(Reason.NO_ORIGIN)
    stats.lost("accesslog", 7)
    snapshot = stats.snapshot(1.0)
    assert rows(snapshot, "proxy_verdicts_total") == {("unknown", "no_origin"): 1}
    assert rows(snapshot, "events_lost_total") == {("accesslog",): 7}


def test_merge_adds_row_by_row_and_changes_nothing(stats: Stats) -> None:
    stats.record(record(duration_ms=3.0))
    stats.record(record("users"))
    one = stats.snapshot(1.0)
    copy = json.loads(json.dumps(one))
    both = merge([one, one, {"requests_total": [["inbound", "w", "orders", "-", "200", "-", "proxy", 4]]}])
    assert one == copy
    assert sum(value for *_, value in both["requests_total"]) == 8
    assert rows(both, "request_duration_seconds")[("outbound", "orders", "proxy")][BUCKETS_MS.index(5.0)] == 2
    assert merge([]) == {}
