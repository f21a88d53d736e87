"""Feedback that other programs export, and tables as people have them."""

import contextlib
import json
import random
from pathlib import Path

import pytest

from kto_core.data import dataset
from kto_core.data.importers import known
from kto_core.data.records.rows import DroppedRow
from kto_core.errors import DataError

CASES = Path(__file__).parent / "cases"
THUMB = {"role": "user", "content": "Name a river."}
SYSTEM = {"role": "system", "content": "Be brief."}


def said(rows):
    return [(r.prompt[-1]["content"], r.completion[0]["content"], r.label) for r in rows]


def loaded(tmp_path, content, name="export.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return dataset.load(str(path))


# --- the cases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "rows", "good", "bad", "program"),
    [
        ("exports/openwebui_feedback.json", 8, 4, 4, "Open WebUI feedback"),
        ("exports/openwebui_chats.json", 2, 1, 1, "Open WebUI chats"),
        ("exports/librechat.json", 1, 1, 0, "LibreChat"),
        ("exports/argilla.jsonl", 4, 2, 2, "Argilla"),
        ("exports/langsmith.jsonl", 4, 2, 2, "LangSmith"),
        ("tables/messages_as_numpy_text.csv", 8, 4, 4, ""),
        ("tables/messages_as_json_text.parquet", 8, 4, 4, ""),
        ("tables/conversations_as_numpy_text.csv", 8, 4, 4, ""),
        ("tables/label_became_float.csv", 8, 3, 4, ""),
    ],
)
def test_cases(file, rows, good, bad, program):
    found = dataset.load(str(CASES / file))
    assert (found.report.rows, found.report.desirable, found.report.undesirable) == (rows, good, bad)
    assert found.report.format.startswith(program) and (program or ":" not in found.report.format)
    for row in found.rows:
        assert row.prompt[-1]["role"] == "user" and row.completion[0]["content"].strip()
        assert not any(m["content"].startswith(("[", "{")) for m in row.prompt + row.completion)
        if "messages_as" in file:
            assert row.prompt[0] == SYSTEM and len(row.prompt) == 2


def test_an_empty_label_among_floats_is_no_label():
    assert dataset.load(str(CASES / "tables/label_became_float.csv")).report.dropped == {"no label": 1}


def test_windows_1252_is_refused_with_what_to_do():
    report = dataset.load(str(CASES / "tables/windows_1252.csv")).report
    assert not report.kept and "UTF-8" in report.problem


def test_rows_lost_to_windows_1252_are_said_aloud(tmp_path):
    from kto_core.cli.data import describe

    path = tmp_path / "t.csv"
    path.write_bytes("prompt,completion,label\na,b,1\nc,d,0\ne,bientôt,1\n".encode("cp1252"))
    report = dataset.load(str(path)).report
    assert report.kept == 2 and "Windows-1252" in report.issues[0]["detail"]
    assert "1 rows are lost because the file is not all UTF-8" in describe(report.to_dict(), "t.csv")


def test_the_second_answer_of_a_chat_has_the_first_in_its_prompt():
    rows = dataset.load(str(CASES / "exports/openwebui_chats.json")).rows
    assert [m["content"] for m in rows[1].prompt] == ["Name a river.", "The Nile.", "What is 2+2?"]


# --- each program -----------------------------------------------------------------------------------------------------


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
        ({"files": [{"type": "image", "url": "x"}]}, "images, video or sound, which need a model that sees or hears"),
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


def argilla(**responses):
    given = {k: [{"value": x, "user_id": "u"} for x in v] for k, v in responses.items()}
    return {"id": "1", "status": "completed", "fields": {"prompt": "Name a river.", "response": "Dunno."},
            "responses": given}  # fmt: skip


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


PROMPT = [{"role": "user", "content": "Name a river."}]
NILE = ("Name a river.", "The Nile.", True)
DUNNO = ("Name a river.", "Dunno.", False)
OPENAI = {"choices": [{"message": {"role": "assistant", "content": "The Nile.", "refusal": None}}]}
STUDIO = {"id": 1, "data": {"prompt": "Name a river.", "response": "Dunno."}}


def result(name, kind, value):
    return {"from_name": name, "to_name": "x", "type": kind, "value": value}


def oasst(role, text, replies=(), **more):
    return {"message_id": text, "text": text, "role": role, "replies": list(replies), **more}


EXPORTS = {
    "argilla flat": ({"id": "1", "prompt": "Name a river.", "response": "The Nile.", "label.responses": ["good"],
                      "label.responses.users": ["u"], "label.suggestion": None}, [NILE]),
    "argilla 1": ({"fields": {"prompt": "Name a river.", "response": "Dunno."}, "responses": [
        {"user_id": "u", "status": "submitted", "values": {"label": {"value": "bad"}}}]}, [DUNNO]),
    "langfuse": ({"id": "t", "projectId": "p", "input": {"messages": PROMPT}, "output": {"role": "assistant",
                  "content": "Dunno."}, "scores": [{"name": "user-feedback", "value": 0, "dataType": "BOOLEAN",
                  "comment": "no"}, {"name": "latency", "value": 4, "dataType": "NUMERIC"},
                  {"name": "output", "value": 0, "dataType": "CORRECTION", "stringValue": "The Nile."}]},
                 [DUNNO, NILE]),
    "langfuse table": ({"id": "t", "timestamp": "x", "sessionId": None, "input": "Name a river.", "output": "Dunno.",
                        "scores": {"user-feedback": [0]}}, [DUNNO]),
    "langfuse download": ({"trace": {"id": "t", "projectId": "p", "input": None, "output": None, "scores": [
        {"name": "thumb", "value": 1, "dataType": "CATEGORICAL", "stringValue": "up"}]}, "observations": [
        {"type": "GENERATION", "input": PROMPT, "output": "The Nile."}]}, [NILE]),
    "langsmith langchain": ({"id": "r", "run_type": "llm", "inputs": {"messages": [[{"lc": 1, "type": "constructor",
        "id": ["langchain", "schema", "messages", "HumanMessage"], "kwargs": {"content": "Name a river.",
        "type": "human"}}]]}, "outputs": {"generations": [[{"text": "Dunno.", "message": {"lc": 1, "id": ["langchain",
        "schema", "messages", "AIMessage"], "kwargs": {"content": "Dunno."}}}]]}, "feedback": [
        {"key": "user_score", "score": 0, "comment": "no", "correction": {"answer": "The Nile."}}]}, [DUNNO, NILE]),
    "langsmith words": ({"id": "r", "trace_id": "t", "inputs": {"question": "Name a river."}, "outputs":
        {"output": "The Nile."}, "feedback_stats": {"thumb": {"n": 1, "avg": None, "values": {"good": 1}}}}, [NILE]),
    "helicone": ({"response_id": "x", "request_body": {"model": "m", "messages": PROMPT}, "response_body": OPENAI,
                  "feedback_rating": True}, [NILE]),
    "helicone anthropic": ({"request_id": "x", "request_body": json.dumps({"model": "m", "messages": PROMPT}),
        "response_body": json.dumps({"type": "message", "role": "assistant", "content": [{"type": "text",
        "text": "Dunno."}]}), "feedback_rating": False}, [DUNNO]),
    "label studio": ({**STUDIO, "annotations": [{"id": 1, "was_cancelled": False, "result": [
        result("label", "choices", {"choices": ["bad"]}), result("correction", "textarea", {"text": ["The Nile."]}),
        result("why", "textarea", {"text": ["no"]})]}], "predictions": []}, [DUNNO, NILE]),
    "label studio pair": ({"id": 1, "data": {"prompt": "Name a river.", "answer1": "The Nile.", "answer2": "Dunno."},
        "annotations": [{"result": [result("c", "pairwise", {"selected": "left"})]}]}, [NILE, DUNNO]),
    "label studio min": ({"id": 1, "prompt": "Name a river.", "response": "Dunno.", "sentiment": "bad", "annotator": 1,
                          "annotation_id": 2, "lead_time": 1.5}, [DUNNO]),
    "openassistant": ({"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": oasst("prompter",
        "Name a river.", [oasst("assistant", "Dunno.", rank=1), oasst("assistant", "The Nile.", rank=0),
        oasst("assistant", "Spam", rank=2, deleted=True)])}, [DUNNO, NILE]),
    "kiln": ({"v": 1, "id": "1", "input": "Name a river.", "output": {"v": 1, "output": "Dunno.", "source": {},
        "rating": {"v": 1, "type": "pass_fail", "value": 0.0}}, "repair_instructions": "answer it",
        "repaired_output": {"v": 1, "output": "The Nile."}, "model_type": "task_run"}, [DUNNO, NILE]),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.parametrize("form", ["lines", "list", "data", "pretty"])
def test_each_program_in_every_kind_of_file(tmp_path, name, form):
    obj, rows = EXPORTS[name]
    text = {"lines": json.dumps(obj) + "\n", "list": json.dumps([obj]), "data": json.dumps({"data": [obj]}),
            "pretty": json.dumps(obj, indent=1)}[form]  # fmt: skip
    found = loaded(tmp_path, text, "feedback.jsonl" if form == "lines" else "feedback.json")
    assert said(found.rows) == rows and not found.report.dropped, found.report.dropped
    assert found.report.format.lower().startswith(name.split()[0])
    if "comment" in json.dumps(obj) or "why" in json.dumps(obj):
        assert found.rows[0].extra["comment"] == "no"


@pytest.mark.parametrize("stars", [1, 3, 5])
def test_a_scale_of_a_program_is_left_to_the_threshold(stars):
    kiln = json.loads(json.dumps(EXPORTS["kiln"][0]))
    kiln["output"]["rating"] = {"type": "five_star", "value": stars}
    studio = {**STUDIO, "annotations": [{"result": [result("quality", "rating", {"rating": stars})]}]}
    for obj in (kiln, studio, argilla(rating=[stars])):
        record = next(iter(known.plain(obj)))
        assert record["rating"] == stars and "label" not in record


@pytest.mark.parametrize(
    ("obj", "words"),
    [
        ({"v": 1, "model_type": "task", "name": "x", "instruction": "y"}, "task_run.kiln"),
        ({**EXPORTS["kiln"][0], "v": 2}, "version 2"),
    ],
)
def test_an_unknown_version_or_form_is_one_sentence(tmp_path, obj, words):
    with pytest.raises(DataError, match=words):
        loaded(tmp_path, [obj])


def test_openassistant_messages_one_by_one_are_trees_again(tmp_path):
    def m(key, parent, role, text, rank=None):
        return {
            "message_id": key,
            "parent_id": parent,
            "message_tree_id": "r",
            "role": role,
            "text": text,
            "rank": rank,
        }

    flat = [m("b", "r", "assistant", "The Nile.", 0), m("r", None, "prompter", "Name a river."),
            m("a", "r", "assistant", "Dunno.", 1), m("x", "gone", "assistant", "Lost.", 0),
            m("y", "z", "prompter", "A circle."), m("z", "y", "assistant", "A circle.")]  # fmt: skip
    found = loaded(tmp_path, flat)
    assert sorted(said(found.rows)) == [("Name a river.", "Dunno.", False), ("Name a river.", "The Nile.", True)]
    assert dict(found.report.dropped) == {"a message of the chat is missing": 3}


def test_openassistant_answers_between_are_named(tmp_path):
    replies = [oasst("assistant", f"a{i}", rank=i) for i in range(4)]
    found = loaded(tmp_path, {"message_tree_id": "t", "prompt": oasst("prompter", "Name a river.", replies)})
    assert found.report.dropped == {"ranked between the best and the worst": 2} and found.report.kept == 2


@pytest.mark.parametrize(
    "row",
    [
        {
            "prompt": "a",
            "completion": "b",
            "label": True,
            "scores": [{"name": "x", "value": 1}],
            "input": "",
            "output": "",
        },
        {"messages": PROMPT, "label": 1, "conversationId": "c"},
        {"input": "a", "output": "b", "scores": [1, 2]},
        {"inputs": "a", "outputs": "b", "label": 1},
        {"prompt": "a", "chosen": "b", "rejected": "c", "annotations": [], "data": {}},
        {"instruction": "a", "input": "", "output": "b", "rating": 4},
    ],
)
def test_a_plain_row_is_no_export(row):
    assert known.find(row) is None and list(known.plain(row)) == [row]


def test_damaged_exports_give_a_reason_and_never_a_traceback():
    """Any value of any export may be of another type; seen are records, reasons and sentences only."""
    rng = random.Random(5)
    objects = [o for o, _ in EXPORTS.values()] + json.loads((CASES / "exports/openwebui_feedback.json").read_text())
    objects += [json.loads((CASES / "exports/librechat.json").read_text()), argilla(label=["good"])]
    odd = [None, "", "x", 0, -1, 1.5, True, [], {}, [None], [[]], {"a": None}, [{"role": 3}], {"content": []}, "[{"]

    def places(value, path=()):
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            yield (*path, key)
            yield from places(value[key], (*path, key))

    tried = 0
    for obj in objects:
        for path in list(places(obj)):
            for value in rng.sample(odd, 6):
                damaged = json.loads(json.dumps(obj))
                inner = damaged
                for key in path[:-1]:
                    inner = inner[key]
                inner[path[-1]] = value
                with contextlib.suppress(DataError):
                    assert all(isinstance(r, dict | DroppedRow) for r in known.plain(damaged))
                tried += 1
    assert tried > 3000


# --- tops of JSON files -----------------------------------------------------------------------------------------------

COLUMNS = {"prompt": ["Name a river.", "Name a river."], "completion": ["The Nile.", "Dunno."], "label": [True, False]}
ROWS = [dict(zip(COLUMNS, r, strict=True)) for r in zip(*COLUMNS.values(), strict=True)]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "top",
    [
        {"rows": ROWS},
        {"version": "1", "records": ROWS},
        {"features": [], "rows": [{"row_idx": i, "row": r, "truncated_cells": []} for i, r in enumerate(ROWS)]},
        COLUMNS,
        {k: {str(i): v for i, v in enumerate(c)} for k, c in COLUMNS.items()},
        {"columns": list(COLUMNS), "index": [0, 1], "data": [list(r.values()) for r in ROWS]},
    ],
    ids=["rows", "records", "viewer", "columns", "pandas", "split"],
)
def test_rows_under_a_key_and_by_columns(tmp_path, top, indent):
    assert said(loaded(tmp_path, json.dumps(top, indent=indent)).rows) == [NILE, DUNNO]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": PROMPT, "chosen": [{"role": "assistant", "content": "a"}],
         "rejected": [{"role": "assistant", "content": "b"}]},
        {"messages": [*PROMPT, {"role": "assistant", "content": "x"}], "label": True, "rows": [1]},
    ],
)  # fmt: skip
def test_one_record_with_lists_stays_one_record(tmp_path, row):
    assert loaded(tmp_path, row).report.kept == (2 if "chosen" in row else 1)


# --- messages in cells ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cell",
    [
        "[{'role': 'user', 'content': \"It's\"} {'role': 'assistant', 'content': 'a } {b'}]",
        "[{'role': 'user', 'content': \"It's\"}\n {'role': 'assistant', 'content': 'a } {b'}]",
        "array([{'role': 'user', 'content': \"It's\"},\n {'role': 'assistant', 'content': 'a } {b'}], dtype=object)",
        "[{'role': 'user', 'content': \"It's\"}, {'role': 'assistant', 'content': 'a ' '} {b'}]",
        '[{"role": "user", "content": "It\'s"}, {"role": "assistant", "content": "a } {b"}]',
    ],
    ids=["blank", "line", "array", "python", "json"],
)
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_messages_in_a_cell(tmp_path, cell, kind):
    import pandas

    path = tmp_path / f"t.{kind}"
    frame = pandas.DataFrame({"messages": [cell], "label": [True]})
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    (row,) = dataset.load(str(path)).rows
    assert (row.prompt[0]["content"], row.completion[0]["content"]) == ("It's", "a } {b")


@pytest.mark.parametrize(
    "cell",
    [
        "[{'role': 'user', 'content': 'a'} ... {'role': 'user', 'content': 'b'}]",
        "[{'role': 'user', 'content': open('/etc/passwd')}]",
        "[{'role': 'user', 'content': " + "[" * 5000 + "]",
    ],
)
def test_messages_that_cannot_be_read_are_no_text(tmp_path, cell):
    import pandas

    path = tmp_path / "t.csv"
    pandas.DataFrame({"prompt": [cell], "completion": ["x"], "label": [True]}).to_csv(path, index=False)
    assert dataset.load(str(path)).report.dropped == {"messages in a cell cannot be read; save the data as JSONL": 1}


@pytest.mark.parametrize(
    "text", ["[1] see", '{"role": 1}', "[{'a': 1}]", "array of things", "[{'role': 'x'}] is a list"]
)
def test_other_text_in_a_cell_stays_text(tmp_path, text):
    import pandas

    path = tmp_path / "t.csv"
    pandas.DataFrame({"prompt": ["Hi"], "completion": [text], "label": [True]}).to_csv(path, index=False)
    assert dataset.load(str(path)).rows[0].completion[0]["content"] == text
