"""Columns as people name them, text that was rendered before, labels on messages: each case gives its right rows."""

import json
from pathlib import Path

import pytest

from kto_core.data import dataset
from kto_core.data.records.columns import spelled
from kto_core.data.records.labels import COLUMNS as LABEL_COLUMNS
from kto_core.data.records.rows import DroppedRow, Row, parse_all

CASES = Path(__file__).parent / "cases"
QUESTIONS = ("Name a river.", "What is 2+2?")
CHANGED = {
    "pairs/trajectories": {"only the last answer is trained", "chosen and rejected end in the same answer"},
    "shapes/trajectory": {"only the last answer is trained"},
    "shapes/history_column": {"history put before the prompt"},
    "shapes/system_prompt_column": {"system column put before the prompt"},
    "pairs/question_system": {"system column put before the prompt"},
    "shapes/messages_as_json_text": {"messages read from JSON text"},
    "shapes/prerendered_chatml": {"text rendered before read as turns"},
    "shapes/prerendered_inst": {"text rendered before read as turns"},
    "shapes/human_assistant_prompt": {"Human:/Assistant: text read as turns"},
    "pairs/human_assistant_prompt": {"Human:/Assistant: text read as turns"},
    "shapes/alpaca_kto_tag": {"label read from column kto_tag"},
    "labels/kto_tag": {"label read from column kto_tag"},
    "shapes/question_answer_rating": {"label read from column rating"},
}
SYSTEMS = {
    "shapes/system_prompt_column": "Be KIND.",
    "pairs/question_system": "You are kind.",
    "shapes/messages_as_json_text": "Be brief.",
    "shapes/prerendered_chatml": "Be brief.",
}
OTHERS = {"shapes/images_column", "labels/per_message", "labels/list_of_labels"}
OTHERS |= {f"shapes/{n}" for n in ("reasoning_content", "system", "think", "two_calls")}  # test_case_templates
NAMES = sorted(f"{p.parent.name}/{p.stem}" for p in CASES.glob("*/*.jsonl") if p.parent.name in ("pairs", "shapes"))


def load(name):
    return dataset.load(CASES / f"{name}.jsonl")


@pytest.mark.parametrize("name", [n for n in NAMES if n not in OTHERS] + ["labels/kto_tag"])
def test_case(name):
    loaded = load(name)
    report = loaded.report
    bad = 8 if name == "pairs/several_rejected" else 4
    assert (report.rows, report.kept, report.desirable, report.undesirable) == (4 + bad, 4 + bad, 4, bad)
    assert set(report.changed) == CHANGED.get(name, set()) and not report.problem
    assert set(report.unused) == ({"response"} if name == "pairs/human_assistant_prompt" else set())
    for row in loaded.rows:
        systems = [m["content"] for m in row.prompt if m["role"] == "system"]
        assert systems == ([SYSTEMS[name]] if name in SYSTEMS else [])
        users = [m["content"] for m in row.prompt if m["role"] == "user"]
        assert len(users) == (2 if name in ("shapes/history_column", "pairs/human_assistant_prompt") else 1)
        asked = users[-1].removesuffix("\nAnswer shortly.")
        assert asked and not asked.endswith(" ") and (asked != users[-1]) == (name == "pairs/instruction_input")
        answer = row.completion[0]["content"]
        assert answer == answer.strip() and "<" not in answer and "[" not in answer
        if asked in QUESTIONS and "traject" not in name:
            right = "The Nile." if asked == QUESTIONS[0] else "4."
            assert (answer.removeprefix("The answer is ") == right) is row.label
            assert answer.startswith("The answer is ") == (name == "pairs/instruction_input")
    if name == "shapes/functions_column":
        assert all(r.tools and r.tools[0]["function"]["name"] == "w" for r in loaded.rows)


@pytest.mark.parametrize("name", ["labels/per_message", "labels/list_of_labels"])
def test_a_row_for_each_labelled_answer(name):
    loaded = load(name)
    assert (loaded.report.kept, loaded.report.desirable, loaded.report.undesirable) == (8, 4, 4)
    assert [len(r.prompt) for r in loaded.rows] == [1, 3] * 4
    assert not any("label" in m for r in loaded.rows for m in r.prompt + r.completion)


def test_images_are_refused_with_a_sentence():
    report = load("shapes/images_column").report
    assert not report.kept and "All 8 rows have images" in report.problem
    part = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "x"}}]
    talk = {"messages": [{"role": "user", "content": part}, {"role": "assistant", "content": "A."}], "label": True}
    assert "images" in parse_all(talk, 1)[0][0].reason


def test_question_answer_and_rating_are_found():
    row = parse_all({"question": "Q?", "answer": "A.", "rating": True}, 1)[0][0]
    assert (row.prompt[0]["content"], row.completion[0]["content"], row.label) == ("Q?", "A.", True)
    assert load("shapes/question_answer_rating").report.format.endswith("from question, answer")


def said(obj):
    """(prompt, answer, label) of each row, or the reason why there is none."""
    out = []
    for r in parse_all(obj, 1)[0]:
        turns = [(m["role"][0], m["content"]) for m in r.prompt] if isinstance(r, Row) else []
        out.append((turns, r.completion[0]["content"], r.label) if turns else r.reason)
    return out


PAIR = [([("u", "Q one?")], "A.", True), ([("u", "Q one?")], "B.", False)]


@pytest.mark.parametrize(
    "obj",
    [
        {"Query": "Q one?", "Response": "A.", "Rejected Response": "B."},
        {"userPrompt": "Q one?", "chosenResponse": "A.", "rejectedResponse": "B."},
        {"question": "Q one?", "chosen": "A.", "rejected": "B."},
        {"instruction": "Q one?", "chosen_response": "A.", "rejected_response": "B."},
        {"instruction": "Q one?", "input": None, "chosen": "A.", "rejected": "B."},
        {"prompt": "Q one?", "chosen": "A.", "rejected": ["B."]},
        {"prompt": "Q one?", "responses": ["A.", "B."], "scores": [0.9, 0.1]},
        {"prompt": "Q one?", "responses": ["A.", "B."], "ranks": [1, 2]},
        {"prompt": "Q one?", "answers": [{"text": "A.", "label": True}, {"text": "B.", "label": False}]},
        {
            "prompt": "Q one?",
            "completions": [{"response": x, "score": s} for x, s in (("A.", 9), ("C.", 5), ("B.", 1))],
        },
        {"prompt": "Q one?", "chosen": "Q one? A.", "rejected": "Q one?\nB."},
        {"prompt": "[INST] Q one? [/INST]", "chosen": "A.</s>", "rejected": " B. </s>"},
        {"chosen": "<s>[INST] Q one? [/INST] A.</s>", "rejected": "<s>[INST] Q one? [/INST] B.</s>"},
    ],
)
def test_pairs_under_other_names(obj):
    assert said(obj) == PAIR


@pytest.mark.parametrize("column", ["title", "Frage", "text"])
def test_a_pair_whose_question_is_not_found_is_refused_and_its_columns_named(tmp_path, column):
    answers = {"chosen": "The answer is four.", "rejected": "The answer is five."}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({column: "What is 2+2?", **answers}) + "\n")
    report = dataset.load(path).report
    assert dict(report.dropped) == {"no prompt column": 2} and f"Found: {column}" in report.problem
    lists = {k: [{"role": "assistant", "content": v}] for k, v in answers.items()}
    assert said({column: "What is 2+2?", **lists}) == ["no prompt column"] * 2
    assert said({"messages": lists["chosen"], column: "What?", "label": True}) == ["no prompt column"]
    assert said({"question": "Q?", "input": "or this?", **answers}) == ["more than one column may be the prompt"]


RENDERED = {
    "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nQ?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama 3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant"
    "<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
    "<start_of_turn>user\nQ?<end_of_turn>\n<start_of_turn>model\n",
    "llama 2": "<s>[INST] Hi [/INST] Hello </s><s>[INST] Q? [/INST]",
    "human": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Q?\n\nAssistant:",
}
ENDS = {"chatml": "<|im_end|>\n", "llama 3": "<|eot_id|>", "gemma": "<end_of_turn>\n", "llama 2": "</s>", "human": ""}


@pytest.mark.parametrize("name", RENDERED)
def test_rendered_text_is_read_as_turns(name):
    talk = [("u", "Hi"), ("a", "Hello"), ("u", "Q?")]
    text, end = RENDERED[name], ENDS[name]
    assert said({"prompt": text, "completion": f" A.{end}", "label": True}) == [(talk, "A.", True)]
    begun = {"prompt": text.rstrip() + " It is", "completion": f" A.{end}", "label": True}
    if name in ("llama 2", "human"):
        assert said(begun) == [(talk, "It is A.", True)]
    whole = {"chosen": f"{text} A.{end}", "rejected": f"{text} B.{end}"}
    assert said(whole) == [(talk, "A.", True), (talk, "B.", False)]


@pytest.mark.parametrize("text", ["What does <|im_end|> mean?", "<|im_end|>", "Is [INST] a marker?", "<|im_start|>x"])
def test_markers_that_somebody_typed_stay_text(text):
    assert said({"prompt": text, "completion": f"{text} is one", "label": 1}) == [
        ([("u", text)], f"{text} is one", True)
    ]


def test_messages_with_weight_0_are_not_trained():
    talk = [
        {"role": r, "content": c} for r, c in (("user", "Q?"), ("assistant", "A."), ("user", "R?"), ("assistant", "B."))
    ]
    talk[3]["weight"] = 0
    assert said({"messages": talk, "label": True}) == [([("u", "Q?")], "A.", True)]
    talk[1]["weight"] = 0
    assert said({"messages": talk, "label": True}) == ["every answer has weight 0"]


def test_columns_that_go_unused_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    row = {"prompt": "Q?", "completion": "A.", "label": True, "question": "other", "note": "", "source": "web"}
    path.write_text(json.dumps(row) + "\n")
    report = dataset.load(path).report
    assert report.to_dict()["unused"] == {"question": 1, "source": 1}


def test_names_count_in_any_case_and_spelling():
    assert {spelled(n) for n in ("systemPrompt", "System Prompt", "SYSTEM-PROMPT", "system_prompt ")} == {
        "system_prompt"
    }
    for name in LABEL_COLUMNS:
        assert said({"Instruction": "Q?", "OUTPUT": "A.", name.upper(): 1}) == [([("u", "Q?")], "A.", True)]


def test_too_many_answers_in_one_record_are_refused():
    lost = parse_all({"prompt": "Q?", "chosen": "A.", "rejected": ["B."] * 2000}, 1)[0]
    assert len(lost) == 1 and isinstance(lost[0], DroppedRow)


def test_a_column_that_was_renamed_beside_one_that_was_read_is_no_question():
    pair = {"prompt": {"role": "system", "content": "Be kind."}, "chosen": "A.", "rejected": "B."}
    for name in ("messages", "original_messages"):
        assert [r.label for r in parse_all({**pair, name: "a text"}, 1)[0]] == [True, False]


INSTRUCTED = (
    "Below is an instruction that describes a task.\n\n### Instruction:\nQ one?\n\n### Input:\nmore\n\n### Response:\n"
)
TWICE = [("u", "Hi"), ("a", "Hello"), ("u", "Q one?")]


@pytest.mark.parametrize(
    "obj,rows",
    [
        # LLaMA-Factory
        ({"instruction": "Q one?", "input": "", "output": ["A.", "B."]}, PAIR),
        ({"instruction": "Q one?", "input": "", "chosen": "A.", "rejected": "B."}, PAIR),
        ({"conversations": [{"from": "human", "value": "Q one?"}], "chosen": {"from": "gpt", "value": "A."},
          "rejected": {"from": "gpt", "value": "B."}}, PAIR),
        ({"instruction": "Q one?", "input": "", "output": "A.", "history": [["Hi", "Hello"]], "kto_tag": True},
         [(TWICE, "A.", True)]),
        # ms-swift
        ({"conversation": [{"human": "Hi", "assistant": "Hello"}, {"human": "Q one?", "assistant": "A."}], "label": 1},
         [(TWICE, "A.", True)]),
        ({"query": "Q one?", "response": "A.", "history": [["Hi", "Hello"]], "label": True}, [(TWICE, "A.", True)]),
        ({"messages": [{"role": "user", "content": "Q one?"}, {"role": "assistant", "content": "A."}],
          "rejected_response": "B."}, PAIR),
        ({"conversations": [{"from": "user", "value": "Q one?"}, {"from": "assistant", "value": "A."}],
          "rejected_response": "B."}, PAIR),
        # Axolotl
        ({"system": "", "question": "Q one?", "chosen": "A.", "rejected": "B."}, PAIR),
        ({"system": "", "input": "Q one?", "chosen": "A.", "rejected": "B."}, PAIR),
        ({"system": "", "instruction": "Q one?", "chosen_response": "A.", "rejected_response": "B."}, PAIR),
        ({"system": "S", "question": "Q one?", "completion": "A.", "label": True},
         [([("s", "S"), ("u", "Q one?")], "A.", True)]),
        ({"messages": [{"role": "user", "content": "Q one?"}], "chosen": {"role": "assistant", "content": "A."},
          "rejected": {"role": "assistant", "content": "B."}}, PAIR),
        # text that was rendered as Alpaca's and Guanaco's
        ({"prompt": INSTRUCTED, "completion": "A.", "label": True},
         [([("s", "Below is an instruction that describes a task."), ("u", "Q one?\nmore")], "A.", True)]),
        ({"chosen": "### Human: Q one?\n### Assistant: A.", "rejected": "### Human: Q one?\n### Assistant: B."}, PAIR),
        ({"prompt": "### Heading\nQ one?", "completion": "A.", "label": 1},
         [([("u", "### Heading\nQ one?")], "A.", True)]),
        ({"prompt": "Below is an instruction manual.", "completion": "A.", "label": 1},
         [([("u", "Below is an instruction manual.")], "A.", True)]),
    ],
)  # fmt: skip
def test_documented_forms_of_other_trainers(obj, rows):
    assert said(obj) == rows
    assert not parse_all({"prompt": "Q?", "completion": "A.", "label": 1, "output": ["a", "b"]}, 1)[2]


@pytest.mark.parametrize("role", ["assistant", "gpt", "model", "bot", "AI", "chatbot"])
def test_who_answers_is_known_by_every_name(role):
    talk = {"messages": [{"role": "user", "content": "Q one?"}, {"role": role, "content": "A."}]}
    assert said(talk | {"rejected_response": "B."}) == PAIR
    assert said(talk | {"rejected": [{"role": role, "content": "B."}]}) == PAIR


def test_importers_and_columns_have_one_list_of_names():
    from kto_core.data.importers import common
    from kto_core.data.records import names

    assert set(names.ANSWERS) <= set(common.ANSWERS)
    for name in names.PROMPTS:
        assert common.exchange({name: "Q?", "response": "A."})[0] == [{"role": "user", "content": "Q?"}]
