"""Ollama Modelfiles: templates read off a chat template agree with it, and what they cannot say is said."""

import re

import pytest

from kto_core.errors import ExportError
from kto_core.export import modelfile

U, A, S = "user", "assistant", "system"
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "chatml with a default system prompt": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind."
    "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama 3": "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
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
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}{{ raise_exception('roles') }}{% endif %}"
    "{% endfor %}",
}
CHATS = [
    [(U, "One?")],
    [(U, "One?"), (A, "Two."), (U, "Three?")],
    [(S, "Be brief."), (U, "One?")],
    [(S, "Be brief."), (U, "One?"), (A, "Two."), (U, "Three?"), (A, "Four."), (U, "Five?")],
]


def renderer(template: str):
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(messages, generation=True):
        import jinja2

        try:
            texts, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=generation,
                                             bos_token="<s>", eos_token="</s>")  # fmt: skip
        except jinja2.TemplateError as e:
            raise ExportError(str(e)) from e
        return texts[0]

    return render


def go(template: str, messages: list[dict]) -> str:
    """The few words of Go's template language that we use, read from the text itself: a second opinion on `Pieces`."""
    tokens = re.split(r"(\{\{.*?\}\})", template)
    names: dict[str, str] = {}
    system = "".join(m["content"] for m in messages if m["role"] == S)

    def value(word: str, m: dict | None) -> str:
        return {".System": system, ".Content": (m or {}).get("content", "")}.get(word) or names.get(word, "")

    def block(i: int, m: dict | None, live: bool) -> tuple[str, int]:
        """Text from token ``i`` to the end or else that closes this block, and where that is."""
        out = ""
        while i < len(tokens):
            word = tokens[i][2:-2].strip() if tokens[i].startswith("{{") else None
            if word is None:
                out += tokens[i] if live else ""
            elif word == "end" or word.startswith("else"):
                return out, i
            elif word == "range .Messages":
                start = i + 1
                for one in messages:
                    text, i = block(start, one, live)
                    out += text
            elif word.startswith("if "):
                text, i = branch(i, m, live)
                out += text
            elif found := re.fullmatch(r"(\$\w+) :?= (.+)", word):
                if live:
                    names[found[1]] = "" if found[2] == '""' else value(found[2], m)
            else:
                out += value(word, m) if live else ""
            i += 1
        return out, i

    def branch(i: int, m: dict | None, live: bool) -> tuple[str, int]:
        out, done = "", False
        while True:
            word = tokens[i][2:-2].strip().removeprefix("else").strip()
            if word == "end":
                return out, i
            if found := re.fullmatch(r'if eq \.Role "(\w+)"', word):
                holds = (m or {}).get("role") == found[1]
            else:
                holds = not word or bool(value(word.removeprefix("if "), m))
            text, i = block(i + 1, m, live and holds and not done)
            out, done = out + text, done or holds

    return block(0, None, True)[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_writes_what_the_chat_template_writes(name):
    render = renderer(TEMPLATES[name])
    text, remarks = modelfile.write("m.gguf", "Modelfile-q8_0", render, bos="<s>", eos="</s>")
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    for chat in CHATS:
        if name == "mistral" and chat[0][0] == S:
            continue
        messages = [{"role": role, "content": content} for role, content in chat]
        assert go(template, messages) == render(messages).removeprefix("<s>")
    no_system = "The model's chat template has no place for a system prompt: SYSTEM has no effect."
    assert remarks == ([no_system] if name == "mistral" else [])
    assert text.startswith("# ollama create NAME -f Modelfile-q8_0\n") and "\nFROM ./m.gguf\n" in text
    stops = re.findall(r'PARAMETER stop "(.*)"', text)
    assert "</s>" in stops and not [s for s in stops if not s.strip() or s.strip() in "<|["]


def test_a_system_prompt_before_the_last_question_is_remarked():
    template = ("{% for m in messages %}{% if m.role == 'user' %}[INST] {{ messages[0].content + '\n\n' if loop.last "
                "and messages[0].role == 'system' else '' }}{{ m.content }}[/INST]{% elif m.role == 'assistant' %} "
                "{{ m.content }}</s>{% endif %}{% endfor %}")  # fmt: skip
    text, remarks = modelfile.write("m.gguf", "Modelfile", renderer(template), bos="", eos="</s>")
    assert remarks == ["The model's own chat template renders a second question after a system prompt differently from "
                       "this TEMPLATE."]  # fmt: skip
    assert f"# {remarks[0]}\n" in text and "TEMPLATE" in text


@pytest.mark.parametrize(
    "template",
    ["{% for m in messages %}{{ m.content | upper }}{% endfor %}", "{{ raise_exception('never') }}",
     "{% for m in messages %}{{ '{{' }}{{ m.role }}:{{ m.content }}{% endfor %}"],
)  # fmt: skip
def test_what_cannot_be_written_is_said_and_nothing_is_guessed(template):
    text, remarks = modelfile.write("m.gguf", "Modelfile", renderer(template), bos="", eos="</s>")
    assert "\nTEMPLATE" not in text and "FROM ./m.gguf" in text and 'PARAMETER stop "</s>"' in text
    assert "cannot be converted to an Ollama template" in remarks[0] and f"# {remarks[-1]}" in text


def test_a_date_that_stands_still_is_remarked():
    _, remarks = modelfile.write("m.gguf", "M", renderer(TEMPLATES["chatml"]), bos="", eos="</s>", dated=True)
    assert remarks == ["The chat template inserts the current date; here it is fixed to the date of the export."]
