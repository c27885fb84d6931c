"""The nouns: status, services, endpoints, explain, validate, version. They read pins and the last mesh, so they work
while no agent runs; what only a running agent knows is added when there is one.
"""

from __future__ import annotations

import os
import time
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from loader import abi, dataplane, environment
from loader.dataplane import Dataplane
from loader.instance import Instance
from loader.plan import TABLES
from meshbpf.cli import ask, output, view
from meshbpf.cli import explain as explaining
from meshbpf.cli.findings import nearly_full
from meshbpf.cli.options import InstanceName, Output
from meshbpf.errors import NotFound
from meshbpf.model import Mesh
from meshbpf.schema.files import load


def register(app: typer.Typer) -> None:
    for command in (status, services, endpoints, explain, validate, reasons, version):
        app.command()(command)


def opened(name: str) -> tuple[Instance, Dataplane, Mesh]:
    """The attached instance, for reading. Raises NotFound: nothing attached; EnvironmentLack: may not."""
    if os.geteuid() != 0:
        environment.require_capabilities()
    instance = Instance(name)
    found = dataplane.open_pins(instance)
    if found is None:
        raise NotFound(f"instance {name} is not attached\n  remedy: meshbpf attach --cgroup PATH -c FILE")
    return instance, *found


def services(
    instance: InstanceName = "default",
    form: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            help="table, wide, json, yaml, or hosts: lines for /etc/hosts",
            envvar="MESHBPF_OUTPUT",
        ),
    ] = "table",
) -> None:
    """What is called: addresses, ports, and the carrier of each. With the reason why it is that carrier."""
    output.check_format(form, ("hosts",))
    _instance, plane, mesh = opened(instance)
    if form == "hosts":
        typer.echo(view.hosts(mesh))
        return
    heads = {
        "service": "SERVICE", "address": "ADDRESS", "port": "PORT", "carrier": "CARRIER", "why": "WHY",
        "endpoints": "READY", "open": "OPEN", "connections": "CONNECTIONS", "source": "SOURCE",
    }  # fmt: skip
    output.show(form, heads, view.services(plane, mesh), "services", wide=("connections", "source"))


def endpoints(
    service: Annotated[str | None, typer.Argument(help="only this service: name or name.namespace")] = None,
    instance: InstanceName = "default",
    form: Output = "table",
) -> None:
    """Who serves: each endpoint, and what the proxy saw of it."""
    output.check_format(form)
    target, plane, mesh = opened(instance)
    only = view.find(mesh, service) if service else None
    answer = ask.get(target, "/v1/status")
    rows = view.endpoints(plane, mesh, only, (answer or {}).get("endpoints", {}))
    heads = {
        "service": "SERVICE", "endpoint": "ENDPOINT", "port": "PORT", "state": "STATE", "weight": "WEIGHT", "ok": "OK",
        "failed": "FAILED", "last_error": "LAST-ERROR", "zone": "ZONE", "source": "SOURCE",
    }  # fmt: skip
    output.show(form, heads, rows, "endpoints", wide=("zone", "source"))


def status(
    instance: InstanceName = "default",
    form: Output = "table",
    brief: Annotated[bool, typer.Option("--brief", help="one line")] = False,
) -> None:
    """Where it is attached, the mesh, the agent, the tables. Also how old the mesh is, and the carriers in use."""
    output.check_format(form)
    target, plane, mesh = opened(instance)
    whole = _status(target, plane, mesh, ask.get(target, "/v1/status"))
    if form in ("json", "yaml"):
        output.structured(form, whole)
    elif brief:
        agent = whole["agent"]
        running = f"agent {agent['pid']}, {agent['ready']}/{agent['workers']} workers" if agent else "no agent"
        cgroups, count = output.counted(len(whole["cgroups"]), "cgroup"), output.counted(len(mesh.services), "service")
        typer.echo(f"{instance}: {cgroups}, {count}, {running}")
    else:
        _print_status(whole)


def _status(instance: Instance, plane: Dataplane, mesh: Mesh, agent: dict[str, Any] | None) -> dict[str, Any]:
    state = instance.read_state()
    fills = [
        {"map": name, "entries": len(list(plane.maps[name].items())), "capacity": getattr(mesh.agent.maps, name)}
        for name in ("services", "policies", "slots", "endpoints", "flows")
    ]
    carriers: dict[str, int] = {}
    for row in view.services(plane, mesh):
        carriers[row["carrier"]] = carriers.get(row["carrier"], 0) + 1
    return {
        "instance": instance.name,
        "cgroups": [{"path": path, "exists": Path(path).is_dir()} for path in state["cgroups"]],
        "generation": mesh.generation,
        "age_seconds": round(time.time() - instance.state_file.stat().st_mtime, 1),
        "services": len(mesh.services),
        "carriers": carriers,
        "agent": agent and {key: agent[key] for key in ("pid", "ready", "workers", "restarts", "acceleration")},
        "sources": (agent or {}).get("sources", []),
        "error": (agent or {}).get("error", ""),
        "maps": fills,
        "warnings": _warnings(fills),
    }


def _warnings(fills: list[dict[str, Any]]) -> list[str]:
    """Tables that will soon refuse a mesh. `flows` refuses none: what is oldest in it goes."""
    full = nearly_full((fill["map"], fill["entries"], fill["capacity"]) for fill in fills if fill["map"] in TABLES)
    return [
        f"map {name} is {100 * entries / room:.1f}% full: raise Agent.spec.maps.{name}, then attach or run again"
        for name, entries, room in full
    ]


def _print_status(whole: dict[str, Any]) -> None:
    agent = whole["agent"]
    lines = [("INSTANCE", whole["instance"])]
    lines += [
        ("CGROUP", entry["path"] + ("" if entry["exists"] else "  (gone: attach again)")) for entry in whole["cgroups"]
    ]
    lines.append(
        (
            "MESH",
            f"generation {whole['generation']}, {output.age(whole['age_seconds'])} old, "
            + output.counted(whole["services"], "service"),
        )
    )
    lines.append(("CARRIERS", ", ".join(f"{name} {count}" for name, count in sorted(whole["carriers"].items())) or "-"))
    if agent:
        lines.append(
            (
                "AGENT",
                f"pid {agent['pid']}, {agent['ready']}/{agent['workers']} workers ready, {agent['restarts']} restarts",
            )
        )
        lines.append(("ACCELERATION", agent["acceleration"]))
    else:
        lines.append(("AGENT", "not running: governed ports follow onProxyDown"))
    for source in whole["sources"]:
        stale = f", no good answer for {output.age(source['stale_seconds'])}" if source["stale_seconds"] else ""
        trouble = f"{stale}, last error: {source['error']}" if source["error"] else ""
        lines.append(("SOURCE", f"{source['name']}, last change {output.age(source['age_seconds'])} ago{trouble}"))
    if whole["error"]:
        lines.append(("ERROR", whole["error"]))
    lines += [("WARNING", warning) for warning in whole["warnings"]]
    width = max(len(head) for head, _text in lines)
    for head, text in lines:
        typer.echo(f"{head.ljust(width)}  {text}")
    typer.echo("")
    rows = [
        [fill["map"], fill["entries"], fill["capacity"], f"{100 * fill['entries'] / fill['capacity']:.1f}%"]
        for fill in whole["maps"]
    ]
    typer.echo(output.table(["MAP", "ENTRIES", "CAPACITY", "FULL"], rows))


def reasons(instance: InstanceName = "default", form: Output = "table") -> None:
    """Every verdict of the kernel programs, by reason, counted. With what the reason means."""
    output.check_format(form)
    _instance, plane, _mesh = opened(instance)
    rows = explaining.verdicts(plane.counters())
    output.show(form, {"program": "PROGRAM", "reason": "REASON", "count": "COUNT", "text": "MEANS"}, rows, "reasons")


def explain(
    target: Annotated[str, typer.Argument(help="a service, SERVICE:PORT or ADDRESS:PORT")],
    instance: InstanceName = "default",
    form: Output = "table",
) -> None:
    """What a connect would do, step by step, and why. Each value says where it comes from. Where a past call went is
    in the access log and in the counters of `reasons`.
    """
    output.check_format(form)
    _instance, plane, mesh = opened(instance)
    steps = explaining.explain(plane, mesh, target)
    if form in ("json", "yaml"):
        output.structured(form, {"target": target, "steps": [{"step": step, "says": says} for step, says in steps]})
        return
    width = max(len(step) for step, _says in steps)
    for step, says in steps:
        typer.echo(f"{step.ljust(width)}  {says}")


def validate(paths: Annotated[list[Path], typer.Argument(help="files or directories")]) -> None:
    """Check a configuration; no root, nothing is changed. Exit 65 with file:line:column for every fault."""
    mesh = load(paths)
    if not mesh.services:
        typer.echo("valid, but names no service")
        return
    policies = output.counted(len(mesh.policies), "policy", "policies")
    typer.echo(f"valid: {output.counted(len(mesh.services), 'service')}, {policies}")


def version(form: Output = "table") -> None:
    """Ours, bcc's, the kernel's, and the layout version of the pins."""
    output.check_format(form)
    try:
        bcc = metadata.version("bcc")
    except metadata.PackageNotFoundError:
        bcc = "missing"
    values = {
        "meshbpf": metadata.version("meshbpf"),
        "bcc": bcc,
        "kernel": os.uname().release,
        "layout": abi.layout(Mesh().agent.maps),
    }
    if form in ("json", "yaml"):
        output.structured(form, values)
        return
    for name, value in values.items():
        typer.echo(f"{name.ljust(8)} {value}")
