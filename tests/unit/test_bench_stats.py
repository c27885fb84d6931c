"""The bench's deciding half, with known answers: statistics, verdicts, report, and the constant-rate client's clock."""

import socket
import sys
import threading
import time
from pathlib import Path

import pytest

# `bench` is a tool of the repository, not an installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import __main__ as command
from bench import figures, openloop, report
from bench.envoy import config
from bench.figures import FIGURES, ROWS, Figure, judge, too_wide
from bench.machine import busy_seconds, steered, usage_seconds
from bench.stats import Estimate, drift, estimate, holds, percentile, ratios

LOOSE = Figure("loose", "keepalive", "cpu_us", "direct", "none", 1.04, at_most=True)
STRICT = Figure("strict", "keepalive", "cpu_us", "direct", "none", 1.04, at_most=True, strict=True)


def rounds(ours: list[float], base: list[float], errors: int = 0) -> list[dict[str, dict[str, float]]]:
    return [
        {
            "direct": {"cpu_us": a, "requests": 1000, "errors": errors},
            "none": {"cpu_us": b, "requests": 1000, "errors": 0},
        }
        for a, b in zip(ours, base, strict=True)
    ]


# --- statistics


def test_ratios_are_taken_within_a_round() -> None:
    assert ratios([2.0, 30.0], [1.0, 10.0]) == [2.0, 3.0]


def test_ratios_refuse_unpaired_rounds_and_an_empty_base() -> None:
    with pytest.raises(ValueError, match="unpaired"):
        ratios([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="not positive"):
        ratios([1.0], [0.0])


def test_percentile_interpolates_between_neighbours() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 0.5) == 3.0
    assert percentile([0.0, 10.0], 0.25) == 2.5
    assert percentile([7.0], 0.975) == 7.0
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 0.5)


def test_estimate_of_equal_rounds_has_no_width() -> None:
    result = estimate([1.25] * 9)
    assert result == Estimate(1.25, 1.25, 1.25, 9)
    assert result.width == 0


def test_estimate_is_the_median_and_one_wild_round_does_not_move_it() -> None:
    calm = [0.98, 0.99, 1.0, 1.01, 1.02] * 3
    assert estimate(calm).value == 1.0
    wild = estimate([*calm[:-1], 50.0])
    assert wild.value == 1.0
    assert wild.high < 1.1


def test_estimate_of_three_rounds_spans_them_all() -> None:
    # With three rounds a resample is all-smallest with chance 1/27, and its median is the smallest with 7/27 > 2.5 %.
    result = estimate([1.0, 2.0, 3.0])
    assert (result.low, result.value, result.high) == (1.0, 2.0, 3.0)


def test_bootstrap_is_deterministic_and_depends_on_its_seed_only() -> None:
    values = [0.9 + 0.013 * (i * 7 % 15) for i in range(15)]
    assert estimate(values, seed=1) == estimate(values, seed=1)
    assert estimate(values).low <= estimate(values).value <= estimate(values).high
    assert estimate(values, seed=1, resamples=50) != estimate(values, seed=2, resamples=50)


def test_more_rounds_narrow_the_interval() -> None:
    values = [0.9 + 0.02 * (i * 7 % 11) for i in range(11)]
    assert estimate(values * 4).width < estimate(values).width


def test_estimate_needs_a_round() -> None:
    with pytest.raises(ValueError, match="no rounds"):
        estimate([])


def test_drift_is_the_spread_over_the_median() -> None:
    assert drift([90.0, 100.0, 115.0]) == pytest.approx(0.25)


# --- the rule: holds unless the interval lies wholly beyond; strict: only when it lies wholly within


@pytest.mark.parametrize(
    ("low", "high", "at_most", "strict", "expected"),
    [
        (0.90, 1.00, True, False, True),  # within
        (1.00, 1.10, True, False, True),  # touches: noise condemns nothing
        (1.05, 1.10, True, False, False),  # wholly beyond
        (1.04, 1.10, True, False, True),  # the bound itself still keeps it
        (1.00, 1.10, True, True, False),  # strict: touching is not enough
        (1.00, 1.04, True, True, True),
        (1.10, 1.20, False, False, True),  # at least, within
        (1.00, 1.10, False, False, True),
        (0.90, 1.03, False, False, False),
        (1.00, 1.10, False, True, False),
        (1.04, 1.10, False, True, True),
    ],
)
def test_holds(low: float, high: float, at_most: bool, strict: bool, expected: bool) -> None:
    assert holds(Estimate((low + high) / 2, low, high, 15), 1.04, at_most, strict) is expected


# --- verdicts


def test_judge_loose_and_strict_differ_on_the_same_rounds() -> None:
    noisy = rounds([1.0, 1.02, 1.08] * 5, [1.0] * 15)
    assert judge(LOOSE, noisy, {}).holds
    assert not judge(STRICT, noisy, {}).holds


def test_judge_fails_what_was_not_measured_and_says_why() -> None:
    verdict = judge(LOOSE, [], {"direct": "no BPF here"})
    assert (verdict.result, verdict.holds, verdict.why) == (None, False, "direct: no BPF here")
    assert judge(LOOSE, [], {}).why == "row not run"


def test_judge_fails_a_subject_that_broke_after_good_rounds() -> None:
    verdict = judge(LOOSE, rounds([1.0] * 5, [1.0] * 5), {"direct": "died"})
    assert verdict.result is not None
    assert not verdict.holds


def test_judge_fails_fast_refusals() -> None:
    assert not judge(LOOSE, rounds([0.5] * 5, [1.0] * 5, errors=10), {}).holds
    assert judge(LOOSE, rounds([0.5] * 5, [1.0] * 5, errors=1), {}).holds  # 0.1 % is allowed


def test_judge_fails_a_proxy_that_saved_its_access_log() -> None:
    figure = Figure("log", "keepalive", "cpu_us", "proxy", "envoy", 0.7, at_most=True)
    cell = {"cpu_us": 10.0, "requests": 1000, "errors": 0}
    logged = {"proxy": {**cell, "log_bytes": 150.0}, "envoy": {**cell, "cpu_us": 30.0, "log_bytes": 150.0}}
    assert judge(figure, [logged] * 3, {}).holds
    verdict = judge(figure, [{**logged, "proxy": {**cell, "log_bytes": 0.0}}] * 3, {})
    assert (verdict.holds, verdict.why) == (False, "no access log from proxy")


def test_only_rounds_with_both_sides_count() -> None:
    mixed = [*rounds([1.0] * 3, [1.0] * 3), {"none": {"cpu_us": 9.0, "requests": 1, "errors": 0}}]
    result = figures.result_of(LOOSE, mixed)
    assert result is not None
    assert result.rounds == 3


def test_a_plain_value_needs_no_base() -> None:
    attach = next(figure for figure in FIGURES if figure.base is None)
    measured = [{"attach": {"seconds": value}} for value in (1.0, 1.5, 2.5)]
    verdict = judge(attach, measured, {})
    assert verdict.result is not None
    assert verdict.result.value == 1.5
    assert verdict.holds
    assert not judge(attach, [{"attach": {"seconds": 2.5}}] * 3, {}).holds


def test_too_wide_asks_for_more_rounds_only_where_the_answer_is_unclear() -> None:
    row = ROWS[0]
    steady = [{n: {"cpu_us": 10.0, "rps": 100.0} for n in row.subjects} for _ in range(5)]
    assert too_wide(row, steady) == []
    for number, cells in enumerate(steady):
        cells["direct"] = {"cpu_us": 10.0 + number, "rps": 100.0}
    assert [(f.subject, f.metric) for f in too_wide(row, steady)] == [("direct", "cpu_us")]


def test_every_figure_names_a_row_that_measures_its_subjects() -> None:
    subjects = {row.name: set(row.subjects) for row in ROWS} | {figures.SCALE: set(figures.SCALE_SUBJECTS)}
    for figure in FIGURES:
        if figure.base is not None:
            assert {figure.subject, figure.base} <= subjects[figure.row], figure.name


def test_the_command_knows_every_subject_and_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench"])
    monkeypatch.setenv("QUICK", "1")
    args = command.options()
    assert args.quick
    assert args.subjects.split(",") == list(figures.ALL)
    assert {figure.row for figure in FIGURES} <= set(args.rows.split(","))


# --- what the reader sees


def test_report_shows_interval_width_and_answer() -> None:
    good = judge(LOOSE, rounds([1.0] * 5, [1.0] * 5), {})
    lines = report.figures_table([good, judge(STRICT, [], {"direct": "gone"})]).splitlines()
    assert lines[2] == "| loose | ≤ 1.04 | 1.000 [1.000, 1.000] | 0.000 | 5 | yes |"
    assert lines[3] == "| strict | ≤ 1.04 (whole interval) | not measured | - | - | **no** (direct: gone) |"


def test_report_doubts_a_machine_that_was_not_quiet() -> None:
    noisy = rounds([10.0, 12.0, 14.0], [10.0, 12.0, 14.0])
    assert any("not quiet" in line for line in report.doubts([], {"keepalive": noisy}, 0.05))
    assert report.doubts([], {"keepalive": rounds([1.0] * 3, [1.0] * 3)}, 0.05) == []


# --- clocks and the peer


def test_cpu_of_the_machine_leaves_out_idle_iowait_and_steal() -> None:
    stat = "cpu  100 20 300 99999 88888 5 75 77777 50 0\ncpu0 1 2 3 4 5 6 7 8 9 0\n"
    assert busy_seconds(stat) == pytest.approx(500 / 100)


def test_usage_reads_the_exact_clock_of_a_cgroup() -> None:
    assert usage_seconds("usage_usec 1500000\nuser_usec 1\n") == 1.5


def test_envoy_keeps_its_log_and_request_ids_and_has_no_tight_breaker() -> None:
    static = config(1, 2, [3, 4], "/log")["static_resources"]
    manager = static["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    assert manager["access_log"][0]["typed_config"]["path"] == "/log"
    assert "generate_request_id" not in manager
    thresholds = static["clusters"][0]["circuit_breakers"]["thresholds"][0]
    assert thresholds["max_requests"] >= 1_000_000


# --- the constant-rate client


def test_summary_is_nearest_rank_in_microseconds() -> None:
    found = openloop.summary([n * 1000 for n in range(1, 101)], [], errors=0, seconds=1)
    assert (found["requests"], found["p50_us"], found["p99_us"], found["max_us"]) == (100, 51.0, 100.0, 100.0)


def test_a_stall_is_charged_to_every_request_it_kept_waiting() -> None:
    """One connection, 400/s, one stall of 300 ms: a closed loop would see a single slow request, we must see ~120."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            peer, _ = server.accept()
            with peer:
                served = 0
                while peer.recv(4096):
                    served += 1
                    if served == 50:
                        time.sleep(0.3)
                    peer.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        found = openloop.run(address, "/", rate=400, count=1, seconds=1, warmup=0)
        thread.join(5)
    assert found["errors"] == 0
    assert found["requests"] == 400
    assert found["max_us"] > 290_000
    assert found["p90_us"] > 100_000  # 10 % of 400 requests is 40; the stall alone covers three times as many


def test_packet_steering_is_found(tmp_path: Path) -> None:
    (tmp_path / "rx-0").mkdir()
    switch = tmp_path / "rx-0" / "rps_cpus"
    for text, found in (("0\n", None), ("00000000,00000000\n", None), ("3\n", switch), ("00000000,00000002\n", switch)):
        switch.write_text(text)
        assert steered(tmp_path) == found
