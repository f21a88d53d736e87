"""What the tabs share: the Blocks, the one timer, the chosen data set and run, and how errors reach the user.

Every tab file has ``build(ctx: Context) -> None``, called once inside its ``gr.Tab``.
"""

from __future__ import annotations

import functools
import html
import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import gradio as gr

from kto_core.errors import Cancelled, KTOError

TABS = ("data", "train", "chat", "export")  # the ids of ctx.tabs: gr.Tabs(selected="chat") switches


def error(problem: str | BaseException, title: str = "Not done") -> gr.Error:
    """A gr.Error to raise: text escaped (a toast renders HTML), shown 15 s, no trace in the terminal.

    A KTOError speaks for itself; any other exception is a bug of ours, printed to the terminal and named.
    """
    if isinstance(problem, gr.Error):
        return problem
    if isinstance(problem, BaseException) and not isinstance(problem, KTOError):
        traceback.print_exception(problem)
        problem = f"Unexpected {type(problem).__name__}: {problem}. The terminal has the details."
    text = html.escape(str(problem)).replace("\n", "<br>")
    return gr.Error(text, duration=15, title=title, print_exception=False)


def guarded(fn: Callable) -> Callable:
    """Wrap an event handler (function or generator): what it raises becomes an `error`; Cancelled becomes a note."""
    if inspect.isgeneratorfunction(fn):

        @functools.wraps(fn)
        def generator(*args):
            try:
                yield from fn(*args)
            except Cancelled as e:
                gr.Info(html.escape(str(e)))
            except Exception as e:
                raise error(e) from None

        return generator

    @functools.wraps(fn)
    def function(*args):
        try:
            return fn(*args)
        except Cancelled as e:
            gr.Info(html.escape(str(e)))
            return gr.skip()
        except Exception as e:
            raise error(e) from None

    return function


def quiet(fn: Callable) -> Callable:
    """Wrap a tick: it never raises. The trace goes to the terminal once for each kind of failure."""
    seen: set[str] = set()

    @functools.wraps(fn)
    def tick(*args):
        try:
            return fn(*args)
        except Exception as e:
            if (key := repr(e)) not in seen:
                seen.add(key)
                traceback.print_exc()
            return gr.skip()

    return tick


def _nothing(result) -> bool:
    """Whether a tick skipped all its outputs; it may return one value, a sequence, or component -> value."""
    skip = gr.skip()
    if isinstance(result, dict) and "__type__" not in result:
        result = list(result.values())
    values = result if isinstance(result, list | tuple) else [result]
    return all(isinstance(v, dict) and v == skip for v in values)


@dataclass
class Context:
    """Handed to every tab's ``build``."""

    blocks: gr.Blocks
    tabs: gr.Tabs  # ids in TABS; an event may output gr.Tabs(selected="train")
    timer: gr.Timer  # ticks once a second while the page is open
    chosen_data: gr.BrowserState  # id of a data source (ui/sources.py), "" = none; survives a reload
    chosen_run: gr.BrowserState  # id of the run shown in Train, "" = the active or newest one; survives a reload
    advice: gr.State  # weights the Data tab advises, {"desirable_weight": x, …}; Train takes them on change
    chosen_model: gr.State | None = None  # {"model": name, "max_length": n} as Train's form has them
    form: gr.BrowserState | None = None  # Train's settings; survives a reload (built outside the tabs: see launch)
    talk: gr.BrowserState | None = None  # Chat's conversation, likewise
    demo: bool = False  # app.py --demo
    public: bool = False  # reachable from other machines: show no folders of this one
    ticks: list = field(default_factory=list)  # (fn, inputs, bell) of every `on_tick`

    def on_load(self, fn: Callable, outputs, inputs=None) -> gr.events.Dependency:
        """Call ``fn(*inputs)`` when a page opens. It must be quick; what it raises leaves the outputs alone.

        Gives Gradio's event, for what comes after it.
        """
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        return self.blocks.load(quiet(fn), inputs, outputs, **quick)

    def on_tick(self, fn: Callable, outputs, inputs=None) -> None:
        """Call ``fn(*inputs)`` every second. It must be pure and quick (< 20 ms): keep a signature of what was shown
        in a gr.State and return gr.skip() when nothing is new.

        A skipped output still costs the browser a copy of all that its component shows (seconds, with plots). So the
        timer asks all ticks at once and has a hidden number for each as its output, its bell; only a tick with
        something new rings, and is then called again for its outputs. `start_ticking` connects them.
        """
        bell = gr.Number(0, visible=False)  # a gr.State's change is only heard of through the queue
        inputs = [] if inputs is None else list(inputs)
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        bell.change(quiet(fn), inputs, outputs, trigger_mode="always_last", **quick)
        self.ticks.append((quiet(fn), inputs, bell))

    def start_ticking(self) -> None:
        """Call once, after all tabs were built."""
        ticks = list(self.ticks)

        def ask(*values):
            rung, at = {}, 0  # not a list: of a page with one tick it would be that bell's value
            for fn, inputs, own in ticks:
                mine, bell = values[at : at + len(inputs)], values[at + len(inputs)]
                rung[own] = gr.skip() if _nothing(fn(*mine)) else (bell or 0) + 1
                at += len(inputs) + 1
            return rung

        asked = [c for _, inputs, bell in ticks for c in (*inputs, bell)]
        self.timer.tick(
            quiet(ask),
            asked,
            [bell for *_, bell in ticks],
            queue=False,
            trigger_mode="once",
            show_progress="hidden",
            api_visibility="private",
        )

    error = staticmethod(error)
    guarded = staticmethod(guarded)
