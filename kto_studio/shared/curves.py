"""Curves as SVG, the one drawing of every plot in the app.

The server draws a curve whole, and the page shows what it gets: nothing has to be loaded, measured or mounted first.
``assets/curves.js`` adds what a pointer does: values at a step, and the range that is zoomed into.
"""

from __future__ import annotations

import html
import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr

SCRIPT = Path(__file__).parents[1] / "assets" / "curves.js"
SIDE = 1000  # of the drawing's own coordinates, in both directions; the page stretches it
DOTS = 40  # a line of at most so many points shows each of them
LEAST = 0.02  # an axis shows at least this share of its numbers' size: less is rounding, no change
HUGE = 1e100  # no number of a run: a difference of two such is no number of a float
Point = tuple[float, float]
Range = tuple[float, float]  # of the horizontal axis, as `Curve.at` has it


@dataclass(frozen=True)
class Line:
    """Points in order of x; one whose y is not finite is left out."""

    name: str
    color: str  # of CSS
    points: Sequence[Point]


@dataclass(frozen=True)
class Curve:
    """One plot: lines that share both axes."""

    id: str  # in the page
    title: str
    lines: Sequence[Line]
    unit: str = ""
    help: str = ""
    x: str = "step"
    log: bool = False  # the horizontal axis
    least: float = 0  # that the vertical axis spans: less is rounding
    thin: Callable[[list[Point]], list[Point]] = field(default=lambda points: points)

    def at(self, x: float) -> float:
        """Where x lies on the horizontal axis."""
        return math.log10(x) if self.log else x


def component(elem_id: str) -> gr.HTML:
    """What shows curves, always mounted. Its ``select`` tells a range, or [] for all: see `chosen`."""
    script = SCRIPT.read_text(encoding="utf-8")
    return gr.HTML("", elem_id=elem_id, elem_classes="curves", show_label=False, js_on_load=script)


def chosen(event: gr.SelectData) -> Range | None:
    """The range that a ``select`` asks for; None: all."""
    found = event.index
    if not isinstance(found, list | tuple) or len(found) != 2:
        return None
    low, high = (float(v) for v in found)
    return (low, high) if math.isfinite(low) and math.isfinite(high) and low < high else None


def view(curves: Sequence[Curve], zoom: Range | None = None) -> str:
    """The curves that have a point, as HTML. ``zoom`` is of all of them; one without a line in it is shown whole."""
    shown = "".join(_figure(c, zoom) for c in curves if any(line.points for line in c.lines))
    return f'<div class="plots">{shown}</div>' if shown else ""


def number(value: float) -> str:
    """Four digits, as one reads them: ``0.4321``, ``12.35``, ``1,204``, ``2.5e-5``; never ``-0``."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{round(value):,}" if size >= 1000 else f"{value:.4g}" if size else "0"


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers from low to high, about as many as wanted."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m, most in ((1, 1.5), (2, 3.5), (5, 7.5), (10, math.inf)) if rough / power < most)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def labels(values: Sequence[float]) -> list[str]:
    """Of ticks: as many decimals as tell them apart."""
    step = min((b - a for a, b in zip(values, values[1:], strict=False)), default=1.0)
    if max(map(abs, values), default=0) < 1e-3 or step < 1e-5:
        return [number(v) for v in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{v:,.{decimals}f}" if v else "0" for v in values]


def _within(c: Curve, points: Sequence[Point], zoom: Range | None) -> list[Point]:
    """The points of a range and their neighbours, so that the line goes on to the border."""
    if zoom is None:
        return list(points)
    first = bisect_left(points, zoom[0], key=lambda p: c.at(p[0]))
    last = bisect_right(points, zoom[1], key=lambda p: c.at(p[0]))
    return list(points[max(0, first - 1) : last + 1])


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(y) and abs(y) < HUGE]


def _ends(c: Curve) -> Range:
    """The whole horizontal axis."""
    there = [line.points for line in c.lines if line.points]
    return min(c.at(points[0][0]) for points in there), max(c.at(points[-1][0]) for points in there)


def _span(values: Sequence[float], least: float = 0) -> Range:
    """The vertical axis: all values with some air, and no magnifying of what is nearly the same."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if size == 0:
        return 0.0, least or 1.0
    air = max((high - low) * 0.06, (max(least, LEAST * size) - (high - low)) / 2)
    return low - air, high + air


def _figure(c: Curve, zoom: Range | None) -> str:
    first, last = _ends(c)
    zoom = zoom if zoom and zoom[0] < last and zoom[1] > first else None
    low, high = zoom or (first, last if last > first else first + 1)
    lines = [Line(w.name, w.color, _finite(c.thin(_within(c, w.points, zoom)))) for w in c.lines]
    bottom, top = _span([y for line in lines for _, y in line.points] or [0.0], c.least)
    across = [p for p in ticks(low, high, 5) if c.log or p == round(p)]
    up = ticks(bottom, top)

    def place(x: float, y: float) -> str:
        return f"{SIDE * (c.at(x) - low) / (high - low):.0f} {SIDE * (top - y) / (top - bottom):.0f}"

    grid = "".join(f"M0 {SIDE * (top - v) / (top - bottom):.0f}h{SIDE}" for v in up)
    drawn = "".join(_path(line, place) for line in lines if line.points)
    keys = "".join(_key(line, alone=len(c.lines) == 1) for line in lines if line.points)
    names_up = "".join(
        f'<span style="top:{100 * (top - v) / (top - bottom):.1f}%">{t}</span>'
        for v, t in zip(up, labels(up), strict=True)
    )
    shown = [number(10**v) for v in across] if c.log else labels(across)
    names_across = "".join(
        f'<span style="left:{100 * (v - low) / (high - low):.1f}%">{t}</span>'
        for v, t in zip(across, shown, strict=True)
    )
    reset = '<button type="button" class="curve-reset">Reset zoom</button>' if zoom else ""
    told = html.escape(json.dumps(_told(c, lines, low, high), ensure_ascii=False, separators=(",", ":")))
    name = html.escape(f"{c.title}{f', {c.unit}' if c.unit else ''}")
    said = html.escape(". ".join([c.title, *(_said(c, line) for line in lines if line.points)]))
    helped = f' title="{html.escape(c.help)}"' if c.help else ""
    return (
        f'<figure class="curve" id="{c.id}" data-curve="{told}"><figcaption><b{helped}>{name}</b>{keys}{reset}'
        f'</figcaption><div class="curve-area"><div class="curve-up" aria-hidden="true">{names_up}</div>'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role="img" aria-label="{said}">'
        f'<path class="curve-grid" d="{grid}"/>{drawn}</svg><i class="curve-band" hidden></i>'
        f'<div class="curve-tip" hidden></div></div><div class="curve-across" aria-hidden="true">{names_across}'
        f"<em>{html.escape(c.x)}</em></div></figure>"
    )


def _path(line: Line, place: Callable[[float, float], str]) -> str:
    at = [place(*p) for p in line.points]
    dots = "".join(f"M{p}h0" for p in at) if len(at) <= DOTS else ""
    marks = f'<path class="curve-dots" d="{dots}" stroke="{line.color}"/>' if dots else ""
    return f'<path class="curve-line" d="M{" L".join(at)}" stroke="{line.color}"/>{marks}'


def _key(line: Line, alone: bool) -> str:
    """Color, name and newest value of a line; the title names one that is alone."""
    name = "" if alone else f"{html.escape(line.name)} "
    value = number(line.points[-1][1])
    return f'<span class="curve-key"><i style="background:{line.color}"></i>{name}<b>{value}</b></span>'


def _told(c: Curve, lines: Sequence[Line], low: float, high: float) -> dict:
    """What a pointer needs: the range, and of each line its places and its values as text."""
    return {
        "range": [low, high],
        "x": c.x,
        "lines": [
            [n.name, n.color, [round(c.at(x), 6) for x, _ in n.points], [number(y) for _, y in n.points],
             [number(x) if c.log else f"{x:,}" for x, _ in n.points]]
            for n in lines
        ],
    }  # fmt: skip


def _said(c: Curve, line: Line) -> str:
    """A line in words, for who does not see it."""
    (_, first), (x, last) = line.points[0], line.points[-1]
    at = number(x) if c.log else f"{x:,}"
    return f"{line.name}: from {number(first)} to {number(last)} at {c.x} {at}"
