"""The whole app in a child process, and a page of Debian's chromium on it, for tests and screenshots."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 180_000  # milliseconds a condition may take on a busy machine; only a failing test waits so long
LEAVING = re.compile(r"AbortError|Connection errored out")  # Gradio's words for requests that leaving the page cut off
JUST = 3  # seconds before a page is left in which its requests may be cut off
IGNORED = re.compile(r"ResizeObserver loop|preloaded using link preload|downloadable font")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def app(folder: Path, *flags: str, cache: Path | None = None, env: dict | None = None) -> Iterator[str]:
    """``app.py`` with its own runs, data and (if asked) cache below ``folder``; gives the address it prints."""
    env = {
        "KTO_STUDIO_RUNS": str(folder / "runs"),
        "KTO_STUDIO_DATA": str(folder / "data"),
        "HF_HUB_OFFLINE": "1",
        **({"KTO_STUDIO_CACHE": str(cache)} if cache else {}),
        **(env or {}),
    }
    command = [sys.executable, "app.py", "--port", str(free_port()), *flags]
    with started(command, folder, env) as (url, said):
        yield url
        assert "Traceback" not in said(), "the app's terminal has a traceback:\n" + said()[-6000:]


@contextlib.contextmanager
def started(command: list[str], folder: Path, env: dict) -> Iterator[tuple[str, Callable[[], str]]]:
    """A child that serves the app: (address, what its terminal says so far). Ended at the end."""
    env = os.environ | {"GRADIO_TEMP_DIR": str(folder / "gradio"), "PYTHONUNBUFFERED": "1"} | env
    child = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    ready = threading.Event()
    address: list[str] = []

    def listen() -> None:
        for line in child.stdout:
            lines.append(line)
            if found := re.match(r"KTO Studio: (http\S+)", line):
                address.append(found[1])
                ready.set()
        ready.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        assert ready.wait(90) and address, "the app did not start:\n" + "".join(lines)
        yield address[0], lambda: "".join(lines)
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextlib.contextmanager
def chromium(*flags: str) -> Iterator:
    """A browser without a window."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium")
    assert program, "Chromium is missing. On Debian: apt-get install chromium"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox", *flags])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def page_of(browser, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> Iterator:
    """A page of the app. Script errors, console errors and requests to other machines fail the test at the end."""
    problems: list[str] = []
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if dark else "light",
        accept_downloads=True,
        reduced_motion="reduce",
    )
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    watch(page, url, problems)
    page.goto(url)
    page.get_by_role("tab", name="Train").last.wait_for()
    try:
        yield page
        assert not problems, problems
    finally:
        context.close()


def watch(page, url: str | None, problems: list[str]) -> None:
    """Collect what goes wrong in a page, and (with its address) its requests to other machines.

    What a page says as another one takes its place is no problem: its requests are cut off. It may say so before the
    request for the next one is seen.
    """
    leaving, arrived, cut_off = False, 0.0, {}  # what was said of requests that were cut off, and when

    def on_console(message) -> None:
        if message.type == "error" and not IGNORED.search(message.text):
            said(f"console: {message.text}")

    def said(problem: str) -> None:
        if not LEAVING.search(problem):
            problems.append(problem)
        elif not leaving and time.monotonic() - arrived > 1:
            cut_off[problem] = time.monotonic()
            problems.append(problem)

    def on_request(request) -> None:
        nonlocal leaving
        if request.is_navigation_request() and request.frame == page.main_frame:
            leaving, now = True, time.monotonic()
            just = {problem for problem, at in cut_off.items() if now - at < JUST}
            problems[:] = [problem for problem in problems if problem not in just]
        if url and not request.url.startswith((url, url.replace("http", "ws", 1), "data:", "blob:")):
            problems.append(f"request: {request.url}")

    def on_load(_) -> None:
        nonlocal leaving, arrived
        leaving, arrived = False, time.monotonic()

    page.on("pageerror", lambda e: said(f"script: {e}"))
    page.on("console", on_console)
    page.on("request", on_request)
    page.on("load", on_load)


def reload(page) -> None:
    """Reload the page and wait for its tabs."""
    page.reload()
    page.get_by_role("tab").last.wait_for()


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).last.click()  # the first one is Gradio's, for measuring


def choose(page, place: str, text: str) -> None:
    """Choose the option with this text in the Dropdown at ``place``."""
    page.locator(f"{place} input").click()
    page.locator(f"{place} [role=option]", has_text=text).click()


def hold(page, pattern: str, which: Callable) -> list:
    """Requests that match and that ``which(request)`` wants are not sent; the list to which they are added."""
    held: list = []
    page.route(pattern, lambda route: held.append(route) if which(route.request) else route.continue_())
    return held


def until(condition, seconds: float = 60.0):
    """Poll until ``condition()`` is true; its value. For what is not in the page (files, processes)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"nothing happened within {seconds} s")


def texts_of(page, selector: str) -> Callable[[], list[str]]:
    """Gives the texts that an element has shown from now on, also those that it shows for a moment only."""
    page.evaluate(
        """selector => {
            window.watched = [];
            new MutationObserver(() => window.watched.push(document.querySelector(selector).innerText))
                .observe(document.body, {subtree: true, childList: true, characterData: true});
        }""",
        selector,
    )
    return lambda: page.evaluate("window.watched")
