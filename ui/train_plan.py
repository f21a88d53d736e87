"""What a run of the form would do, before it starts: problems, steps, rows, tokens, memory. Quick, and exact on demand.

The quick answer uses what is known of the data already; the exact one is `kto_core.train.dry_run` in the background.
"""

from __future__ import annotations

import html
import json
from collections import OrderedDict

from kto_core import hardware, jobs, memory_plan, model_info, train_checks
from kto_core.dry_run import planned_steps
from kto_core.errors import DataError, KTOError
from kto_core.events import thin
from ui import data_jobs, live, sources, train_form
from ui.jobs_view import bar

JOB = "Plan "
KEEP = 20
LETTERS = 4  # characters of a token, about, where tokens were not counted
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
    try:
        data = sources.key(data_id)
    except (KTOError, OSError):
        data = data_id
    return json.dumps([form, data], sort_keys=True, default=str)


def begin(form: dict, data_id: str) -> jobs.Job:
    """Ask for the exact plan in the background.

    Raises:
        ConfigError, DataError, ModelError: nothing to plan.
    """
    if not data_id:
        raise DataError("Choose a data set in the Data tab first.")
    found = train_form.resolve(form, data_id)
    name = key(form, data_id)
    job = _exact.get(name)
    if job and (job.running or job.state == "done"):
        return job

    def work(progress, cancel):
        from kto_core import train

        progress(None, "Looking for the model's tokenizer…")
        model_info.resolve_model(found.config.model, progress, cancel)
        return train.dry_run(found.config, progress)

    _exact[name] = job = jobs.start(JOB + sources.name(data_id), work)
    while len(_exact) > KEEP:
        _exact.popitem(last=False)
    return job


def signature(form: dict, data_id: str) -> tuple:
    """Changes when `view` would say something else: what is known of the data, and of the exact plan."""
    look = _look(form, data_id)
    job = _exact.get(key(form, data_id))
    there = not form["adapter"] or any(r.id == form["adapter"] and r.adapter for r in live.listed())
    return look.signature, (job.state, job.text) if job else None, there


def _look(form: dict, data_id: str):
    length = form["values"].get("max_length") or train_form.config.resolve(form["preset"], {}).config.max_length
    return data_jobs.look(data_id, form["model"], length, start=False)


def view(form: dict, data_id: str) -> str:
    """The plan as HTML."""
    problems = train_form.problems(form, data_id)
    if not data_id:
        problems.append("No data is chosen. Choose a data set in the Data tab.")
    if problems:
        lines = "".join(f"<li>{html.escape(p)}</li>" for p in problems)
        return f'<div class="note note-bad" role="alert"><b>This cannot be trained yet</b><ul>{lines}</ul></div>'
    found = train_form.resolve(form, data_id)
    try:
        train_checks.check_size(found.config)
        train_checks.check_libraries(found.config)
    except KTOError as e:
        return (
            f'<div class="note note-bad" role="alert"><b>This cannot be trained here</b><br>{html.escape(str(e))}</div>'
        )
    remarks = "".join(f"<br>{html.escape(r)}" for r in train_form.config.remarks(found.config))
    job = _exact.get(key(form, data_id))
    if job and job.state == "done":
        return _exact_view(job.result, remarks)
    text = _quick_view(found.config, _look(form, data_id), remarks)
    if job and job.running:
        text += f'<div class="note" role="status">{html.escape(job.text)}{bar(job.fraction, "Plan")}</div>'
    elif job and job.state == "failed":
        text += f'<div class="note note-bad" role="alert">{html.escape(job.error)}</div>'
    return text


def _quick_view(c, look, remarks: str) -> str:
    if look.loaded is None:
        text = html.escape(look.problem or (look.reading.error if look.reading else "") or "The data is not read yet.")
        return f'<div class="note">{text}</div>'
    report = look.report
    if report.problem:
        return f'<div class="note note-bad" role="alert">{html.escape(report.problem)}</div>'
    tokens = report.lengths_unit == "tokens"
    rows = report.kept - (report.too_long or 0)
    held = round(rows * c.test_size)
    lengths = sorted(min(n if tokens else n // LETTERS + 1, c.max_length) for n in report.row_lengths)
    plan = hardware.plan(c, thin(lengths, SAMPLE))
    about = "" if tokens else "about "
    steps = planned_steps(c, max(1, rows - held))
    facts = {
        "Steps": f"{about if c.test_size else ''}{steps:,}",
        "Rows": f"{rows - held:,}" + (f" + {held:,} held out" if held else ""),
        "Rows a step": f"{c.effective_batch_size:,}",
        "Tokens": f"{about}{sum(lengths):,}",
    }
    told = [] if tokens else ["Estimated from what is known of the data. A <b>dry run</b> counts it exactly."]
    note = " ".join(told + memory_plan.remarks(plan.sharded, plan.offload, c.num_gpus))
    return _plan(facts, plan.verdict, plan.predicted_gib, plan.available_gib, plan.advice, note + remarks)


def _exact_view(result: dict, remarks: str) -> str:
    data, memory = result["data"], result["memory"]
    if not result["steps"]:
        return '<div class="note note-bad" role="alert">No row of this data can be trained on. See the Data tab.</div>'
    if result["problem"]:
        why = html.escape(result["problem"])
        return f'<div class="note note-bad" role="alert"><b>This cannot be trained here</b><br>{why}</div>'
    held = result.get("test_rows", 0)
    facts = {
        "Steps": f"{result['steps']:,}",
        "Rows": f"{result.get('train_rows', 0):,}" + (f" + {held:,} held out" if held else ""),
        "Rows a step": f"{result['config']['effective_batch_size']:,}",
        "Longest row": f"{data['lengths']['max']:,}",
    }
    cut = [f"{data['truncated']:,} prompts are cut."] if data.get("truncated") else []
    cut += [f"{data['too_long']:,} rows are too long and left out."] if data.get("too_long") else []
    placed = memory_plan.remarks(memory["sharded"], memory["offload"], result["config"]["num_gpus"])
    note = "Checked: " + " ".join((cut or ["every row fits."]) + placed)
    return _plan(
        facts, memory["verdict"], memory["predicted_gib"], memory["available_gib"], memory["advice"], note + remarks
    )


def _plan(facts: dict, verdict: str, predicted: float, available: float, advice: str, note: str) -> str:
    tone, word = VERDICTS.get(verdict, ("", verdict))
    share = min(100.0, 100 * predicted / available) if available else 100.0
    kind = "main memory" if verdict == "cpu" else "GPU memory"
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
