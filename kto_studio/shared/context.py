"""What the tabs share: the Blocks, the one timer, the chosen data set and run, and how errors reach the user.

Every tab file has ``build(ctx: Context) -> None``, called once inside its ``gr.Tab``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypedDict

import gradio as gr

from kto_core.errors import Cancelled, KTOError
from kto_core.plain_text import print_trace

from .prose import prose


class Event(TypedDict, total=False):
    """Keywords of a Gradio event."""

    queue: bool
    concurrency_limit: int | None
    show_progress: Literal["full", "minimal", "hidden"]
    api_visibility: Literal["public", "private", "undocumented"]
    trigger_mode: Literal["once", "multiple", "always_last"]
    preprocess: bool


# through the queue: an error that is raised outside of it shows no toast, but a failed request in the console
QUICK: Event = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
# what raises nothing goes without it, in half the time
DIRECT: Event = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
TABS = ("data", "train", "chat", "export")  # the ids of ctx.tabs: gr.Tabs(selected="chat") switches


def error(problem: str | BaseException, title: str = "Error") -> gr.Error:
    """A gr.Error to raise: text escaped (a toast renders HTML), shown 15 s, no trace in the terminal.

    A KTOError speaks for itself; any other exception is a bug of ours, printed to the terminal and named.
    """
    if isinstance(problem, gr.Error):
        return problem
    if isinstance(problem, BaseException) and not isinstance(problem, KTOError):
        print_trace(problem)
        problem = f"Unexpected {type(problem).__name__}: {problem}. See the terminal for details."
    text = prose(problem).replace("\n", "<br>")
    return gr.Error(text, duration=15, title=title, print_exception=False)


def guarded(fn: Callable) -> Callable:
    """Wrap an event handler (function or generator): what it raises becomes an `error`; Cancelled becomes a note."""
    if inspect.isgeneratorfunction(fn):

        @functools.wraps(fn)
        def generator(*args):
            try:
                yield from fn(*args)
            except Cancelled as e:
                gr.Info(prose(e))
            except Exception as e:
                raise error(e) from None

        return generator

    @functools.wraps(fn)
    def function(*args):
        try:
            return fn(*args)
        except Cancelled as e:
            gr.Info(prose(e))
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
                print_trace(e)
            return gr.skip()

    return tick


def lenient(fn: Callable, inputs: list) -> Callable:
    """For an event with ``preprocess=False``: ``fn`` gets what Gradio would pass, or the raw value of a control that
    Gradio would refuse (a number out of its bounds, a choice that is gone), and with it the call for all the others."""

    def taken(component, value):
        try:
            return value if component.stateful else component.preprocess(value)
        except Exception:
            return value

    @functools.wraps(fn)
    def called(*values):
        return fn(*(taken(c, v) for c, v in zip(inputs, values, strict=True)))

    return called


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
    chosen_data: gr.BrowserState  # id of a data source (data_sources.py), "" = none; survives a reload
    chosen_run: gr.BrowserState  # id of the run shown in Train, "" = the active or newest one; survives a reload
    advice: gr.State  # weights the Data tab advises, {"desirable_weight": x, …}; Train takes them on change
    chosen_model: gr.State | None = None  # {"model": name, "max_length": n} as Train's form has them
    form: gr.BrowserState | None = None  # Train's settings; survives a reload (built outside the tabs: see launch)
    talk: gr.BrowserState | None = None  # Chat's conversation, likewise
    go_on: gr.State | None = None  # {"run": id, …}: Train continues from its adapter, on the chosen data, on change
    demo: bool = False  # app.py --demo
    public: bool = False  # reachable from other machines: show no folders of this one
    ticks: list = field(default_factory=list)  # (fn, inputs, bell) of every `on_tick`

    def on_load(self, fn: Callable, outputs, inputs=None) -> gr.events.Dependency:
        """Call ``fn(*inputs)`` when a page opens. It must be quick; what it raises leaves the outputs alone.

        Gives Gradio's event, for what comes after it.
        """
        return self.blocks.load(quiet(fn), inputs, outputs, **DIRECT)

    def on_tick(self, fn: Callable, outputs, inputs=None) -> None:
        """Call ``fn(*inputs)`` every second. It must be pure and quick (< 20 ms): keep a signature of what was shown
        in a gr.State and return gr.skip() when nothing is new.

        A skipped output still costs the browser a copy of all that its component shows (seconds, with plots). So the
        timer asks all ticks at once and has a hidden number for each as its output, its bell; only a tick with
        something new rings, and is then called again for its outputs. `start_ticking` connects them.

        No value of a control stops a tick, least of all those of others (see `lenient`): ``fn`` clamps what it uses.
        """
        bell = gr.Number(0, visible=False)  # a gr.State's change is only heard of through the queue
        inputs = [] if inputs is None else list(inputs)
        rung: Event = {**DIRECT, "preprocess": False, "trigger_mode": "always_last"}
        bell.change(lenient(quiet(fn), inputs), inputs, outputs, **rung)
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
            lenient(quiet(ask), asked),
            asked,
            [bell for *_, bell in ticks],
            preprocess=False,
            queue=False,
            trigger_mode="once",
            show_progress="hidden",
            api_visibility="private",
        )

    error = staticmethod(error)
    guarded = staticmethod(guarded)
