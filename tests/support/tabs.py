"""One or two tabs of the interface, served alone and opened in Debian's chromium."""

import contextlib
import shutil
from collections.abc import Callable, Iterator

import gradio as gr

from kto_core import paths
from kto_studio.security import doors as security
from kto_studio.shared.context import Context
from tests.support.browser import watch


@contextlib.contextmanager
def served(**tabs: Callable[[Context], None]) -> Iterator[str]:
    """The address of a page with these tabs (name -> build); the last one is open."""
    with gr.Blocks(fill_width=True) as blocks:
        timer, data, run, advice = gr.Timer(0.3), gr.BrowserState(""), gr.BrowserState(""), gr.State(None)
        with gr.Tabs(selected=list(tabs)[-1]) as holder:
            ctx = Context(blocks, holder, timer, data, run, advice)
            for name, build in {"data": lambda ctx: gr.Markdown("The data tab"), **tabs}.items():
                with gr.Tab(name.capitalize(), id=name):
                    build(ctx)
        ctx.start_ticking()
    paths.runs_dir().mkdir(parents=True, exist_ok=True)
    gr.set_static_paths([paths.runs_dir()])
    css = (paths.ROOT / "kto_studio" / "assets" / "tabs.css").read_text()
    gate = security.local_kwargs([paths.runs_dir()])  # as the app is served: what a tab needs must pass it
    _, url, _ = blocks.launch(
        prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1", css=css, app_kwargs=gate
    )
    try:
        yield url
    finally:
        blocks.close()


@contextlib.contextmanager
def opened(url: str) -> Iterator:
    """A page that fails the test on any script error, console error or request to another machine."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium")
    assert program, "Chromium is missing. On Debian: apt-get install chromium"
    problems: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True).new_page()
        watch(page, url, problems)
        page.goto(url)
        yield page
        assert not problems, problems
        browser.close()
