"""`meshbpf check`: look, judge, show, and end with a code that a script can use. Nothing is changed."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Sequence
from itertools import groupby
from typing import Annotated

import typer

from meshbpf import durations
from meshbpf.cli import facts, findings, output
from meshbpf.cli.findings import Finding, Result
from meshbpf.cli.options import InstanceName, Output

PAUSE = 0.25  # between two looks of --wait: an agent that starts offers nothing to wait on until it is there
WIDTH = 80


def register(app: typer.Typer) -> None:
    app.command()(check)


def check(
    instance: InstanceName = "default",
    pre: Annotated[bool, typer.Option("--pre", help="only what is needed before an attach, not the instance")] = False,
    wait: Annotated[str, typer.Option("--wait", help="look again until there is no error, at most this long")] = "0s",
    form: Output = "table",
) -> None:
    """What this machine can do, and whether the instance works. Each row is ok, or has its remedy."""
    output.check_format(form)
    try:
        deadline = time.monotonic() + durations.parse(wait)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--wait") from None
    machine = facts.machine()
    before = findings.machine(machine)
    may_look = not machine.missing_capabilities
    while True:
        # What the machine is does not change while we wait; the instance does.
        found = before if pre or not may_look else before + findings.instance(facts.instance(instance))
        code = findings.exit_code(found, may_look)
        if code != 1 or time.monotonic() + PAUSE > deadline:
            break
        time.sleep(PAUSE)
    if form in ("json", "yaml"):
        output.structured(form, _document(found))
    else:
        typer.echo(_text(found))
    raise typer.Exit(code)


def _groups(found: Sequence[Finding]) -> list[tuple[str, list[Finding]]]:
    return [(category, list(rows)) for category, rows in groupby(found, key=lambda finding: finding.category)]


def _document(found: Sequence[Finding]) -> dict[str, object]:
    return {
        "success": all(finding.result is not Result.ERROR for finding in found),
        "categories": [
            {
                "name": category,
                "checks": [
                    {"id": row.id, "result": row.result.value, "detail": row.detail, "remedy": row.remedy}
                    for row in rows
                ],
            }
            for category, rows in _groups(found)
        ],
    }


def _text(found: Sequence[Finding]) -> str:
    wide = max(len(finding.id) for finding in found)
    indent = " " * (2 + 9 + wide + 2)
    lines: list[str] = []
    for category, rows in _groups(found):
        lines += [*([""] if lines else []), category.upper()]
        for row in rows:
            says = [row.detail] + ([f"remedy: {row.remedy}"] if row.result is not Result.OK else [])
            text = [line for part in says for line in textwrap.wrap(part, max(WIDTH - len(indent), 30))]
            lines.append(f"  {row.result.value.ljust(9)}{row.id.ljust(wide)}  {text[0] if text else '-'}")
            lines += [indent + line for line in text[1:]]
    counts = {result: sum(1 for finding in found if finding.result is result) for result in Result}
    lines += ["", f"ok {counts[Result.OK]}, warnings {counts[Result.WARNING]}, errors {counts[Result.ERROR]}"]
    return "\n".join(lines)
