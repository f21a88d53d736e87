"""An Ollama Modelfile with an explicit TEMPLATE: Ollama only guesses a Jinja template by its likeness to ones it knows.

A family's form of each role is taken when it renders a conversation exactly as the model's own chat template does.
"""

from __future__ import annotations

from dataclasses import dataclass

SYSTEM, USER, ANSWER, MORE = "Be brief.", "What is one?", "It is 1.", "And two?"


@dataclass(frozen=True)
class Family:
    """How each role is written, ``{}`` being its text; ``begin`` opens the answer. ``system`` None: no such role."""

    system: str | None
    user: str
    assistant: str
    begin: str
    stop: tuple[str, ...]

    def text(self, messages: list[dict]) -> str:
        forms = {"system": self.system or "", "user": self.user, "assistant": self.assistant}
        return "".join(forms[m["role"]].replace("{}", m["content"]) for m in messages) + self.begin

    def go(self) -> str:
        """As an Ollama (Go) template."""
        forms = [("system", self.system), ("user", self.user), ("assistant", self.assistant)]
        parts, word = [], "if"
        for role, form in forms:
            if form is not None:
                parts.append(f'{{{{ {word} eq .Role "{role}" }}}}' + form.replace("{}", "{{ .Content }}"))
                word = "else if"
        return "{{ range .Messages }}" + "".join(parts) + "{{ end }}{{ end }}" + self.begin


def _chatml(end: str = "<|im_end|>\n") -> Family:
    forms = [f"<|im_start|>{role}\n{{}}{end}" for role in ("system", "user", "assistant")]
    return Family(*forms, "<|im_start|>assistant\n", ("<|im_end|>",))


_HEADER = "<|start_header_id|>{role}<|end_header_id|>\n\n"
FAMILIES = {
    "ChatML": _chatml(),
    "Llama 3": Family(
        *(_HEADER.replace("{role}", r) + "{}<|eot_id|>" for r in ("system", "user", "assistant")),
        _HEADER.replace("{role}", "assistant"),
        ("<|eot_id|>",),
    ),
    "Gemma": Family(
        None, "<start_of_turn>user\n{}<end_of_turn>\n", "<start_of_turn>model\n{}<end_of_turn>\n",
        "<start_of_turn>model\n", ("<end_of_turn>",),
    ),
    "Phi 3": Family(
        "<|system|>\n{}<|end|>\n", "<|user|>\n{}<|end|>\n", "<|assistant|>\n{}<|end|>\n", "<|assistant|>\n",
        ("<|end|>",),
    ),
    "Mistral": Family(None, "[INST] {}[/INST]", " {}</s>", "", ("</s>", "[INST]")),
    "Mistral (spaced)": Family(None, "[INST] {} [/INST]", " {}</s>", "", ("</s>", "[INST]")),
    "Zephyr": Family(
        "<|system|>\n{}</s>\n", "<|user|>\n{}</s>\n", "<|assistant|>\n{}</s>\n", "<|assistant|>\n", ("</s>",)
    ),
}  # fmt: skip


def modelfile(name: str, render, bos: str, eos: str) -> str:
    """The text of a Modelfile for the GGUF file ``name`` beside it.

    Args:
        render: list of role/content dicts -> the text of the model's own chat template, with generation prompt.
        bos, eos: special tokens; Ollama adds the BOS itself.
    """
    lines = [f"FROM ./{name}"]
    family, exact = _family(lambda m: render(m).removeprefix(bos) if bos else render(m))
    if family is None:
        lines += ["# This model's chat template is of no family known here: Ollama reads it from the file, and may",
                  "# guess wrong. Compare an answer with the one of the check in Export."]  # fmt: skip
        stops = [eos] if eos else []
    else:
        if not exact:
            lines.append("# The nearest known template: the model's own adds text that Ollama cannot express.")
        lines.append(f'TEMPLATE """{family.go()}"""')
        if system := _default_system(family, lambda m: render(m).removeprefix(bos) if bos else render(m)):
            lines.append(f'SYSTEM """{system}"""')
        stops = list(dict.fromkeys([*family.stop, *([eos] if eos else [])]))
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def _family(render) -> tuple[Family | None, bool]:
    """(the family that renders a conversation exactly so, True), or (the one whose marks occur, False), or none."""
    nearest = None
    for family in FAMILIES.values():
        turns = [("user", USER), ("assistant", ANSWER), ("user", MORE)]
        if family.system is not None:
            turns = [("system", SYSTEM), *turns]
        messages = [{"role": r, "content": c} for r, c in turns]
        try:
            text = render(messages)
        except Exception:  # a template that refuses a role
            continue
        if text == family.text(messages):
            return family, True
        marks = [family.user.partition("{}")[0].strip(), family.stop[0]]
        if nearest is None and all(mark in text for mark in marks):
            nearest = family
    return nearest, False


def _default_system(family: Family, render) -> str:
    """The system prompt that the model's template adds where a conversation has none, "" if it adds none."""
    if family.system is None:
        return ""
    messages = [{"role": "user", "content": USER}]
    text, plain = render(messages), family.text(messages)
    before, _, after = family.system.partition("{}")
    if text == plain or not text.startswith(before) or not text.endswith(after + plain):
        return ""
    return text[len(before) : -len(after + plain)]
