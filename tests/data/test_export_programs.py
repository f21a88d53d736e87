"""What each program's export says: branches, ratings, edits, tools, and what cannot be used."""

import json

import pytest
from program_exports import CASES, SYSTEM, THUMB, argilla, loaded, said

from kto_core.data import dataset
from kto_core.errors import DataError


def webui(messages, **chat):
    return {"id": "c", "title": "t", "chat": {"history": {"messages": messages, "currentId": "x"}, **chat}}


ASKED = {"id": "q", "parentId": None, "childrenIds": ["a", "b"], "role": "user", "content": "Name a river."}


def answer(key, text, rating=None, **more):
    rated = {} if rating is None else {"annotation": {"rating": rating, "comment": more.pop("comment", "")}}
    return {"id": key, "parentId": "q", "role": "assistant", "content": text, **rated, **more}


def test_open_webui_takes_each_rated_branch_with_its_own_path(tmp_path):
    tree = {"q": ASKED, "a": answer("a", "The Nile.", 1, comment="short"), "b": answer("b", "Dunno.", -1),
            "n": {"id": "n", "parentId": "b", "role": "user", "content": "Sure?"}}  # fmt: skip
    found = loaded(tmp_path, [webui(tree, params={"system": "Be brief."})])
    assert said(found.rows) == [("Name a river.", "The Nile.", True), ("Name a river.", "Dunno.", False)]
    assert found.rows[0].prompt == [SYSTEM, THUMB] and found.rows[0].extra["comment"] == "short"


def test_open_webui_edited_answer_is_a_second_desirable_row(tmp_path):
    tree = {"q": ASKED, "a": answer("a", "The Nile.", -1, originalContent="Dunno.")}
    found = loaded(tmp_path, [webui(tree)])
    assert said(found.rows) == [("Name a river.", "Dunno.", False), ("Name a river.", "The Nile.", True)]


def test_open_webui_thoughts_are_told_from_the_answer(tmp_path):
    thought = '<details type="reasoning" done="true">\n<summary>Thought for 3 s</summary>\n> Rivers &gt; lakes\n> ok\n'
    text = thought + "</details>\nThe Nile."
    (row,) = loaded(tmp_path, [webui({"q": ASKED, "a": answer("a", text, 1)})]).rows
    assert row.completion == [{"role": "assistant", "content": "The Nile.", "reasoning_content": "Rivers > lakes\nok"}]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"content": '<details type="tool_calls" id="1"></details>Done.'}, "tool_calls not understood"),
        ({"content": '<details type="code_interpreter">x</details>Done.'}, "a part of a message is not understood"),
        ({"files": [{"type": "image", "url": "x"}]}, "images, video or sound, and training uses text only"),
        ({"parentId": "lost"}, "a message of the chat is missing"),
        ({"annotation": {"rating": 3}}, "label not understood"),
        ({"parentId": "a"}, "a message of the chat is missing"),
        ({"annotation": None}, "no rated answer"),
    ],
)
def test_open_webui_names_what_it_cannot_use(tmp_path, change, reason):
    tree = {"q": ASKED, "a": {**answer("a", "The Nile.", 1), **change}}
    assert loaded(tmp_path, [webui(tree)]).report.dropped == {reason: 1}


def test_open_webui_tool_calls_written_as_html_are_turns(tmp_path):
    call = (
        '<details type="tool_calls" done="true" id="c1" name="search" arguments="&quot;{\\&quot;q\\&quot;: '
        '\\&quot;river\\&quot;}&quot;" result="&quot;The Nile &amp; more&quot;" files="">\n'
        "<summary>Tool Executed</summary>\n</details>\n"
    )
    tree = {"q": ASKED, "a": answer("a", f"Let me see.\n{call}The Nile.", 1)}
    tree["n"] = {"id": "n", "parentId": "a", "role": "user", "content": "Sure?"}
    tree["m"] = answer("m", "Yes.", -1) | {"parentId": "n"}
    first, second = loaded(tmp_path, [webui(tree)]).rows
    turns = [*first.prompt, *first.completion]
    assert [m["role"] for m in turns] == ["user", "assistant", "tool", "assistant"] and turns == second.prompt[:4]
    assert turns[1]["content"] == "Let me see." and turns[1]["tool_calls"][0]["function"]["name"] == "search"
    assert json.loads(turns[1]["tool_calls"][0]["function"]["arguments"]) == {"q": "river"}
    assert turns[2]["content"] == "The Nile & more" and turns[3]["content"] == "The Nile."


def test_open_webui_feedback_of_an_unknown_version_is_refused(tmp_path):
    export = json.loads((CASES / "exports/openwebui_feedback.json").read_text())
    export[3]["version"] = 7
    with pytest.raises(DataError, match="version 7"):
        loaded(tmp_path, export)


def test_open_webui_feedback_without_chats_says_so(tmp_path):
    export = json.loads((CASES / "exports/openwebui_feedback.json").read_text())
    found = loaded(tmp_path, [{k: v for k, v in e.items() if k != "snapshot"} for e in export])
    assert found.report.dropped == {"feedback without its chat": 8}


def test_librechat_tree_with_tools_and_thoughts(tmp_path):
    call = {"type": "tool_call", "tool_call": {"id": "1", "name": "look", "args": "{}", "output": "Nile"}}
    parts = [{"type": "think", "think": "Hm."}, call, {"type": "text", "text": {"value": "The Nile."}}]
    rated = {"messageId": "2", "isCreatedByUser": False, "text": "", "content": parts, "children": [],
             "feedback": {"rating": "thumbsDown", "text": "too slow"}}  # fmt: skip
    asked = {"messageId": "1", "isCreatedByUser": True, "text": "Name a river.", "children": [rated],
             "parentMessageId": "00000000-0000-0000-0000-000000000000"}  # fmt: skip
    export = {"conversationId": "c", "options": {"promptPrefix": "Be brief."}, "recursive": True, "messages": [asked]}
    (row,) = loaded(tmp_path, export).rows
    assert [m["role"] for m in row.prompt] == ["system", "user", "assistant", "tool"]
    assert row.completion[0]["content"] == "The Nile." and not row.label and row.extra["comment"] == "too slow"
    assert row.prompt[2]["tool_calls"][0]["function"]["name"] == "look"
    assert row.prompt[2]["reasoning_content"] == "Hm."


def test_librechat_single_messages_are_refused(tmp_path):
    with pytest.raises(DataError, match="whole conversations"):
        loaded(tmp_path, [{"conversationId": "c", "messageId": "1", "isCreatedByUser": True, "text": "x"}])


def test_argilla_correction_and_comment(tmp_path):
    found = loaded(tmp_path, [argilla(label=["bad"], correction=["The Nile."], comment=["no answer"])])
    assert said(found.rows) == [("Name a river.", "Dunno.", False), ("Name a river.", "The Nile.", True)]
    assert [r.extra["comment"] for r in found.rows] == ["no answer"] * 2


def test_argilla_stars_are_a_scale(tmp_path):
    found = loaded(tmp_path, [argilla(rating=[1]), argilla(rating=[1])])
    assert not found.report.kept and "no number but 1" in found.report.problem
    found = loaded(tmp_path, [argilla(rating=[1]), argilla(rating=[5]), argilla(rating=[4, 5])])
    assert not found.report.kept and "rating is a scale" in found.report.scale
    path = tmp_path / "export.json"
    report = dataset.load(str(path), good_from=4, bad_to=2).report
    assert (report.desirable, report.undesirable) == (2, 1)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (argilla(label=["good", "bad"]), "ratings disagree"),
        (argilla(label=["good"], label_2=["bad"]), "several ratings of one answer"),
        (argilla(), "no rated answer"),
        ({**argilla(label=["good"]), "fields": {"a": "x", "b": "y"}}, "no question and answer found"),
        ({**argilla(label=["good"]), "status": "discarded"}, "discarded by its annotator"),
    ],
)
def test_argilla_names_what_it_cannot_use(tmp_path, record, reason):
    assert loaded(tmp_path, [record]).report.dropped == {reason: 1}
