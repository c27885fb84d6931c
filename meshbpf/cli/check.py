"""`meshbpf check`: look, judge, show, and end with a code that a script can use. Nothing is changed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import groupby
from typing import Annotated

import typer

from meshbpf import durations
from meshbpf.cli import facts, findings, layout, output
from meshbpf.cli.findings import Finding, Result
from meshbpf.cli.layout import Screen
from meshbpf.cli.options import InstanceName, Output

PAUSE = 0.25  # between two looks of --wait: an agent that starts offers nothing to wait on until it is there
MARGIN, RESULT = "  ", 9


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
    machine = facts.machine("" if pre else instance)
    before = findings.machine(machine)
    may_look = not (machine.missing_capabilities or machine.bpf_refused)
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
        output.say(text(found, output.screen()))
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


def text(found: Sequence[Finding], screen: Screen) -> str:
    """By category: the result, the id, what was found, and the remedy of what is not ok."""
    wide = max((len(finding.id) for finding in found), default=0)
    indent = " " * (len(MARGIN) + RESULT + wide + layout.GAP)
    room = None if screen.width is None else max(screen.width - len(indent), layout.LEAST)
    lines: list[str] = []
    for category, rows in _groups(found):
        lines += [*([""] if lines else []), screen.paint(category.upper(), layout.BOLD)]
        for row in rows:
            says = [row.detail or "-"] + ([f"remedy: {row.remedy}"] if row.result is not Result.OK else [])
            first, *more = [line for part in says for line in layout.lines_of(part, room)]
            result = screen.mood(row.result.value) + " " * (RESULT - len(row.result.value))
            lines.append(f"{MARGIN}{result}{row.id.ljust(wide + layout.GAP)}{first}")
            lines += [indent + line for line in more]
    counts = {result: sum(1 for finding in found if finding.result is result) for result in Result}
    lines += ["", f"ok {counts[Result.OK]}, warnings {counts[Result.WARNING]}, errors {counts[Result.ERROR]}"]
    return "\n".join(lines)
