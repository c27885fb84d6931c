"""How lists are shown: `-o table|wide|json|yaml`. Upper-case heads, `-` for no data, units in the values; no colour."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import typer
import yaml

SCHEMA_VERSION = 1
FORMATS = ("table", "wide", "json", "yaml")


def check_format(form: str, more: Sequence[str] = ()) -> str:
    """Raises typer.BadParameter (exit 2) for a format nobody knows."""
    if form not in (*FORMATS, *more):
        raise typer.BadParameter(f"{form!r} is none of {', '.join((*FORMATS, *more))}", param_hint="-o")
    return form


def counted(number: int, noun: str, more: str = "") -> str:
    """`1 port`, `2 ports`; `more` is the plural where it is not the noun with an s."""
    return f"{number} {noun if number == 1 else more or noun + 's'}"


def age(seconds: float) -> str:
    """A duration in its largest two units: `3s`, `2m10s`, `4h5m`, `9d2h`."""
    whole = int(seconds)
    for size, unit, below, lower in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size}{unit}{rest}{lower}" if rest else f"{whole // size}{unit}"
    return f"{whole}s"


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell, two blanks between them, none at the end of a line."""
    text = [[str(cell) if cell not in (None, "") else "-" for cell in row] for row in rows]
    widths = [max(len(head), *(len(row[i]) for row in text)) if text else len(head) for i, head in enumerate(heads)]
    lines = [heads, *text]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def show(
    form: str, heads: Mapping[str, str], rows: Sequence[Mapping[str, Any]], kind: str, wide: Sequence[str] = ()
) -> None:
    """Print rows. `heads` maps a row's key to its column head; `wide` keys are columns only in `-o wide`."""
    if form in ("json", "yaml"):
        structured(form, {kind: list(rows)})
        return
    keys = [key for key in heads if form == "wide" or key not in wide]
    typer.echo(table([heads[key] for key in keys], [[row.get(key) for key in keys] for row in rows]))


def structured(form: str, value: Mapping[str, Any]) -> None:
    """Print a JSON or YAML object with its schemaVersion."""
    whole = {"schemaVersion": SCHEMA_VERSION, **value}
    if form == "json":
        typer.echo(json.dumps(whole, indent=2))
    else:
        typer.echo(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True).rstrip())
