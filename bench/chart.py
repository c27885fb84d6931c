"""The chart of a run, for those who look before they read: every ratio with interval and bound, and connect() by size.

Rule: no axis is cut. A ratio's bar begins at 1, where both sides are equal, on a logarithmic axis, so that twice and
half are as long as each other; a time's bar begins at 0 on a linear one. What was not measured is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.figures import CONNECT, SINGLES, Round, Verdict, series
from bench.stats import Estimate, estimate

LABELS, PLOT, VALUES, ROW, PAD = 790, 640, 400, 34, 30  # pixels: widths of the three columns, height of a row
INK, FAINT, GOOD, BAD, PLAIN, BOUND = "#222222", "#cccccc", "#4477aa", "#cc6677", "#888888", "#aa3311"
TICKS = (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10)  # of ratios
LEGEND = (
    "bar: median of the paired rounds, from 1 = equal, logarithmic · line: its 95 % interval · red mark: the bound"
    " · blue: holds, red: does not"
)


@dataclass(frozen=True, slots=True)
class Bar:
    label: str
    found: Estimate
    text: str
    colour: str
    bound: float | None = None


def ratios(verdicts: Sequence[Verdict]) -> list[Bar]:
    found = []
    for verdict in verdicts:
        figure, result = verdict.figure, verdict.result
        if result is not None and figure.base is not None:
            text = f"{shown(result, 2)}  at {'most' if figure.at_most else 'least'} {figure.bound:g}"
            found.append(Bar(figure.name, result, text, GOOD if verdict.holds else BAD, figure.bound))
    return found


def connects(rounds: Sequence[Round]) -> list[Bar]:
    found = []
    for name in SINGLES[CONNECT]:
        cells = [cells for cells in rounds if name in cells]
        if cells:
            result = estimate(series(cells, name, "connect_us"))
            way, _, count = name.partition("-")
            label = f"connect() by {'our hook' if way == 'hook' else way}, {count} services"
            found.append(Bar(label, result, f"{shown(result, 1)} us", GOOD if way == "hook" else PLAIN))
    return found


def shown(found: Estimate, digits: int) -> str:
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def draw(title: str, about: str, verdicts: Sequence[Verdict], rounds: Mapping[str, Sequence[Round]]) -> Any:
    """An image of Pillow, as high as it needs to be. Raises ImportError where Pillow is not installed."""
    from PIL import Image, ImageDraw, ImageFont

    upper, lower = ratios(verdicts), connects(rounds.get(CONNECT, []))
    height = 2 * PAD + ROW * (3 + sum(len(bars) + 3 for bars in (upper, lower) if bars))
    picture = Image.new("RGB", (LABELS + PLOT + VALUES + 2 * PAD, height), "white")
    pen = Pen(ImageDraw.Draw(picture), ImageFont.load_default)
    pen.text(PAD, PAD, title, 28)
    pen.text(PAD, PAD + ROW + 4, about, 18)
    top = PAD + 3 * ROW
    if upper:
        edges = [abs(math.log(v)) for bar in upper for v in (bar.found.low, bar.found.high, bar.bound or 1) if v > 0]
        reach = max(*edges, math.log(2)) * 1.05
        ticks = [tick for tick in TICKS if abs(math.log(tick)) <= reach]
        pen.panel(top, upper, ticks, lambda v: 0.5 + math.log(v) / reach / 2, 1)
        top += ROW * (len(upper) + 1)
        pen.text(PAD, top + 6, LEGEND, 18)
        top += 2 * ROW
    if lower:
        most = max(bar.found.high for bar in lower) * 1.05
        step = 10 ** math.floor(math.log10(most)) / (1 if most > 4 * 10 ** math.floor(math.log10(most)) else 2)
        pen.panel(top, lower, [step * n for n in range(int(most / step) + 1)], lambda v: v / most, 0)
    return picture


@dataclass(frozen=True, slots=True)
class Pen:
    on: Any
    font: Callable[[int], Any]

    def text(self, x: float, y: float, text: str, size: int = 20, anchor: str = "la") -> None:
        self.on.text((x, y), text, INK, font=self.font(size), anchor=anchor)

    def panel(
        self, top: float, bars: Sequence[Bar], ticks: Sequence[float], place: Callable[[float], float], zero: float
    ) -> None:
        """Bars below each other; `place`: a value to 0..1 of the plot's width; `zero`: where bars begin."""

        def x(value: float) -> float:
            return PAD + LABELS + PLOT * place(value)

        bottom = top + ROW * len(bars)
        for tick in ticks:
            self.on.line((x(tick), top, x(tick), bottom), FAINT if tick != zero else INK, 2)
            self.text(x(tick), bottom + 4, f"{tick:g}", 18, "ma")
        for number, bar in enumerate(bars):
            middle = top + ROW * (number + 0.5)
            left, right = sorted((x(zero), x(bar.found.value)))
            self.on.rectangle((left, middle - 9, right, middle + 9), bar.colour)
            self.on.line((x(bar.found.low), middle, x(bar.found.high), middle), INK, 3)
            for end in (bar.found.low, bar.found.high):
                self.on.line((x(end), middle - 5, x(end), middle + 5), INK, 3)
            if bar.bound is not None:
                self.on.line((x(bar.bound), middle - 14, x(bar.bound), middle + 14), BOUND, 4)
            self.text(PAD + LABELS - 16, middle, bar.label, anchor="rm")
            self.text(PAD + LABELS + PLOT + 24, middle, bar.text, anchor="lm")
