"""A soak's judge finds what leaks, however slowly, and nothing in what does not."""

from __future__ import annotations

import random

import pytest

from bench import soak_text
from bench.leaks import HOUR, MINUTE, Sample, at_rest, climbing, settled, slope, tolerance

MIB = float(1 << 20)
REST = {"map.flows": 0.0, "map.endpoints": 12.0, "fds.agent": 30.0, "rss.agent": 60 * MIB, "series": 200.0}


def run(grow: float, *, length: float = HOUR, noise: float = 0.0) -> list[tuple[float, Sample]]:
    """Samples each 5 s of a memory that has `grow` bytes more in the end, and of one that is restarted now and then."""
    dice = random.Random(7)
    return [
        (
            at,
            {"rss.agent": 60 * MIB + grow * at / length + dice.uniform(-noise, noise), "map.flows": dice.random() * 50},
        )
        for at in (5.0 * n for n in range(int(length / 5)))
    ]


def test_back_at_the_baseline() -> None:
    assert at_rest(REST, REST) == []
    assert at_rest(REST, {**REST, "map.endpoints": 11.0, "fds.agent": 29.0, "rss.agent": 50 * MIB}) == []


@pytest.mark.parametrize(
    ("series", "more"),
    [("map.flows", 1), ("map.endpoints", 1), ("fds.agent", 3), ("rss.agent", 6.1 * MIB), ("sockets.open", 3)],
)
def test_what_did_not_come_back_is_named(series: str, more: float) -> None:
    begun = REST.get(series, 0.0)
    (finding,) = at_rest(REST, {**REST, series: begun + more})
    assert (finding.series, finding.baseline, finding.value) == (series, begun, begun + more)
    assert series in str(finding) and "at rest" in str(finding)
    smaller = at_rest(REST, {**REST, series: finding.allowed})
    assert smaller == []


def test_what_has_no_tolerance_is_shown_only() -> None:
    assert tolerance("series") is None
    assert at_rest(REST, {**REST, "series": 9000.0}) == []


def test_a_map_nobody_knew_before_must_be_empty() -> None:
    assert [finding.series for finding in at_rest(REST, {**REST, "map.new": 1.0})] == ["map.new"]


@pytest.mark.parametrize("noise", [0.0, 2 * MIB])
def test_memory_that_climbs_is_found_before_it_is_large(noise: float) -> None:
    (finding,) = climbing(run(5 * MIB, noise=noise))
    assert finding.series == "rss.agent" and "climbing" in finding.how
    assert at_rest(REST, {"rss.agent": 65 * MIB}) == []


@pytest.mark.parametrize("noise", [0.0, 2 * MIB])
def test_memory_that_stays_is_not(noise: float) -> None:
    assert climbing(run(0, noise=noise)) == []
    assert climbing(run(-5 * MIB, noise=noise)) == []


@pytest.mark.parametrize(("leak", "found"), [(0.0, 0), (3 * MIB, 1)])
def test_a_saw_is_judged_by_its_lower_edge(leak: float, found: int) -> None:
    """What waits for the next collection is none; what a collection leaves more of each time is one."""
    saw = [(at, {"rss.worker": 30 * MIB + at % 200 / 200 * 8 * MIB + leak * at / HOUR}) for at in range(0, 3600, 5)]
    assert len(climbing(saw)) == found


def test_memory_that_grows_in_the_beginning_only_is_not() -> None:
    grown = [(at, {"rss.agent": 60 * MIB + min(at / 600, 1) * 30 * MIB}) for at in range(0, 3600, 5)]
    assert climbing(grown) == []


def test_a_step_in_the_middle_is_not_a_slope_and_the_baseline_finds_it() -> None:
    stepped = [(at, {"rss.agent": 60 * MIB + (20 * MIB if at > 3400 else 0)}) for at in range(0, 3600, 5)]
    assert climbing(stepped) == []
    assert at_rest(REST, {"rss.agent": 80 * MIB}) != []


def test_a_short_run_says_nothing_about_an_hour() -> None:
    assert climbing(run(50 * MIB, length=10 * MINUTE)) == []


def test_slope() -> None:
    assert slope([(0, 1), (1, 3), (2, 5), (3, 7), (4, 1000)]) == 2.0  # one wild minute moves nothing
    with pytest.raises(ValueError, match="two moments"):
        slope([(1, 1)])


def test_settled() -> None:
    assert settled(REST, {**REST, "rss.agent": 1.0, "series": 3.0})
    busy = {**REST, "map.flows": 4.0}
    assert not settled(busy, busy), "what stands still in use is no rest"
    assert not settled(REST, {**REST, "map.flows": 1.0})
    assert not settled(REST, {**REST, "sockets.open": 1.0})


def test_the_table_marks_what_leaked_and_the_minute_is_a_line() -> None:
    end = {**REST, "map.flows": 2.0, "sockets.open": 0.0, "fds.worker": 5.0, "restarts": 1.0, "rss.worker": 30 * MIB}
    rows = {line.split()[0]: line for line in soak_text.table(REST, [end], end).splitlines()}
    assert rows["map.flows"].endswith(soak_text.MARK) and rows["map.flows"].split()[1:5] == ["0", "2", "2", "0"]
    assert rows["rss.agent"].split()[1:] == ["60.0M", "60.0M", "60.0M", "66.0M"]
    assert rows["series"].split()[4] == "-"
    assert "\n" not in soak_text.minute(60.0, {"ok": 7}, end)
