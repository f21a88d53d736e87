"""What a part of the page was last made of, kept in the page itself.

A gr.State lives on the server. There it tells what was sent, in the order of sending; but answers overtake each other
on the way (one goes through the queue, another past it). The page then shows the older one, and the server believes
that it shows the newer: nothing would ever mend it. A mark arrives with the values that it is about.
"""

from __future__ import annotations

import gradio as gr


class Seen(str):
    """A mark as a tick gets it: equal to what it was made of, which Gradio kept as text."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, str(other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def mark() -> gr.Textbox:
    """A hidden box, an input of ticks only. An event returns for it whatever its values depend on (short, equal where
    its text is equal), and the next tick gets a `Seen` of that."""
    box = gr.Textbox("", visible=False)
    # Of this box, and for `context.lenient`, which asks the box that was built: once an event has skipped a component,
    # Gradio works with a copy of it. Not a class: Gradio writes a .pyi beside the source of each class of components.
    box.preprocess = lambda payload: Seen(payload)  # type: ignore[method-assign]
    return box
