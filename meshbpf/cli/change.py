"""The verbs: attach, run, exec, detach. Each does one thing to the machine and says what it did.

What a command alone needs is imported in it: `exec` stands before every program of a host and must not load a server.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path
from typing import Annotated

import typer

from loader import dataplane, environment, leftovers, neighbours
from loader import instance as places
from loader.instance import Instance
from meshbpf import garbage, logs
from meshbpf.carrier import Carrier, choose
from meshbpf.cli import options
from meshbpf.cli.options import AllowRoot, Cgroups, Config, InstanceName, LogFormat, LogLevel
from meshbpf.cli.output import counted
from meshbpf.cli.read import attached_here, not_attached
from meshbpf.errors import CannotRun, EnvironmentLack, MeshError
from meshbpf.model import MapSizes
from meshbpf.runtime import cgroup
from meshbpf.schema import files


def register(app: typer.Typer) -> None:
    app.command()(attach)
    app.command()(run)
    app.command(name="exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(
        execute
    )
    app.command()(detach)


def attach(
    cgroup: Cgroups,
    config: Config = None,
    instance: InstanceName = "default",
    allow_root_cgroup: AllowRoot = False,
) -> None:
    """Load the programs, fill the tables, attach, then exit. Direct ports then work with no process at all."""
    from meshbpf.runtime import orphans, stranded
    from meshbpf.runtime.sources import embedded_settings, last_generation, new_store_undone, once

    environment.require_capabilities()
    paths = options.cgroups(cgroup, allow_root_cgroup)
    target = Instance(instance)
    leftovers.sweep()
    configured = files.load(options.configuration(config))
    with target.lock(), new_store_undone(target, Path(embedded_settings(configured, instance).store)):
        mesh = asyncio.run(once(configured, instance, last_generation(target) + 1))
        # Workers that outlived their agent are led callers of whatever the tables say: they have to know it first.
        if not asyncio.run(orphans.keep_up(target, mesh, paths)) and (found := dataplane.open_pins(target)):
            found[0].set_agent(0, 0)  # onProxyDown is better than a worker that closes what it does not know
            found[0].close()
        dataplane.attach(target, paths, mesh)
        try:
            for line in neighbours.switched_off(paths, dataplane.CGROUP_HOOKS):
                typer.echo(f"warning: {line}", err=True)
        except (MeshError, OSError) as error:
            typer.echo(f"warning: neighbours not looked at: {error}", err=True)
        if found := dataplane.open_pins(target):
            stranded.end(found[0].maps)
            found[0].close()
    choices = [choose(port, mesh.policy_for(service)) for service in mesh.services for port in service.ports]
    governed = sum(1 for choice in choices if choice.carrier is not Carrier.DIRECT)
    typer.echo(
        f"attached {instance} to {', '.join(map(str, paths))}: "
        f"{counted(len(mesh.services), 'service')}, {counted(len(choices), 'port')}"
    )
    if governed:
        are = "is governed: it follows" if governed == 1 else "are governed: they follow"
        typer.echo(f"{counted(governed, 'port')} {are} onProxyDown until `meshbpf run`")


def run(
    cgroup: Cgroups,
    config: Config = None,
    instance: InstanceName = "default",
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, max=256, help="proxy processes (default: as configured)")
    ] = None,
    allow_root_cgroup: AllowRoot = False,
    log_level: LogLevel = "info",
    log_format: LogFormat = "text",
) -> None:
    """Attach, then stay: registry, proxy, metrics. SIGTERM drains, SIGHUP re-reads."""
    garbage.not_yet()
    environment.require_capabilities()
    logs.configure(log_level, log_format)
    paths = options.cgroups(cgroup, allow_root_cgroup)
    target, configured = Instance(instance), options.configuration(config)
    with contextlib.closing(dataplane.Compiler()) as compiler:
        texts = files.texts(configured)
        # Compiling takes as long as loading a server and reading ten thousand services: it begins before both.
        if not files.may_size_tables(texts):
            dataplane.foresee(compiler, MapSizes())
        from meshbpf.runtime.agent import Options
        from meshbpf.runtime.main import serve

        asyncio.run(serve(Options(target, paths, workers, log_level, log_format), configured, texts, compiler))


def execute(
    command: Annotated[list[str], typer.Argument(help="what to become")],
    cgroup_: Annotated[
        Path | None,
        typer.Option("--cgroup", help="default: the first one that the instance leads", envvar="MESHBPF_EXEC_CGROUP"),
    ] = None,
    instance: InstanceName = "default",
) -> None:
    """Join the cgroup, then become CMD. The cgroup is made when missing; this puts any program into the mesh."""
    if cgroup_ is None:
        try:
            named = Instance(instance).read_state().get("cgroups")
        except PermissionError as error:
            lack = f"may not read instance {instance}"
            raise EnvironmentLack(lack, "run as root (sudo), or name --cgroup") from error
        if not named:
            raise not_attached(instance, ", or name --cgroup")
        target = Path(named[0])
    else:
        target = options.cgroup_to_join(cgroup_)
    if target.resolve() == environment.cgroup2():
        raise MeshError(f"{target} is the machine's root cgroup: joining it would leave the mesh")
    try:
        target.mkdir(parents=True, exist_ok=True)
        cgroup.join(target)
    except PermissionError as error:
        raise EnvironmentLack(f"may not join {target}", "run as root (sudo)") from error
    except OSError as error:
        raise MeshError(f"cannot join {target}: {error.strerror}") from error
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise CannotRun(command[0], error) from error


def detach(
    instance: InstanceName = "default",
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="name every table too")] = False,
) -> None:
    """Take everything of that instance away. Its registry's file stays, and is named. Exit 0 when nothing was there."""
    from meshbpf.runtime import stop
    from meshbpf.runtime.sources import store_of

    environment.require_capabilities()
    target = Instance(instance)
    leftovers.sweep()
    store, run_there = store_of(target), target.run.is_dir()
    removed = stop.stop_processes(target)
    with target.lock():
        removed += dataplane.detach(target)
    if not any(not line.startswith("run directory") for line in removed):
        tidied = [f"removed run directory {target.run}, which an earlier start had left"] if run_there else []
        typer.echo("\n".join([f"nothing attached as {instance}", *tidied, *attached_here()]))
        return
    tables = [line for line in removed if line.startswith("map ")]
    for line in removed:
        if verbose or line not in tables:
            typer.echo(f"removed {line}")
        elif line == tables[0]:
            typer.echo(f"removed {counted(len(tables), 'map')}")
    typer.echo(f"detached {instance}: direct connections stay open, what the proxy carried has ended")
    others = [store_of(Instance(name)) for name in places.attached() if name != instance]
    if store.exists() and store not in others:  # two that name one file: only one of them can hold it
        typer.echo(f"kept {store}, what its registry remembers; to forget it: rm {store}*")
