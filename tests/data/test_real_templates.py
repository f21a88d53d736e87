"""Every row in every real chat template: trained as the chat asks, nothing left out without a word."""

import json
import re

import pytest
import real_templates

from kto_core.data.records import thoughts
from kto_core.data.records.rows import Row
from kto_core.data.rendering import template
from kto_core.data.rendering.style import Style

USER = {"role": "user", "content": "Name a river in Kenya."}
MORE = {"role": "user", "content": "And a lake there?"}
SYSTEM = {"role": "system", "content": "Answer in CAPITALS."}
LATER = {"role": "system", "content": "From now on be brief."}
DEVELOPER = {"role": "developer", "content": "Obey the operator."}
SAID = {"role": "assistant", "content": "The Tana flows there."}
ANSWER = {"role": "assistant", "content": "Lake Turkana, of course."}
THINKS = {**ANSWER, "reasoning_content": "They ask for water.\n\nI recall Turkana."}
TAGS = {"role": "assistant", "content": "<think>\nThey ask for water.\n</think>\n\nLake Turkana."}
BEFORE = {**SAID, "thinking": "An early thought."}


def call(city, name="weather", text=None):
    function = {"name": name, "arguments": {"city": city, "days": 3}}
    return {"id": f"call_{city}", "type": "function", "function": function if text is None else {**function, **text}}


def result(city):
    return {
        "role": "tool",
        "content": f'{{"rain in {city}": "none"}}',
        "name": "weather",
        "tool_call_id": f"call_{city}",
    }


ONE = {"role": "assistant", "content": None, "tool_calls": [call("Lima")]}
TWO = {"role": "assistant", "content": None, "tool_calls": [call("Lima"), call("Oslo")]}
BOTH = {"role": "assistant", "content": "I look it up.", "tool_calls": [call("Rome")]}
AS_TEXT = {"role": "assistant", "content": "", "tool_calls": [call("Bern", text={"arguments": '{"city": "Bern"}'})]}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA}}]

TALKS = [
    ([USER], ANSWER, None),
    ([SYSTEM, USER], ANSWER, None),
    ([DEVELOPER, USER], ANSWER, None),
    ([USER, SAID, MORE], ANSWER, None),
    ([SYSTEM, USER, SAID, MORE], THINKS, None),
    ([USER, SAID, LATER, MORE], ANSWER, None),
    ([SYSTEM, LATER, USER], ANSWER, None),
    ([USER, MORE], ANSWER, None),
    ([SAID, USER], ANSWER, None),
    ([USER], THINKS, None),
    ([USER], TAGS, None),
    ([USER, BEFORE, MORE], THINKS, None),
    ([USER], ONE, TOOLS),
    ([SYSTEM, USER], TWO, TOOLS),
    ([USER], BOTH, TOOLS),
    ([USER], AS_TEXT, None),
    ([USER, ONE, result("Lima")], ANSWER, TOOLS),
    ([USER, TWO, result("Lima"), result("Oslo")], ANSWER, TOOLS),
    ([SYSTEM, USER, {**ONE, "reasoning_content": "I need a tool."}, result("Lima")], THINKS, TOOLS),
    ([USER, ONE, result("Lima"), SAID, MORE], {**TWO, "reasoning_content": "Two calls."}, TOOLS),
]
EMPTY = re.compile(r"<think>\s*</think>|\A\s*</think>")


@pytest.fixture(scope="module")
def tokenizers():
    return {name: real_templates.of(name) for name in real_templates.NAMES}


def said(message):
    """Everything a message says."""
    shown = thoughts.parted(message)
    yield shown["content"] or ""
    yield shown.get(thoughts.KEY, "")
    for c in shown.get("tool_calls", ()):
        arguments = c["function"]["arguments"]
        yield c["function"]["name"]
        yield (json.loads(arguments) if isinstance(arguments, str) else arguments)["city"]


def test_there_are_enough():
    assert len(real_templates.NAMES) >= 25 and len(TALKS) >= 20


@pytest.mark.parametrize("name", real_templates.NAMES)
def test_rows_say_what_they_said_after_the_prompt_that_chat_asks_with(tokenizers, name):
    tokenizer = tokenizers[name]
    asked = {}
    for number, (prompt, answer, tools) in enumerate(TALKS):
        row = Row(prompt, [answer], True, 1, tools)
        found, text = template.encode(row, tokenizer), template.render(row, tokenizer)
        for mode in ("on", "off"):
            asked[mode] = template.render_chat(prompt, tokenizer, tools, Style(mode))
        wanted = "on" if found.thought else "off"
        if name in ("gptoss", "muse_glimmer") and "tool_calls" in answer:
            wanted = "on"  # a channel of plain answers leads to no call
        assert found.prompt_ids == asked[wanted], (number, text.prompt)
        assert found.fate == "ok" and not found.refused, (number, text.completion)
        assert not EMPTY.search(text.completion), (number, text.completion)
        for part in said(answer):
            assert part in text.completion or json.dumps(part)[1:-1] in text.completion, (number, text.completion)
        for m in prompt:
            for part in said(m):
                shown = part in text.prompt or json.dumps(part)[1:-1] in text.prompt
                assert shown or (part in (BEFORE["thinking"], "I need a tool.") and found.changes), (number, part)
        for tool in tools or ():
            assert tool["function"]["description"] in text.prompt
        other = {**answer, "content": f"{answer['content'] or ''} Or so."}
        assert template.encode(Row(prompt, [other], False, 1, tools), tokenizer).prompt_ids == found.prompt_ids
