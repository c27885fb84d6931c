"""The nouns: services, endpoints, explain, validate, version. They read pins and the last mesh, so they work
while no agent runs; what only a running agent knows is added when there is one.
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from loader import abi, dataplane, environment
from loader import instance as places
from loader.dataplane import Dataplane
from loader.instance import Instance
from meshbpf.cli import ask, columns, completion, layout, output, view
from meshbpf.cli import explain as explaining
from meshbpf.cli.options import InstanceName, Output, ServiceName
from meshbpf.errors import NotFound
from meshbpf.model import Mesh
from meshbpf.schema.files import load


def register(app: typer.Typer) -> None:
    for command in (services, endpoints, explain, validate, version):
        app.command()(command)


def opened(name: str) -> tuple[Instance, Dataplane, Mesh]:
    """The attached instance, for reading. Raises NotFound: nothing attached; EnvironmentLack: may not."""
    if os.geteuid() != 0:
        environment.require_capabilities()
    instance = Instance(name)
    found = dataplane.open_pins(instance)
    if found is None:
        raise not_attached(name)
    return instance, *found


def not_attached(name: str, else_: str = "") -> NotFound:
    """What to say to who asks for an instance that is not there: perhaps --instance was forgotten."""
    others = "".join(f"\n  {line}" for line in attached_here())
    return NotFound(f"instance {name} is not attached{others}\n  remedy: meshbpf attach --cgroup PATH -c FILE{else_}")


def attached_here() -> list[str]:
    """A line that names the instances that there are, and how to name them to a command; none when there are none."""
    named = ", ".join(f"{name} (--instance {name})" for name in places.attached())
    return [f"attached here: {named}"] if named else []


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
    output.show(form, columns.SERVICES, view.services(plane, mesh), "services")


def endpoints(
    service: ServiceName = None,
    instance: InstanceName = "default",
    form: Output = "table",
) -> None:
    """Who serves: each endpoint, and what the proxy saw of it."""
    output.check_format(form)
    target, plane, mesh = opened(instance)
    only = view.find(mesh, service) if service else None
    answer = ask.get(target, "/v1/status")
    rows = view.endpoints(plane, mesh, only, (answer or {}).get("endpoints", {}))
    output.show(form, columns.ENDPOINTS, rows, "endpoints")


def explain(
    target: Annotated[
        str,
        typer.Argument(
            help="a service, SERVICE:PORT or ADDRESS:PORT, where PORT is a number or a name",
            autocompletion=completion.services,
        ),
    ],
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
    output.say(layout.facts(steps, output.screen()))


def validate(paths: Annotated[list[Path], typer.Argument(help="files or directories")]) -> None:
    """Check a configuration; no root, nothing is changed. Exit 65 with file:line:column for every fault."""
    mesh = load(paths)
    if not mesh.services:
        typer.echo("valid, but names no service")
        return
    policies = output.counted(len(mesh.policies), "policy", "policies")
    typer.echo(f"valid: {output.counted(len(mesh.services), 'service')}, {policies}")


def version(form: Output = "table") -> None:
    """Ours, bcc's, the kernel's, and the layout of the pins."""
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
