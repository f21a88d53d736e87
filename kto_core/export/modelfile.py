"""An Ollama Modelfile for a GGUF: FROM, an explicit TEMPLATE, PARAMETER stop.

Ollama's templates are Go's, and it only guesses a Jinja template by its likeness to those it knows. Rather than a table
of families, the texts around system, user and assistant messages are read off the model's own chat template by
rendering it. Several conversations are then put together from them and compared with what the chat template renders:
what does not agree is said in a comment, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kto_core.errors import ExportError

Render = Callable[..., str]  # (messages, generation=True) -> text
S, U, A, V = "System text.", "First question?", "An answer.", "Second question?"
OPENING = ("<", "<|", "[")  # a text is never split inside a special token


@dataclass(frozen=True)
class Pieces:
    """The texts around the messages of a chat.

    Attributes:
        begin: what a chat without a system message begins with (a default system prompt, often "").
        system: texts before and after a system message; None: the template has no place for one.
        folded: the system message stands inside the first user's turn, ``system[1]`` between the two texts.
        user: texts before and after a user message; the latter opens the answer.
        lead: text between that and an answer that was given already; a new answer begins with it by itself.
        end: text after an answer.
    """

    begin: str
    system: tuple[str, str] | None
    folded: bool
    user: tuple[str, str]
    lead: str
    end: str

    def text(self, messages: list[dict]) -> str:
        """What Ollama makes of ``messages`` with the template of `go`, without BOS."""
        system = "".join(m["content"] for m in messages if m["role"] == "system") if self.system else ""
        out = self.system[0] + system + self.system[1] if system and not self.folded else self.begin
        told = system + self.system[1] if system and self.folded else ""
        for m in messages:
            if m["role"] == "user":
                out, told = out + self.user[0] + told + m["content"] + self.user[1], ""
            elif m["role"] == "assistant":
                out += self.lead + m["content"] + self.end
        return out

    def go(self) -> str:
        """The Go template, over Ollama's .System and .Messages."""
        head, told = self.begin, ""
        if self.system and self.folded:
            head += "{{ $system := .System }}"
            told = "{{ if $system }}{{ $system }}" + self.system[1] + '{{ $system = "" }}{{ end }}'
        elif self.system:
            head = "{{ if .System }}" + self.system[0] + "{{ .System }}" + self.system[1]
            head += ("{{ else }}" + self.begin if self.begin else "") + "{{ end }}"
        user = '{{ if eq .Role "user" }}' + self.user[0] + told + "{{ .Content }}" + self.user[1]
        answer = '{{ else if eq .Role "assistant" }}' + self.lead + "{{ .Content }}" + self.end + "{{ end }}"
        return head + "{{ range .Messages }}" + user + answer + "{{ end }}"


def write(
    gguf_name: str, own_name: str, render: Render, *, bos: str, eos: str, dated: bool = False
) -> tuple[str, list[str]]:
    """Text of a Modelfile called ``own_name`` beside the file ``gguf_name``, and the remarks that it has as comments.

    Args:
        bos: text that Ollama puts before everything by itself, or "".
        eos: text of the end token.
        dated: the chat template writes the day's date.
    """
    pieces, remarks = derive(render, bos)
    stops = [eos]
    lines = [f"FROM ./{gguf_name}"]
    if pieces is None:
        remarks.append("There is no TEMPLATE here, so Ollama guesses one. Compare its answers with those of Check.")
    else:
        if dated:
            remarks.append("The chat template inserts the current date; here it is fixed to the date of the export.")
        lines.append(f'TEMPLATE """{pieces.go()}"""')
        stops += [pieces.end.strip(), pieces.user[0].strip().partition("\n")[0]]
    lines += [f'PARAMETER stop "{_escaped(s)}"' for s in dict.fromkeys(stops) if s]
    return "\n".join([f"# ollama create NAME -f {own_name}", *(f"# {r}" for r in remarks), *lines]) + "\n", remarks


def derive(render: Render, bos: str) -> tuple[Pieces | None, list[str]]:
    """The pieces of a chat template, and remarks on what they do not reproduce; None: Ollama cannot express it."""

    def shown(messages: list[dict], generation: bool = True) -> str:
        return render(messages, generation).removeprefix(bos)

    try:
        pieces = _pieces(shown)
    except (ExportError, ValueError) as e:
        return None, [f"The model's chat template cannot be converted to an Ollama template: {e}"]
    chats = {"a question": [_m("user", U)], "a second question": [_m("user", U), _m("assistant", A), _m("user", V)]}
    if pieces.system:
        told = {f"{name} after a system prompt": [_m("system", S), *messages] for name, messages in chats.items()}
        chats |= told
    wrong = [name for name, messages in chats.items() if shown(messages) != pieces.text(messages)]
    if "a question" in wrong:
        return None, ["The model's chat template cannot be converted to an Ollama template."]
    remarks = [f"The model's own chat template renders {name} differently from this TEMPLATE." for name in wrong]
    if not pieces.system:
        remarks.append("The model's chat template has no place for a system prompt: SYSTEM has no effect.")
    return pieces, remarks


def _m(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def _pieces(shown: Render) -> Pieces:
    """Raises ValueError where a text is not found, ExportError where the template refuses a plain chat."""
    before, after = _around(shown([_m("user", U)]), U)
    between, _ = _around(_around(shown([_m("user", U), _m("assistant", A), _m("user", V)]), A)[1], V)
    given, end = _around(_around(shown([_m("user", U), _m("assistant", A)], False), U)[1], A)
    while not between.startswith(end) or end.endswith(OPENING):  # some end the whole text with more than a turn's end
        end = end[:-1]
    prefix = between[len(end) :]
    if not before.endswith(prefix):
        raise ValueError("it formats the first question differently from later ones.")
    begin = before[: len(before) - len(prefix)]
    system, folded = _system(shown, begin, prefix)
    if any(s in p for p in (begin, *(system or ()), prefix, after, given, end) for s in ("{{", "}}", '"""')):
        raise ValueError("it contains braces or quotes that have another meaning there.")
    lead = given.removeprefix(after) if given.startswith(after) else ""
    return Pieces(begin, system, folded, (prefix, after), lead, end)


def _system(shown: Render, begin: str, prefix: str) -> tuple[tuple[str, str] | None, bool]:
    """(texts before and after a system message, whether it stands inside the user's turn)."""
    try:
        before, rest = _around(shown([_m("system", S), _m("user", U)]), S)
        between, _ = _around(rest, U)
    except (ExportError, ValueError):
        return None, False
    if prefix and between.endswith(prefix):
        return (before, between[: len(between) - len(prefix)]), False
    if before == begin + prefix:
        return ("", between), True
    return None, False


def _around(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found:
        raise ValueError("it changes the text of a message.")
    return before, after


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
