"""What the Data tab shows, as HTML. Pure; every text from a data set is escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

from kto_core.data.records.rows import Row
from kto_core.data.report import Report, histogram, lopsided, weight_advice
from kto_core.jobs import Job, duration
from kto_studio.shared.jobs_view import bar
from kto_studio.shared.prose import in_app, note, prose

KINDS = {
    "dropped": ("Dropped", "not used for training"),
    "changed": ("Changed", "kept with this change"),
    "duplicate": ("Duplicate", "kept; identical to an earlier row"),
    "conflict": ("Contradiction", "kept; the same prompt and answer also occurs with the other label"),
    "refused": ("Refused", "not used for training: the model's chat template leaves a part of the answer out"),
    "too_long": ("Too long", "not used for training: the answer alone exceeds the maximum length"),
    "truncated": ("Truncated", "used for training with the beginning of the prompt removed"),
}
LINES = 6  # line numbers named for each reason
LOOK = 20_000  # issues looked through for line numbers; the download has all
SHOWN = 6000  # characters at each end of a text; the middle of a longer one is left out, and that is said
PAGE = 50  # rows of the table
FILTERS = [("All", "all"), ("👍 Good", "yes"), ("👎 Bad", "no")]
ROLES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


def esc(text: object) -> str:
    return html.escape(str(text))


def clipped(text: str) -> str:
    """Escaped, the middle of a long text left out."""
    return _marked(text, [])


def _marked(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """Escaped text with a mark around each span."""
    if len(text) <= 2 * SHOWN:
        return _stretch(text, spans, 0, len(text))
    head, tail = SHOWN, len(text) - SHOWN
    gap = f'<span class="gap">… {tail - head:,} characters not shown …</span>'
    return _stretch(text, spans, 0, head) + gap + _stretch(text, spans, tail, len(text))


def _stretch(text: str, spans: Sequence[tuple[int, int]], start: int, end: int) -> str:
    out, at = [], start
    for a, b in spans:
        a, b = max(a, start), min(b, end)
        if a < b:
            out += [esc(text[at:a]), f'<mark class="token">{esc(text[a:b])}</mark>']
            at = b
    return "".join([*out, esc(text[at:end])])


def label_of(choice: str | None) -> bool | None:
    """The label that a choice of `FILTERS` asks for; None: both."""
    return {"yes": True, "no": False}.get(choice or "all")


# ---- the set as a whole ----------------------------------------------------------------------------------------------


def working(job: Job, verb: str) -> str:
    """A running job: bar, what it does, time left."""
    left = f" · {duration(job.eta)} left" if job.eta and job.eta > 1 else ""
    text = esc((job.text or f"{verb}…") + left)
    return f'<div class="note" role="status">{bar(job.fraction, verb)}{text}</div>'


def problem(text: str) -> str:
    return note(text, "bad")


def nothing() -> str:
    return (
        '<div class="empty"><h2>No dataset selected</h2><p>Choose a dataset, upload a file, or load one from the '
        "Hub. Each row needs a prompt, an answer, and whether the answer is good.</p></div>"
    )


def summary(report: Report) -> str:
    """Numbers in a row, and why the set cannot be trained on, if so."""
    out = report.left_out
    why = f"{sum(out.values()):,} left out: " + ", ".join(f"{n:,} {reason}" for reason, n in out.items()) if out else ""
    cells = [("Rows", f"{report.rows:,}", "", "Rows in the file"),
             ("Usable", f"{sum(report.fitting):,}", "", "Rows that a run trains on or validates with"),
             ("Left out", f"{sum(out.values()):,}", "warn" if out else "", why or "No row is left out"),
             ("Duplicates", f"{report.duplicates:,}", "", "Rows identical to an earlier one; they are trained on"),
             ("Contradictions", f"{report.conflicts:,}", "warn" if report.conflicts else "",
              "Prompts with one answer that has both labels; they are trained on")]  # fmt: skip
    cells.append(("Format", report.format or "none", "word", "The shape of the rows"))
    shown = "".join(
        f'<div class="tile {c}" title="{esc(t)}"><span>{n}</span><b>{esc(v)}</b></div>' for n, v, c, t in cells
    )
    bad = problem(in_app(report.problem)) if report.problem else ""
    said = f'<p class="card-text" id="data-left-out">{esc(why)}.</p>' if why else ""
    return f'<div class="tiles">{shown}</div>{said}{bad}'


def advised(report: Report) -> tuple[str, float] | None:
    """(field, value) of the weight to change: the rarer label's, in the middle of Eq. 9's range; None if balanced.

    Of the rows that train: one that is left out has no weight.
    """
    good, bad = report.fitting
    if not lopsided(report.fitting, 1.0, 1.0):
        return None
    side = "desirable" if good < bad else "undesirable"
    low, high = weight_advice(good, bad)[side]
    return f"{side}_weight", _between(low, high)


def _between(low: float, high: float) -> float:
    """The middle, with as few digits as stay inside the range."""
    middle = (low + high) / 2
    return next((r for d in range(4) if low <= (r := round(middle, d)) <= high), middle)


def balance(report: Report) -> str:
    """Both labels as numbers and a bar, and what Eq. 9 says about the weights."""
    good, bad = report.fitting
    share = 100 * good / (good + bad) if good + bad else 0
    text = f"{good:,} good, {bad:,} bad"
    found = weight_advice(good, bad)
    if advice := advised(report):
        side = advice[0].removesuffix("_weight")
        low, high = found[side]
        says = (
            f"For {good:,} good and {bad:,} bad rows, the KTO paper (Eq. 9) recommends {side}_weight between "
            f"<b>{low:.3g}</b> and <b>{high:.3g}</b>, with the other weight at 1."
        )
    elif good and bad:
        says = "The labels are balanced as the KTO paper (Eq. 9) recommends. Both weights can stay at 1."
    else:
        says = "KTO needs both good and bad rows."
    none = "" if good + bad else " none"
    return (
        '<h2 class="card-title">Labels <span>of the usable rows</span></h2>'
        f'<div class="balance{none}" role="img" aria-label="{text}"><i style="width:{share:.2f}%"></i></div>'
        f'<div class="balance-legend"><span><i class="dot good"></i>👍 Good <b>{good:,}</b> ({share:.0f} %)</span>'
        f'<span><i class="dot bad"></i>👎 Bad <b>{bad:,}</b> ({100 - share if good + bad else 0:.0f} %)</span></div>'
        f'<p class="card-text">{says}</p>'
    )


def lengths(report: Report, max_length: int | None, model: str, job: Job | None, drawn: str) -> str:
    """A histogram (``drawn`` by `chart`) and what becomes of long rows; in tokens once they are counted."""
    unit = f"tokens of {esc(model)}" if report.lengths_unit == "tokens" else "characters"
    fate = f'<p class="card-text">{_fate(report, max_length, model, job)}</p>' if report.kept else ""
    return f'<h2 class="card-title">Lengths <span>in {unit}</span></h2>{drawn}{fate}'


def chart(report: Report, max_length: int | None) -> str:
    """Bars of how many rows are how long. A million rows take a second: draw it once, where nobody waits."""
    bars = histogram(report.row_lengths, max_length if report.lengths_unit == "tokens" else None)
    if not bars:
        return '<p class="card-text">No rows.</p>'
    numbers = report.lengths
    highest = max(b["count"] for b in bars)
    columns = "".join(
        f'<i class="{"over" if b["over"] else ""}" style="height:{max(2.0, 100 * b["count"] / highest):.1f}%" '
        f'title="{b["start"]:,} to {b["end"] - 1:,}: {b["count"]:,} rows"></i>'
        if b["count"]
        else f'<i class="none" title="{b["start"]:,} to {b["end"] - 1:,}: no rows"></i>'
        for b in bars
    )
    return (
        f'<div class="histogram" role="img" aria-label="Lengths of {report.kept:,} rows">{columns}</div>'
        f'<div class="axis"><span>0</span><span>{bars[-1]["end"] - 1:,}</span></div>'
        f'<p class="card-text">Median <b>{numbers["p50"]:,}</b> · 99th percentile <b>{numbers["p99"]:,}</b> · '
        f"longest <b>{numbers['max']:,}</b>.</p>"
    )


def _fate(report: Report, max_length: int | None, model: str, job: Job | None) -> str:
    if report.truncated is not None:
        if not report.truncated and not report.too_long:
            return f"All rows fit in the maximum length of {max_length:,} tokens." if max_length else ""
        return (
            f"At a maximum length of {max_length:,}, {report.truncated:,} prompts are truncated and "
            f"{report.too_long:,} rows are left out."
        )
    if job and job.running:
        return f"Counting tokens… {esc(job.text)}"
    if job and job.state == "failed":
        return f'<span class="bad">Could not count tokens: {prose(job.error)}</span>'
    return f"Press <b>Count tokens</b> to measure lengths in tokens of {esc(model)}."


def problems(report: Report) -> str:
    """Counts by kind and reason, with the first line numbers."""
    counts: dict[tuple[str, str], int] = {("dropped", r): n for r, n in report.dropped.most_common()}
    counts |= {("changed", r): n for r, n in report.changed.most_common()}
    where: dict[tuple[str, str], list[str]] = {}
    for i in range(min(LOOK, len(report.issues))):
        issue = report.issues[i]
        found = where.setdefault((issue["kind"], issue["reason"]), [])
        if len(found) <= LINES:
            like = f" (like {issue['detail']})" if issue["kind"] in ("duplicate", "conflict") else ""
            found.append(f"{issue['line']:,}{like}")
    totals = {"duplicate": report.duplicates, "conflict": report.conflicts}
    totals |= {"refused": report.seen.refused if report.seen else 0}
    totals |= {"too_long": report.too_long or 0, "truncated": report.truncated or 0}
    for kind, reason in where:
        counts.setdefault((kind, reason), totals.get(kind, 0))
    head = '<h2 class="card-title">Report</h2>'
    if not counts:
        return head + '<p class="card-text good-news">Nothing was dropped or changed, and there are no duplicates.</p>'
    lines = []
    for (kind, reason), count in counts.items():
        name, meaning = KINDS[kind]
        at = where.get((kind, reason), [])
        rows = ", ".join(at[:LINES]) + (", …" if len(at) > LINES else "")
        lines.append(
            f'<tr><td><span class="kind kind-{kind}" title="{esc(meaning)}">{name}</span></td>'
            f'<td>{esc(reason)}</td><td class="n">{count:,}</td><td class="lines">{esc(rows)}</td></tr>'
        )
    return (
        f'{head}<div class="report"><table><thead><tr><th scope="col">Result</th><th scope="col">Reason</th><th '
        'scope="col" class="n">Rows</th><th '
        f'scope="col">Lines</th></tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


# ---- rows ------------------------------------------------------------------------------------------------------------


def thumb(label: bool) -> str:
    return (
        '<span class="label good" title="Good">👍<em>Good</em></span>'
        if label
        else '<span class="label bad" title="Bad">👎<em>Bad</em></span>'
    )


def table(rows: Sequence[dict], total: int, selected: int | None = None, searched: bool = False) -> str:
    """One page of rows, as `kto_core.data.pages.page` gives them. A row is chosen by click, Enter or arrow keys."""
    if not rows:
        text = "No row matches. Change the search or the label." if searched else "No rows."
        return f'<div class="empty small"><p>{text}</p></div>'
    lines, shown = [], {r["index"] for r in rows}
    for r in rows:
        marks = "".join(f'<span class="mark">{m}</span>' for m in ("system", "tools") if r[m])
        chosen = r["index"] == selected
        stop = r["index"] == (selected if selected in shown else rows[0]["index"])  # one Tab stop, arrows inside
        lines.append(
            f'<tr data-index="{int(r["index"])}" tabindex="{0 if stop else -1}" aria-selected="{str(chosen).lower()}">'
            f'<td class="n" title="Line {r["line"]:,}">{r["index"] + 1:,}</td><td>{thumb(r["label"])}</td>'
            f'<td><div class="clamp">{esc(r["prompt"])}</div></td>'
            f'<td><div class="clamp">{esc(r["completion"])}</div></td>'
            f'<td class="n">{r["turns"]}{marks}</td></tr>'
        )
    return (
        '<div class="rows"><table><thead><tr><th scope="col" class="n">Row</th><th scope="col">Label</th>'
        '<th scope="col">Last question</th><th scope="col">Answer</th><th scope="col" class="n">Turns</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def place(page: int, size: int, total: int) -> str:
    """``51–100 of 4,570 rows``."""
    if not total:
        return '<div class="place">0 rows</div>'
    return f'<div class="place">{page * size + 1:,}–{min(total, (page + 1) * size):,} of {total:,} rows</div>'


def conversation(row: Row) -> str:
    """A row's turns, tool calls and other columns."""
    turns = [*row.prompt, *row.completion]
    parts = [f'<div class="row-head">{thumb(row.label)}<span>Line {row.line:,}</span></div>']
    for i, m in enumerate(turns):
        last = i == len(turns) - 1
        said = " · rated answer" if last else ""
        parts.append(
            f'<div class="turn {esc(m["role"])}{" answer" if last else ""}">'
            f"<b>{esc(ROLES.get(m['role'], m['role']))}{said}</b>"
            f"<pre>{clipped(m['content'] or '')}</pre>{_calls(m)}</div>"
        )
    if row.tools:
        parts.append(_folded(f"{len(row.tools)} tools available", row.tools))
    if row.extra:
        parts.append(_folded("Other columns", row.extra))
    return _of_label(row, "".join(parts))


def _of_label(row: Row, shown: str) -> str:
    return f'<div class="{"good" if row.label else "bad"}-row">{shown}</div>'


def _calls(message: dict) -> str:
    calls = message.get("tool_calls")
    return f'<pre class="calls">{clipped(json.dumps(calls, ensure_ascii=False, indent=1))}</pre>' if calls else ""


def _folded(title: str, value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=1, default=str)
    return f"<details><summary>{esc(title)}</summary><pre>{clipped(text)}</pre></details>"


def as_seen(row: Row, rendered) -> str:
    """The text the model is trained on: special tokens marked, the answer (what is learned) set apart."""
    cut = len(rendered.prompt)
    prompt = _marked(rendered.prompt, [(a, b) for a, b in rendered.special if b <= cut])
    answer = _marked(rendered.completion, [(a - cut, b - cut) for a, b in rendered.special if a >= cut])
    return _of_label(
        row,
        f'<div class="row-head">{thumb(row.label)}<span>Line {row.line:,}</span></div>'
        f'<div class="seen"><b>Prompt</b><pre>{prompt}</pre>'
        f"<b>Answer (the model learns to say this {'more often' if row.label else 'less often'})</b>"
        f'<pre class="learned">{answer}</pre></div>',
    )


def not_seen(model: str, job: Job | None) -> str:
    if job and job.running:
        return (
            f'<div class="note" role="status">{esc(job.text or "Loading the tokenizer…")}{bar(None, "Tokenizer")}</div>'
        )
    if job and job.state == "failed":
        return problem(job.error)
    return (
        f'<div class="note">To show the text as {esc(model)} sees it, its tokenizer is needed. Press <b>Count '
        "tokens</b> to load it.</div>"
    )
