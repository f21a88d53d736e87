"""The blind vote of the Chat tab: what its events do. The vote shown is the newest one on disk, on every page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gradio as gr

from kto_core.errors import DataError, ModelError
from kto_core.guards import bounded
from kto_core.jobs import Job
from kto_core.vote import folder, rows
from kto_core.vote.session import Session
from kto_studio.shared import data_sources, model_choices
from kto_studio.shared.context import QUICK, Context, Event
from kto_studio.shared.marks import mark

from . import vote_view, vote_work
from .session import Settings
from .vote_layout import PLACES

SCRIPT = Path(__file__).parents[1] / "assets" / "vote.js"
ONCE: Event = {**QUICK, "trigger_mode": "once"}


def build(ctx: Context, ui: SimpleNamespace, settings: list) -> None:
    """Connect what `vote_layout.side` made. ``settings``: components in the order of `Settings`."""
    gr.HTML("", show_label=False, elem_id="vote-script", js_on_load=SCRIPT.read_text(encoding="utf-8"))
    _showing(ctx, ui, settings)
    _voting(ctx, ui, settings)
    _setup(ctx, ui, settings)
    _rows(ctx, ui)


# ---- what is shown


def _outputs(ui: SimpleNamespace) -> list:
    texts = [ui.status, ui.prompt, *ui.answers.values(), *ui.edits.values(), *ui.folds.values()]
    return [ui.seen, ui.vote, ui.number, *texts, ui.progress, ui.result, ui.setup, ui.fold, ui.cancel, ui.resume]


def _now() -> tuple[Session | None, Job | None]:
    session = folder.newest()
    return session, vote_work.supply(session).job if session else None


def _signature(session: Session | None, job: Job | None, markdown: bool) -> tuple:
    doing: tuple = (job.id, job.state, round(job.fraction or 0, 2), job.text) if job else ()
    if session is not None and session.shown() is not None and job is not None and job.running:
        doing = (job.id, job.state)  # its progress is not shown
    return (session.id, bounded.stamp(session.path), doing, markdown) if session else (doing, markdown)


def _screen(session: Session | None, job: Job | None, markdown: bool, number: float = -1) -> list:
    """Values for `_outputs`. ``number``: of the pair that the page shows; another one closes its editors."""
    shown = session.shown() if session else None
    same = shown is not None and shown.number == number
    texts = (shown.left, shown.right) if shown else ("", "")
    edited = shown.edited if shown else ("", "")
    busy = bool(job and job.running)
    done = bool(session and session.prompts() and shown is None and not session.unanswered() and not busy)
    fold = gr.skip() if same else gr.update(open=False)
    return [
        _signature(session, job, markdown),
        session.id if session else "",
        shown.number if shown else 0,
        vote_view.status(session, job),
        vote_view.prompt(shown),
        *(vote_view.answer(text, markdown) if shown else "" for text in texts),
        *(gr.skip() if same else better or text for text, better in zip(texts, edited, strict=True)),
        fold,
        fold,
        vote_view.progress(session),
        vote_view.result(session),
        gr.skip() if shown and number > 0 else gr.update(open=not (shown or busy)),  # not while somebody uses it
        gr.update(open=True) if done else gr.skip(),
        gr.update(visible=busy and shown is None),
        gr.update(visible=vote_view.idle(session, job)),
    ]


def _showing(ctx: Context, ui: SimpleNamespace, settings: list) -> None:
    markdown, outputs = settings[-1], _outputs(ui)

    def tick(seen, number: float, rendered: bool):
        session, job = _now()
        if seen == _signature(session, job, rendered):
            return [gr.skip()] * len(outputs)
        return _screen(session, job, rendered, number)

    ctx.on_tick(tick, outputs, [ui.seen, ui.number, markdown])
    ctx.on_load(lambda rendered: _screen(*_now(), rendered), outputs, [markdown])


# ---- voting


def _voting(ctx: Context, ui: SimpleNamespace, settings: list) -> None:
    markdown, outputs = settings[-1], _outputs(ui)

    def choose(choice: str) -> Callable:
        def chosen(vote: str, number: float, rendered: bool):
            session = _shown(vote)
            session.vote(int(number), choice)
            vote_work.supply(session).kick()
            return _screen(*_now(), rendered, number)

        return chosen

    def keep(place: str) -> Callable:
        def kept(vote: str, number: float, text: str, rendered: bool):
            session = _shown(vote)
            session.edit(int(number), place, text or "")
            shown = session.shown()
            edited = shown is not None and shown.edited[PLACES.index(place)]
            gr.Info("Kept. Now vote on the pair." if edited else "Nothing to keep: the text is that of the answer.")
            return _screen(*_now(), rendered, number)

        return kept

    for choice, button in (("left", ui.left), ("tie", ui.tie), ("right", ui.right), ("bad", ui.bad)):
        button.click(ctx.guarded(choose(choice)), [ui.vote, ui.number, markdown], outputs, **ONCE)
    for place in PLACES:
        given = [ui.vote, ui.number, ui.edits[place], markdown]
        ui.keeps[place].click(ctx.guarded(keep(place)), given, [*outputs], **ONCE)


def _shown(vote: str) -> Session:
    if not vote:
        raise DataError("No vote is open. Press Start voting.")
    return folder.find(vote)


# ---- setting up


def _setup(ctx: Context, ui: SimpleNamespace, settings: list) -> None:
    markdown, outputs, model = settings[-1], _outputs(ui), settings[0]

    def start(against: str, source: str, typed: str, data_id: str, count, new: bool, *values):
        session = vote_work.begin(Settings(*values), against, source, typed, data_id, count, new)
        return [False, *_screen(session, vote_work.supply(session).job, values[-1])]

    def cancel(rendered: bool):
        session, job = _now()
        if job is not None:
            job.cancel()
        return _screen(session, job, rendered)

    def resume(vote: str, rendered: bool):
        vote_work.supply(_shown(vote)).kick()
        return _screen(*_now(), rendered)

    def sources(source: str):
        there = data_sources.choices()
        typed, data = gr.update(visible=source == "typed"), gr.update(visible=source == "data", choices=there)
        return typed, data

    asked = [ui.against, ui.source, ui.typed, ui.data, ui.count, ui.new]
    ui.start.click(ctx.guarded(start), [*asked, *settings], [ui.new, *outputs], **ONCE)
    ui.resume.click(ctx.guarded(resume), [ui.vote, markdown], outputs, **ONCE)
    ui.cancel.click(ctx.guarded(cancel), [markdown], outputs, **ONCE)
    ui.source.input(ctx.guarded(sources), [ui.source], [ui.typed, ui.data], **QUICK)
    listed = mark()

    def opponents(choice: str, against: str, known):
        found = vote_work.opponents(choice)
        if known == found:
            return gr.skip(), gr.skip()
        value = against if against in [name for _, name in found] else "base"
        return gr.update(choices=found, value=value), found

    ctx.on_tick(opponents, [ui.against, listed], [model, ui.against, listed])


# ---- rows


def _rows(ctx: Context, ui: SimpleNamespace) -> None:
    def write(vote: str) -> tuple[Session, str, str]:
        session = _shown(vote)
        path, good, bad = rows.write(session)
        name = Path(path).name
        return session, name, vote_view.made(name, good, bad, rows.reference(session.settings.a))

    def make(vote: str):
        _, name, text = write(vote)
        return text, f"file:{name}"

    def train(vote: str):
        session, name, text = write(vote)
        side = session.settings.a
        if side.run not in dict(model_choices.with_adapter()):
            raise ModelError(
                f"The rows are in {name}, but {side.name} has no finished adapter to continue from. Resume the run "
                "first."
            )
        if side.checkpoint:
            raise ModelError(
                f"The rows are in {name}. The vote was on a checkpoint, and Train continues from finished adapters "
                "only: use `kto vote rows`, which prints the command."
            )
        return text, f"file:{name}", {"run": side.run, "vote": session.id}, gr.Tabs(selected="train")

    ui.rows.click(ctx.guarded(make), [ui.vote], [ui.made, ctx.chosen_data], **ONCE)
    go_on = ctx.go_on if ctx.go_on is not None else gr.State(None)
    ui.train.click(ctx.guarded(train), [ui.vote], [ui.made, ctx.chosen_data, go_on, ctx.tabs], **ONCE)
