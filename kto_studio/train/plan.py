"""What a run of the form would do, before it starts: problems, steps, rows, tokens, memory. Quick, and exact on demand.

The quick answer uses what is known of the data already; the exact one is `kto_core.planning.dry_run` in the background.
"""

from __future__ import annotations

import html
import json
from collections import OrderedDict

from kto_core import jobs
from kto_core.config import remarks as on_settings
from kto_core.config import resolving
from kto_core.data import splitting
from kto_core.data.report import lopsided
from kto_core.errors import DataError, HardwareError, KTOError
from kto_core.hardware import gpus
from kto_core.models import facts as model_info
from kto_core.planning import checks
from kto_core.planning import memory as memory_plan
from kto_core.planning import rate as rates
from kto_core.planning.dry_run import dry_run
from kto_core.runs.events import thin
from kto_studio.data import jobs as data_jobs
from kto_studio.shared import data_sources, live
from kto_studio.shared.jobs_view import bar
from kto_studio.shared.prose import in_app, note, prose

from . import form as train_form

JOB = "Plan "
CARD = 24.0  # GiB of the GPU that a model is planned for where this machine has none
KEEP = 20
LETTERS = 4  # characters of a token, about, where tokens were not counted
FEW = 20  # rows
SAMPLE = 2000  # lengths the memory plan looks at
VERDICTS = {
    "fits": ("good", "Fits"),
    "tight": ("warn", "Tight"),
    "does not fit": ("bad", "Does not fit"),
    "cpu": ("", "Trains on the CPU"),
}
_exact: OrderedDict[str, jobs.Job] = OrderedDict()


def key(form: dict, data_id: str) -> str:
    """Of everything the answer depends on but the machine."""
    data: tuple | str
    try:
        data = data_sources.key(data_id)
    except (KTOError, OSError):
        data = data_id
    return json.dumps([form, data], sort_keys=True, default=str)


def begin(form: dict, data_id: str) -> jobs.Job:
    """Ask for the exact plan in the background.

    Raises:
        ConfigError, DataError, ModelError: nothing to plan.
    """
    if not data_id:
        raise DataError(data_sources.NONE)
    found = train_form.resolve(form, data_id)
    name = key(form, data_id)
    job = _exact.get(name)
    if job and (job.running or job.state == "done"):
        return job

    def work(progress, cancel):
        progress(None, "Loading the model's tokenizer…")
        model_info.resolve_model(found.config.model, progress, cancel)
        return dry_run(found.config, progress)

    _exact[name] = job = jobs.start(JOB + data_sources.name(data_id), work)
    while len(_exact) > KEEP:
        _exact.popitem(last=False)
    return job


def signature(form: dict, data_id: str) -> tuple:
    """Changes when `view` would say something else: what is known of the data, and of the exact plan."""
    known = look(form, data_id)
    job = _exact.get(key(form, data_id))
    there = not form["adapter"] or ((r := live.runs().find(form["adapter"])) is not None and r.adapter is not None)
    return known.signature, (job.state, job.text) if job else None, there


def look(form: dict, data_id: str):
    """What is known of the data (`jobs.Look`) for the model and the length of a form."""
    length = form["values"].get("max_length") or resolving.resolve(form["preset"], {}).config.max_length
    return data_jobs.look(data_id, form["model"], length, start=False)


def ready(form: dict, data_id: str) -> bool:
    """Whether nothing is known that speaks against a start."""
    if not data_id or train_form.problems(form, data_id):
        return False
    found, known = train_form.resolve(form, data_id), look(form, data_id)
    try:
        checks.check_libraries(found.config)
        checks.check_size(found.config)
    except KTOError:
        return False
    return known.report is None or not known.report.problem


def _named(problem: str) -> str:
    """A problem with its control's name in place of the field's."""
    field, colon, rest = problem.partition(":")
    return f"{train_form.label(field)}:{rest}" if colon and field in _fields() else problem


def _fields() -> set[str]:
    return {c.name for c in train_form.controls()}


def view(form: dict, data_id: str) -> str:
    """The plan as HTML."""
    problems = train_form.problems(form, data_id)
    if not data_id:
        problems.append(data_sources.NONE)
    if problems:
        lines = "".join(f"<li>{prose(_named(p))}</li>" for p in problems)
        wrong = " ".join(sorted({p.partition(":")[0] for p in problems} & _fields()))  # assets/page.js marks them
        return (
            f'<div class="note note-bad" role="alert" data-fields="{wrong}"><b>Some settings need fixing</b>'
            f"<ul>{lines}</ul></div>"
        )
    found = train_form.resolve(form, data_id)
    try:
        checks.check_libraries(found.config)
        checks.check_size(found.config)
    except KTOError as e:
        refused = _refused(e)
        card = gpus.imagined(CARD)
        if gpus.devices() or not isinstance(e, HardwareError):
            return refused
        return f'{refused}<p class="card-text">On {card.name}:</p>' + _quick_view(
            found.config, look(form, data_id), "", card
        )
    remarks = "".join(f"<br>{html.escape(r)}" for r in on_settings.remarks(found.config))
    job = _exact.get(key(form, data_id))
    if job and job.result is not None:
        return _exact_view(job.result, remarks)
    text = _quick_view(found.config, look(form, data_id), remarks)
    if job and job.running:
        text += f'<div class="note" role="status">{prose(job.text)}{bar(job.fraction, "Plan")}</div>'
    elif job and job.state == "failed":
        text += note(job.error, "bad")
    return text


def _quick_view(c, known, remarks: str, card: gpus.Device | None = None) -> str:
    if known.loaded is None:
        text = html.escape(
            known.problem or (known.reading.error if known.reading else "") or "The dataset is still being read."
        )
        return f'<div class="note">{text}</div>'
    report = known.report
    if report.problem:
        return note(in_app(report.problem), "bad")
    tokens = report.lengths_unit == "tokens"
    good, bad = report.fitting
    rows, held = good + bad, splitting.expected(good, bad, c.test_size)
    lengths = sorted(min(n if tokens else n // LETTERS + 1, c.max_length) for n in report.row_lengths)
    plan = memory_plan.plan(c, thin(lengths, SAMPLE), device=card)
    about = "" if tokens else "~"
    split = "~" if held else ""  # as long as nobody has compared the questions
    steps = c.steps(max(1, rows - held))
    facts = {
        "Steps": f"{split}{steps:,}",
        "Rows": f"{split}{rows - held:,}" + (f" + {held:,} validation" if held else ""),
        "Rows per step": f"{c.effective_batch_size:,}",
        "Tokens": f"{about}{sum(lengths):,}",
    }
    gauge = rates.gauge(c, steps)
    uneven = lopsided(report.fitting, c.desirable_weight, c.undesirable_weight)
    told = [] if tokens else ["This is an estimate. Press <b>Check settings</b> for exact numbers."]
    said = " ".join(told + memory_plan.remarks(plan.sharded, plan.offload, c.num_gpus))
    shown = _plan(facts, plan.verdict, plan.predicted_gib, plan.available_gib, plan.advice, said + remarks)
    few = f"Only {rows:,} usable rows: expect little of so few." if rows < FEW else ""
    return shown + _gauge(gauge) + "".join(map(note, filter(None, (uneven, few))))


def _exact_view(result: dict, remarks: str) -> str:
    data, memory = result["data"], result["memory"]
    if not result["steps"]:
        return note("None of the rows can be trained on. See the Data tab.", "bad")
    if result["problem"]:
        return _refused(result["problem"])
    held = result.get("test_rows", 0)
    facts = {
        "Steps": f"{result['steps']:,}",
        "Rows": f"{result.get('train_rows', 0):,}" + (f" + {held:,} validation" if held else ""),
        "Rows per step": f"{result['config']['effective_batch_size']:,}",
        "Longest row": f"{data['lengths']['max']:,}",
    }
    cut = [f"{data['truncated']:,} prompts are truncated."] if data.get("truncated") else []
    cut += [f"{data['too_long']:,} rows are too long and left out."] if data.get("too_long") else []
    cut += (
        [f"{data['refused']:,} rows are refused: the chat template cuts their answers."] if data.get("refused") else []
    )
    placed = memory_plan.remarks(memory["sharded"], memory["offload"], result["config"]["num_gpus"])
    said = "Checked: " + " ".join((cut or ["every row fits."]) + placed)
    shown = _plan(
        facts, memory["verdict"], memory["predicted_gib"], memory["available_gib"], memory["advice"], said + remarks
    )
    return shown + "".join(map(_gauge, (result["rate"]["gauge"], result["engine"]["why"], result["adapter"]["says"])))


def _gauge(text: str) -> str:
    """What the run will do, in a line below the plan."""
    return f'<p class="card-text">{prose(text)}</p>' if text else ""


def _plan(facts: dict, verdict: str, predicted: float, available: float, advice: str, note: str) -> str:
    tone, word = VERDICTS.get(verdict, ("", verdict))
    share = min(100.0, 100 * predicted / available) if available else 100.0
    kind = "CPU memory" if verdict == "cpu" else "GPU memory"
    cells = "".join(f'<div class="tile"><span>{k}</span><b>{v}</b></div>' for k, v in facts.items())
    text = f"{predicted:.1f} of {available:.1f} GiB {kind}"
    return (
        f'<div class="tiles">{cells}</div>'
        f'<div class="memory {tone}" data-verdict="{html.escape(verdict)}"><div class="memory-line"><b>{word}</b>'
        f'<span>{text}</span></div><div class="memory-bar" role="img" aria-label="{text}">'
        f'<i style="width:{share:.0f}%"></i></div>'
        + (f"<p>{html.escape(advice)}</p>" if advice else "")
        + "</div>"
        + (f'<p class="card-text">{note}</p>' if note else "")
    )


def _refused(why: object) -> str:
    return f'<div class="note note-bad" role="alert"><b>Cannot train on this machine</b><br>{prose(why)}</div>'
