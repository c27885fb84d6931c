"""/metrics, /healthz and /readyz of a running agent: what was sent is what is counted."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from tests.support.machine import Machine, policy, service, until


def samples(machine: Machine) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{machine.admin_port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(machine: Machine, name: str, **labels: str) -> float:
    """The sum of the samples that have these labels."""
    return sum(
        number
        for (sample, pairs), number in samples(machine).items()
        if sample == name and set(labels.items()) <= set(pairs)
    )


def test_what_was_sent_is_counted(machine: Machine) -> None:
    port = machine.endpoint("a")
    machine.configure(
        service("orders", "127.96.0.10", [port]),
        service("ledger", "127.96.0.11", [port]),
        policy("ledger", mode="direct"),
    )
    machine.run_agent()
    for _ in range(5):
        machine.curl("http://127.96.0.10/")
    for _ in range(3):
        machine.curl("http://127.96.0.11/")
    until(lambda: value(machine, "meshbpf_requests_total", service="orders", code="200") == 5, "five requests counted")
    assert value(machine, "meshbpf_request_duration_seconds_count", service="orders") == 5
    assert value(machine, "meshbpf_upstream_requests_total", endpoint=f"127.0.0.1:{port}", outcome="ok") == 5
    assert value(machine, "meshbpf_connections_total", service="orders", carrier="proxy") == 5
    assert value(machine, "meshbpf_connections_total", service="ledger", carrier="direct") == 3
    assert value(machine, "meshbpf_kernel_verdicts_total", program="connect", reason="proxy") == 5
    assert value(machine, "meshbpf_kernel_verdicts_total", program="connect", reason="direct") == 3
    assert value(machine, "meshbpf_endpoints", service="orders", state="ready") == 1
    assert value(machine, "meshbpf_map_capacity", map="services") == 16384
    for path, body in (("healthz", b"ok\n"), ("readyz", b"ready\n")):
        with urllib.request.urlopen(f"http://127.0.0.1:{machine.admin_port}/{path}", timeout=5) as answer:
            assert answer.read() == body
