"""deploy/prometheus and deploy/grafana speak only of what /metrics has: metrics, labels and known values."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from loader import abi
from meshbpf.carrier import Carrier
from meshbpf.model import EndpointState
from meshbpf.reason import Reason
from meshbpf.runtime.metrics import TABLES
from meshbpf.telemetry import FROM_WORKERS, PREFIX, Facts, render
from tests.support.machine import ROOT

RULES, RULES_TEST = ROOT / "deploy/prometheus/rules.yaml", ROOT / "deploy/prometheus/rules_test.yaml"
CUSTOM = ROOT / "deploy/prometheus/prometheusrule.yaml"
DASHBOARD = ROOT / "deploy/grafana/meshbpf.json"
OF_PROMETHEUS = {"job", "instance"}  # what the scrape adds
SELECTOR = re.compile(r"(meshbpf_\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(=~|!=|!~|=)\s*"([^"]*)"')
GROUPING = re.compile(r"(?:by|on|group_left)\s*\(([^)]*)\)")
LEGEND = re.compile(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}")
VALUES = {
    "reason": {reason.word for reason in Reason},
    "program": {program.name.lower() for program in abi.Program},
    "carrier": {carrier.value for carrier in Carrier},
    "state": {state.value for state in EndpointState},
    "map": set(TABLES),
}


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is missing: vagrant/provision.sh test")
    return subprocess.run([found, *arguments], capture_output=True, text=True, check=False, timeout=60)


def metrics() -> dict[str, set[str]]:
    """Every sample name of a page of ours → its labels."""
    rows = {
        name: [[*("x" for _ in labels), [1] * 16 if name.endswith("seconds") else 1]]
        for name, (_text, labels) in FROM_WORKERS.items()
    }
    one, two = {("a", "b"): 1}, {("a", "b"): (1, 1)}
    build = {"version": "0", "kernel": "6", "layout": "x"}
    facts = Facts(rows, one, two, {"a": (1, 1)}, one, {"a": 1.0}, 1, {"a": 1}, build)
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(render(facts)[0].decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    assert all(f"{PREFIX}{name}" in " ".join(found) for name in FROM_WORKERS)
    return found


def alerts() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]
    return found


def queries() -> Iterator[tuple[str, str, str]]:
    """(where, expression, text that names labels)."""
    for rule in alerts():
        yield rule["alert"], rule["expr"], " ".join(rule["annotations"].values())
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"], target["legendFormat"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            expression, label = (
                variable["query"]["query"].removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
            )
            yield f"variable {variable['name']}", expression, f"{{{{{label}}}}}"


@pytest.mark.parametrize(("where", "expression", "text"), list(queries()), ids=lambda value: value[:24])
def test_every_metric_and_label_exists(where: str, expression: str, text: str) -> None:
    known = metrics()
    within: set[str] = set()
    for name, matchers in SELECTOR.findall(expression):
        assert name in known, f"{where}: there is no {name}"
        within |= known[name]
        for label, operator, value in MATCHER.findall(matchers):
            assert label in known[name] | OF_PROMETHEUS, f"{where}: {name} has no label {label}"
            if label in VALUES and not value.startswith("$") and operator in ("=", "!=", "=~"):
                assert set(value.split("|")) <= VALUES[label], f"{where}: {label} is never {value}"
    named = {label.strip() for group in GROUPING.findall(expression) for label in group.split(",")}
    assert named | set(LEGEND.findall(text)) <= within | OF_PROMETHEUS, where


def test_prometheus_takes_every_rule() -> None:
    done = promtool("check", "rules", str(RULES))
    assert done.returncode == 0, done.stderr


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    cases = [case for one in yaml.safe_load(RULES_TEST.read_text())["tests"] for case in one["alert_rule_test"]]
    for rule in alerts():
        told = [bool(case["exp_alerts"]) for case in cases if case["alertname"] == rule["alert"]]
        assert set(told) == {True, False}, f"{rule['alert']} needs a case that fires and one that does not"
    done = promtool("test", "rules", str(RULES_TEST))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_custom_resource_has_the_same_rules() -> None:
    custom = yaml.safe_load(CUSTOM.read_text())
    assert (custom["apiVersion"], custom["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert custom["spec"] == yaml.safe_load(RULES.read_text())


def test_prometheus_understands_every_panel(tmp_path: Path) -> None:
    rules = []
    for number, (_where, expression, _text) in enumerate(queries()):
        rules.append({"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "5m")})
    path = tmp_path / "panels.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = promtool("check", "rules", str(path))
    assert done.returncode == 0, done.stderr


def test_the_dashboard_holds_together() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard)))
    assert used - {"__rate_interval", "__all"} == variables
    ids = [panel["id"] for panel in dashboard["panels"]]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids) and len(set(places)) == len(places)
    assert all(panel["title"] and panel["description"] for panel in dashboard["panels"])
