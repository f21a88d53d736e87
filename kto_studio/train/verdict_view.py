"""The verdict on the shown run: one line, and in a fold its numbers and the answers. Read from the run's folder."""

from __future__ import annotations

import html
from collections.abc import Sequence

import gradio as gr

from kto_core.verdict import keeping, wording
from kto_studio.shared.prose import prose


def build() -> list:
    """The component."""
    return [gr.HTML("", show_label=False, visible=False, elem_id="train-verdict")]


def key(run) -> tuple:
    """Changes with the run's verdict, and with the adapter that it is about."""
    return (run.id, *keeping.key(run)) if run else (None,)


def values(run) -> list:
    """What `build`'s component shows; nothing where the run's adapter was not judged."""
    found = keeping.read(run) if run else None
    text = view(found, keeping.samples(run)) if found else ""
    return [gr.update(value=text, visible=bool(found))]


def view(found: dict, samples: Sequence[dict] = ()) -> str:
    """The line, the numbers and the answers side by side as HTML."""
    lines = [("Measured on", found["data"]), *wording.lines(found), *(("Note", text) for text in found["remarks"])]
    rows = "".join(f'<tr><th scope="row">{html.escape(n)}</th><td>{html.escape(t)}</td></tr>' for n, t in lines)
    return (
        f'<details class="card" data-verdict="{html.escape(found["verdict"]["word"])}"><summary>'
        f"{prose(found['verdict']['sentence'])}</summary>"
        f'<div class="report"><table><tbody>{rows}</tbody></table></div>{_answers(samples)}</details>'
    )


def _answers(samples: Sequence[dict]) -> str:
    """A table of prompts with both answers; what changed is marked, and changed answers come first."""
    if not samples:
        return ""
    body = "".join(map(_answer, sorted(samples, key=lambda s: s["base"] == s["tuned"])))
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Prompt", "Before", "After"))
    return (
        f'<h4>Answers side by side</h4><div class="report answers"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _answer(sample: dict) -> str:
    pieces = wording.changed(sample["base"], sample["tuned"])
    same = '<span class="lines">the same</span>'
    before = "".join(_piece(kind, text, "gone", "del") for kind, text in pieces if kind != "new")
    after = "".join(_piece(kind, text, "new", "ins") for kind, text in pieces if kind != "gone")
    cells = (html.escape(sample["prompt"]), before, after if sample["base"] != sample["tuned"] else same)
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _piece(kind: str, text: str, marked: str, tag: str) -> str:
    return f"<{tag}>{html.escape(text)}</{tag}>" if kind == marked else html.escape(text)
