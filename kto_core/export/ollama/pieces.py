"""The texts of a chat template, and the Go template that writes them.

What stands between two messages depends on who spoke before and who speaks now, and a chat begins differently with a
system prompt or tools. So a template is kept as two tables: how a chat begins, and what comes before and after the
content of each message. `Pieces.text` puts a chat together from them; `Pieces.go` says the same in Go, over the
variables that Ollama sets: ``.System``, ``.Tools`` and ``.Messages``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SYSTEM, TOOLS = "\0system\0", "\0tools\0"  # where they stand in the beginning of a chat
Beginning = tuple[str, str]  # text before the first turn, and after the opening of the first question


@dataclass(frozen=True)
class Calls:
    """Calls of tools, and the list of tools.

    Attributes:
        part: of a tool that is listed: "" (all of it) or ".Function". between_items: text between two tools.
        spelled: a tool as the chat template spells it.
        glue: text between an answer and the calls that follow it.
        opens: text before the name of the first call. to_arguments: between a name and its arguments.
        again: between the arguments of one call and the name of the next.
        spelled_arguments: arguments as the chat template spells them.
    """

    part: str
    between_items: str
    spelled: Callable[[dict], str]
    glue: str
    opens: str
    to_arguments: str
    again: str
    spelled_arguments: Callable[[dict], str]


@dataclass(frozen=True)
class Pieces:
    """The texts around the messages of a chat; roles are user, assistant, calls (of an assistant) and tool.

    Attributes:
        beginnings: (with a system prompt, with tools) -> how a chat begins. Without a key the template has no place
            for it.
        after: role -> text after the content of its message, whatever follows.
        before: role -> {role of the message before, or "" for any other: text before the content}.
        end: role of the last message -> text that opens the answer, after that of ``after``.
        calls: None if the template has no tools, or they cannot be written in Go.
    """

    beginnings: dict[tuple[bool, bool], Beginning]
    after: dict[str, str]
    before: dict[str, dict[str, str]]
    end: dict[str, str]
    calls: Calls | None = None

    @property
    def takes_system(self) -> bool:
        return (True, False) in self.beginnings

    def literals(self) -> list[str]:
        """All texts that stand in the Go template as they are."""
        found = [t for pair in self.beginnings.values() for t in pair]
        found += [*self.after.values(), *self.end.values(), *(t for b in self.before.values() for t in b.values())]
        if c := self.calls:
            found += [c.between_items, c.glue, c.opens, c.to_arguments, c.again]
        return found

    # ---- in Python

    def text(self, messages: list[dict], tools: list[dict] | None = None) -> str:
        """What Ollama makes of ``messages`` with the template of `go`, without BOS.

        JSON is spelled as the chat template spells it: Go's spelling is another, whatever the template says.
        """
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system") if self.takes_system else ""
        listed = ""
        if self.calls and tools:
            listed = self.calls.between_items.join(self.calls.spelled(t) for t in tools)
        begin, told = (t.replace(SYSTEM, system).replace(TOOLS, listed)
                       for t in self.beginnings[(bool(system), bool(listed))])  # fmt: skip
        out, prior = begin, ""
        for m in messages:
            if m["role"] == "system":
                continue
            asked = m.get("tool_calls") if self.calls else None
            role = "calls" if asked else m["role"]
            if role not in self.before:
                continue
            out += _of(self.before["assistant" if asked and m["content"] else role], prior)
            if role == "user":
                out, told = out + told, ""
            out += m["content"]
            if asked and self.calls:
                out += self._asked(asked, bool(m["content"]))
            out, prior = out + self.after[role], role
        return out + self.end.get(prior, "")

    def _asked(self, asked: list[dict], after_content: bool) -> str:
        calls = self.calls
        assert calls is not None
        each = [one["function"]["name"] + calls.to_arguments + calls.spelled_arguments(one["function"]["arguments"])
                for one in asked]  # fmt: skip
        return (calls.glue if after_content else "") + calls.opens + calls.again.join(each)

    # ---- in Go

    def go(self) -> str:
        """The Go template."""
        told = self._beginning(1)
        once = "{{ if not $told }}" + told + "{{ $told = true }}{{ end }}" if told else ""
        body = '{{ if eq .Role "user" }}' + _chain(self.before["user"]) + once + "{{ .Content }}"
        body += self.after["user"] + self._note("user")
        body += '{{ else if eq .Role "assistant" }}' + self._assistant()
        if self.calls:
            body += (
                '{{ else if eq .Role "tool" }}' + _chain(self.before["tool"]) + "{{ .Content }}" + self.after["tool"]
            )
            body += self._note("tool")
        head = self._beginning(0) + ("{{ $told := false }}" if told else "")
        if self._remembers:
            head += '{{ $prior := "" }}'
        return head + "{{ range .Messages }}" + body + "{{ end }}{{ end }}" + self._end()

    @property
    def _remembers(self) -> bool:
        """Whether the template has to know who spoke before."""
        return any(len(set(b.values())) > 1 for b in self.before.values()) or any(self.end.values())

    def _note(self, role: str) -> str:
        return f'{{{{ $prior = "{role}" }}}}' if self._remembers else ""

    def _beginning(self, part: int) -> str:
        """Part 0: before the first turn. Part 1: inside it."""

        def with_tools(tools: bool) -> str:
            plain = self._filled(self.beginnings[(False, tools)][part])
            if not self.takes_system:
                return plain
            told = self._filled(self.beginnings[(True, tools)][part])
            return _either("$.System", told, plain)

        return _either("$.Tools", with_tools(True), with_tools(False)) if self.calls else with_tools(False)

    def _filled(self, text: str) -> str:
        tools = ""
        if c := self.calls:
            again = "{{ if $i }}" + c.between_items + "{{ end }}" if c.between_items else ""
            tools = "{{ range $i, $tool := $.Tools }}" + again + "{{ $tool" + c.part + " }}{{ end }}"
        return text.replace(SYSTEM, "{{ $.System }}").replace(TOOLS, tools)

    def _assistant(self) -> str:
        lead, content = _chain(self.before["assistant"]), "{{ .Content }}"
        if not (c := self.calls):
            return lead + content + self.after["assistant"] + self._note("assistant")
        if self.before["assistant"] != self.before["calls"]:
            lead = "{{ if .Content }}" + lead + "{{ else }}" + _chain(self.before["calls"]) + "{{ end }}"
        # "with", for Ollama looks for its mark of a call in the first "if" that names .ToolCalls
        glue = "{{ if .Content }}{{ with .ToolCalls }}" + c.glue + "{{ end }}{{ end }}" if c.glue else ""
        one = "{{ $call.Function.Name }}" + c.to_arguments + "{{ $call.Function.Arguments }}"
        again = "{{ if $i }}" + c.again + "{{ end }}"
        asked = c.opens + "{{ range $i, $call := .ToolCalls }}" + again + one + "{{ end }}"
        return (
            lead + content + glue + "{{ if .ToolCalls }}" + asked + self.after["calls"] + self._note("calls")
            + "{{ else }}" + self.after["assistant"] + self._note("assistant") + "{{ end }}"
        )  # fmt: skip

    def _end(self) -> str:
        branches = [(role, text) for role, text in self.end.items() if text]
        out = "".join(f'{{{{ {"else " if i else ""}if eq $prior "{role}" }}}}{text}'
                      for i, (role, text) in enumerate(branches))  # fmt: skip
        return out + "{{ end }}" if out else ""


def _of(before: dict[str, str], prior: str) -> str:
    return before.get(prior, before[""])


def _chain(before: dict[str, str]) -> str:
    """Text that depends on who spoke before, in Go."""
    out = ""
    for role, text in before.items():
        if role and text != before[""]:
            out += f'{{{{ {"else " if out else ""}if eq $prior "{role}" }}}}{text}'
    return out + "{{ else }}" + before[""] + "{{ end }}" if out else before[""]


def _either(condition: str, yes: str, no: str) -> str:
    if yes == no:
        return yes
    return "{{ if " + condition + " }}" + yes + ("{{ else }}" + no if no else "") + "{{ end }}"
