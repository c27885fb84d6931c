"""What is measured and what it must reach. Pure data: a promise is changed here and nowhere else.

`ROWS` are the loads, `FIGURES` the claims. A claim compares one subject with another in one row by one metric; the
metric is CPU of the whole machine per completed request wherever that is the question, because BPF work lands on the
sender and does not show in a proxy's own time, and because on shared machines rps swings and CPU per request does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.stats import Estimate, estimate, holds, ratios

WIDEST = 0.05  # an interval wider than this has not answered the question: the row gets more rounds
ERRORS_ALLOWED = 0.001  # of all requests; a refusal is cheaper than an answer, so more of them would flatter

PEERS = ("envoy", "haproxy", "nginx")
HOOK, REDIRECT = INTERCEPTED = ("envoy-hook", "envoy-iptables")  # the same Envoy, behind ours and as in Istio
LOGGING = frozenset({"proxy", "proxy-off", *PEERS, *INTERCEPTED})  # equal features: they must have written their log

Cell = Mapping[str, Any]  # one measurement of one subject, as written to the raw file
Round = Mapping[str, Cell]  # subject name -> its cell


@dataclass(frozen=True, slots=True)
class Row:
    """One load, offered to every subject in turn."""

    name: str
    what: str
    subjects: tuple[str, ...]
    path: str = "/small"
    connections: int = 32
    close: bool = False  # a new connection for every request
    open_loop: bool = False  # constant rate, latency from the planned moment of sending


@dataclass(frozen=True, slots=True)
class Figure:
    """A claim: metric of `subject` over metric of `base` in `row` (no base: the plain value), and its bound."""

    name: str
    row: str
    metric: str
    subject: str
    base: str | None
    bound: float
    at_most: bool
    strict: bool = False
    repeat: bool = True  # more rounds while the interval is wide; not where the bound is far away


@dataclass(frozen=True, slots=True)
class Verdict:
    """A figure with what was found; `result` is None when the row could not be measured, `why` says why."""

    figure: Figure
    result: Estimate | None
    holds: bool
    why: str = ""


CALLED = ("none", "direct", "proxy", "proxy-off", *PEERS)
ALL = (*CALLED, *INTERCEPTED)
ROWS = (
    Row("keepalive", "1 KB answers, 32 kept connections", CALLED),
    Row("newconn", "1 KB answers, a new connection each", CALLED, close=True),
    Row("intercept", "intercepted, 32 kept connections", ("proxy", *INTERCEPTED)),
    Row("intercept-new", "intercepted, a new connection each", ("proxy", *INTERCEPTED), close=True),
    # Eight: enough to keep every hop busy, few enough that eight windows of loopback stay in the cache of a small VM.
    Row("large", "1 MiB answers, 8 kept connections", ("none", "direct", "proxy", *PEERS), "/large", 8),
    Row("latency", "1 KB answers at half of Envoy's peak rate", ("none", "proxy", "envoy"), open_loop=True),
)
# The rows without a load, and what each measures.
ATTACH, SCALE, CONNECT, MEMORY, STREAMS = "attach", "scale", "connect", "memory", "streams"
SIZES = (10, 1_000, 10_000)  # services
LENGTHY = (SCALE, MEMORY, STREAMS)  # a short run leaves these out unless it is asked for them
SINGLES = {
    ATTACH: ("attach",),
    SCALE: ("maps", "start-yaml", "start-json", "start-registry", "small-file", "change", "change-file"),
    CONNECT: tuple(f"{way}-{count}" for way in ("hook", "iptables", "nft") for count in SIZES),
    MEMORY: ("memory",),
    STREAMS: ("streams",),
}

FIGURES = (
    Figure("direct vs none, keep-alive: CPU/request", "keepalive", "cpu_us", "direct", "none", 1.04, True, strict=True),
    Figure("direct vs none, keep-alive: rps", "keepalive", "rps", "direct", "none", 0.95, False),
    Figure("direct vs none, new connection: CPU/request", "newconn", "cpu_us", "direct", "none", 1.08, True),
    Figure("proxy vs Envoy, keep-alive: CPU/request", "keepalive", "cpu_us", "proxy", "envoy", 0.7, True),
    Figure("proxy vs Envoy, keep-alive: rps", "keepalive", "rps", "proxy", "envoy", 1.5, False),
    Figure("proxy vs Envoy, half of Envoy's peak: p99", "latency", "p99_us", "proxy", "envoy", 1.0, True),
    Figure("proxy vs Envoy, new connection: CPU/request", "newconn", "cpu_us", "proxy", "envoy", 1.3, True),
    Figure("proxy vs Envoy, 1 MiB bodies: throughput", "large", "rps", "proxy", "envoy", 0.8, False),
    # At most twice the better one of the two is at most twice either.
    *(
        Figure(f"proxy vs {title}, {load}: CPU/request", row, "cpu_us", "proxy", peer, 2.0, True, repeat=False)
        for row, load in (("keepalive", "keep-alive"), ("newconn", "new connection"), ("large", "1 MiB bodies"))
        for peer, title in (("haproxy", "HAProxy"), ("nginx", "nginx"))
    ),
    *(
        Figure(f"connect hook vs iptables REDIRECT, {load}: CPU/request", row, "cpu_us", HOOK, REDIRECT, 1.0, True)
        for row, load in (("intercept", "keep-alive"), ("intercept-new", "new connection"))
    ),
    *(
        Figure(f"proxy vs Envoy behind REDIRECT, {load}: CPU/request", row, "cpu_us", "proxy", REDIRECT, most, True)
        for row, load, most in (("intercept", "keep-alive", 0.7), ("intercept-new", "new connection", 1.3))
    ),
    Figure("redirect vs off, keep-alive: CPU/request", "keepalive", "cpu_us", "proxy", "proxy-off", 0.95, True),
    Figure("redirect vs off, new connection: CPU/request", "newconn", "cpu_us", "proxy", "proxy-off", 1.02, True),
    Figure("attach, second time: seconds", ATTACH, "seconds", "attach", None, 2.0, True),
    *(
        Figure(what, SCALE, metric, subject, None, bound, True)
        for what, metric, subject, bound in (
            ("100 000 endpoints into the maps: seconds", "seconds", "maps", 1.0),
            ("run with 100 000 endpoints in one YAML file, to ready: seconds", "seconds", "start-yaml", 12.0),
            ("run with 100 000 endpoints in one JSON file, to ready: seconds", "seconds", "start-json", 3.0),
            ("run with a full registry (10 000 instances), to ready: seconds", "seconds", "start-registry", 3.0),
            ("one endpoint of 100 001 changed by the registry: ms", "ms", "change", 100.0),
            ("one endpoint changed in a file of 100 services: ms", "ms", "change-file", 100.0),
        )
    ),
    Figure("connect() with 10 000 services vs 10", CONNECT, "connect_us", "hook-10000", "hook-10", 1.05, True),
    Figure("memory of the agent, 10 000 idle proxied connections: MB", MEMORY, "agent_mb", "memory", None, 80.0, True),
    # 60 MB and 20 KB for each connection.
    Figure("memory of the worker, 10 000 idle: MB", MEMORY, "worker_mb", "memory", None, 260.0, True),
    *(
        Figure(f"restart, kill, upgrade: {what}", STREAMS, metric, "streams", None, bound, most, strict=True)
        for what, metric, bound, most in (
            ("resets of 200 direct streams", "resets", 0.0, True),
            ("bytes lost in them", "lost_bytes", 0.0, True),
            ("streams out of order or changed, proxied ones too", "wrong", 0.0, True),
            ("proxied streams cut and not counted", "cut_uncounted", 0.0, True),
            ("new direct connections that failed", "new_failed", 0.0, True),
            ("new direct connections per second", "new_per_second", 1990.0, False),
        )
    ),
)


def series(rounds: Iterable[Round], subject: str, metric: str) -> list[float]:
    return [float(cells[subject][metric]) for cells in rounds]


def paired(rounds: Sequence[Round], figure: Figure) -> list[Round]:
    """The rounds that measured both sides; extra rounds carry only the subjects whose figures were still too wide."""
    needed = {figure.subject} | ({figure.base} if figure.base else set())
    return [cells for cells in rounds if needed <= cells.keys()]


def result_of(figure: Figure, rounds: Sequence[Round]) -> Estimate | None:
    """What the rounds say about a figure; None when they never measured both sides."""
    rounds = paired(rounds, figure)
    if not rounds:
        return None
    ours = series(rounds, figure.subject, figure.metric)
    return estimate(ratios(ours, series(rounds, figure.base, figure.metric)) if figure.base else ours)


def error_share(figure: Figure, rounds: Sequence[Round]) -> float:
    """The worst share of failed requests on either side, over all rounds together."""
    worst = 0.0
    for name in (figure.subject, figure.base):
        cells = [cells[name] for cells in paired(rounds, figure) if name]
        failed = sum(float(cell.get("errors", 0)) for cell in cells)
        done = sum(float(cell.get("requests", 0)) for cell in cells)
        worst = max(worst, failed / (failed + done) if failed else 0.0)
    return worst


def silent(figure: Figure, rounds: Sequence[Round]) -> list[str]:
    """The sides that should have written an access log and did not: what they saved was not carrying requests."""
    names = sorted(LOGGING & {figure.subject, figure.base or ""})
    return [name for name in names if not any(cells[name].get("log_bytes") for cells in paired(rounds, figure))]


def judge(figure: Figure, rounds: Sequence[Round], missing: Mapping[str, str]) -> Verdict:
    """A figure that was not measured does not hold: silence is no proof, and neither are the rounds before a crash."""
    result = result_of(figure, rounds)
    names = [name for name in (figure.subject, figure.base) if name and name in missing]
    if result is None or names:
        why = "; ".join(f"{name}: {missing[name]}" for name in names) or "row not run"
        return Verdict(figure, result, False, why)
    share = error_share(figure, rounds)
    if share > ERRORS_ALLOWED:
        return Verdict(figure, result, False, f"{share:.2%} of the requests failed")
    if quiet := silent(figure, rounds):
        return Verdict(figure, result, False, f"no access log from {', '.join(quiet)}")
    return Verdict(figure, result, holds(result, figure.bound, figure.at_most, figure.strict))


def too_wide(row: Row, rounds: Sequence[Round]) -> list[Figure]:
    """The row's figures whose interval has not answered yet; only ratios, for seconds the bound is far away."""
    found = []
    for figure in FIGURES:
        result = result_of(figure, rounds) if figure.row == row.name and figure.base and figure.repeat else None
        if result is not None and wide(result):
            found.append(figure)
    return found


def wide(ratio: Estimate) -> bool:
    """Has it not answered? Of a ratio above 1 the share counts: 0.1 of 2 is as good as 0.05 of 1."""
    return ratio.width > WIDEST * max(1.0, ratio.value)
