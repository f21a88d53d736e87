"""Feedback that other programs export: every program in every kind of file, and what is no export."""

import contextlib
import json
import random

import pytest
from program_exports import CASES, DUNNO, NILE, PROMPT, SYSTEM, argilla, loaded, said

from kto_core.data import dataset
from kto_core.data.importers import known
from kto_core.data.records.rows import DroppedRow
from kto_core.errors import DataError

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


# --- every program ---------------------------------------------------------------------------------------------------

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
