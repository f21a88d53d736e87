"""Answers as models generate them, with their thoughts told apart piece by piece."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "data"))
import real_templates

from kto_core.chat import thought_text
from kto_core.data.records import thoughts
from kto_core.data.records.rows import Row
from kto_core.data.rendering import template
from kto_core.data.rendering.style import Style

USER = {"role": "user", "content": "Name a river."}
PLAIN = {"role": "assistant", "content": "The Nile <i>x</i>.\n\nOr so."}
THINKS = {**PLAIN, "reasoning_content": "I recall < one.\n\nYes."}


@pytest.mark.parametrize("name", real_templates.NAMES)
def test_what_was_trained_is_read_back(name):
    """The tokens that a row trains, generated one by one, give its thought and its answer."""
    tokenizer = real_templates.of(name)
    for message, mode in ((PLAIN, "off"), (THINKS, "on"), (PLAIN, "on")):
        row = Row([USER], [message], True, 1)
        found = template.encode(row, tokenizer, style=Style("rows" if mode == "on" and message is THINKS else mode))
        prompt = template.render_chat([USER], tokenizer, style=Style(mode)) if message is THINKS else found.prompt_ids
        markers = thought_text.markers(tokenizer, prompt)
        reader, text, grown = thought_text.ThoughtText(markers), "", []
        raw = tokenizer.decode(found.completion_ids, skip_special_tokens=not markers.raw)
        for piece in raw:
            text += reader.feed(piece)
            grown.append(thoughts.split(text, unfinished=True))
        text += reader.finish()
        thought, answer = thoughts.split(text, unfinished=True)
        assert (thought, answer.strip()) == (message.get("reasoning_content", ""), PLAIN["content"]), raw
        assert all(PLAIN["content"].startswith(a.strip()) for _, a in grown)
        assert text == thought_text.whole(tokenizer, prompt, found.completion_ids)


def test_a_thought_that_max_tokens_cut_is_still_one():
    tokenizer = real_templates.of("qwen3_8")
    prompt = template.render_chat([USER], tokenizer)
    text = thought_text.whole(tokenizer, prompt, tokenizer("I recall", add_special_tokens=False)["input_ids"])
    assert thoughts.split(text, unfinished=True) == ("I recall", "")


def test_an_answer_of_blanks_is_shown_as_it_comes():
    tokenizer = real_templates.of("qwen3")
    reader = thought_text.ThoughtText(thought_text.markers(tokenizer, tokenizer("Hi").input_ids))
    said = [reader.feed("\n ") for _ in range(20)]
    assert "".join(said[:8]), "it may be waited for a marker, but not for long"
