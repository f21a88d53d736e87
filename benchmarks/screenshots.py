"""README's pictures: every tab of the real app, light and dark, 1280 and 1920 px wide, on a small real run.

    python benchmarks/screenshots.py [--out docs/screenshots] [--steps 40]

Trains the demo preset on the example in a folder of its own, talks to the result, makes one GGUF file. Needs
requirements-dev.txt and Debian's chromium. Takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import browser  # noqa: E402

EXAMPLE = ROOT / "examples" / "short_answers.jsonl"
SIZES = {1280: 900, 1920: 1080}
QUESTION = "What is the capital of France?"
LONG = 900_000  # milliseconds: the longest wait on a busy machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "screenshots")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of the run (default: %(default)s)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        shoot(Path(folder), args.out, args.steps)


def shoot(folder: Path, out: Path, steps: int) -> None:
    env = os.environ | {"KTO_STUDIO_RUNS": str(folder / "runs"), "KTO_STUDIO_DATA": str(folder / "data")}
    run = folder / "runs" / "short-answers"
    train = ["train", "--preset", "demo", "--data", str(EXAMPLE), "--max-steps", str(steps), "--output-dir", str(run)]
    with browser.app(folder) as url, browser.chromium() as chromium:
        training = subprocess.Popen([sys.executable, "-m", "kto_core", *train], cwd=ROOT, env=env)
        try:
            every(chromium, url, out, "train", lambda page: during(page, steps // 2))
            assert training.wait(LONG / 1000) == 0, "the run failed"
        finally:
            training.kill()
        every(chromium, url, out, "data", data)
        command = [sys.executable, "-m", "kto_core", "export", "gguf", str(run), "--quant", "q8_0"]
        subprocess.run(command, cwd=ROOT, env=env, check=True)
        every(chromium, url, out, "export", export)
        every(chromium, url, out, "chat", chat)


def every(chromium, url: str, out: Path, name: str, prepare) -> None:
    """One tab in both themes and widths. ``prepare`` brings the page to the state that is shown."""
    for dark in (False, True):
        for width, height in SIZES.items():
            theme = "dark" if dark else "light"
            themed = f"{url.rstrip('/')}/?__theme={theme}"
            with browser.page_of(chromium, url, width=width, height=height, dark=dark) as page:
                page.set_default_timeout(LONG)
                page.goto(themed)
                page.get_by_role("tab", name="Train").last.wait_for()
                prepare(page)
                page.mouse.move(0, 0)
                page.evaluate("scrollTo(0, 0)")
                page.screenshot(path=out / f"{name}-{theme}-{width}.png", animations="disabled")
            print(out / f"{name}-{theme}-{width}.png", flush=True)


def data(page) -> None:
    browser.tab(page, "Data")
    page.locator("#data-table tr[data-index]").first.wait_for()
    page.locator("#data-lengths").get_by_text("in tokens").wait_for()


def during(page, step: int) -> None:
    """The run as it trains, from ``step`` on."""
    browser.tab(page, "Train")
    page.wait_for_function(
        "n => Number(document.querySelector('#train-head [data-step]')?.dataset.step) >= n", arg=step
    )
    page.locator("#train-plots canvas, #train-plots svg.marks").first.wait_for()


def export(page) -> None:
    browser.tab(page, "Export")
    page.locator("#export-download-0").wait_for()


def chat(page) -> None:
    """The base model beside the tuned one, one answer each; the first page asks, the others find it anew."""
    browser.tab(page, "Chat")
    page.locator("#chat-model input").click()
    page.get_by_role("option").filter(has_text="short-answers").first.click()
    page.get_by_text("Side by side").click()
    page.locator("#chat-message textarea").fill(QUESTION)
    page.locator("#chat-message textarea").press("Enter")
    page.locator("#chat-stop").wait_for()
    page.locator("#chat-send").wait_for()
    page.locator("#chat-b .bot.message").first.wait_for()


if __name__ == "__main__":
    main()
