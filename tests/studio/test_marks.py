"""What a part of the page was made of is kept in the page: answers that overtake each other are mended."""

import gradio as gr
import pytest

from kto_studio import launch
from kto_studio.shared.context import Context, lenient
from kto_studio.shared.marks import Seen, mark


@pytest.fixture(scope="module")
def blocks_and_ticks():
    ticks = []
    patch = pytest.MonkeyPatch()
    patch.setattr(Context, "start_ticking", lambda self: ticks.extend(self.ticks))
    blocks = launch.build()
    patch.undo()
    return blocks, ticks


@pytest.mark.parametrize("made_of", [("run", 3, None, 0.5), "text", True, None, ("a\nb", "'\"")])
def test_a_tick_finds_its_mark_equal_to_what_it_was_made_of(made_of):
    """As Gradio does it, with another instance for what goes out: it copies a component that an event has skipped."""
    box, got = mark(), []
    lenient(got.append, [box])(gr.Textbox(visible=False).postprocess(made_of))
    (seen,) = got
    assert isinstance(seen, Seen) and seen == made_of and made_of == seen
    assert seen != ("run", 4, None, 0.5)
    lenient(got.append, [box])(gr.Textbox(visible=False).postprocess(seen))
    assert got[-1] == made_of, "what the page has goes back as it is"
    lenient(got.append, [box])("")
    assert got[-1] != made_of, "nothing was shown yet"


def test_no_tick_believes_the_server_about_the_page(blocks_and_ticks):
    """A gr.State tells what was sent last, not what the page shows. Two remain, which no tick sets: Train's form, and
    the range that is zoomed into."""
    _, ticks = blocks_and_ticks
    assert len(ticks) > 15
    states = {c._id: c.value for _, inputs, _ in ticks for c in inputs if isinstance(c, gr.State)}
    assert all(isinstance(value, dict) and "preset" in value or value is None for value in states.values()), states


def test_only_ticks_get_marks(blocks_and_ticks):
    """Another event would get its text, which equals nothing."""
    blocks, ticks = blocks_and_ticks
    marks = {c._id for _, inputs, _ in ticks for c in inputs if "preprocess" in vars(c)}
    assert len(marks) > 15
    for fn in blocks.fns.values():
        assert not fn.preprocess or not marks & {c._id for c in fn.inputs}, fn.name
