"""`meshbpf register` and `deregister`: the light client on the local agent's socket. Only options are read here."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from loader.instance import Instance
from meshbpf.cli.options import InstanceName
from meshbpf.errors import ConfigError
from meshbpf.registration import Registration, registration

Service = Annotated[str, typer.Argument(metavar="SERVICE", help="name or name.namespace")]


def register(app: typer.Typer) -> None:
    app.command(name="register", context_settings={"allow_interspersed_args": True})(put_in)
    app.command(name="deregister")(take_out)


def put_in(
    service: Service,
    port: Annotated[
        list[str], typer.Option("--port", metavar="[NAME=]P[/PROTOCOL]", help="where the program listens (repeatable)")
    ],
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- CMD...]", help="run it; in after its check passes, out before it stops"),
    ] = None,
    address: Annotated[str, typer.Option("--address", help="where callers reach it")] = "127.0.0.1",
    service_port: Annotated[int, typer.Option("--service-port", help="what callers dial for the first --port")] = 80,
    ttl: Annotated[str, typer.Option("--ttl", help="how long a lease outlives its last sign of life")] = "10s",
    check: Annotated[str, typer.Option("--check", help="tcp, http:/PATH or cmd:COMMAND; default with CMD: tcp")] = "",
    interval: Annotated[
        str, typer.Option("--interval", help="between checks and signs of life; default a third of --ttl")
    ] = "",
    id: Annotated[str, typer.Option("--id", help="default: ADDRESS-PORT")] = "",
    weight: Annotated[int, typer.Option("--weight", help="share of new calls beside the others'")] = 100,
    zone: Annotated[str, typer.Option("--zone", help="where it runs")] = "",
    label: Annotated[list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="(repeatable)")] = None,
    instance: InstanceName = "default",
) -> None:
    """Put a program into the registry while it is ready. It is taken out before it is told to stop. `meshbpf run`
    must be running: without it, this tries again until there is one.
    """
    try:
        wanted = registration(
            service, port, address=address, service_port=service_port, ttl=ttl, check=check, interval=interval, id=id,
            weight=weight, zone=zone, labels=_labels(label or []), with_command=bool(command),
        )  # fmt: skip
    except ConfigError as error:
        raise typer.BadParameter(error.message, param_hint=error.where) from None
    raise typer.Exit(asyncio.run(_kept(instance, wanted, command or [])))


async def _kept(instance: str, wanted: Registration, command: list[str]) -> int:
    from meshbpf import register as light
    from meshbpf.registry.client import RegistryClient

    async with RegistryClient(unix=Instance(instance).socket) as client:
        return await light.register(client, wanted, command)


def take_out(
    service: Service,
    id: Annotated[str, typer.Option("--id", help="which one; not needed when there is just one")] = "",
    instance: InstanceName = "default",
) -> None:
    """Take an instance out of the registry. One whose `meshbpf register` still runs comes back: stop that instead."""
    from meshbpf import register as light
    from meshbpf.registry.client import RegistryClient

    async def ask() -> str:
        async with RegistryClient(unix=Instance(instance).socket) as client:
            return await light.deregister(client, service, id)

    typer.echo(f"{service}/{asyncio.run(ask())} deregistered")
    typer.echo("if its `meshbpf register` still runs, that puts it in again: stop it instead", err=True)


def _labels(texts: list[str]) -> dict[str, str]:
    """Raises ConfigError for what is not KEY=VALUE."""
    labels: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError("--label", f'"{text}" is not KEY=VALUE')
        labels[key] = value
    return labels
