"""How a soak reads: the line of each minute, and the table in the end. Pure: samples in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench import leaks

MARK = "  <-- FOUND"


def minute(passed: float, tally: Mapping[str, int], sample: leaks.Sample) -> str:
    """After `passed` seconds."""
    tables = sum(value for name, value in sample.items() if name.startswith("map."))
    return (
        f"{passed / 60:4.0f} min  {tally.get('ok', 0):8d} ok  {tally.get('failed', 0):4d} failed"
        f"  agent {megabytes(sample['rss.agent'])}  worker {megabytes(sample['rss.worker'])}"
        f"  fds {sample['fds.agent']:.0f}+{sample['fds.worker']:.0f}"
        f"  sockets {sample['sockets.open']:.0f}  table entries {tables:.0f}  restarts {sample['restarts']:.0f}"
    )


def counts(found: Mapping[str, int]) -> str:
    return "  ".join(f"{name}: {count}" for name, count in sorted(found.items()))


def table(baseline: leaks.Sample, samples: Sequence[leaks.Sample], end: leaks.Sample) -> str:
    """Every series: at rest before, the most under load, at rest after, and what is allowed."""
    lines = [f"{'SERIES':18} {'BEFORE':>10} {'MOST':>10} {'AFTER':>10} {'ALLOWED':>10}"]
    for name in sorted({*baseline, *end}):
        rule = leaks.tolerance(name)
        before, after = baseline.get(name, 0.0), end.get(name, 0.0)
        most = max((sample.get(name, 0.0) for sample in samples), default=0.0)
        allowed = None if rule is None else rule.allowed(before)
        shown = [_value(name, value) for value in (before, most, after, allowed)]
        mark = MARK if allowed is not None and after > allowed else ""
        lines.append(f"{name:18} {' '.join(f'{text:>10}' for text in shown)}{mark}")
    return "\n".join(lines)


def _value(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return megabytes(value) if name.startswith(("rss.", "pss.")) else f"{value:.0f}"


def megabytes(value: float) -> str:
    return f"{value / (1 << 20):.1f}M"
