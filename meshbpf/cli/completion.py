"""`meshbpf completion SHELL`, and what is offered for a name. Quick and silent: where nothing may be read, or nothing
is attached, nothing is offered, and no word of it appears between somebody's keystrokes.
"""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated

import typer
from typer.completion import completion_init, get_completion_script  # type: ignore[attr-defined]

from loader import instance as places
from loader.instance import Instance
from meshbpf.errors import MeshError
from meshbpf.model import Service

PROGRAM = "meshbpf"
VARIABLE = "_MESHBPF_COMPLETE"  # a script of ours runs us with it, instead of typer's own way of asking


class Shell(StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def register(app: typer.Typer) -> None:
    app.command()(completion)


def answering() -> None:
    """To be called before the command line is read: teaches it what a script of ours may ask."""
    if VARIABLE in os.environ:
        completion_init()


def completion(shell: Annotated[Shell, typer.Argument(help="whose script to print")]) -> None:
    """A script that completes commands, options and names. Try it with: source <(meshbpf completion bash)"""
    typer.echo(get_completion_script(prog_name=PROGRAM, complete_var=VARIABLE, shell=shell.value))


def services(ctx: typer.Context, incomplete: str) -> list[str]:
    """Services of the instance that the line names, from what was applied last; no agent is asked."""
    try:
        said = Instance(ctx.params.get("instance") or "default").read_state()
        found = [Service(one["name"], one.get("namespace", "default")).label for one in said["mesh"]["services"]]
    except (MeshError, OSError, LookupError, TypeError):
        return []  # a key was pressed; `meshbpf status` says what is wrong
    return sorted(name for name in found if name.startswith(incomplete))


def instances(incomplete: str) -> list[str]:
    """Those that are attached here."""
    try:
        return sorted(name for name in os.listdir(places.RUN) if name.startswith(incomplete))
    except OSError:
        return []
