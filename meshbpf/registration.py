"""What `meshbpf register` was asked for: options in, one checked value out. Pure: nothing is contacted or started.

`--port [NAME=]P[/PROTOCOL]`: the program listens on P; the protocol defaults to http, the name to the protocol.
`--service-port S` (default 80) is the number callers use for the *first* port; every further port keeps its own number.
It travels as `servicePort` in the port entry, so that a service that only the registry knows gets its ports; a service
declared in a file takes its numbers from there and matches by port name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshbpf import checks, durations
from meshbpf.checks import Check
from meshbpf.errors import ConfigError
from meshbpf.registry.instance import Refusal, Rules, parse

_OPTIONS = {
    "service": "SERVICE",
    "ports": "--port",
    **{name: f"--{name}" for name in ("address", "ttl", "check", "id", "weight", "zone", "labels")},
}


@dataclass(frozen=True, slots=True)
class PortSpec:
    name: str
    port: int
    protocol: str
    named: bool = True  # by the user


@dataclass(frozen=True, slots=True)
class Registration:
    """What the command line asked for, checked. `interval` is the pause between checks and between heartbeats."""

    service: str
    id: str
    body: Mapping[str, Any]
    address: str
    port: int  # the one that is checked
    interval: float
    check: Check | None
    notes: tuple[str, ...] = ()  # what was chosen for the user, in words


def parse_port(text: str) -> PortSpec:
    """`[NAME=]P[/PROTOCOL]`. Raises ConfigError."""
    name, equals, rest = text.rpartition("=")
    number, slash, protocol = rest.partition("/")
    if not (number.isascii() and number.isdigit()) or (equals and not name) or (slash and not protocol):
        raise ConfigError("--port", f'"{text}" is not [NAME=]PORT[/PROTOCOL], such as 8081 or grpc=9000/grpc')
    protocol = protocol or "http"
    return PortSpec(name or protocol, int(number), protocol, bool(name))


def registration(
    service: str,
    ports: Sequence[str],
    address: str = "127.0.0.1",
    service_port: int = 80,
    ttl: str = "10s",
    check: str = "",
    interval: str = "",
    id: str = "",
    weight: int = 100,
    zone: str = "",
    labels: Mapping[str, str] | None = None,
    with_command: bool = False,
) -> Registration:
    """Check the options of the command line. Raises ConfigError, which names the option."""
    specs = [parse_port(text) for text in ports]
    if not specs:
        raise ConfigError("--port", "is needed: which port does the program listen on?")
    if len({spec.name for spec in specs}) < len(specs):
        raise ConfigError("--port", "two ports have the same name: write NAME=PORT")
    try:
        checked = next((spec for spec in specs if spec.protocol != "udp"), None)
        if check and not check.startswith("cmd:") and checked is None:
            raise ValueError("only cmd:COMMAND can check a program that has UDP ports alone")
        parsed = checks.parse(check or "tcp") if check or (with_command and checked) else None
    except ValueError as error:
        raise ConfigError("--check", str(error)) from None
    entries: dict[str, dict[str, Any]] = {}
    for spec in specs:
        called = service_port if spec is specs[0] else spec.port
        entries[spec.name] = {"port": spec.port, "protocol": spec.protocol, "servicePort": called}
    body: dict[str, Any] = {"address": address, "ports": entries, "ttl": ttl, "weight": weight, "zone": zone}
    body |= {"labels": dict(labels or {}), "check": parsed.text if parsed else ""}
    id = id or f"{address}-{specs[0].port}"
    # The registry's own judgement, before a command is started; what depends on the machine is left to the agent.
    instance = parse(service, id, body, Rules())
    if isinstance(instance, Refusal):
        raise ConfigError(_OPTIONS.get(instance.field.partition(".")[0], instance.field), instance.message)
    try:
        every = durations.parse(interval) if interval else instance.ttl / 3
    except ValueError as error:
        raise ConfigError("--interval", str(error)) from None
    if not 0.05 <= every < instance.ttl:
        raise ConfigError("--interval", f"must be at least 50ms and shorter than the ttl of {ttl}")
    notes = tuple(_note(spec) for spec in specs if not spec.named)
    return Registration(service, id, body, address, (checked or specs[0]).port, every, parsed, notes)


def _note(spec: PortSpec) -> str:
    """An endpoint whose port has another name than the service's is left out of the mesh, which only the agent sees."""
    other = f"a service whose port has another name needs --port NAME={spec.port}/{spec.protocol}"
    return f"port {spec.port} has no name, so it takes its protocol's: {spec.name}; {other}"
