"""The Export tab: merge a run, make GGUF files, check them in llama.cpp, download, push to the Hub."""

from __future__ import annotations

import contextlib
import html
from pathlib import Path

import gradio as gr

from kto_core import jobs
from kto_core.errors import BusyError, ExportError, KTOError
from kto_core.export import export, publish
from kto_core.models import facts as model_info
from kto_core.models.facts import ModelFacts
from kto_core.paths import is_hub_id
from kto_core.runs import folders
from kto_studio.shared import jobs_view, model_choices
from kto_studio.shared.context import QUICK, Context
from kto_studio.shared.marks import mark
from kto_studio.shared.prose import note

from . import view

JOB = "Export "


def build(ctx: Context) -> None:
    with gr.Row(equal_height=True):
        chosen = gr.Dropdown(
            [], label="Run", info="All runs with an adapter.", interactive=True, scale=1, elem_id="export-run"
        )
        # its id: Gradio refuses a Dropdown as input whose value was in the list before the last tick only
        run_id = gr.Textbox(visible=False)
        facts = gr.HTML(view.nothing(), elem_id="export-facts", show_label=False)
    area = gr.Column(elem_id="export-jobs")
    with gr.Row(equal_height=False):
        with gr.Column(min_width=420):
            quants, disk, merge, convert = _make_controls()
            file, prompt, check, answer = _check_controls()
        with gr.Column(min_width=420):
            files, empty = _download_controls()
            push = _push_controls()
    shown = [facts, disk, file, empty, *files, merge, convert, check, push[-1]]
    version = mark()  # of what the page shows
    with area:
        jobs_view.build(ctx, JOB)
    _refresh(ctx, chosen, run_id, quants, push[3], version, shown, disk)
    _make(ctx, run_id, quants, merge, convert, push)
    _check(ctx, run_id, file, prompt, check, answer)


# ---- layout


def _make_controls():
    with gr.Column(elem_classes="card"):
        gr.HTML(
            "<h2>Create files</h2><p>For llama.cpp, Ollama, LM Studio and other programs.</p>",
            elem_classes="panel-head",
        )
        quants = gr.CheckboxGroup(
            [(label, name) for name, label in view.QUANTS],
            value=["q4_k_m"],
            label="GGUF",
            info="How the weights are stored. Smaller files are faster and slightly less accurate.",
            elem_id="export-quants",
        )
        disk = gr.HTML("", elem_id="export-disk", show_label=False)
        with gr.Row():
            convert = gr.Button("Create GGUF", variant="primary", interactive=False, elem_id="export-gguf")
            merge = gr.Button("Merge only (16 bit)", interactive=False, elem_id="export-merge")
    return quants, disk, merge, convert


def _check_controls():
    with gr.Column(elem_classes="card"):
        gr.HTML(
            "<h2>Check in llama.cpp</h2><p>Compares the file with the merged model: chat template, tokens, weights, "
            "answers.</p>",
            elem_classes="panel-head",
        )
        file = gr.Dropdown([], label="File", info="GGUF files created above.", elem_id="export-file")
        prompt = gr.Textbox(
            export.QUESTION,
            label="Question",
            info="Asked with the chat template in the file.",
            elem_id="export-prompt",
        )
        check = gr.Button("Check", interactive=False, elem_id="export-check")
        answer = gr.HTML("", elem_id="export-answer", show_label=False)
    return file, prompt, check, answer


def _download_controls():
    with gr.Column(elem_classes="card"):
        gr.HTML("<h2>Download</h2><p>Files created from this run.</p>", elem_classes="panel-head")
        empty = gr.HTML('<div class="note">No files yet. Choose a run, then create GGUF files.</div>', show_label=False)
        files = [
            gr.DownloadButton("", visible=False, size="md", elem_id=f"export-download-{i}", elem_classes="download")
            for i in range(view.DOWNLOADS)
        ]
    return files, empty


def _push_controls():
    with gr.Column(elem_classes="card"):
        gr.HTML(
            "<h2>Push to the Hugging Face Hub</h2><p>Includes a model card with base model, data, settings and "
            "metrics.</p>",
            elem_classes="panel-head",
        )
        repo = gr.Textbox(
            label="Repository", placeholder="owner/name", info="Created if it doesn't exist.", elem_id="export-repo"
        )
        what = gr.CheckboxGroup(
            list(view.WHAT),
            value=["adapter"],
            label="What",
            info="Missing files are created first.",
            elem_id="export-what",
        )
        private = gr.Checkbox(True, label="Private", info="Off: anyone can see it.", elem_id="export-private")
        token = gr.Textbox(
            label="Access token",
            type="password",
            info=view.token_note(False),
            elem_id="export-token",
            html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
        )
        push = gr.Button("Push", variant="primary", interactive=False, elem_id="export-push")
    return repo, what, private, token, push


# ---- what is shown


def _folder(name: str | None) -> Path | None:
    try:
        return find(name).path
    except KTOError:
        return None


def find(name: str | None):
    """The run of an id of this page.

    Raises:
        ExportError: none is chosen.
    """
    if not name or Path(name).name != name or name in (".", ".."):
        raise ExportError("Choose a run first. If there is none, start one in the Train tab.")
    return folders.find(name)


def summary(run) -> dict:
    """The facts that `export_view.facts` shows."""
    state = run.state()
    made = [view.file_id(p, run.path) for p in view.gguf_files(run.path)]
    return {
        "model": run.config().config.model,
        "state": state.state,
        "steps": state.step,
        "margin": state.latest("rewards/margins"),
        "seconds": state.seconds or None,
        "remarks": view.remarks(run.path),
        "made": (["merged model"] if merged(run.path) else []) + [Path(m).name for m in made],
    }


def merged(folder: Path) -> bool:
    return (folder / "exports" / "merged" / "config.json").is_file()


_facts: dict[str, ModelFacts] = {}  # of models; asking may take a request to the Hub


def needed(run, quants: list[str], ask: bool = True) -> float | None:
    """Bytes that its files take; None if nobody knows, or nobody asked yet and ``ask`` is False."""
    name = run.config().config.model
    if ask and name not in _facts:
        with contextlib.suppress(KTOError):
            _facts[name] = model_info.model_facts(name)
    if (facts := _facts.get(name)) is None:
        return None
    return view.needed(facts.parameters, quants, merged(run.path), facts.shape.hidden, facts.shape.intermediate)


def show_run(name: str | None, quants: list[str], ask: bool = True) -> tuple:
    """Values for the run's facts, disk, file list, download buttons and actions."""
    folder = _folder(name)
    off = [gr.update(interactive=False)] * 4
    hidden = [gr.update(visible=False)] * view.DOWNLOADS
    no_file = gr.update(choices=[], value=None)
    nothing = (view.nothing(), "", no_file, gr.update(visible=True), *hidden, *off)
    if folder is None:
        return nothing
    run = find(name)
    if problem := run.problem():
        cannot = note(f"This run cannot be read: {problem}.", "bad")
        return (cannot, *nothing[1:])
    files = view.downloads(folder)[: view.DOWNLOADS]
    ggufs = [(p.name, view.file_id(p, folder)) for p in view.gguf_files(folder)]
    buttons = [gr.update(label=f"{p.name}  ({view.size(p.stat().st_size)})", value=str(p), visible=True) for p in files]
    buttons += [gr.update(visible=False, value=None)] * (view.DOWNLOADS - len(files))
    need = needed(run, quants, ask)
    ready = gr.update(interactive=True)
    return (
        view.facts(summary(run)),
        view.disk(need, view.free(folder)),
        gr.update(choices=ggufs, value=ggufs[-1][1] if ggufs else None),
        gr.update(visible=not files),
        *buttons,
        ready,
        ready,
        gr.update(interactive=bool(ggufs)),
        ready,
    )


def _refresh(ctx: Context, chosen, run_id, quants, token, version, shown: list, disk) -> None:
    def state() -> tuple:
        return model_choices.signature(), sum(not j.running for j in jobs_view.mine(JOB))

    def tick(before: tuple, name: str | None, asked: list[str]):
        now = state()
        if now == before:
            return (gr.skip(),) * (3 + len(shown))
        labels = dict(model_choices.with_adapter())
        name = name if name in labels else next(iter(labels), None)
        choices = [(label, name) for name, label in labels.items()]
        return gr.update(choices=choices, value=name), name, now, *show_run(name, asked, ask=False)

    def opened(name: str | None, asked: list[str]):
        note = view.token_note(bool(publish.token_present()))
        return gr.update(info=note), *tick((), name, asked)

    def follow(name: str | None):
        """A run chosen in Train is the one to export."""
        return (name, name) if name in dict(model_choices.with_adapter()) else (gr.skip(), gr.skip())

    def pick(event: gr.SelectData):
        return event.value

    def room(name: str | None, asked: list[str]):
        folder = _folder(name)
        if folder is None or find(name).problem():
            return ""
        return view.disk(needed(find(name), asked), view.free(folder))

    ctx.on_tick(tick, [chosen, run_id, version, *shown], [version, run_id, quants])
    ctx.on_load(opened, [token, chosen, run_id, version, *shown], [ctx.chosen_run, quants])
    chosen.select(ctx.guarded(pick), None, [run_id], **QUICK)
    run_id.change(ctx.guarded(show_run), [run_id, quants], shown, **QUICK)
    quants.change(ctx.guarded(room), [run_id, quants], [disk], **QUICK)
    ctx.chosen_run.change(ctx.guarded(follow), [ctx.chosen_run], [chosen, run_id], **QUICK)


# ---- what is done


def start(name: str, work) -> jobs.Job:
    """Start a long job, one at a time: they share the disk and the memory.

    Raises:
        BusyError: one runs already.
    """
    if job := jobs_view.busy(JOB):
        raise BusyError(f"{job.name.removeprefix(JOB)} is still running. Wait until it finishes, or cancel it first.")
    return jobs.start(JOB + name, work)


def make_gguf(run, quants: list[str], progress: jobs.Progress, cancel) -> list[Path]:
    """GGUF files with a Modelfile each, checked.

    Raises:
        ExportError: besides what `export.gguf` raises: a check failed; the files are there.
    """
    made = export.gguf_and_check(run, quants, progress=progress, cancel=cancel)
    if failed := [f"{m['path'].name}: {' '.join(m['check']['problems'])}" for m in made if not m["check"]["ok"]]:
        raise ExportError("Created, but the check failed. " + " ".join(failed))
    return [m["path"] for m in made]


def _make(ctx: Context, run_id, quants, merge, convert, push: tuple) -> None:
    def on_merge(name: str | None):
        run = find(name)
        start(f"Merge {run.id}", lambda progress, cancel: export.merge(run, progress=progress, cancel=cancel))

    def on_convert(name: str | None, asked: list[str]):
        if not asked:
            raise ExportError("Select at least one GGUF type.")
        run = find(name)
        start(
            f"Create GGUF {', '.join(asked)} from {run.id}",
            lambda progress, cancel: make_gguf(run, asked, progress, cancel),
        )

    def on_push(name: str | None, repo: str, what: list[str], private: bool, token: str):
        run, repo, secret = find(name), (repo or "").strip(), (token or "").strip() or None
        if not is_hub_id(repo):
            raise ExportError("Enter the repository as owner/name, for example jane/my-model.")
        if not what:
            raise ExportError("Select at least one item to upload.")

        def work(progress, cancel):
            return publish.push(run, repo, what=what, private=private, token=secret, progress=progress, cancel=cancel)

        start(f"Upload to {repo}", work)
        return ""  # the token leaves the page

    repo, what, private, token, button = push
    merge.click(ctx.guarded(on_merge), [run_id], None, **QUICK)
    convert.click(ctx.guarded(on_convert), [run_id, quants], None, **QUICK)
    button.click(ctx.guarded(on_push), [run_id, repo, what, private, token], [token], **QUICK)


def _check(ctx: Context, run_id, file, prompt, button, answer) -> None:
    told = gr.State(("", ""))  # (id of the run whose file was checked, the answer)

    def on_check(name: str | None, file_id: str | None, question: str):
        run = find(name)
        path = view.by_id(file_id, run.path)
        job = start(
            f"Check {path.name} of {run.id}",
            lambda progress, cancel: export.check_gguf(path, question, progress=progress, cancel=cancel),
        )
        waiting = '<div class="note">Loading the file in llama.cpp…</div>'
        yield (run.id, waiting), waiting, gr.update(interactive=False)
        job.wait()
        about = f'<p class="card-text">{html.escape(path.name)} of run {html.escape(run.id)}</p>'
        if job.result is not None:
            said = about + view.verdict(job.result)
        else:
            said = about + note(job.error or "The check was cancelled.", "bad")
        # shown by what follows, if the run is still chosen; and the tick knows whether there is something to check
        yield (run.id, said), gr.skip(), gr.skip()

    def of_the_chosen(name: str | None, found: tuple[str, str]):
        return found[1] if found[0] == name else ""

    button.click(
        ctx.guarded(on_check),
        [run_id, file, prompt],
        [told, answer, button],
        concurrency_limit=None,
        show_progress="hidden",
        api_visibility="private",
    ).then(of_the_chosen, [run_id, told], [answer], **QUICK)
    run_id.change(of_the_chosen, [run_id, told], [answer], **QUICK)
