"""What a part of the page was last made of, kept in the page itself.

A gr.State lives on the server. There it tells what was sent, in the order of sending; but answers overtake each other
on the way (one goes through the queue, another past it). The page then shows the older one, and the server believes
that it shows the newer: nothing would ever mend it. A mark arrives with the values that it is about.
"""

from __future__ import annotations

import hashlib

import gradio as gr


class Seen(str):
    """A mark as an event gets it: equal to what it was made of."""

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other if isinstance(other, Seen) else digest(other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def mark() -> gr.Textbox:
    """A hidden box. An event returns for it whatever its values depend on, and gets a `Seen` of that."""
    box = gr.Textbox("", visible=False)
    # of this box, not of a class: of each subclass of its components Gradio writes a .pyi beside the source
    box.preprocess = lambda payload: Seen(payload or "")  # type: ignore[method-assign]
    box.postprocess = lambda value: value if isinstance(value, Seen) else digest(value)  # type: ignore[method-assign]
    return box


def digest(value: object) -> str:
    """Equal for values that read the same; short, since the page sends it back every second."""
    return hashlib.blake2b(repr(value).encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
