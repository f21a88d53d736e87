"""Thoughts told from answers, on the prompt's side or the answer's, in the forms of real models."""

import pytest
import real_templates

from kto_core.data import dataset
from kto_core.data.records import thoughts
from kto_core.data.records.rows import Row, parse
from kto_core.data.rendering import template
from kto_core.data.rendering.style import Style

USER = {"role": "user", "content": "Name a river."}
PLAIN = {"role": "assistant", "content": "The Nile."}
THINKS = {**PLAIN, "reasoning_content": "I recall one."}
EXAONE = (  # as EXAONE 4 does: tags in the content only, a switch, the frame written again for the last answer
    "{%- for m in messages %}{%- set text = m.content %}{%- set mind = '' %}{%- if '</think>' in text %}"
    "{%- set mind = text.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{%- set text = text.split('</think>')[-1].strip() %}{%- endif %}"
    "{{- '[|' + m.role + '|]\n' }}{%- if m.role == 'assistant' and loop.last %}"
    "{{- '<think>\n' + mind + '\n</think>\n\n' }}{%- endif %}{{- text + '[|endofturn|]\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '[|assistant|]\n' }}{%- if enable_thinking is defined and enable_thinking %}"
    "{{- '<think>\n' }}{%- else %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
FINAL = "<|channel|>final<|message|>"

# name: (end of the prompt without a thought, its completion, end of the prompt with one, its completion)
MODELS = {
    "deepseek_r1_distill": (
        "<think>\n\n</think>\n\n", "The Nile.<｜end▁of▁sentence｜>", "<｜Assistant｜><think>\n",
        "I recall one.\n</think>\n\nThe Nile.<｜end▁of▁sentence｜>",
    ),
    "qwen3": (
        "assistant\n<think>\n\n</think>\n\n", "The Nile.<|im_end|>", "<|im_start|>assistant\n",
        "<think>\nI recall one.\n</think>\n\nThe Nile.<|im_end|>",
    ),
    "qwen3_5_think": (
        "<think>\n\n</think>\n\n", "The Nile.<|im_end|>", "assistant\n<think>\n",
        "I recall one.\n</think>\n\nThe Nile.<|im_end|>",
    ),
    "qwen3_8": (
        "<think>\n\n</think>\n\n", "The Nile.<|im_end|>", "assistant\n<think>\n",
        "I recall one.\n</think>\n\nThe Nile.<|im_end|>",
    ),
    "glm4moe": (
        "<|assistant|>\n<think></think>", "\nThe Nile.</s>", "<|assistant|>",
        "\n<think>I recall one.</think>\nThe Nile.</s>",
    ),
    "nemotron_3_nano": (
        "<think></think>", "The Nile.<|im_end|>", "<think>\n", "I recall one.\n</think>\nThe Nile.<|im_end|>",
    ),
    "gptoss": (
        "<|start|>assistant" + FINAL, "The Nile.<|return|>", "<|start|>assistant",
        f"<|channel|>analysis<|message|>I recall one.<|end|><|start|>assistant{FINAL}The Nile.<|return|>",
    ),
    "gemma4": (
        "<|turn>model\n", "The Nile.<turn|>", "<|turn>model\n",
        "<|channel>thought\nI recall one.\n<channel|>The Nile.<turn|>",
    ),
    "muse_glimmer": (
        "<|start|>assistant to=user<|message|>", "The Nile.<|eot|>", "<|start|>assistant",
        " to=self<|message|>I recall one.<|eom|><|start|>assistant to=user<|message|>The Nile.<|eot|>",
    ),
    "exaone": (
        "[|assistant|]\n<think>\n\n</think>\n\n", "The Nile.[|endofturn|]\n</s>", "[|assistant|]\n<think>\n",
        "I recall one.\n</think>\n\nThe Nile.[|endofturn|]\n</s>",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers():
    made = {name: real_templates.of(name) for name in MODELS if name != "exaone"}
    return made | {"exaone": real_templates.with_template(EXAONE)}


@pytest.mark.parametrize("name", MODELS)
def test_the_frame_is_the_prompts_and_the_thought_is_the_answers(tokenizers, name):
    tokenizer = tokenizers[name]
    bare, answer, asking, thinking = MODELS[name]
    for message, prompt, completion in ((PLAIN, bare, answer), (THINKS, asking, thinking)):
        shown = template.render(Row([USER], [message], True, 1), tokenizer)
        assert shown.prompt.endswith(prompt) and shown.completion == completion
    for written in (
        {**PLAIN, "thinking": "I recall one."},
        {**PLAIN, "content": "<think>\nI recall one.\n</think>\n\nThe Nile."},
        {**PLAIN, "content": f"<|channel|>analysis<|message|>I recall one.<|end|><|start|>assistant{FINAL}The Nile."},
    ):
        shown = template.render(Row([USER], [written], True, 1), tokenizer)
        assert shown.completion == thinking, written


@pytest.mark.parametrize("name", MODELS)
def test_settings(tokenizers, name):
    """off: the thought is left out and said so; the answer only: the thought is part of the prompt."""
    tokenizer, row = tokenizers[name], Row([USER], [THINKS], True, 1)
    off = template.encode(row, tokenizer, style=Style("off"))
    plain = template.encode(Row([USER], [PLAIN], True, 1), tokenizer)
    assert (off.prompt_ids, off.completion_ids) == (plain.prompt_ids, plain.completion_ids)
    assert off.changes == ("reasoning of the answer left out (thinking is off)",) and not off.thought
    both, only = (template.render(row, tokenizer, Style(train_thoughts=t)) for t in (True, False))
    assert only.prompt + only.completion == both.prompt + both.completion and only.prompt.startswith(both.prompt)
    assert "I recall one." in only.prompt and only.completion.startswith("The Nile.")
    asked = template.render_chat([USER], tokenizer, style=Style("on"))
    on = template.encode(Row([USER], [PLAIN], True, 1), tokenizer, style=Style("on"))
    assert on.prompt_ids[: len(asked) - 1] == asked[:-1] and "The Nile." in tokenizer.decode(on.completion_ids)
    assert "think>" not in tokenizer.decode(on.completion_ids)


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("The Nile.", "", "The Nile."),
        ("<think>\na\n</think>\n\nb", "a", "b"),
        ("<thinking>a</thinking>b", "a", "b"),
        ("a\nb\n</think>\n\nc", "a\nb", "c"),
        ("[THINK]a[/THINK]b", "a", "b"),
        ("<|channel>thought\na\n<channel|>b", "a", "b"),
        ("<|channel|>final<|message|>b<|return|>", "", "b"),
        ("analysisI recall.assistantfinalThe Nile.", "I recall.", "The Nile."),
        ("Write </think> to close it.", "", "Write </think> to close it."),
        ("Use <think>a</think> tags.", "", "Use <think>a</think> tags."),
        ("<think>\nnever closed", "", "<think>\nnever closed"),
        ("<think>\nonly a thought\n</think>\n", "", "<think>\nonly a thought\n</think>\n"),
    ],
)
def test_split(text, thought, answer):
    assert thoughts.split(text) == (thought, answer)


def test_a_growing_text():
    assert thoughts.split("<think>\nso f", unfinished=True) == ("so f", "")
    assert thoughts.split("<think>\nso far\n</think>\n", unfinished=True) == ("so far", "")
    assert thoughts.split("<think>\nso far\n</think>\n\nT", unfinished=True) == ("so far", "T")


def test_thoughts_as_parts_and_as_no_text():
    said = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "The Nile."}]
    talk = {"messages": [USER, {"role": "assistant", "content": said}], "label": True}
    (row,), _, changes = parse(talk, 1)
    assert row.completion == [{"role": "assistant", "content": "The Nile.", "reasoning_content": "Hm."}]
    assert "thinking parts read as reasoning_content" in changes
    with pytest.raises(dataset_error(), match="reasoning_content is not text"):
        parse({"messages": [USER, {**PLAIN, "reasoning_content": 7}], "label": True}, 1)


def dataset_error():
    from kto_core.data.records.rows import DroppedRow

    return DroppedRow


def test_the_report_says_what_is_left_out_and_what_of_a_thought_is_trained(tmp_path, tokenizers):
    earlier = [USER, THINKS, USER, {**THINKS, "content": "Or so."}]
    rows = [{"messages": [USER, PLAIN], "label": True}, *({"messages": earlier, "label": v} for v in (False, True))]
    file = tmp_path / "rows.jsonl"
    dataset.save([r for n, o in enumerate(rows, 1) for r in parse(o, n)[0]], file)
    loaded = dataset.load(str(file))
    left = "reasoning of an earlier answer left out by the model's chat template"
    for style, trained in ((None, "thought and answer"), (Style(train_thoughts=False), "the answer only")):
        report = dataset.check(loaded, tokenizers["gptoss"], style=style)
        found = report.to_dict()
        assert found["thoughts"] == {"answers": 2, "trained": trained} and found["refused"] == 0
        assert found["left_out"] == {left: {"rows": 2, "first_line": 2}} and found["changed"][left] == 2
    assert loaded.report.changed[left] == 0 and dataset.check(loaded).seen is None


def test_an_answer_that_the_template_cuts_is_refused(tmp_path):
    """What is trained is never a part of what was rated."""
    stub = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content[:4] if m.role == 'assistant' else m.content }}{% endfor %}"
    )
    tokenizer = real_templates.with_template(stub + "{% if add_generation_prompt %}[assistant] {% endif %}")
    short, long = ({"prompt": "Q?", "completion": text, "label": True} for text in ("Yes.", "The Nile."))
    file = tmp_path / "rows.jsonl"
    dataset.save([r for n, o in enumerate((short, long), 1) for r in parse(o, n)[0]], file)
    report = dataset.check(dataset.load(str(file)), tokenizer)
    assert report.seen.refused == 1 and report.fitting == (1, 0)
    assert report.to_dict()["left_out"] == {
        "the answer is cut by the model's chat template": {"rows": 1, "first_line": 2}
    }
    issue = [i for i in report.issues if i["kind"] == "refused"]
    assert [i["line"] for i in issue] == [2]


def test_a_system_prompt_that_no_form_keeps_is_named():
    stub = (
        "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}] {{ m.content[-6:] }}\n{% endif %}{% endfor %}"
    )
    tokenizer = real_templates.with_template(stub + "{% if add_generation_prompt %}[assistant] {% endif %}")
    row = Row([{"role": "system", "content": "Be brief, always."}, USER], [{**PLAIN, "content": "Nile."}], True, 1)
    found = template.encode(row, tokenizer)
    assert found.fate == "ok" and set(found.changes) == {
        "a system prompt left out by the model's chat template",
        "a user turn left out by the model's chat template",
    }


def test_the_date(tokenizers):
    """A run's date stays; a chat has today's."""
    row, day = Row([USER], [PLAIN], True, 1), 1_750_000_000.0
    old = template.render(row, tokenizers["gptoss"], Style(began=day)).prompt
    assert "Current date: 2025-06-1" in old and "2025-06-1" not in template.render(row, tokenizers["gptoss"]).prompt
    assert template.writes_date(tokenizers["gptoss"]) and not template.writes_date(tokenizers["qwen3"])
