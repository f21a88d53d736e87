"""Lines over a logarithmic axis as SVG, for `learning_report.py`: text and shapes only, like `picture.py`."""

from __future__ import annotations

import math
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 800, 420, 70, 210, 70, 60
COLOURS = ("#0b66c3", "#b3261e", "#197a3e", "#8a5a00", "#6f42c1", "#00707a", "#a0367f", "#5b6470")
DARK = ("#58a6ff", "#ff8a80", "#56d37f", "#e0b050", "#bd9bff", "#4fd3de", "#f18ac9", "#aab2bd")

STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.ground { fill: #ffffff }
.title { font-weight: 600; font-size: 17px }
.note { fill: #4a5059 }
.axis { stroke: #757d87; fill: none }
.grid { stroke: #d5d9de; fill: none }
.line { fill: none; stroke-width: 2 }
"""


def style() -> str:
    """Colours that follow the reader's light or dark theme."""
    light = [f".c{i} {{ stroke: {c} }} .d{i} {{ fill: {c} }}" for i, c in enumerate(COLOURS)]
    dark = [f".c{i} {{ stroke: {c} }} .d{i} {{ fill: {c} }}" for i, c in enumerate(DARK)]
    dark += [
        ".ground { fill: #0d1117 }",
        "text { fill: #f0f6fc }",
        ".note { fill: #c0c7d0 }",
        ".grid { stroke: #30363d }",
    ]
    return STYLE + "\n".join(light) + "\n@media (prefers-color-scheme: dark) {\n" + "\n".join(dark) + "\n}\n"


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers from ``low`` to ``high``, about six of them; powers of ten on a logarithmic axis."""
    if log:
        powers = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
        return [10.0**p for p in powers]
    step = 10 ** math.floor(math.log10((high - low) / 5))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 7)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(
    title: str, x_name: str, y_name: str, series: dict[str, list], log_y: bool = False, lines: bool = True
) -> str:
    """The SVG.

    Args:
        series: name -> points (x, y), x above 0; with ``log_y`` y above 0, too. lines: join the points of a series.
    """
    points = [p for s in series.values() for p in s]
    if not points:
        return ""
    to = math.log10 if log_y else float

    def span(values: list[float]) -> tuple[float, float]:
        low, high = min(values), max(values)
        return (low - 0.5, high + 0.5) if high == low else (low - 0.03 * (high - low), high + 0.03 * (high - low))

    (x0, x1), (y0, y1) = span([math.log10(x) for x, _ in points]), span([to(y) for _, y in points])
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (math.log10(x) - x0) / (x1 - x0), (to(y) - y0) / (y1 - y0)
        return round(LEFT + across * (right - LEFT), 1), round(bottom - up * (bottom - TOP), 1)

    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" aria-labelledby="title desc">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="desc">{escape(y_name)} against {escape(x_name)} for {escape(", ".join(series))}.</desc>',
        f"<style>{style()}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
        f'<text class="title" x="20" y="32">{escape(title)}</text>',
        f'<text class="note" x="20" y="54">{escape(y_name)}</text>',
        f'<text class="note" x="{(LEFT + right) // 2}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x_name)}</text>',
    ]
    middle = points[0]
    for x in ticks(10**x0, 10**x1, True):
        across, _ = at(x, middle[1])
        body.append(f'<path class="grid" d="M{across} {TOP}V{bottom}"/>')
        body.append(f'<text class="note" x="{across}" y="{bottom + 20}" text-anchor="middle">{x:g}</text>')
    for y in ticks(*((10**y0, 10**y1) if log_y else (y0, y1)), log_y):
        _, up = at(middle[0], y)
        body.append(f'<path class="grid" d="M{LEFT} {up}H{right}"/>')
        body.append(f'<text class="note" x="{LEFT - 8}" y="{up + 4}" text-anchor="end">{y:g}</text>')
    body.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    for i, (name, found) in enumerate(series.items()):
        k, places = i % len(COLOURS), [at(*p) for p in sorted(found)]
        dashes = ' stroke-dasharray="6 4"' if i >= len(COLOURS) else ""
        if lines and places:
            body.append(f'<path class="line c{k}"{dashes} d="M' + "L".join(f"{x} {y}" for x, y in places) + '"/>')
        body += [f'<circle class="d{k}" cx="{x}" cy="{y}" r="3"/>' for x, y in places]
        down = TOP + 22 * i
        body.append(f'<circle class="d{k}" cx="{right + 20}" cy="{down}" r="5"/>')
        body.append(f'<text x="{right + 32}" y="{down + 4}">{escape(name)}</text>')
    return "\n".join([*body, "</svg>"]) + "\n"
