"""Options that several commands share, so that one thing has one name and one help text everywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from loader import environment
from loader.instance import Instance
from meshbpf.cli import completion
from meshbpf.errors import ConfigError, EnvironmentLack, MeshError

Cgroups = Annotated[
    list[Path],
    typer.Option("--cgroup", help="cgroup2 directory to lead (repeatable); a relative one is below the cgroup2 mount"),
]
Config = Annotated[
    list[Path] | None,
    typer.Option(
        "-c",
        "--config",
        help="configuration file or directory (repeatable); default /etc/meshbpf",
        envvar="MESHBPF_CONFIG",
    ),
]


def _instance_name(value: str) -> str:
    try:
        Instance(value)
    except MeshError as error:
        raise typer.BadParameter(str(error)) from None
    return value


InstanceName = Annotated[
    str,
    typer.Option(
        "--instance",
        callback=_instance_name,
        help="which meshbpf on this machine",
        envvar="MESHBPF_INSTANCE",
        autocompletion=completion.instances,
    ),
]
ServiceName = Annotated[
    str | None,
    typer.Argument(help="only this service: name or name.namespace", autocompletion=completion.services),
]
AllowRoot = Annotated[bool, typer.Option("--allow-root-cgroup", help="lead the whole machine, this shell included")]
FORMATS = ("table", "wide", "json", "yaml")


def _forms(incomplete: str) -> list[str]:
    return [form for form in FORMATS if form.startswith(incomplete)]


Output = Annotated[
    str,
    typer.Option("-o", "--output", help="table, wide, json or yaml", envvar="MESHBPF_OUTPUT", autocompletion=_forms),
]


def _one_of(*words: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in words:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(words)}")
        return value

    return check


LogLevel = Annotated[
    str,
    typer.Option(
        "--log-level", callback=_one_of("debug", "info", "warning", "error"), help="debug, info, warning or error"
    ),
]
LogFormat = Annotated[str, typer.Option("--log-format", callback=_one_of("text", "json"), help="text or json")]

DEFAULT_CONFIG = Path("/etc/meshbpf")


def configuration(paths: list[Path] | None) -> list[Path]:
    """The named files, else the default directory. Raises ConfigError when there is neither."""
    if not paths and not DEFAULT_CONFIG.exists():
        raise ConfigError(str(DEFAULT_CONFIG), "does not exist: name a file or directory with -c")
    return paths or [DEFAULT_CONFIG]


def below_mount(path: Path) -> Path:
    """A relative cgroup is below the cgroup2 mount, wherever this machine has it."""
    return path if path.is_absolute() else environment.cgroup2() / path


def cgroups(paths: list[Path], allow_root: bool) -> tuple[Path, ...]:
    """Checked cgroup directories, each once. Raises EnvironmentLack with the remedy."""
    with _telling_of_relative(*paths):
        return tuple(dict.fromkeys(environment.check_cgroup(below_mount(path), allow_root) for path in paths))


def cgroup_to_join(path: Path) -> Path:
    """A checked cgroup directory that may be missing yet. Raises EnvironmentLack with the remedy."""
    with _telling_of_relative(path):
        return environment.within_cgroup2(below_mount(path))


@contextlib.contextmanager
def _telling_of_relative(*paths: Path) -> Iterator[None]:
    """Who wrote an absolute path may not know where this machine has the mount, nor that it need not be written."""
    try:
        yield
    except EnvironmentLack as error:
        if not any(path.is_absolute() for path in paths):
            raise
        relative = "a name without a leading / is below the cgroup2 mount, such as --cgroup shop"
        raise EnvironmentLack(error.what, f"{error.remedy}; {relative}") from error
