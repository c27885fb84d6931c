"""The metrics page: names and labels of the contract, valid for Prometheus, and sums that survive their workers."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from meshbpf.model import Endpoint, Mesh, Service
from meshbpf.reason import Reason
from meshbpf.record import Record
from meshbpf.telemetry import ATTEMPTS, FROM_WORKERS, Facts, Totals, render
from userspace_proxy.stats import KEEP, Snapshot, Stats

BOTH = Mesh(
    services=(
        Service(
            "orders", endpoints=(Endpoint("127.0.0.1", {"http": 8080}), Endpoint("127.0.0.2", {"http": 8080}))
        ),
    )
)  # fmt: skip
ONE = Mesh(services=(Service("orders", endpoints=(Endpoint("127.0.0.1", {"http": 8080}),)),))

CONTRACT = {
    "meshbpf_requests_total": {"direction", "workload", "service", "route", "code", "flags", "carrier"},
    "meshbpf_request_duration_seconds": {"direction", "service", "carrier"},
    "meshbpf_requests_in_flight": {"service"},
    "meshbpf_upstream_requests_total": {"service", "endpoint", "outcome"},
    "meshbpf_connections_total": {"direction", "workload", "service", "carrier"},
    "meshbpf_connections_open": {"service", "carrier"},
    "meshbpf_bytes_total": {"service", "direction"},
    "meshbpf_kernel_verdicts_total": {"program", "reason"},
    "meshbpf_endpoints": {"service", "state"},
    "meshbpf_retries_total": {"service", "outcome"},
    "meshbpf_mesh_generation": set(),
    "meshbpf_mesh_age_seconds": {"source"},
    "meshbpf_map_entries": {"map"},
    "meshbpf_map_capacity": {"map"},
    "meshbpf_events_lost_total": {"source"},
    "meshbpf_build_info": {"version", "kernel"},
    "meshbpf_proxy_verdicts_total": {"service", "reason"},
}


def counted(host: str = "127.0.0.1:8080", mesh: Mesh = BOTH) -> Snapshot:
    stats = Stats()
    stats.adopt(mesh, 0.0)
    record = Record("orders", 1.0, 'evil"\n\\', "127.0.0.1:1")
    record.response_code, record.duration_ms, record.attempts = 200, 3.0, 2
    record.upstream_host, record.endpoint_outcome = host, "ok"
    stats.record(record)
    stats.in_flight("orders")[0] = 1
    stats.opened("outbound", "web.service", "orders", "proxy")
    stats.verdict(Reason.NO_ORIGIN)
    stats.lost("accesslog", 3)
    return stats.snapshot(0.0)


def facts(stats: Snapshot) -> Facts:
    return Facts(
        stats=stats,
        verdicts={("connect", "direct"): 7},
        connections={("orders", "direct"): (5, 2), ("orders", "proxy"): (99, 0), ("users", "direct"): (1, 2)},
        maps={"services": (1, 16384)},
        endpoints={("orders", "ready"): 2},
        ages={"file": 1.5},
        generation=4,
        events_lost={"ring": 2},
        build={"version": "0.1.0", "kernel": "6.18"},
    )


def samples(page: bytes) -> dict[str, dict[tuple[str, ...], float]]:
    """Sample name → label values in the order of their names → value."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in parse_text(page.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(v for _, v in sorted(sample.labels.items()))] = sample.value
    return found


def openmetrics(page: bytes) -> list[Metric]:
    return list(parse_openmetrics(page.decode()))  # type: ignore[no-untyped-call]


def test_names_and_labels_are_the_contract() -> None:
    page, content_type = render(facts(counted()))
    assert content_type.startswith("text/plain")
    seen: dict[str, set[str]] = {}
    for family in parse_text(page.decode()):
        for sample in family.samples:
            name = sample.name
            for ending in ("_bucket", "_sum", "_count"):
                name = name.removesuffix(ending)
            seen.setdefault(name, set()).update(set(sample.labels) - {"le"})
    assert seen == CONTRACT


def test_every_family_of_a_worker_has_its_help_and_labels() -> None:
    assert set(Stats().snapshot(0.0)) == set(FROM_WORKERS)
    for family, rows in counted().items():
        assert {len(row) - 1 for row in rows} <= {len(FROM_WORKERS[family][1])}


def test_values_arrive_as_counted() -> None:
    found = samples(render(facts(counted()))[0])
    assert found["meshbpf_requests_total"] == {
        ("proxy", "200", "outbound", "-", "-", "orders", 'evil"\n\\'): 1.0
    }  # fmt: skip
    buckets = {labels[2]: value for labels, value in found["meshbpf_request_duration_seconds_bucket"].items()}
    assert (buckets["0.0025"], buckets["0.005"], buckets["10"], buckets["+Inf"]) == (0, 1, 1, 1)
    assert list(found["meshbpf_request_duration_seconds_sum"].values()) == [pytest.approx(0.003)]
    assert found["meshbpf_events_lost_total"] == {("accesslog",): 3.0, ("ring",): 2.0}
    assert found["meshbpf_kernel_verdicts_total"] == {("connect", "direct"): 7.0}
    assert found["meshbpf_mesh_generation"] == {(): 4.0}
    assert found["meshbpf_build_info"] == {("6.18", "0.1.0"): 1.0}


def test_the_kernel_adds_what_the_proxy_does_not_see_and_nothing_twice() -> None:
    found = samples(render(facts(counted()))[0])
    assert found["meshbpf_connections_total"] == {
        ("proxy", "outbound", "orders", "web.service"): 1.0,
        ("direct", "outbound", "orders", "unknown"): 5.0,
        ("direct", "outbound", "users", "unknown"): 1.0,
    }
    assert found["meshbpf_connections_open"] == {
        ("proxy", "orders"): 1.0, ("direct", "orders"): 3.0, ("direct", "users"): 0.0
    }  # fmt: skip


def test_openmetrics_when_asked_for() -> None:
    page, content_type = render(facts(counted()), "application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert content_type.startswith("application/openmetrics-text")
    families = {family.name: family.type for family in openmetrics(page)}
    assert families["meshbpf_requests"] == "counter"
    assert families["meshbpf_request_duration_seconds"] == "histogram"


def test_an_empty_mesh_has_a_valid_page() -> None:
    page, _ = render(Facts())
    assert openmetrics(render(Facts(), "application/openmetrics-text")[0])
    assert b"meshbpf_mesh_generation 0.0" in page


@pytest.mark.parametrize("full", [True, False])
def test_promtool_has_nothing_to_say(full: bool) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is missing: apt-get install --no-install-recommends prometheus")
    page, _ = render(facts(counted()) if full else Facts())
    done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, check=False, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_the_totals_of_a_dead_worker_stay_and_its_gauges_go() -> None:
    totals = Totals()
    totals.adopt(BOTH, 0.0)
    totals.update("1:100", counted(), 0.0)
    totals.update("2:200", counted(), 0.0)
    totals.ended("1:100")
    totals.update("1:101", counted(), 0.0)
    totals.ended("unheard of")
    merged = totals.merged(1.0)
    assert [row[-1] for row in merged["requests_total"]] == [3]
    assert merged["requests_in_flight"] == [["orders", 2]]
    assert merged["connections_open"] == [["orders", "proxy", 2]]
    assert totals.merged(1.0) == merged  # reading changes nothing


def test_a_worker_that_reports_again_replaces_what_it_reported() -> None:
    totals = Totals()
    totals.adopt(BOTH, 0.0)
    for _ in range(3):
        totals.update("1:100", counted(), 0.0)
    assert [row[-1] for row in totals.merged(1.0)["requests_total"]] == [1]


def test_the_series_of_a_gone_endpoint_ends_after_ten_minutes_also_for_dead_workers() -> None:
    totals = Totals()
    totals.adopt(BOTH, 0.0)
    for host in ("127.0.0.1:8080", "127.0.0.2:8080"):
        totals.update(host, counted(host), 0.0)
        totals.ended(host)
    totals.adopt(ONE, 100.0)
    assert len(totals.merged(100.0 + KEEP - 1)["upstream_requests_total"]) == 2
    assert totals.merged(100.0 + KEEP)["upstream_requests_total"] == [["orders", "127.0.0.1:8080", "ok", 1]]
    totals.adopt(Mesh(), 2000.0)
    assert totals.merged(2000.0 + KEEP)["requests_total"] == []


def tried(ok: int, refused: int, reset: int = 0) -> Snapshot:
    counts = {"ok": ok, "connect_failed": refused, "upstream_reset": reset}
    return {ATTEMPTS: [["orders", "127.0.0.1:8080", outcome, count] for outcome, count in counts.items() if count]}


def test_how_an_endpoint_failed_last_and_how_long_ago() -> None:
    totals = Totals()
    totals.adopt(ONE, 0.0)
    seen = []
    for second, report in enumerate((tried(5, 0), tried(5, 2), tried(5, 2, 1), tried(6, 2, 1), tried(6, 2, 1)), 1):
        totals.update("1:100", report, float(second))
        seen.append(totals.endpoints(second + 0.5)["orders 127.0.0.1:8080"])
    assert [(one["ok"], one["failed"], one["last_error"], one["last_error_seconds"]) for one in seen] == [
        (5, 0, None, None), (5, 2, "connect_failed", 0.5), (5, 3, "upstream_reset", 0.5), (6, 3, "upstream_reset", 1.5),
        (6, 3, "upstream_reset", 2.5),
    ]  # fmt: skip
    assert [one["failing"] for one in seen] == [False, True, True, False, False]


def test_an_endpoint_that_fails_now_and_then_is_failing() -> None:
    totals = Totals()
    totals.adopt(ONE, 0.0)
    totals.update("1:100", tried(5, 5), 1.0)
    totals.update("2:200", tried(9, 0), 1.2)
    assert not totals.endpoints(2.0)["orders 127.0.0.1:8080"]["failing"]
    totals.update("1:100", tried(9, 6), 2.0)
    assert totals.endpoints(3.0)["orders 127.0.0.1:8080"] == {
        "ok": 18, "failed": 6, "last_error": "connect_failed", "last_error_seconds": 1.0, "failing": True,
    }  # fmt: skip


def test_the_failures_of_an_endpoint_that_is_long_gone_are_forgotten() -> None:
    totals = Totals()
    totals.adopt(ONE, 0.0)
    totals.update("1:100", tried(0, 5), 1.0)
    totals.ended("1:100")
    totals.adopt(Mesh(), 2.0)
    assert totals.endpoints(2.0 + KEEP) == {}
    totals.adopt(ONE, 3.0 + KEEP)
    totals.update("1:101", tried(1, 0), 4.0 + KEEP)
    assert totals.endpoints(5.0 + KEEP)["orders 127.0.0.1:8080"]["last_error"] is None


def test_failures_that_nobody_asks_about_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshbpf.telemetry.MAX_SERIES", 2)
    totals = Totals()
    totals.adopt(ONE, 0.0)
    for second, service in enumerate(("a", "b", "a", "c", "d"), 1):
        totals.update(second, {ATTEMPTS: [[service, "127.0.0.1:1", "connect_failed", 1]]}, float(second))
    seen = totals.endpoints(9.0)
    assert [name[0] for name, one in seen.items() if one["failing"]] == ["c", "d"]


def test_what_a_process_counted_before_us_did_not_just_happen() -> None:
    totals = Totals()
    orders = Service("orders", endpoints=(Endpoint("127.0.0.1", {"http": 8081}),))
    totals.adopt(Mesh(services=(orders,)), 0.0)
    host = "127.0.0.1:8081"

    def said(failed: int, ok: int, open_: int) -> Snapshot:
        attempts: list[list[object]] = [["orders", host, "connect_failed", failed], ["orders", host, "ok", ok]]
        return {"upstream_requests_total": attempts, "requests_in_flight": [["orders", open_]]}

    totals.update("orphan-7", said(1, 1_000_000, 3), 10.0, earlier=True)
    first = totals.endpoints(10.0)[f"orders {host}"]
    assert (first["ok"], first["failed"], first["failing"], first["last_error"]) == (0, 0, False, None)
    assert totals.merged(10.0)["requests_in_flight"] == [["orders", 3]]
    totals.update("orphan-7", said(2, 1_000_005, 3), 11.0, earlier=True)
    then = totals.endpoints(11.0)[f"orders {host}"]
    assert (then["ok"], then["failed"], then["failing"]) == (5, 1, True)
