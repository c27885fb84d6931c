"""The row `streams`, its deciding half: no harm to a stream goes unseen, and a cell says what an event cost."""

from __future__ import annotations

import pytest

from bench.course import HEAD, LAST, Incoming, Outgoing, Wrong
from bench.figures import FIGURES, STREAMS, judge
from bench.streams import EVENTS, judged, summed

STORM = {"ok": 4000, "failed": {}, "per_second": 2000.0, "slowest_ms": 31.5}


@pytest.mark.parametrize("harm", ["nothing", "lost", "doubled", "swapped", "changed", "cut short"])
def test_a_stream_shows_every_harm(harm: str) -> None:
    out, came = Outgoing(1), Incoming()
    frames = [out.frame(100) for _ in range(6)] + [out.last(0)]
    if harm == "lost":
        del frames[3]
    elif harm == "doubled":
        frames.insert(3, frames[3])
    elif harm == "swapped":
        frames[2], frames[3] = frames[3], frames[2]
    elif harm == "changed":
        frames[3] = frames[3][:-1] + bytes([frames[3][-1] ^ 1])
    elif harm == "cut short":
        frames = [*frames[:3], HEAD.pack(*HEAD.unpack(frames[6][: HEAD.size])) + LAST.pack(600, 0)]

    def hear() -> None:
        for frame in frames:
            came.rest(frame[: HEAD.size])
            came.take(frame[: HEAD.size], frame[HEAD.size :])

    if harm == "nothing":
        hear()
        assert came.told == (600, 0) and came.received == 600
    else:
        with pytest.raises(Wrong):
            hear()


def tally(**direct: int) -> dict[str, dict[str, int]]:
    return {
        "direct": {"streams": 2, "whole": 2, "sent": 1000, "received": 1000, **direct},
        "relayed": {"streams": 3, "whole": 1, "cut": 2},
        "kept": {"streams": 1, "whole": 1, "told to close": 1},
    }


def test_a_calm_event_costs_nothing() -> None:
    found = judged(tally(), STORM, {"relayed": 2})
    zero = ("resets", "lost_bytes", "wrong", "cut_uncounted", "new_failed")
    assert [found[key] for key in zero] == [0] * 5
    assert (found["cut"], found["proxied"], found["proxied_whole"], found["told_to_close"]) == (2, 4, 2, 1)


@pytest.mark.parametrize(
    ("direct", "storm", "drained", "missed"),
    [
        ({"cut": 1, "whole": 1}, {}, 2, "resets"),
        ({"failed": 1}, {}, 2, "resets"),
        ({"lost": 7, "wrong": 1}, {}, 2, "lost_bytes"),
        ({"wrong": 1}, {}, 2, "wrong"),
        ({}, {}, 1, "cut_uncounted"),
        ({}, {}, 3, "cut_uncounted"),
        ({}, {"failed": {"Connection refused": 1}}, 2, "new_failed"),
        ({}, {"per_second": 1500.0}, 2, "new_per_second"),
    ],
)
def test_one_bad_event_of_four_misses_its_figure(
    direct: dict[str, int], storm: dict[str, float], drained: int, missed: str
) -> None:
    events = {event: judged(tally(), STORM, {"relayed": 2}) for event in EVENTS}
    figures = {figure.metric: figure for figure in FIGURES if figure.row == STREAMS}
    assert all(judge(figure, [{"streams": summed(events)}], {}).holds for figure in figures.values())
    events["kill"] = judged(tally(**direct), STORM | storm, {"relayed": drained})
    assert not judge(figures[missed], [{"streams": summed(events)}], {}).holds
