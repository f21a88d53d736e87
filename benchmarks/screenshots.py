"""Pictures of every tab for the README, written to docs/screenshots/TAB-THEME-WIDTH.png.

Nothing is staged: the app runs in folders of its own, trains the demo preset on the example data for ``--steps`` steps,
with two betas, answers a question with the second result, and is then photographed in each width and theme. Needs
Debian's chromium; about eight minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support import browser  # noqa: E402

TABS = ("Data", "Train", "Runs", "Chat", "Export")
HEIGHT = 1000
QUESTION = "What colour is the sky on a clear day?"
LONG = 15 * 60_000  # milliseconds


def train(page, steps: int, beta: float) -> None:
    """Train the chosen data with the demo preset, to the end."""
    browser.tab(page, "Train")
    page.locator("#train-preset").get_by_text("demo", exact=True).click()
    values = {"max_steps": str(steps), "beta": str(beta), "run_name": f"Short answers, beta {beta:g}"}
    for name, value in values.items():
        field = page.locator(f"#set-{name} input, #set-{name} textarea").first
        field.fill(value)
        field.press("Tab")
    page.locator("#train-changed").get_by_text(str(steps)).wait_for()
    page.locator("#train-start").click()
    page.locator(".run-head", has_text=values["run_name"]).wait_for()
    page.locator(".run-head[data-state=finished]").wait_for(timeout=LONG)


def chat(page) -> None:
    """Load the run that was trained, and ask it and its base something, without chance."""
    browser.tab(page, "Train")
    page.locator("#train-chat").click()
    page.wait_for_function("document.querySelector('#chat-model input').value.startsWith('Run')")
    page.locator("#chat-load").click()
    page.locator("#chat-status .note-good").wait_for(timeout=LONG)
    page.locator("#chat-mode").get_by_text("Side by side").click()
    page.get_by_text("Sampling").click()
    page.locator("#chat-sampling input[type=number]").first.fill("0")
    page.locator("#chat-sampling input[type=number]").first.press("Tab")
    page.wait_for_function("document.querySelector('#chat-sampling input[type=range]').value === '0'")
    page.wait_for_timeout(500)
    page.get_by_text("Sampling").click()
    page.locator("#chat-b").wait_for()
    page.locator("#chat-message textarea").fill(QUESTION)
    page.locator("#chat-send").click()
    page.locator("#chat-stats").get_by_text("tokens").wait_for(timeout=LONG)
    page.locator("#chat-send").wait_for(timeout=LONG)  # hidden while it answers


def settle(page, name: str) -> None:
    """Wait until a tab shows what belongs to it."""
    browser.tab(page, name)
    shown = {
        "Data": "#data-row-view .seen",
        "Train": "#plot-kl .curve-line",
        "Runs": "#runs-table input[type=checkbox]",
        "Chat": "#chat-b .bot.message",
        "Export": "#export-facts table, #export-facts .note",
    }[name]
    page.locator(shown).first.wait_for(timeout=LONG)
    if name == "Runs":
        for box in page.get_by_role("checkbox", name="Compare").all():
            box.check()
        page.locator("#runs-beside .curve-line").first.wait_for()
    page.wait_for_timeout(1500)  # a tick of the page, and its plots drawn


def photograph(chromium, url: str, kept: dict, folder: Path, width: int, dark: bool) -> list[Path]:
    """A picture of every tab; ``kept`` is the state of the browser that trained and chatted."""
    made = []
    context = chromium.new_context(
        viewport={"width": width, "height": HEIGHT},
        color_scheme="dark" if dark else "light",
        storage_state=kept,
        reduced_motion="reduce",
    )
    context.set_default_timeout(LONG)
    page = context.new_page()
    problems: list[str] = []
    browser.watch(page, url, problems)
    page.goto(url)
    for name in TABS:
        settle(page, name)
        path = folder / f"{name.lower()}-{'dark' if dark else 'light'}-{width}.png"
        page.screenshot(path=path, full_page=True)
        made.append(path)
    context.close()
    if problems:
        raise SystemExit("The page has problems:\n" + "\n".join(problems))
    return made


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "screenshots", metavar="D", help="where to write")
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="steps to train (default: %(default)s)")
    parser.add_argument("--widths", default="1280,1920", metavar="N,N", help="widths in pixels (default: %(default)s)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home, browser.app(Path(home)) as url, browser.chromium() as chromium:
        context = chromium.new_context(viewport={"width": 1280, "height": HEIGHT})
        context.set_default_timeout(LONG)
        page = context.new_page()
        page.goto(url)
        page.locator("#data-table tr[data-index]").first.wait_for()
        train(page, args.steps, 0.1)
        train(page, args.steps, 0.5)
        chat(page)
        kept = context.storage_state()
        context.close()
        for width in (int(w) for w in args.widths.split(",")):
            for dark in (False, True):
                for path in photograph(chromium, url, kept, args.out, width, dark):
                    print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
