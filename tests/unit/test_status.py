"""What `meshbpf status` prints, to the letter: a table that is nearly full is said before it refuses a mesh."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from loader.instance import Instance
from meshbpf.cli import status
from meshbpf.cli.layout import Screen
from meshbpf.model import Agent, Endpoint, MapSizes, Mesh, Port, Protocol, Service
from tests.support.plane import FakeMap, attached

SERVICES = tuple(
    Service(
        f"s{n}",
        addresses=(f"127.96.0.{n}",),
        ports=(Port("main", 80, Protocol.TCP),),
        endpoints=(Endpoint(f"127.0.1.{n}", {"main": 1}),),
    )
    for n in range(1, 9)
)
SIZES = MapSizes(services=16, policies=16, slots=10, endpoints=11, flows=4)
MESH = Mesh(Agent(maps=SIZES), SERVICES, generation=7)


def said(mesh: Mesh, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[str, list[str]]:
    """The text, and the warnings of `-o json`."""
    monkeypatch.setattr("loader.instance.RUN", tmp_path)
    instance = Instance("unit")
    instance.write_state({"cgroups": ["/nowhere"]})
    fake, plane = attached(mesh)
    fake.maps["connected"] = FakeMap({})
    fake.maps["flows"] = FakeMap({bytes([n]): b"" for n in range(4)})
    whole = status.gathered(instance, plane, mesh, None)
    return status.text({**whole, "age_seconds": 3.0}, Screen()), whole["warnings"]


def test_tables_that_are_nearly_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text, warnings = said(MESH, monkeypatch, tmp_path)
    assert text.splitlines() == [
        "INSTANCE  unit",
        "CGROUP    /nowhere  (gone: attach again)",
        "MESH      generation 7, 3s old, 8 services",
        "CARRIERS  direct 8 ports, 0 open",
        "AGENT     not running, and not needed: every port is direct",
        "WARNING   map slots is 80.0% full: raise Agent.spec.maps.slots, then attach or run again",
        "",
        "MAP        ENTRIES  SIZE    FULL",
        "services         8    16   50.0%",
        "policies         8    16   50.0%",
        "slots            8    10   80.0%",
        "endpoints        8    11   72.7%",
        "flows            4     4  100.0%",
    ]
    assert warnings == ["map slots is 80.0% full: raise Agent.spec.maps.slots, then attach or run again"]


def test_below_that_nothing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    roomy = replace(MESH, agent=Agent(maps=replace(SIZES, slots=11)))
    text, warnings = said(roomy, monkeypatch, tmp_path)
    assert "WARNING" not in text and warnings == []


def test_the_default_tables_hold_ten_thousand_services_of_ten_endpoints() -> None:
    sizes = MapSizes()
    held = {"services": 10_000, "policies": 10_000, "slots": 100_000, "endpoints": 100_000}
    assert status.warnings((name, n, getattr(sizes, name)) for name, n in held.items()) == []


@pytest.mark.parametrize(("serves", "says"), [(True, "are still served by its workers"), (False, "follow onProxyDown")])
def test_workers_that_outlived_their_agent(
    serves: bool, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("loader.instance.RUN", tmp_path)
    instance = Instance("unit")
    instance.write_state({"cgroups": []})
    fake, plane = attached(MESH)
    fake.maps |= {"connected": FakeMap({}), "flows": FakeMap({})}
    whole = status.gathered(instance, plane, MESH, None)
    text = status.text({**whole, "carriers": {"proxy": 2}, "proxy_serves": serves}, Screen())
    assert f"AGENT     not running: 2 governed ports {says}" in text.splitlines()
