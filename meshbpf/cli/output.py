"""How commands show what they found: `-o table|wide|json|yaml`, on the screen that there is. Lines are `layout`'s."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer
import yaml

from meshbpf.cli import layout
from meshbpf.cli.layout import Column, Screen
from meshbpf.cli.options import FORMATS

SCHEMA_VERSION = 1


def check_format(form: str, more: Sequence[str] = ()) -> str:
    """Raises typer.BadParameter (exit 2) for a format nobody knows."""
    if form not in (*FORMATS, *more):
        raise typer.BadParameter(f"{form!r} is none of {', '.join((*FORMATS, *more))}", param_hint="-o")
    return form


def screen(environment: Mapping[str, str] = os.environ, terminal: bool | None = None) -> Screen:
    """Who looks: a terminal has an end and colours (not with NO_COLOR, not a dumb one); what else reads us has neither,
    unless it says how wide it is (`watch` sets COLUMNS).
    """
    terminal = sys.stdout.isatty() if terminal is None else terminal
    asked = environment.get("COLUMNS", "")
    columns = int(asked) if asked.isascii() and asked.isdigit() else 0
    if not columns and terminal:
        columns = shutil.get_terminal_size().columns
    colour = terminal and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"
    return Screen(columns or None, colour)


def counted(number: int, noun: str, more: str = "") -> str:
    """`1 port`, `2 ports`; `more` is the plural where it is not the noun with an s."""
    return f"{number} {noun if number == 1 else more or noun + 's'}"


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of its own kind, for whom no end of the line is near."""
    columns = [Column(head, head) for head in heads]
    return layout.table(columns, [dict(zip(heads, row, strict=True)) for row in rows], Screen())


def show(form: str, columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], kind: str) -> None:
    """Print rows."""
    if form in ("json", "yaml"):
        structured(form, {kind: list(rows)})
    else:
        say(layout.table(columns, rows, screen(), form == "wide"))


def say(text: str) -> None:
    """Print what `layout` made for `screen()`; it has decided about colours."""
    typer.echo(text, color=True)


def structured(form: str, value: Mapping[str, Any]) -> None:
    """Print a JSON or YAML object with its schemaVersion."""
    whole = {"schemaVersion": SCHEMA_VERSION, **value}
    if form == "json":
        typer.echo(json.dumps(whole, indent=2))
    else:
        typer.echo(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True).rstrip())
