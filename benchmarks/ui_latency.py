"""How quickly the page answers while a model trains on the same CPU: ``python benchmarks/ui_latency.py [--seconds S]``.

Starts the app as a user does, trains the demo preset on the example with the default worker (a thread of the app), and
meanwhile uses the page: opens tabs, turns pages of the table, filters by label, searches. A latency is the time from
the click to the frame in which the result is in the page, measured in the page. Also counted: the round trips of
whatever the page asks the server meanwhile, once a second of its own accord. Needs Debian's chromium.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support import browser  # noqa: E402

# clicks (or types) and waits, frame by frame, until the condition holds; milliseconds
ACT = """async ([act, done]) => {
  const began = performance.now();
  eval(act);
  const holds = () => eval(done);
  while (!holds()) {
    if (performance.now() - began > 20000) throw new Error("nothing happened: " + act);
    await new Promise(requestAnimationFrame);
  }
  return performance.now() - began;
}"""
TABS = """(() => { for (const b of document.querySelectorAll('button[role=tab]'))
  if (b.innerText.trim() === '%s' && b.offsetParent) return b; })()"""
SEEN = "!!document.querySelector('#tab-%s') && document.querySelector('#tab-%s').offsetHeight > 0"
RANGE = "document.querySelector('#data-range').textContent"  # innerText would lay the page out
ROUND_TRIPS = """performance.getEntriesByType('resource').filter(e => e.name.includes('/gradio_api/')
  && !/heartbeat|queue\\/data|upload/.test(e.name)).map(e => e.duration)"""


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def figures(values: list[float]) -> dict:
    """Milliseconds: n, median, p95, max."""
    return {
        "n": len(values),
        "median": round(statistics.median(values), 1),
        "p95": round(percentile(values, 0.95), 1),
        "max": round(max(values), 1),
    }


def use(page, seconds: float) -> dict[str, list[float]]:
    """Use the page for that long; milliseconds of each action."""
    took: dict[str, list[float]] = {}

    def act(name: str, do: str, done: str) -> None:
        took.setdefault(name, []).append(page.evaluate(ACT, [do, done]))
        time.sleep(0.15)

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for tab in ("Train", "Chat", "Export", "Data"):
            act("open a tab", f"{TABS % tab}.click()", SEEN % (tab.lower(), tab.lower()))
        for button, place in (("forth", "51–100"), ("forth", "101–150"), ("back", "51–100"), ("back", "1–50")):
            click = f"document.querySelector('button#data-{button}').click()"
            act("turn a page of the table", click, f"{RANGE}.includes('{place} of')")
        for label, rows in (("👎 Bad", 150), ("All", 300)):
            click = (
                "[...document.querySelectorAll('#data-label label')].find(l => l.innerText.trim() === "
                f"'{label}').querySelector('input').click()"
            )
            act("filter by label", click, f"{RANGE}.includes('of {rows} rows')")
    return took


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=60, metavar="S", help="how long to use it (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    args = parser.parse_args(argv)
    with (
        tempfile.TemporaryDirectory() as home,
        browser.app(Path(home)) as url,
        browser.chromium() as chromium,
        browser.page_of(chromium, url) as page,
    ):
        page.locator("#data-table tr[data-index]").first.wait_for()
        page.locator("#data-lengths").get_by_text("in tokens").wait_for()
        idle = use(page, min(10.0, args.seconds))
        browser.tab(page, "Train")
        page.locator("#train-start").click()
        page.wait_for_function("+document.querySelector('.run-head')?.dataset.step >= 1", timeout=900_000)
        browser.tab(page, "Data")
        page.evaluate("performance.clearResourceTimings(); performance.setResourceTimingBufferSize(100000)")
        busy = use(page, args.seconds)
        trips = page.evaluate(ROUND_TRIPS)
        step = int(page.locator(".run-head").get_attribute("data-step"))
        going_on = page.locator(".run-head").get_attribute("data-state") == "training"
    found = {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("gradio", "torch")},
        "idle_ms": {name: figures(values) for name, values in idle.items()},
        "training_ms": {name: figures(values) for name, values in busy.items()},
        "all_ms": figures([v for values in busy.values() for v in values]),
        "round_trips_ms": figures(trips),
        "step_at_the_end": step,
        "trained_all_the_time": going_on,
    }
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    print("| action | idle: median / p95 ms | while training: median / p95 / max ms |\n|---|---|---|")
    for name, values in found["training_ms"].items():
        quiet = found["idle_ms"][name]
        print(
            f"| {name} | {quiet['median']} / {quiet['p95']} | {values['median']} / {values['p95']} / {values['max']} |"
        )
    print(f"All actions while training: {found['all_ms']}; round trips: {found['round_trips_ms']}; at step {step}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
