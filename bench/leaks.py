"""Says what a soak has leaked. Pure: samples in, findings out; which series there are the caller knows.

Two rules, both with tolerances stated here. At rest: with no load and nothing changing, every series is back where it
was at rest before the load. Under load: memory that only grows is a leak also while it still is small. Python collects
cycles now and then, so memory is a saw, and what grows is its lower edge: the least of every five minutes. Its slope is
the median of the slopes between all pairs (Theil-Sen), which one busy period does not move.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

Sample = Mapping[str, float]  # series → value at one moment

MINUTE, HOUR = 60.0, 3600.0
PERIOD = 5 * MINUTE  # longer than what a worker throws away waits for its collection
STEADY_PERIODS = 6  # fewer say nothing about an hour
WARM_SHARE = 1 / 3  # of a run, in which pools and arenas may still grow
SLOPE_PERCENT = 1.0  # per hour, of memory under load
SLOPE_BYTES = 1 << 20  # growth within the run that is none


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far above its baseline a series may rest: the larger of an amount and a share of the baseline."""

    amount: float
    percent: float = 0.0

    def allowed(self, baseline: float) -> float:
        return baseline + max(self.amount, baseline * self.percent / 100)


# The longest prefix of a series' name decides. A name that none fits is shown and not judged.
TOLERANCES = {
    "map.": Tolerance(0),
    "fds.": Tolerance(2),  # a registry client or a pooled upstream connection that is just being used
    "fds.worker": Tolerance(6),  # a worker keeps a pidfd for each caller it has looked at last
    "fds.workers": Tolerance(12),
    "sockets.": Tolerance(2),
    "namespaces": Tolerance(0),
    "cgroups": Tolerance(0),
    "threads.": Tolerance(6),  # asyncio's pool keeps the threads that it once needed
    "rss.": Tolerance(4 << 20, 10),  # arenas do not all go back to the system
    "pss.": Tolerance(4 << 20, 10),
    # … and up to 50 000 objects in cycles (meshbpf/garbage.py), of which each connection leaves some, wait for a look.
    "rss.worker": Tolerance(12 << 20),
    "pss.worker": Tolerance(12 << 20),
}
# What is not used at all, which a baseline that is worth the name shows too.
IDLE = {"namespaces": 1.0, "map.flows": 0.0, "map.pairs": 0.0, "map.socks": 0.0, "sockets.open": 0.0}
STEADY = ("rss.",)  # prefixes of what may not climb under load


@dataclass(frozen=True, slots=True)
class Finding:
    """One series that leaked: it is at `value` where at most `allowed` would be right."""

    series: str
    baseline: float
    value: float
    allowed: float
    how: str

    def __str__(self) -> str:
        was = f"it was {self.baseline:.0f}, at most {self.allowed:.0f} is right"
        return f"{self.series}: {self.value:.0f} {self.how}; {was}"


def tolerance(series: str) -> Tolerance | None:
    """What applies to the series; None: it is not judged."""
    fitting = [prefix for prefix in TOLERANCES if series.startswith(prefix)]
    return TOLERANCES[max(fitting, key=len)] if fitting else None


def at_rest(baseline: Sample, end: Sample) -> list[Finding]:
    """What has not come back. A series that the baseline lacks began at 0; one that is gone again is no leak."""
    found = []
    for series, value in end.items():
        rule = tolerance(series)
        begun = baseline.get(series, 0.0)
        if rule is not None and value > rule.allowed(begun):
            found.append(Finding(series, begun, value, rule.allowed(begun), "at rest"))
    return found


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Median slope between all pairs of (seconds, value), per second. Raises ValueError with fewer than two points."""
    slopes = [(v2 - v1) / (t2 - t1) for (t1, v1), (t2, v2) in combinations(points, 2) if t2 != t1]
    if not slopes:
        raise ValueError("a slope needs two moments")
    return median(slopes)


def edges(samples: Iterable[tuple[float, Sample]]) -> dict[str, list[tuple[float, float]]]:
    """Series → (second, least value) of each period."""
    grouped: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for at, sample in samples:
        for series, value in sample.items():
            grouped[series][int(at // PERIOD)].append(value)
    return {
        series: [((number + 0.5) * PERIOD, min(values)) for number, values in sorted(periods.items())]
        for series, periods in grouped.items()
    }


def climbing(samples: Sequence[tuple[float, Sample]]) -> list[Finding]:
    """Memory that grows under load. Nothing when the run is too short to tell."""
    found = []
    for series, points in edges(samples).items():
        steady = points[int(len(points) * WARM_SHARE) :]
        if not series.startswith(STEADY) or len(steady) < STEADY_PERIODS:
            continue
        begun, per_second = steady[0][1], slope(steady)
        seconds = steady[-1][0] - steady[0][0]
        allowed = max(begun * SLOPE_PERCENT / 100 / HOUR * seconds, SLOPE_BYTES)
        if per_second * seconds > allowed:
            value = begun + per_second * seconds
            found.append(Finding(series, begun, value, begun + allowed, f"climbing for {seconds / MINUTE:.0f} minutes"))
    return found


def settled(earlier: Sample, later: Sample) -> bool:
    """Whether nothing that is counted moves any more (memory may), and nobody uses anything."""
    if at_rest(IDLE, {name: later[name] for name in IDLE if name in later}):
        return False
    names = {name for name in (*earlier, *later) if tolerance(name) and not name.startswith(("rss.", "pss."))}
    return all(earlier.get(name) == later.get(name) for name in names)
