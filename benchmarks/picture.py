"""README's picture of the measured speeds: ``python benchmarks/picture.py [--data FIGURES] [--out SVG]``.

Draws ``benchmarks/gpu_7b.json`` (figures, date, machine, versions and command of one measurement in `RESULTS.md`) as a
bar chart, ``docs/speed-7b.svg``: text and shapes only, a title and a description for screen readers, colours that
follow the reader's light or dark theme.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "benchmarks" / "gpu_7b.json"
OUT = ROOT / "docs" / "speed-7b.svg"

WIDTH, LEFT, RIGHT, EDGE = 800, 220, 230, 20  # names on the left, figures behind the bars
TOP, BAR, GAP = 84, 30, 14

# a ground of its own, since a page may be dark where the reader's system is light; contrast with it: text at least 7,
# bars at least 3, in either theme
STYLE = """
text { font: 15px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.ground { fill: #ffffff }
.title { font-weight: 600; font-size: 17px }
.note { font-size: 13px; fill: #4a5059 }
.value { font-weight: 600 }
.rest { font-weight: 400 }
.ours { fill: #0b66c3 }
.other { fill: #757d87 }
.axis { stroke: #757d87 }
@media (prefers-color-scheme: dark) {
  .ground { fill: #0d1117 }
  text { fill: #f0f6fc }
  .note { fill: #c0c7d0 }
  .ours { fill: #58a6ff }
  .other { fill: #8b949e }
  .axis { stroke: #8b949e }
}
"""


def draw(figures: dict) -> str:
    """The SVG: a bar for each of ``figures["bars"]``, as long as its rows a second."""
    bars = figures["bars"]
    first, most = bars[0], max(b["rows_per_s"] for b in bars)
    end = TOP + len(bars) * (BAR + GAP) - GAP
    foot = [f"{figures['date']}, {figures['machine']}", *([figures["note"]] if figures.get("note") else [])]
    height = end + 28 + 20 * len(foot) + 10
    said = "; ".join(f"{b['name']} {b['rows_per_s']:.1f}" for b in bars)
    title, unit = escape(figures["title"]), escape(figures["unit"])
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'role="img" aria-labelledby="title desc">',
        f'<title id="title">{title}: {unit}</title>',
        f'<desc id="desc">Bar chart, {unit}: {escape(said)}.</desc>',
        f"<style>{STYLE}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{height}" rx="8"/>',
        f'<text class="title" x="{EDGE}" y="34">{title}</text>',
        f'<text class="note" x="{EDGE}" y="58">{unit} (against the first), peak memory</text>',
    ]
    for n, b in enumerate(bars):
        y = TOP + n * (BAR + GAP)
        long = round((WIDTH - LEFT - RIGHT) * b["rows_per_s"] / most, 1)
        kind, middle = "ours" if b.get("ours") else "other", y + BAR // 2 + 5
        times = "" if b is first else f" ({b['rows_per_s'] / first['rows_per_s']:.1f}×)"
        rest = f'<tspan class="rest">{times}, {b["peak_gib"]:.1f} GiB</tspan>'
        lines += [
            f'<text x="{LEFT - 12}" y="{middle}" text-anchor="end">{escape(b["name"])}</text>',
            f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{long}" height="{BAR}" rx="3"/>',
            f'<text class="value" x="{LEFT + long + 10:g}" y="{middle}">{b["rows_per_s"]:.1f}{rest}</text>',
        ]
    lines += [
        f'<path class="axis" d="M{LEFT} {TOP - 8}V{end + 8}"/>',
        *(
            f'<text class="note" x="{EDGE}" y="{end + 36 + 20 * n}">{escape(text)}</text>'
            for n, text in enumerate(foot)
        ),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="measured figures (default: benchmarks/gpu_7b.json)")
    parser.add_argument("--out", type=Path, default=OUT, help="where to write (default: docs/speed-7b.svg)")
    args = parser.parse_args(argv)
    args.out.write_text(draw(json.loads(args.data.read_text(encoding="utf-8"))), encoding="utf-8")
    print(args.out.relative_to(ROOT) if args.out.is_relative_to(ROOT) else args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
