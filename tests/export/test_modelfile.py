"""Ollama Modelfiles: a template in Go writes what the model's chat template writes, and what it cannot is said."""

import json
import re
import shutil
from pathlib import Path

import pytest

from kto_core.errors import ExportError
from kto_core.export.ollama import modelfile, parameters, probing
from tests.support.go_template import evaluate, evaluate_in_go

S, U, A = probing.system, probing.user, probing.answer
BOS, EOS = "<s>", "</s>"
OWN = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "chatml with a default system prompt": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind."
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama 3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "llama 3.1, whose system turn is always there": "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today: 1 Jan\n\n{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}"
    "{% endif %}<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first else '' }}"
    "{{ m.content }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "phi 3": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    "olmo 2, whose first question has no line before it": "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n"
    "{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% if not loop.last %}\n{% endif %}{% else %}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "llama 2, whose turns each begin anew": "{% if messages[0].role == 'system' %}"
    "{% set told = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}{% else %}"
    "{% set told = '' %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{{ told if loop.first else '' }}{{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}"
    "{% endfor %}",
    "a template that opens an answer with a thought": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
}
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}{{ raise_exception('roles') }}{% endif %}"
    "{% endfor %}"
)
MISTRAL_3 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.last %}[AVAILABLE_TOOLS] "
    "{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] {{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS] "
    "[{% for c in m.tool_calls %}{{ c.function | tojson }}, \"id\": \"{{ c.id }}\"}{% endfor %}]{{ eos_token }}"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]{% else %} {{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)  # fmt: skip
GRANITE = (
    "{% if tools %}<|role|>tools\n{{ tools | tojson(indent=4) }}<|end|>\n{% endif %}{% for m in messages %}"
    "{% if m.tool_calls %}<|role|>assistant\n<|call|>[{% for c in m.tool_calls %}{{ ', ' if not loop.first else '' }}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}{% endfor %}]<|end|>\n'
    "{% else %}<|role|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|role|>assistant\n{% endif %}"
)
CHATS = {"a question": [U("One?")], "blanks": [U("  One?\n")],
         "a second question": [U("One?"), A("Two."), U("Three?")],
         "a question after a system prompt": [S("Be brief."), U("One?")],
         "a third question after a system prompt": [S("Be brief."), U("One?"), A("Two."), U("Three?"), A("Four."),
                                                    U("Five?")]}  # fmt: skip
TOOL_CHATS = probing.TOOL_CHATS | probing.MORE_TOOL_CHATS | {
    "a question with tools after a system prompt": [S("Be brief."), U("One?")]
}  # fmt: skip
TOOLS = [*probing.LISTED, probing.tool("rain <&> snow")]  # one more than the template was read with
BLANKS = "The model's own chat template removes blanks around a message; Ollama keeps them."


def of_trl() -> dict[str, str]:
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    return {p.stem: p.read_text() for p in sorted(folder.glob("*.jinja"))}


def renderer(template: str):
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(messages, generation=True, tools=None):
        import jinja2

        try:
            texts, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=generation,
                                             tools=tools, bos_token=BOS, eos_token=EOS)  # fmt: skip
        except (jinja2.TemplateError, TypeError, KeyError) as e:
            raise ExportError(str(e)) from e
        return texts[0]

    return render


def made(template: str, **more) -> modelfile.Modelfile:
    return modelfile.make(renderer(template), bos=BOS, eos=EOS, **more)


def same_json(text: str) -> str:
    """The text with every JSON object in it spelled one way."""
    out, decoder = "", json.JSONDecoder()
    while (at := text.find("{")) >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except ValueError:
            value, end = None, at + 1
        out += text[:at] + (json.dumps(value, sort_keys=True) if value is not None else "{")
        text = text[end:]
    return out + text


def differing(template: str, own: modelfile.Modelfile) -> list[str]:
    """Names of conversations that Ollama would write otherwise than the model's template does."""
    render, found = renderer(template), []
    takes_tools = ".Tools" in own.template
    for chats, tools in ((CHATS, None), (TOOL_CHATS, TOOLS if takes_tools else None)):
        for name, messages in chats.items():
            if tools is None and chats is TOOL_CHATS:
                continue
            try:
                expected = render(messages, True, tools).removeprefix(BOS)
            except ExportError:
                continue
            if same_json(evaluate(own.template, messages, tools)) != same_json(expected):
                found.append(name)
    return found


@pytest.mark.parametrize("name", OWN)
def test_the_template_writes_what_the_chat_template_writes(name):
    own = made(OWN[name])
    assert not differing(OWN[name], own)
    assert own.remarks == []
    text = own.text("m.gguf", "Modelfile-q8_0")
    assert text.startswith("# ollama create NAME -f Modelfile-q8_0\n") and "\nFROM ./m.gguf\n" in text
    assert f'TEMPLATE """{own.template}"""' in text
    stops = re.findall(r'PARAMETER stop "(.*)"', text)
    assert EOS in stops and not [s for s in stops if not s.strip() or s.strip() in "<|[" or s == f"{EOS}{BOS}"]


@pytest.mark.parametrize("name", of_trl())
def test_every_known_template_is_equal_or_remarked(name):
    """Table of conversations: what Ollama writes otherwise than the model's template has a remark."""
    template = of_trl()[name]
    own = made(template)
    if not own.template:
        assert own.remarks[-1] == modelfile.GUESSED
        return
    said = " ".join(own.remarks)
    for chat in differing(template, own):
        expected = {"blanks": BLANKS}.get(chat, f"renders {chat} differently")
        assert expected in said, (chat, own.remarks)
    if renderer(template)([U("One?")], True, TOOLS) != renderer(template)([U("One?")]):
        assert probing.JSON in own.remarks or "Tools are not in this TEMPLATE" in said


TOOL_USERS = {name: text for name, text in of_trl().items() if name in ("qwen2_5", "qwen3", "llama3_1", "llama3_2",
              "qwen3_instruct_2507")} | {"granite": GRANITE}  # fmt: skip


@pytest.mark.parametrize("name", TOOL_USERS)
def test_tools_are_in_the_template_where_the_model_has_them(name):
    own = made(TOOL_USERS[name])
    assert "$.Tools" in own.template and ".ToolCalls" in own.template and 'eq .Role "tool"' in own.template
    for chat in ("a question with tools", "the result of a tool"):
        assert chat not in differing(TOOL_USERS[name], own)
    assert probing.JSON in own.remarks
    # Ollama takes the first text in the first "if" that names .ToolCalls for the mark of a call
    mark = re.search(r"\{\{ if \.ToolCalls \}\}(.*?)\{\{", own.template, re.DOTALL)[1].strip().split("{")[0]
    assert mark == {"llama3_1": "", "llama3_2": "", "granite": "<|call|>["}.get(name, "<tool_call>\n")


def test_calls_that_ollama_cannot_write_are_left_out_and_said():
    own = made(MISTRAL_3)
    assert ".Tools" not in own.template
    assert "Tools are not in this TEMPLATE, so Ollama refuses them for this model: " in " ".join(own.remarks)
    assert differing(MISTRAL_3, own) == []


@pytest.mark.skipif(not shutil.which("go"), reason="needs Go; the templates are evaluated without it above")
def test_go_itself_agrees_with_our_reading_of_its_language():
    cases = []
    for template in (OWN | of_trl() | {"granite": GRANITE}).values():
        own = made(template)
        if own.template:
            cases += [(own.template, chat, None) for chat in CHATS.values()]
            cases += [(own.template, chat, TOOLS) for chat in TOOL_CHATS.values()]
    for (template, chat, tools), text in zip(cases, evaluate_in_go(cases), strict=True):
        assert evaluate(template, chat, tools) == text


def test_a_template_without_a_system_prompt_says_so():
    own = made(MISTRAL)
    assert own.remarks == [probing.NO_SYSTEM]
    assert differing(MISTRAL, own) == []


def test_a_system_prompt_before_the_last_question_is_remarked():
    template = ("{% for m in messages %}{% if m.role == 'user' %}[INST] {{ messages[0].content + '\n\n' if loop.last "
                "and messages[0].role == 'system' else '' }}{{ m.content }}[/INST]{% elif m.role == 'assistant' %} "
                "{{ m.content }}</s>{% endif %}{% endfor %}")  # fmt: skip
    own = made(template)
    assert own.remarks == [f"The model's own chat template renders a {nth} question after a system prompt differently "
                           "from this TEMPLATE." for nth in ("second", "third")]  # fmt: skip
    assert f"# {own.remarks[0]}\n" in own.text("m.gguf", "Modelfile") and own.template


def test_what_a_template_does_to_blanks_and_thoughts_is_remarked():
    assert made(OWN["llama 3"].replace("m.content", "m.content | trim")).remarks == [BLANKS]
    thoughts = OWN["chatml"].replace("{{ m.content }}", "{{ m.content.split('</think>')[-1].lstrip('\n') }}")
    assert "thoughts of earlier answers" in made(thoughts).remarks[0] and len(made(thoughts).remarks) == 1


@pytest.mark.parametrize(
    "template",
    ["{% for m in messages %}{{ m.content | upper }}{% endfor %}", "{{ raise_exception('never') }}",
     "{% for m in messages %}{{ '{{' }}{{ m.role }}:{{ m.content }}{% endfor %}",
     "{% for m in messages %}<{{ m.role }}>{{ '{' }}{{ m.content }}{{ '}' }}{% endfor %}"],
)  # fmt: skip
def test_what_cannot_be_written_is_said_and_nothing_is_guessed(template):
    own = made(template)
    text = own.text("m.gguf", "Modelfile")
    assert "\nTEMPLATE" not in text and "FROM ./m.gguf" in text and 'PARAMETER stop "</s>"' in text
    assert "cannot be converted to an Ollama template" in own.remarks[0] and f"# {own.remarks[-1]}" in text


def test_a_date_that_stands_still_is_remarked():
    assert made(OWN["chatml"], dated=True).remarks == [modelfile.DATED]


def test_sampling_context_and_licence():
    own = made(OWN["chatml"], parameters={"temperature": 0.6, "num_ctx": 4096}, license='Apache "2.0"""')
    text = own.text("m.gguf", "Modelfile")
    assert "\nPARAMETER temperature 0.6\nPARAMETER num_ctx 4096\n" in text
    assert 'LICENSE """Apache "2.0\'\'\'"""' in text
    files = own.hub_files()
    assert files["template"] == own.template
    assert json.loads(files["params"]) == {"stop": own.stops, "temperature": 0.6, "num_ctx": 4096}
    assert "LICENSE" not in made(OWN["chatml"]).text("m.gguf", "M")


def test_sampling_is_the_models_own():
    own = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "eos": 3}
    assert parameters.sampling(own, {"temp": 1.0}) == {"temperature": 0.7, "top_p": 0.8, "top_k": 20,
                                                       "repeat_penalty": 1.05}  # fmt: skip
    assert parameters.sampling(own | {"do_sample": False}, {}) == {}
    assert parameters.sampling({}, {"temp": 0.6000000238418579, "top_k": 20, "sequence": "x"}) == {
        "temperature": 0.6, "top_k": 20}  # fmt: skip


def test_the_context_is_what_the_run_was_trained_with():
    assert parameters.context(1024, 8192) == 4096 and parameters.context(6000, 8192) == 6000
    assert parameters.context(1024, 2048) == 2048 and parameters.context(16384, None) == 16384
