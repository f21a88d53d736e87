"""Build the page and serve it: theme, styles, safe settings. What the tabs do is in their own files."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder

from kto_core import paths
from kto_studio.chat import tab as chat_tab
from kto_studio.data import tab as data_tab
from kto_studio.export import tab as export_tab
from kto_studio.shared import data_sources, live, model_choices, temporary, views
from kto_studio.shared.context import Context
from kto_studio.train import tab as train_tab

from . import demo_panel

os.environ["FORWARDED_ALLOW_IPS"] = ""  # uvicorn believes no proxy's word about who asks, and how

LOCAL = ("127.0.0.1", "localhost", "::1")
FIRST_PORT = 7860
ASSETS = Path(__file__).with_name("assets")
STYLES = [ASSETS / name for name in ("style.css", "tabs.css", "curves.css")]
BROWSER_KEY = "kto-studio-browser"  # obfuscates which data set and run were open; nothing secret is kept there
FAVICON = ASSETS / "icon.svg"


def theme() -> gr.themes.Base:
    """Gradio's default theme (good contrast) with our accent, calmer surfaces and one radius."""
    teal = gr.themes.colors.teal
    weights = (400, 700)  # Gradio's own files of these are whole; its semi-bold ones lack most letters
    return gr.themes.Default(
        font=[gr.themes.LocalFont("Source Sans Pro", weights=weights), "ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=[gr.themes.LocalFont("IBM Plex Mono", weights=weights), "ui-monospace", "Consolas", "monospace"],
        primary_hue=teal,
        secondary_hue=teal,
        neutral_hue=gr.themes.colors.zinc,
        radius_size=gr.themes.sizes.radius_md,
        text_size=gr.themes.sizes.text_md,
    ).set(
        body_background_fill="#f6f7f8",
        body_background_fill_dark="#0e0f11",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#17181b",
        background_fill_secondary="#f6f7f8",
        background_fill_secondary_dark="#1d1f23",
        block_background_fill="#ffffff",
        block_background_fill_dark="#17181b",
        border_color_primary="#e1e4e8",
        border_color_primary_dark="#2c2f35",
        block_shadow="none",
        block_radius="12px",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_label_border_width_dark="0px",
        block_title_text_weight="600",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_label_text_color="*body_text_color",
        block_label_text_color_dark="*body_text_color",
        block_label_text_weight="600",
        body_text_color_subdued="#5b626b",
        body_text_color_subdued_dark="#a0a6af",
        block_info_text_color="#5b626b",
        block_info_text_color_dark="#a0a6af",
        input_background_fill_dark="#1d1f23",
        input_border_color_focus="*primary_600",
        input_border_color_focus_dark="*primary_500",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#115e59",
        button_primary_background_fill_dark="#0f766e",
        button_primary_background_fill_hover_dark="#0d9488",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_hover="#eef0f2",
        button_secondary_background_fill_dark="#23262b",
        button_secondary_background_fill_hover_dark="#2c3037",
        button_secondary_text_color="#24282d",
        button_secondary_text_color_dark="#e6e8eb",
        button_secondary_border_color="#d3d8dd",
        button_secondary_border_color_dark="#3a3e45",
        button_border_width="1px",
        button_primary_border_color="transparent",
        button_primary_border_color_dark="transparent",
        button_cancel_border_color="transparent",
        button_cancel_border_color_dark="transparent",
        button_cancel_background_fill="#b42318",
        button_cancel_background_fill_hover="#912018",
        button_cancel_background_fill_dark="#b42318",
        button_large_text_weight="600",
    )


def build(*, demo: bool = False, public: bool = False) -> gr.Blocks:
    """The whole page. Quick: no model, no data set is read here."""
    with gr.Blocks(title="KTO Studio", fill_width=True, analytics_enabled=False) as blocks:
        timer = gr.Timer(1.0)
        chosen_data = gr.BrowserState(data_sources.default(), storage_key="kto-studio-data", secret=BROWSER_KEY)
        chosen_run = gr.BrowserState("", storage_key="kto-studio-run", secret=BROWSER_KEY)
        # inside a tab these would be read when it is opened, too late for what fills the page
        form = gr.BrowserState({}, storage_key="kto-studio-form", secret=BROWSER_KEY)
        talk = gr.BrowserState({}, storage_key="kto-studio-chat", secret=BROWSER_KEY)
        with gr.Row(elem_id="header"):
            gr.HTML(views.brand())
            status = gr.HTML(views.header_status(None, None), elem_id="header-status")
            script = (ASSETS / "page.js").read_text(encoding="utf-8")
            gr.HTML(views.theme_toggle(), elem_id="header-theme", js_on_load=script)
        demo_room = gr.Column(elem_id="demo-room") if demo else None
        go_on = gr.State(None)
        advice, model = gr.State(None), gr.State(model_choices.first_model())  # not inside gr.Tabs: they count as tabs
        with gr.Tabs(elem_id="tabs", selected="data") as tabs:
            ctx = Context(
                blocks,
                tabs,
                timer,
                chosen_data,
                chosen_run,
                advice,
                model,
                form=form,
                talk=talk,
                go_on=go_on,
                demo=demo,
                public=public,
            )
            for name, tab in (("data", data_tab), ("train", train_tab), ("chat", chat_tab), ("export", export_tab)):
                with gr.Tab(name.capitalize(), id=name, elem_id=f"tab-{name}"):
                    tab.build(ctx)
        if demo_room:
            with demo_room:
                demo_panel.build(ctx)
        _header(ctx, status)
        ctx.start_ticking()
        nowhere = gr.State()
    for fn in blocks.fns.values():
        fn.api_visibility = "private"  # the page's own calls only: nothing of it is an API for scripts
        if fn.show_progress == "hidden":
            # else the browser copies every output of every event that ever ran, twice for each call: seconds with plots
            fn.show_progress_on = [nowhere]
    return blocks


def _header(ctx: Context, status: gr.HTML) -> None:
    """The chip at the top right: what runs now, and on which device. Redrawn only when its text changes."""
    shown = gr.State("")

    def tick(before: str):
        run = live.active()
        text = views.header_status(run.state() if run else None, live.device())
        return (gr.skip(), gr.skip()) if text == before else (text, text)

    ctx.on_tick(tick, [status, shown], [shown])
    ctx.on_load(lambda: tick(""), [status, shown])


def free_port(host: str, port: int | None) -> int:
    """``port`` if it was asked for, else the first free one from 7860 on.

    Raises:
        OSError: the asked one is taken, the host is not an address of this machine, or nothing is free.
    """
    tried = [port] if port else range(FIRST_PORT, FIRST_PORT + 100)
    problem = OSError(errno.EADDRINUSE, "nothing is free")
    for number in tried:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind((host, number))
                return number
            except OSError as e:
                problem = e
                if e.errno != errno.EADDRINUSE:
                    break
    raise OSError(
        problem.errno, "the port is already in use" if problem.errno == errno.EADDRINUSE else problem.strerror
    )


def folders() -> list[Path]:
    """What the browser may download from: runs and data."""
    return [paths.runs_dir(), paths.data_dir()]


def doors(public: bool) -> dict:
    """Arguments of ``launch`` that decide who gets in. On this machine only: no password, its own pages only.

    Reachable from others: two passwords, created at each start and printed once, and `security.doors`'s gate before
    every route, with the guest's page behind it.
    """
    from kto_studio.security import doors as security

    if not public:
        return {"app_kwargs": security.local_kwargs(folders())}
    from kto_studio.chat import guest

    accounts = security.Accounts()
    style = {name: value for name, value in looks().items() if name != "favicon_path"}
    gate = security.app_kwargs({"folders": folders()}, guest.build(), accounts=accounts, guest_options=style)
    print(f"The app is reachable from other machines. User: {security.OWNER}   Password: {accounts.owner}")
    print(
        f"Guests (chat only) at {security.GUEST_PATH}: {security.GUEST}   Password: {accounts.guest}",
        flush=True,
    )
    return {"auth": accounts.owner_login, "app_kwargs": gate}


def looks() -> dict:
    """Theme, styles and icon, as ``launch`` and ``mount_gradio_app`` take them."""
    css = "\n".join(path.read_text(encoding="utf-8") for path in STYLES)
    return {"theme": theme(), "css": css, "favicon_path": FAVICON}


def launch(*, host: str = "127.0.0.1", port: int | None = None, share: bool = False, demo: bool = False) -> None:
    """Serve until interrupted.

    Raises:
        DiskError: a folder cannot be made, or there is no room for uploads.
        OSError: the port is taken, or the host is not ours.
    """
    with temporary.folder():
        _serve(host, port, share, demo)


def _serve(host: str, port: int | None, share: bool, demo: bool) -> None:
    public = share or host not in LOCAL
    wanted, port = port, free_port(host, port)
    if not wanted and port != FIRST_PORT:
        print(f"Port {FIRST_PORT} is in use, perhaps by another KTO Studio. This one listens on {port}.", flush=True)
    paths.make_folder(paths.runs_dir(), "runs", "KTO_STUDIO_RUNS")
    paths.make_folder(paths.data_dir(), "data", "KTO_STUDIO_DATA")
    paths.make_folder(paths.cache_dir(), "the cache", "KTO_STUDIO_CACHE")
    paths.make_folder(Path(get_upload_folder()), "uploads on their way", "GRADIO_TEMP_DIR")
    gr.set_static_paths(folders())  # downloads of gigabytes are not copied first
    blocks = build(demo=demo, public=public)
    blocks.queue(default_concurrency_limit=8)
    blocks.launch(
        server_name=host,
        server_port=port,
        share=share,
        run_history=False,  # the default keeps inputs, passwords included, in the browser in clear
        show_error=not public,
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size="2gb",
        **looks(),
        **doors(public),
    )
    blocks.share = False  # Gradio's page for a share link takes its scripts from another server; this one has them here
    print(f"KTO Studio: {blocks.local_url}", flush=True)
    if share:
        print(
            f"Public link: {blocks.share_url}"
            if blocks.share_url
            else "No public link: Gradio's tunnel cannot be reached. The app is only available on this machine.",
            flush=True,
        )
    blocks.block_thread()
