"""What the reader sees: Markdown from measured rounds. Pure: text in, text out, no measuring and no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from bench.figures import ROWS, SINGLES, Figure, Round, Verdict, series, wide
from bench.stats import drift

# Beyond this spread of `none` the machine was not quiet and the run is to be repeated.
CALM = 0.15


def figures_table(verdicts: Sequence[Verdict]) -> str:
    lines = ["| figure | must reach | measured [95 % interval] | width | rounds | holds? |"]
    lines.append("|---|---|---|---|---|---|")
    for verdict in verdicts:
        found, width, rounds = "not measured", "-", "-"
        if verdict.result is not None:
            r = verdict.result
            found, width, rounds = f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]", f"{r.width:.3f}", str(r.rounds)
        answer = ("yes" if verdict.holds else "**no**") + (f" ({verdict.why})" if verdict.why else "")
        lines.append(f"| {verdict.figure.name} | {_bound(verdict.figure)} | {found} | {width} | {rounds} | {answer} |")
    return "\n".join(lines)


def _bound(figure: Figure) -> str:
    sign = "≤" if figure.at_most else "≥"
    return f"{sign} {figure.bound:g}" + (" (whole interval)" if figure.strict else "")


def context_table(rounds: Mapping[str, Sequence[Round]]) -> str:
    """The plain medians behind the ratios. Compare only within one run: the machine is another one an hour later."""
    lines = [
        "| load | subject | CPU us/request | own processes | rps | p50 us | p99 us | log bytes/request | errors |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        for name in row.subjects:
            cells = [cells for cells in rounds.get(row.name, []) if name in cells]
            if not cells:
                continue
            keys = ("cpu_us", "own_cpu_us", "rps", "p50_us", "p99_us", "log_bytes")
            cpu, own, rps, p50, p99, log = (median(series(cells, name, key)) for key in keys)
            errors = sum(series(cells, name, "errors"))
            # A closed loop does not know its latency, and the constant-rate client's own CPU is most of its row's.
            latency = f"{p50:.0f} | {p99:.0f}" if row.open_loop else "- | -"
            cost = "- | -" if row.open_loop else f"{cpu:.1f} | {own:.1f}"
            lines.append(f"| {row.what} | {name} | {cost} | {rps:.0f} | {latency} | {log:.0f} | {errors:.0f} |")
    return "\n".join(lines)


def singles_table(rounds: Mapping[str, Sequence[Round]]) -> str:
    """What the rows without a load measured: every cell's numbers, median and spread."""
    lines = ["| row | of | what | median | lowest | highest | cells |", "|---|---|---|---|---|---|---|"]
    for row, subjects in SINGLES.items():
        for name in subjects:
            cells = [cells for cells in rounds.get(row, []) if name in cells]
            for key in cells[0][name] if cells else ():
                values = series(cells, name, key)
                numbers = " | ".join(f"{value:.4g}" for value in (median(values), min(values), max(values)))
                lines.append(f"| {row} | {name} | {key} | {numbers} | {len(values)} |")
    return "\n".join(lines)


def doubts(verdicts: Sequence[Verdict], rounds: Mapping[str, Sequence[Round]]) -> list[str]:
    """What a careful reader must know before quoting a number of this run."""
    found = []
    for row in ROWS:
        base = [cells for cells in rounds.get(row.name, []) if "none" in cells]
        spread = drift(series(base, "none", "cpu_us")) if base and not row.open_loop else 0.0
        if spread > CALM:
            found.append(f"{row.name}: CPU/request of `none` moved by {spread:.0%}: the machine was not quiet")
    every = [cell for cells in rounds.values() for one in cells for cell in one.values()]
    foreign = [cell["foreign_share"] for cell in every if "foreign_share" in cell]
    if foreign and median(foreign) > CALM:
        found.append(f"{median(foreign):.0%} of the machine's CPU was used by others in the median cell")
    for verdict in verdicts:
        if verdict.figure.base and verdict.result and wide(verdict.result):
            found.append(f"{verdict.figure.name}: interval {verdict.result.width:.3f} wide")
    late = [(name, cell["late_p99_us"], cell["p99_us"]) for r in rounds.get("latency", []) for name, cell in r.items()]
    if late and median(one[1] for one in late) > median(one[2] for one in late) / 2:
        found.append("latency: the client itself was late, its p99 lateness is over half of the measured p99")
    return found


def markdown(
    title: str, verdicts: Sequence[Verdict], rounds: Mapping[str, Sequence[Round]], facts: Mapping[str, Any]
) -> str:
    notes = "\n".join(f"- {line}" for line in doubts(verdicts, rounds))
    about = ", ".join(f"{key} {value}" for key, value in facts.items())
    parts = [f"# {title}", about, figures_table(verdicts), "## Medians", context_table(rounds), singles_table(rounds)]
    return "\n\n".join([*parts, *(["## Doubts", notes] if notes else [])]) + "\n"
