"""`connections`, `edges`, `reasons`, `maps`: what the kernel and the proxy hold now. They read pins and sockets, so
they work while no agent runs; what only the agent has counted is added when there is one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from loader import environment, sockets
from loader.dataplane import Dataplane
from loader.instance import Instance
from meshbpf.cli import ask, calls, columns, layout, output, view
from meshbpf.cli import explain as explaining
from meshbpf.cli import maps as tables
from meshbpf.cli.options import InstanceName, Output, ServiceName
from meshbpf.cli.read import opened
from meshbpf.errors import DataplaneError, EnvironmentLack
from meshbpf.runtime import netns
from meshbpf.runtime.workload import Workloads

MOST = 20  # clients in the short table


def register(app: typer.Typer) -> None:
    for command in (connections, edges, reasons, maps):
        app.command()(command)


def connections(
    service: ServiceName = None,
    instance: InstanceName = "default",
    form: Output = "table",
) -> None:
    """Open connections of each service, and who is behind them. By carrier; with -o wide, or of one service, every
    client.
    """
    output.check_format(form)
    target, plane, mesh = opened(instance)
    only = view.find(mesh, service) if service else None
    known = calls.names(plane, mesh)
    rows = calls.connections(plane, known, only)
    clients, lack = _clients(target, plane, known, only)
    if form in ("json", "yaml"):
        output.structured(form, {"connections": rows, "clients": clients, "error": lack})
        return
    most = len(clients) if service or form == "wide" else MOST
    output.say(connections_text(rows, clients, lack, most, output.screen(), form == "wide"))


def connections_text(
    rows: Sequence[dict[str, Any]], clients: Sequence[dict[str, Any]], lack: str, most: int, screen: layout.Screen,
    wide: bool,
) -> str:  # fmt: skip
    """Two tables: how many, and (of at most so many) who."""
    parts = [layout.table(columns.CONNECTIONS, rows, screen, wide)]
    if clients:
        parts.append(layout.table(columns.CLIENTS, clients[:most], screen, wide))
    notes = []
    if len(clients) > most:
        notes.append(f"and {len(clients) - most} more: -o wide, or name a service")
    if lack:
        notes.append(f"clients of direct connections are not shown: {lack}")
    parts += ["\n".join(layout.wrap(note, screen.width)) for note in notes]
    return "\n\n".join(parts)


def edges(instance: InstanceName = "default", form: Output = "table") -> None:
    """Which workload calls which service. Requests as the agent has counted them; open connections as the kernel has
    them.
    """
    output.check_format(form)
    target, plane, mesh = opened(instance)
    known = calls.names(plane, mesh)
    clients, lack = _clients(target, plane, known)
    rows = calls.edges(clients, ask.get(target, "/v1/counts"), not lack)
    output.show(form, columns.EDGES, rows, "edges")


def reasons(instance: InstanceName = "default", form: Output = "table") -> None:
    """Every verdict that fell, by reason, counted. With what the reason means, and what can be done about it."""
    output.check_format(form)
    target, plane, _mesh = opened(instance)
    proxy = (ask.get(target, "/v1/counts") or {}).get("proxy_verdicts_total", [])
    output.show(form, columns.REASONS, explaining.verdicts(plane.counters(), proxy), "reasons")


def maps(instance: InstanceName = "default", form: Output = "table") -> None:
    """The tables in the kernel: what is in each, and how full. And who writes it."""
    output.check_format(form)
    _instance, plane, _mesh = opened(instance)
    output.show(form, columns.MAPS, tables.rows(tables.held(plane.maps_folder)), "maps")


def _clients(
    instance: Instance, plane: Dataplane, known: calls.Names, only: Any = None
) -> tuple[list[dict[str, Any]], str]:
    """Everybody who has a connection, and why those with a direct one could not be found; empty when they could."""
    cgroups = [Path(path) for path in instance.read_state()["cgroups"]]
    workloads = Workloads(environment.cgroup2(), cgroups)
    found, lack = _sockets(plane, cgroups)
    rows = calls.client_rows(calls.clients(plane, found, _cgroup_of), known, workloads, workloads.path, only)
    return rows, lack


def _cgroup_of(pid: int) -> int:
    """The id of the cgroup that a process is in; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        below = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
        return 0 if below is None else (environment.cgroup2() / below).stat().st_ino
    except OSError:
        return 0


def _sockets(plane: Dataplane, cgroups: Sequence[Path]) -> tuple[list[sockets.Led] | None, str]:
    """Of every namespace that a process of the cgroups is in; none at all when one of them cannot be asked, because
    half an answer would look like a whole one.
    """
    found: list[sockets.Led] = []
    try:
        for pid in netns.in_use(cgroups).values():
            fd = netns.opened(netns.of_process(pid))
            if fd is None:
                continue
            try:
                with netns.inside(fd):
                    found += sockets.led(plane.maps_folder)
            finally:
                os.close(fd)
    except EnvironmentLack as error:
        return None, error.what
    except DataplaneError as error:
        return None, str(error)
    return found, ""
