"""`meshbpf status`: where an instance is attached, what it serves, who runs it, how full it is. On one screen."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from loader.dataplane import Dataplane
from loader.instance import Instance
from meshbpf.carrier import Carrier
from meshbpf.cli import ask, calls, columns, layout, output, view
from meshbpf.cli.findings import nearly_full
from meshbpf.cli.layout import Screen, age
from meshbpf.cli.options import InstanceName, Output
from meshbpf.cli.output import counted
from meshbpf.cli.read import opened
from meshbpf.model import Mesh

FILLED = ("services", "policies", "slots", "endpoints")  # by a mesh, which is refused when it does not fit
SHOWN = (*FILLED, "flows")
OF_AGENT = ("pid", "ready", "workers", "restarts", "acceleration", "namespaces")


def register(app: typer.Typer) -> None:
    app.command()(status)


def status(
    instance: InstanceName = "default",
    form: Output = "table",
    brief: Annotated[bool, typer.Option("--brief", help="one line")] = False,
) -> None:
    """Where it is attached, the mesh, the agent, the tables. Also how old the mesh is, and the carriers in use."""
    output.check_format(form)
    target, plane, mesh = opened(instance)
    whole = gathered(target, plane, mesh, ask.get(target, "/v1/status"))
    if form in ("json", "yaml"):
        output.structured(form, whole)
    else:
        output.say(in_brief(whole) if brief else text(whole, output.screen()))


def gathered(instance: Instance, plane: Dataplane, mesh: Mesh, agent: Mapping[str, Any] | None) -> dict[str, Any]:
    """What there is to show, as `-o json` has it; `agent` is its own word, None when none runs."""
    cgroups = instance.read_state()["cgroups"]
    fills = [(name, len(list(plane.maps[name].items())), int(getattr(mesh.agent.maps, name))) for name in SHOWN]
    ports, still = _carriers(view.services(plane, mesh)), {carrier.value: 0 for carrier, _place in calls.CARRIERS}
    for row in calls.connections(plane, calls.names(plane, mesh)):
        still[row["carrier"]] += row["open"]
    said = agent or {}
    return {
        "instance": instance.name,
        "cgroups": [{"path": path, "exists": Path(path).is_dir()} for path in cgroups],
        "generation": mesh.generation,
        "age_seconds": round(time.time() - instance.state_file.stat().st_mtime, 1),
        "services": len(mesh.services),
        "carriers": ports,
        "open": still,
        "agent": {key: said[key] for key in OF_AGENT} if agent else None,
        "proxy_serves": plane.proxy_serves(time.monotonic_ns()),
        "sources": said.get("sources", []),
        "error": said.get("error", ""),
        "restart": said.get("restart", []),
        "maps": [{"map": name, "entries": entries, "capacity": room} for name, entries, room in fills],
        "warnings": warnings(fills),
    }


def _carriers(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many ports each carrier has."""
    found: dict[str, int] = {}
    for row in rows:
        found[row["carrier"]] = found.get(row["carrier"], 0) + 1
    return found


def warnings(fills: Iterable[tuple[str, int, int]]) -> list[str]:
    """Tables that will soon refuse a mesh. `flows` refuses none: what is oldest in it goes."""
    return [
        f"map {name} is {100 * entries / room:.1f}% full: raise Agent.spec.maps.{name}, then attach or run again"
        for name, entries, room in nearly_full(fill for fill in fills if fill[0] in FILLED)
    ]


def in_brief(whole: Mapping[str, Any]) -> str:
    agent = whole["agent"]
    running = f"agent {agent['pid']}, {agent['ready']}/{agent['workers']} workers" if agent else "no agent"
    cgroups, services = counted(len(whole["cgroups"]), "cgroup"), counted(whole["services"], "service")
    troubles = list(_troubles(whole))
    trouble = f"; {layout.printable(troubles[0].splitlines()[0])}" if troubles else ""
    more = f" (and {len(troubles) - 1} more: meshbpf status)" if len(troubles) > 1 else ""
    return f"{whole['instance']}: {cgroups}, {services}, {running}{trouble}{more}"


def _troubles(whole: Mapping[str, Any]) -> Iterable[str]:
    """What somebody should do something about, worst first."""
    if whole["error"]:
        yield whole["error"]
    for source in whole["sources"]:
        if source["error"]:
            yield f"{source['name']}: {source['error']}"
    if whole["restart"]:
        yield _restart(whole["restart"])
    yield from whole["warnings"]


def _restart(names: Iterable[str]) -> str:
    changed = ", ".join(f"Agent.spec.{name}" for name in names)
    return f"changed in the configuration, applied by a restart of `meshbpf run`: {changed}"


def text(whole: Mapping[str, Any], screen: Screen) -> str:
    """Two blocks: facts, a line or more each, then the tables that have a size."""
    fills = [{**fill, "full_percent": calls.percent(fill["entries"], fill["capacity"])} for fill in whole["maps"]]
    return f"{layout.facts(_facts(whole), screen)}\n\n{layout.table(columns.FILLS, fills, screen)}"


def _facts(whole: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "INSTANCE", whole["instance"]
    for entry in whole["cgroups"]:
        yield "CGROUP", entry["path"] + ("" if entry["exists"] else "  (gone: attach again)")
    services = counted(whole["services"], "service")
    yield "MESH", f"generation {whole['generation']}, {age(whole['age_seconds'])} old, {services}"
    carriers = [
        f"{name} {counted(ports, 'port')}, {whole['open'].get(name, 0)} open"
        for name, ports in sorted(whole["carriers"].items())
    ]
    yield "CARRIERS", "; ".join(carriers) or "-"
    if agent := whole["agent"]:
        yield "AGENT", f"pid {agent['pid']}, {counted(agent['restarts'], 'restart')} of workers"
        ready = f"{agent['ready']}/{agent['workers']} workers ready"
        yield "PROXY", f"{ready}, listens in {counted(agent['namespaces'], 'network namespace')}"
        yield "ACCELERATION", agent["acceleration"]
    else:
        governed = sum(ports for name, ports in whole["carriers"].items() if name != Carrier.DIRECT)
        one = governed == 1
        orphans = f"{counted(governed, 'governed port')} {'is' if one else 'are'} still served by its workers"
        without = f"{counted(governed, 'governed port')} {'follows' if one else 'follow'} onProxyDown"
        follow = orphans if whole["proxy_serves"] else without
        yield "AGENT", f"not running: {follow}" if governed else "not running, and not needed: every port is direct"
    for source in whole["sources"]:
        stale = f", no good answer for {age(source['stale_seconds'])}" if source["stale_seconds"] else ""
        trouble = f"{stale}, last error: {source['error']}" if source["error"] else ""
        services = counted(source["services"], "service")
        yield "SOURCE", f"{source['name']}, {services}, last change {age(source['age_seconds'])} ago{trouble}"
    if whole["error"]:
        yield "ERROR", whole["error"]
    if whole["restart"]:
        yield "RESTART", _restart(whole["restart"])
    for warning in whole["warnings"]:
        yield "WARNING", warning
