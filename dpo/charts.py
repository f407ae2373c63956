"""Charts as SVG text, coloured by the page's style sheet so that light and dark both fit.

A chart is `<figure>` with an `<svg>`; `data-points` carries what a pointer over it reads out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 34
MOST_POINTS, MOST_DOTS = 400, 1500

Shape = Literal["line", "faint", "dots"]


@dataclass(frozen=True)
class Series:
    """One line, or one set of dots. colour: a class of the style sheet. spread: half heights of a band around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    shape: Shape = "line"
    spread: Sequence[float] | None = None


def number(value: float, digits: int = 4) -> str:
    """A number as people write it, in so many digits."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        text = f"{value:.{digits}g}"
        return f"{value:.0f}" if "e" in text else text
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in [low, high], about `count` of them."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 2.5, 5, 10) if (high - low) / (step * m) <= count)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def labels(values: Sequence[float]) -> list[str]:
    """Ticks as text, with as many digits as tell them apart."""
    step = min((abs(b - a) for a, b in pairwise(values)), default=1.0)
    shown: list[str] = []
    for digits in range(1, 10):
        shown = [number(value, digits) for value in values]
        if all(abs(float(text) - value) < 0.01 * step for text, value in zip(shown, values, strict=True)):
            break
    return shown


class Axes:
    """Scales of one chart, from data to the picture."""

    def __init__(
        self,
        x: Sequence[float],
        y: Sequence[float],
        y_range: tuple[float, float] | None = None,
        log: bool = False,
        x_margin: float = 0.0,
    ) -> None:
        self.log = log
        self.x0, self.x1 = _widened(min(x), max(x), x_margin)
        values = [math.log10(v) for v in y] if log else y
        self.y0, self.y1 = y_range or _widened(min(values), max(values), 0.06)

    def px(self, x: float) -> float:
        return LEFT + (x - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def py(self, y: float) -> float:
        value = math.log10(y) if self.log else y
        share = (value - self.y0) / (self.y1 - self.y0)
        return HEIGHT - BOTTOM - min(max(share, -0.02), 1.02) * (HEIGHT - TOP - BOTTOM)

    def frame(self, x_label: str, y_label: str = "") -> str:
        parts = []
        if self.log:
            rows = [(10.0**k, number(10.0**k)) for k in range(math.ceil(self.y0), math.floor(self.y1) + 1)]
            if len(rows) < 2:
                rows = [(10**t, number(10**t)) for t in ticks(self.y0, self.y1, 3)]
        else:
            rows = list(zip(heights := ticks(self.y0, self.y1), labels(heights), strict=True))
        for value, text in rows:
            y = self.py(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
        places = ticks(self.x0, self.x1, 6)
        for value, text in zip(places, labels(places), strict=True):
            x, y = self.px(value), HEIGHT - BOTTOM + 15
            parts.append(f'<text class="tick" x="{x:.1f}" y="{y}" text-anchor="middle">{text}</text>')
        base = HEIGHT - BOTTOM
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
        parts.append(
            f'<text class="label" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>'
        )
        if y_label:
            parts.append(f'<text class="label" x="{LEFT - 44}" y="{TOP - 2}">{escape(y_label)}</text>')
        return "".join(parts)


def _widened(low: float, high: float, margin: float) -> tuple[float, float]:
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-6):
        pad = max(abs(low) * 0.05, 1e-6)
        return low - pad, high + pad
    pad = (high - low) * margin
    return low - pad, high + pad


def thinned(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """At most `most` points: means of neighbours."""
    if len(x) <= most:
        return list(x), list(y)
    edges = [round(k * len(x) / most) for k in range(most + 1)]
    return tuple([sum(v[a:b]) / (b - a) for a, b in pairwise(edges)] for v in (x, y))  # pyright: ignore[reportReturnType]


def lines(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "step",
    y_range: tuple[float, float] | None = None,
    log: bool = False,
    rule: tuple[float, str] | None = None,
    marks: Sequence[float] = (),
    note: str = "",
) -> str:
    """Curves over steps. rule: a height that means something, and its name. marks: places that do."""
    series = [s for s in series if len(s.x)]
    if not series:
        return ""
    every_y = [v for s in series for v in s.y] + [
        v + sign * e for s in series if s.spread for v, e in zip(s.y, s.spread, strict=True) for sign in (-1, 1)
    ]
    if log:
        every_y = [v for v in every_y if v > 0]
        if not every_y:
            return ""
    axes = Axes([v for s in series for v in s.x], every_y + ([rule[0]] if rule else []), y_range, log)
    parts = [axes.frame(x_label)]
    if rule:
        y = axes.py(rule[0])
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{WIDTH - RIGHT}" y="{y - 4:.1f}" text-anchor="end">{escape(rule[1])}</text>'
        )
    for place in marks:
        x = axes.px(place)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for s in series:
        parts.append(_curve(axes, s))
    readable = [s for s in series if s.shape != "faint"]
    points = [[s.name, s.colour, *map(_rounded, thinned(s.x, s.y))] for s in readable]
    return _figure(title, readable, "".join(parts), note, {"x": [axes.x0, axes.x1], "label": x_label, "series": points})


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{v:.5g}") for v in values]


def _curve(axes: Axes, s: Series) -> str:
    x, y = thinned(s.x, s.y)
    if axes.log:
        x, y = zip(*[(a, b) for a, b in zip(x, y, strict=True) if b > 0], strict=True)
    path = " ".join(f"{axes.px(a):.1f},{axes.py(b):.1f}" for a, b in zip(x, y, strict=True))
    parts = []
    if s.spread is not None:
        upper = [f"{axes.px(a):.1f},{axes.py(b + e):.1f}" for a, b, e in zip(s.x, s.y, s.spread, strict=True)]
        lower = [f"{axes.px(a):.1f},{axes.py(b - e):.1f}" for a, b, e in zip(s.x, s.y, s.spread, strict=True)]
        parts.append(f'<polygon class="{s.colour} band" points="{" ".join(upper + lower[::-1])}"/>')
    if s.shape != "dots" or len(x) < 60:
        parts.append(f'<polyline class="{s.colour} {s.shape}" points="{path}"/>')
    if s.shape == "dots":
        parts += [
            f'<circle class="{s.colour} dot" cx="{axes.px(a):.1f}" cy="{axes.py(b):.1f}" r="3"/>'
            for a, b in zip(x, y, strict=True)
        ]
    return "".join(parts)


def histogram(
    title: str, series: Sequence[tuple[str, Sequence[float], str]], *, x_label: str, note: str = "", bins: int = 32
) -> str:
    """Counts of values, sets over each other. series: (name, values, colour)."""
    everything = [v for _, values, _ in series for v in values]
    if not everything:
        return ""
    low, high = _widened(min(everything), max(everything), 0.0)
    width = (high - low) / bins
    counts = [[0] * bins for _ in series]
    for held, (_, values, _) in zip(counts, series, strict=True):
        for v in values:
            held[min(int((v - low) / width), bins - 1)] += 1
    top = max(map(max, counts))
    axes = Axes([low, high], [0, top], (0.0, top * 1.05))
    parts = [axes.frame(x_label, "pairs")]
    if low < 0 < high:
        x = axes.px(0)
        parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for held, (name, _, colour) in zip(counts, series, strict=True):
        for k, count in enumerate(held):
            if count:
                x, y = axes.px(low + k * width), axes.py(count)
                wide = axes.px(low + (k + 1) * width) - x - 0.6
                what = f"{name} {number(low + k * width)} to {number(low + (k + 1) * width)}: {count}"
                parts.append(
                    f'<rect class="{colour} bar" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" '
                    f'height="{HEIGHT - BOTTOM - y:.1f}"><title>{escape(what)}</title></rect>'
                )
    shown = [Series(name, (), (), colour) for name, _, colour in series]
    return _figure(title, shown if len(shown) > 1 else [], "".join(parts), note, None)


def scatter(
    title: str,
    series: Sequence[tuple[str, Sequence[float], Sequence[float], str]],
    *,
    x_label: str,
    y_label: str,
    note: str = "",
) -> str:
    """Dots. series: (name, x, y, colour); more than MOST_DOTS are thinned evenly."""
    if not any(len(x) for _, x, _, _ in series):
        return ""
    axes = Axes([v for _, x, _, _ in series for v in x], [v for _, _, y, _ in series for v in y], x_margin=0.03)
    parts = [axes.frame(x_label, y_label)]
    if axes.y0 < 0 < axes.y1:
        y = axes.py(0)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for _, xs, ys, colour in series:
        step = max(1, math.ceil(len(xs) / MOST_DOTS))
        parts += [
            f'<circle class="{colour} point" cx="{axes.px(a):.1f}" cy="{axes.py(b):.1f}" r="2.4"/>'
            for a, b in list(zip(xs, ys, strict=True))[::step]
        ]
    shown = [Series(name, (), (), colour) for name, _, _, colour in series]
    return _figure(title, shown if len(shown) > 1 else [], "".join(parts), note, None)


def _figure(title: str, legend: Sequence[Series], body: str, note: str, points: object | None) -> str:
    names = "".join(f'<span class="key {s.colour} {s.shape}">{escape(s.name)}</span>' for s in legend if s.name)
    data = f' data-points="{escape(json.dumps(points, separators=(",", ":")))}"' if points is not None else ""
    after = f"<p>{escape(note)}</p>" if note else ""
    return (
        f'<figure><figcaption><b>{escape(title)}</b><span class="keys">{names}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"{data}>{body}</svg>'
        f"{after}</figure>"
    )
