"""What the Chat tab shows, as pure functions: choices, status lines, and model text made safe to show."""

from __future__ import annotations

import html
import re

from kto_core.jobs import Job
from kto_studio.shared.jobs_view import bar
from kto_studio.shared.prose import note, prose

JOINER = "\u2060"  # invisible; behind "<" it keeps a browser from reading a tag
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
THOUGHT = "Thought"  # title of what is folded
MODES = ("Tuned", "Base", "Side by side")


def shown(text: str, markdown: bool) -> str:
    """A message as the page shows it: no tag in it is read as HTML, and no picture is fetched from elsewhere.

    With ``markdown`` the contents of fenced code stay as they are (the page shows them literally), so that copied code
    has nothing added to it.
    """
    if not markdown:
        return _TAG.sub("<" + JOINER, text)
    lines, fence = [], ""
    for line in text.split("\n"):
        mark = _FENCE.match(line)
        if fence:
            closes = mark and mark[1][0] == fence[0] and len(mark[1]) >= len(fence) and not line.strip().strip(fence[0])
            fence = "" if closes else fence
            lines.append(line)
        else:
            fence = mark[1] if mark and not (mark[1][0] == "`" and "`" in line[mark.end() :]) else ""
            lines.append(_TAG.sub("<" + JOINER, line).replace("![", "!" + JOINER + "["))
    return "\n".join(lines)


def typed(text: str) -> str:
    """The inverse of `shown`, for text that comes back from the page (an edited message)."""
    return text.replace("<" + JOINER, "<").replace("!" + JOINER + "[", "![")


def content(value) -> str:
    """The text of a message as the page sends it: a string, or a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return content(value.get("text", value.get("content", "")))
    return "".join(content(part) for part in value or [])


def history(messages: list[dict], markdown: bool) -> list[dict]:
    """A conversation as gr.Chatbot takes it: a thought is a folded message before its answer, open while it grows."""
    out = []
    for m in messages:
        text = shown(m["content"], markdown)
        if thought := m.get("thought"):
            state = {"title": THOUGHT, "status": "done" if text.strip() else "pending"}
            out.append({"role": m["role"], "content": shown(thought, markdown), "metadata": state})
            if not text.strip():
                continue
        out.append({"role": m["role"], "content": text or "\u2026"})
    return out


def position(messages: list[dict], index: int) -> int:
    """Which message the page means by ``index`` of what `history` made; one past the end for what is not there."""
    at = 0
    for i, m in enumerate(messages):
        at += 2 if m.get("thought") and m["content"].strip() else 1
        if index < at:
            return i
    return len(messages)


def status(loaded: str | None, adapter: bool, device: str, job: Job | None) -> str:
    """The line under Load: what is loaded, what is being loaded, or why that failed."""
    if job is not None and job.running:
        return f'{bar(job.fraction, "Loading")}<div class="job-text">{prose(job.text or "Loading…")}</div>'
    lines = []
    if job is not None and job.state == "failed":
        lines.append(note(job.error, "bad"))
    if loaded:
        kind = "with its adapter" if adapter else "no adapter, so Tuned and Base are the same"
        place = f" · {html.escape(device)}" if device else ""
        lines.append(f'<div class="note note-good">Loaded: <b>{html.escape(loaded)}</b><br>{kind}{place}</div>')
    elif not lines:
        lines.append('<div class="note">No model is loaded. Choose a model and press Load, or send a message.</div>')
    return "".join(lines)


def stats(
    per_second: float | None, tokens: int, seconds: float, ended: str | None = None, forgotten: int | None = None
) -> str:
    """How fast the last answer came, and what cut it."""
    if not tokens or not seconds:
        return ""
    speed = per_second or tokens / seconds
    parts = [f"{speed:.1f} tokens/s", f"{tokens:,} tokens", f"{seconds:.1f} s"]
    parts += ["stopped at Max tokens"] if ended == "length" else []
    parts += [f"{forgotten} earlier messages no longer fit in the context"] if forgotten else []
    return " · ".join(parts)


def feedback(up: int, down: int, file: str) -> str:
    """The note under the conversation: what the thumbs have collected."""
    if not up + down:
        return "Rate answers with 👍 or 👎 to collect training data."
    rows = f"{up + down} row{'s' if up + down > 1 else ''}"
    return f"{rows} collected ({up} 👍, {down} 👎) in {file}. Choose this file in the Data tab to train on it."
