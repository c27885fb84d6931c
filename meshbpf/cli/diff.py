"""`meshbpf diff PATH…`: what applying these files would change; nothing is changed. Exit 79 when something would be."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from loader.diff import runs
from loader.plan import TABLES, Tables, plan
from meshbpf.cli import columns, layout, output
from meshbpf.cli.changes import changes
from meshbpf.cli.layout import Screen
from meshbpf.cli.options import InstanceName, Output
from meshbpf.cli.read import opened
from meshbpf.model import Mesh, Service
from meshbpf.registry import merge
from meshbpf.registry.base import Snapshot
from meshbpf.registry.instance import IPNetwork
from meshbpf.schema.files import load

FINDINGS = 79
PLACE = re.compile(r".*:\d+:\d+|files|")  # how files sign; registries sign with their names


def register(app: typer.Typer) -> None:
    app.command()(diff)


def diff(
    paths: Annotated[list[Path], typer.Argument(help="files or directories: all that -c would name")],
    instance: InstanceName = "default",
    form: Output = "table",
) -> None:
    """What applying these files would change in tables and proxy. Nothing is changed. Exit 79 when something would, 0
    when not, 65 with file:line:column for a fault. What registries have said stays.
    """
    output.check_format(form)
    configured = load(paths)
    _instance, plane, mesh = opened(instance)
    wanted = after(mesh, configured)
    rows, written = changes(mesh, wanted), writes(plane.read_tables(), wanted)
    if form in ("json", "yaml"):
        output.structured(form, {"changes": rows, "writes": written})
    else:
        output.say(text(rows, written, output.screen(), form == "wide"))
    if rows or written:
        raise typer.Exit(FINDINGS)


def after(mesh: Mesh, configured: Mesh) -> Mesh:
    """The mesh that would follow `mesh`: with these files instead of its own, and with what registries added to it.
    Addresses of the pool stay; a service that is new gets the one that its name suggests. Pure.
    """
    files = Snapshot(configured.services, tuple(configured.policies.values()), configured.agent, source="files")
    network = ipaddress.ip_network(configured.agent.address_pool)
    said = [_of_registries(service, network) for service in mesh.services]
    registries = Snapshot(tuple(service for service in said if service is not None))
    given = {
        service.id: address
        for service in mesh.services
        for address in service.addresses[:1]
        if ipaddress.ip_address(address) in network
    }
    return merge.mesh([files, registries], given, mesh.generation + 1).mesh


def _of_registries(service: Service, pool: IPNetwork) -> Service | None:
    """What of an applied service no file has said."""
    endpoints = tuple(endpoint for endpoint in service.endpoints if not PLACE.fullmatch(endpoint.source))
    if PLACE.fullmatch(service.source):
        return Service(service.name, service.namespace, endpoints=endpoints) if endpoints else None
    named = tuple(address for address in service.addresses if ipaddress.ip_address(address) not in pool)
    return replace(service, addresses=named, endpoints=endpoints)


def writes(have: Tables, wanted: Mesh) -> list[dict[str, Any]]:
    """How many rows of each table would be set or deleted. Raises MapFull when they do not fit. Pure."""
    found: dict[str, Counter[str]] = {table: Counter() for table in TABLES}
    for run in runs(have, plan(wanted, have).tables):
        found[run.table].update(set=len(run.rows), deleted=len(run.gone))
    return [
        {"map": table, "set": counts["set"], "deleted": counts["deleted"]}
        for table, counts in found.items()
        if counts.total()
    ]


def text(rows: list[dict[str, Any]], written: list[dict[str, Any]], screen: Screen, wide: bool) -> str:
    """What changes, then what that means for the kernel."""
    if not rows and not written:
        return "nothing would change"
    said = [{**row, "says": _says(row)} for row in rows]
    parts = [layout.table(columns.CHANGES, said, screen, wide)] if rows else []
    parts.append(layout.table(columns.WRITES, written, screen, wide) if written else "no table would change")
    return "\n\n".join(parts)


def _says(row: dict[str, Any]) -> str:
    """`weight: 100 → 50`, or what came or went."""
    sides = [row["before"], row["after"]]
    shown = [layout.cell(side) for side in sides if row["change"] == "changed" or side is not None]
    return ": ".join(part for part in (row["field"], " → ".join(shown)) if part)
