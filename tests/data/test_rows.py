"""Every shape a row may come in, every label, and both saved forms."""

import pytest

from kto_core.data.records.rows import DroppedRow, parse, parse_all, parse_label, to_chatml, to_trl

USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "Q?"), ("assistant", "A."), ("assistant", "B.")))
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"name": "look"}]
CALL = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": '{"q": "x"}'}}


def one(obj):
    rows, form, changes = parse(obj, 7)
    assert len(rows) == 1
    return rows[0], form, changes


def dropped(obj) -> str:
    with pytest.raises(DroppedRow) as e:
        parse(obj, 7)
    return e.value.reason


@pytest.mark.parametrize(
    "value", [True, 1, 1.0, "true", "True", " TRUE ", "1", "yes", "Yes", "👍", "👍🏽", "👍\ufe0f", "good", "1.0"]
)
def test_desirable(value):
    assert parse_label(value) is True


@pytest.mark.parametrize("value", [False, 0, 0.0, -1, "false", "FALSE", "0", "no", "👎", "👎🏿"])
def test_undesirable(value):
    assert parse_label(value) is False


@pytest.mark.parametrize(
    "value,reason",
    [(None, "no label"), (float("nan"), "no label"), ("", "no label"), ("nan", "no label")]
    + [(v, "label not understood") for v in ("maybe", [True], {}, "👍👎", float("inf"))]
    + [(v, "label on a scale") for v in (2, 0.5)],
)
def test_other_labels_drop_the_row(value, reason):
    assert dropped({"prompt": "Q?", "completion": "A.", "label": value}) == reason


def test_missing_label_drops_the_row():
    assert dropped({"prompt": "Q?", "completion": "A."}) == "no label"
    assert dropped({"messages": [USER, GOOD]}) == "no label"


@pytest.mark.parametrize(
    "obj",
    [
        {"prompt": "Q?", "completion": "A.", "label": True},
        {"prompt": [USER], "completion": [GOOD], "label": True},
        {"prompt": [USER], "completion": "A.", "label": 1},
        {"prompt": "Q?", "completion": GOOD, "label": "yes"},
        {"conversations": [USER, GOOD], "label": True},
        {"messages": [USER, GOOD], "label": True},
        {"conversations": '[{"role":"user","content":"Q?"},{"role":"assistant","content":"A."}]', "label": True},
        {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}], "label": True},
        {"prompt": [{"from": "human", "value": "Q?"}], "completion": {"from": "gpt", "value": "A."}, "label": True},
        {"messages": [{"role": "USER", "content": "Q?"}, {"role": "Assistant", "content": "A."}], "label": True},
    ],
)
def test_single_rows(obj):
    row, form, changes = one(obj)
    assert (row.prompt, row.completion, row.label, row.line, changes) == ([USER], [GOOD], True, 7, [])
    assert form


@pytest.mark.parametrize(
    "obj",
    [
        {"prompt": "Q?", "chosen": "A.", "rejected": "B."},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
        {"prompt": "Q?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},  # the prompt is said twice
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"conversations": [{"from": "human", "value": "Q?"}], "chosen": {"from": "gpt", "value": "A."},
         "rejected": {"from": "gpt", "value": "B."}},
        {"messages": [USER], "chosen": "A.", "rejected": "B."},
        {"chosen": "\n\nHuman: Q?\n\nAssistant: A.", "rejected": "\n\nHuman: Q?\n\nAssistant: B."},
        {"chosen": "Q? A.", "rejected": "Q? B."},
    ],
)  # fmt: skip
def test_pairs_become_two_rows(obj):
    rows, form, _ = parse(obj, 3)
    assert [(r.prompt, r.completion, r.label) for r in rows] == [([USER], [GOOD], True), ([USER], [BAD], False)]
    assert form.startswith(("chosen", "prompt/chosen"))


def test_pair_system_prompt_is_kept_and_not_doubled():
    for chosen in ([GOOD], [USER, GOOD], [SYSTEM, USER, GOOD]):
        rows, _, _ = parse({"prompt": [SYSTEM, USER], "chosen": chosen, "rejected": [BAD]}, 1)
        assert [r.prompt for r in rows] == [[SYSTEM, USER]] * 2
    rows, _, _ = parse({"prompt": "Q?", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, 1)
    assert [r.prompt for r in rows] == [[SYSTEM, USER]] * 2


def test_pair_without_any_prompt_still_gives_two_rows():
    rows, _, changes = parse({"chosen": "Yes.", "rejected": "No."}, 1)
    assert [r.completion[0]["content"] for r in rows] == ["Yes.", "No."]
    assert all(r.prompt == [{"role": "user", "content": ""}] for r in rows)
    assert changes


def test_broken_side_of_a_pair_is_counted_alone():
    parsed, _, _ = parse_all({"prompt": "Q?", "chosen": "A.", "rejected": ""}, 1)
    assert parsed[0].label is True and parsed[1].reason == "empty completion"
    rows, _, changes = parse({"prompt": "Q?", "chosen": "A.", "rejected": None}, 1)
    assert len(rows) == 1 and changes == ["one side left out: no rejected"]
    assert len(parse_all({"prompt": None, "chosen": None, "rejected": None}, 1)[0]) == 2


def test_last_assistant_turn_is_the_completion():
    tool = {"role": "tool", "content": "42", "tool_call_id": "call00001", "name": "look"}
    asks = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    row, _, changes = one({"messages": [SYSTEM, USER, asks, tool, GOOD], "label": False, "tools": [{"name": "look"}]})
    assert row.prompt == [SYSTEM, USER, asks, tool] and row.completion == [GOOD] and row.tools == [{"name": "look"}]
    assert not changes
    row, _, changes = one({"messages": [USER, GOOD, USER], "label": False})
    assert row.completion == [GOOD] and changes == ["turns after the last assistant turn left out"]


@pytest.mark.parametrize("content", [None, "", "I look."])
def test_tool_calls_with_and_without_content(content):
    turn = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    assert one({"messages": [USER, turn], "label": True})[0].completion == [turn]


def test_other_forms_of_calls_and_tools():
    call = [{"name": "look", "arguments": {"q": "x"}}]
    text = '{"name": "look", "arguments": {"q": "x"}}'
    for turn in (
        {"from": "function_call", "value": text},
        {"role": "assistant", "content": None, "function_call": call[0]},
        {"role": "assistant", "content": None, "tool_calls": f"[{text}]"},
    ):
        row, _, _ = one({"conversations": [USER, turn], "label": True})
        assert row.completion == [{"role": "assistant", "content": None, "tool_calls": call}]
    schema = {"type": "function", "function": {"name": "look"}}
    for tools in ([schema], '[{"type": "function", "function": {"name": "look"}}]', schema):
        assert one({"messages": [USER, GOOD], "label": True, "tools": tools})[0].tools == [schema]
    for tools in (None, "", []):
        assert one({"messages": [USER, GOOD], "label": True, "tools": tools})[0].tools is None


def test_system_column_goes_before_the_prompt():
    row, _, changes = one({"system": "Be brief.", "prompt": "Q?", "completion": "A.", "label": True})
    assert row.prompt == [SYSTEM, USER] and changes and "system" not in row.extra


@pytest.mark.parametrize(
    "obj,reason",
    [
        ({"text": "x", "score": 1}, "wrong columns"),
        ({}, "wrong columns"),
        ({"completion": "A.", "label": True}, "wrong columns"),
        ({"chosen": "A.", "label": True}, "wrong columns"),
        ([1], "not an object"),
        ("x", "not an object"),
        (None, "not an object"),
        ({"prompt": None, "completion": "A.", "label": True}, "no prompt"),
        ({"prompt": "Q?", "completion": None, "label": True}, "no completion"),
        ({"prompt": "Q?", "completion": " \n", "label": True}, "empty completion"),
        ({"prompt": {"a": 1}, "completion": "A.", "label": True}, "role not understood"),
        ({"prompt": True, "completion": "A.", "label": True}, "prompt is neither text nor messages"),
        ({"prompt": "Q?", "completion": [USER], "label": True}, "no assistant turn"),
        ({"messages": [USER], "label": True}, "no assistant turn"),
        ({"messages": [], "label": True}, "no assistant turn"),
        ({"messages": "hello", "label": True}, "messages is neither text nor messages"),
        ({"messages": [USER, "A."], "label": True}, "message is not an object"),
        ({"messages": [USER, {"role": "wizard", "content": "A."}], "label": True}, "role not understood"),
        ({"messages": [USER, {"role": ["assistant"], "content": "A."}], "label": True}, "role not understood"),
        ({"messages": [{"role": "user", "content": None}, GOOD], "label": True}, "message without content"),
        ({"messages": [USER, {"role": "assistant", "content": {"a": 1}}], "label": True}, "content is not text"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "i"}]}], "label": 1}, "content is not text"),
        ({"messages": [USER, {**GOOD, "tool_calls": [{"x": 1}]}], "label": True}, "tool_calls not understood"),
        ({"messages": [USER, {**GOOD, "tool_calls": "{"}], "label": True}, "tool_calls not understood"),
        ({"messages": [USER, GOOD], "tools": "{", "label": True}, "tools not understood"),
    ],
)
def test_reasons(obj, reason):
    assert dropped(obj) == reason


def test_numbers_and_parts_become_text_and_say_so():
    row, _, changes = one({"prompt": "6*7?", "completion": 42, "label": True})
    assert row.completion[0]["content"] == "42" and changes == ["number read as text"]
    parts = [{"type": "text", "text": "A"}, {"type": "text", "text": "."}]
    row, _, changes = one({"messages": [USER, {"role": "assistant", "content": parts}], "label": True})
    assert row.completion == [GOOD] and changes == ["content parts joined"]


@pytest.mark.parametrize("form", [to_trl, to_chatml])
@pytest.mark.parametrize(
    "obj",
    [
        {"prompt": "Q?", "completion": "A.", "label": False, "category": "x", "score": 1.5, "nested": {"a": [None]}},
        {"messages": [SYSTEM, USER, {**GOOD, "content": None, "tool_calls": [CALL]}], "label": 1, "tools": TOOLS},
        {"messages": [USER, {**GOOD, "reasoning_content": "hm"}], "label": True, "prompt": "a column", "chosen": "x"},
        {"prompt": "Q?", "chosen": "A.", "rejected": "B.", "messages": [USER], "label": "?", "completion": "c"},
        {"system": "Be brief.", "prompt": "Q?", "completion": "A.", "label": True},
        {"conversations": [GOOD], "label": True},
    ],
)  # fmt: skip
def test_saved_forms_lose_nothing(form, obj):
    for row in parse(obj, 1)[0]:
        saved = form(row)
        again, _, changes = parse(saved, 1)
        assert again == [row] and changes == [] and form(again[0]) == saved
        other = to_chatml if form is to_trl else to_trl
        assert form(parse(other(again[0]), 1)[0][0]) == saved
