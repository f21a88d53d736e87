"""Go's text/template as far as our Ollama templates use it, and how Ollama calls it; and the real one, if Go is there.

`evaluate` reads a template of its own accord: it knows nothing of the code that wrote it. `evaluate_in_go` runs the
same in Go. Both join messages as Ollama does: the system messages apart, neighbours of one role into one.
"""

import json
import re
import subprocess
from pathlib import Path

PROGRAM = Path(__file__).with_name("go_template.go")
WORD = re.compile(r'"(?:[^"\\]|\\.)*"|[^\s"]+')


def compact(value) -> str:
    """JSON as Go spells it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def collated(messages: list[dict]) -> tuple[str, list[dict]]:
    """(system prompt, messages) as Ollama gives them to a template."""
    out: list[dict] = []
    for m in messages:
        if out and out[-1]["role"] == m["role"] != "tool":
            out[-1]["content"] += "\n\n" + m["content"]
        else:
            out.append(dict(m))
    return "\n\n".join(m["content"] for m in messages if m["role"] == "system"), out


def evaluate(template: str, messages: list[dict], tools: list[dict] | None = None) -> str:
    """What Ollama makes of a conversation with this TEMPLATE."""
    system, joined = collated(messages)
    root = {"System": system, "Tools": tools or [], "Messages": [_message(m) for m in joined]}
    return _Reader(template, root).text()


def _message(m: dict) -> dict:
    asked = [{"Function": {"Name": c["function"]["name"], "Arguments": c["function"]["arguments"]}}
             for c in m.get("tool_calls") or []]  # fmt: skip
    return {"Role": m["role"], "Content": m["content"], "ToolCalls": asked}


class _Reader:
    def __init__(self, template: str, root: dict):
        pieces = re.split(r"(\{\{.*?\}\})", template, flags=re.DOTALL)
        self.nodes = [(p[2:-2].strip(), True) if i % 2 else (p, False) for i, p in enumerate(pieces)]
        self.root = root
        self.names: dict[str, object] = {"$": root}

    def text(self) -> str:
        out, at = self.block(0, self.root, True)
        assert at == len(self.nodes), f"something is left after {at} of {len(self.nodes)}"
        return out

    def block(self, at: int, dot, live: bool) -> tuple[str, int]:
        """Text up to the end or else of this block, and where that stands."""
        out = ""
        while at < len(self.nodes):
            text, is_action = self.nodes[at]
            if not is_action:
                out += text if live else ""
            elif text == "end" or text.startswith("else"):
                return out, at
            elif text.startswith(("if ", "with ", "range ")):
                more, at = self.branch(at, dot, live)
                out += more
            elif found := re.fullmatch(r"(\$\w+) :?= (.+)", text):
                if live:
                    self.names[found[1]] = self.value(found[2], dot)
            elif live:
                out += self.shown(self.value(text, dot))
            at += 1
        return out, at

    def branch(self, at: int, dot, live: bool) -> tuple[str, int]:
        """An if, with or range from its first word to its end."""
        out, done = "", False
        text = self.nodes[at][0]
        while True:
            word, _, rest = text.removeprefix("else").strip().partition(" ")
            if word == "range":
                more, at = self.each(at, rest, dot, live)
                out += more
            else:
                value = (self.value(rest, dot) if rest else True) if live and not done else None
                holds = bool(value)
                more, at = self.block(at + 1, value if word == "with" else dot, holds)
                out, done = out + more, done or holds
            text = self.nodes[at][0]
            if text == "end":
                return out, at

    def each(self, at: int, what: str, dot, live: bool) -> tuple[str, int]:
        named = re.fullmatch(r"(\$\w+), (\$\w+) := (.+)", what)
        items = self.value(named[3] if named else what, dot) if live else []
        out, after = self.block(at + 1, None, False)
        for i, item in enumerate(items):
            if named:
                self.names |= {named[1]: i, named[2]: item}
            more, after = self.block(at + 1, item, True)
            out += more
        return out, after

    def value(self, text: str, dot):
        words = WORD.findall(text)
        if words[0] == "eq":
            return self.value(words[1], dot) == self.value(words[2], dot)
        if words[0] == "not":
            return not self.value(words[1], dot)
        (word,) = words
        if word.startswith('"'):
            return json.loads(word)
        if word in ("true", "false"):
            return word == "true"
        head, *fields = word.split(".")
        value = self.names[head] if head else dot
        for name in fields:
            if name:
                value = value[name] if name in value else value[name.lower()]
        return value

    def shown(self, value) -> str:
        return value if isinstance(value, str) else compact(value)


def evaluate_in_go(cases: list[tuple[str, list[dict], list[dict] | None]]) -> list[str]:
    """The same in Go's own text/template: a text for each (template, messages, tools)."""
    given = []
    for template, messages, tools in cases:
        system, joined = collated(messages)
        given.append({"template": template, "system": system, "messages": [_message(m) for m in joined],
                      "tools": [compact(t) for t in tools or []],
                      "functions": [compact(t["function"]) for t in tools or []]})  # fmt: skip
    for case in given:
        for message in case["messages"]:
            for call in message["ToolCalls"]:
                call["Function"]["Arguments"] = compact(call["Function"]["Arguments"])
    done = subprocess.run(["go", "run", str(PROGRAM)], input=json.dumps(given), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
