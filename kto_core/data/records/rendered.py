"""Text that was rendered for a model before, read back as messages.

ChatML, Llama 2 and 3, Mistral, Gemma, Zephyr, "Human: … Assistant:" and "### Instruction: … ### Response:". Text counts
as rendered only if it begins with a marker and its turns come out whole: a marker that somebody typed in the middle of
a message stays text.
"""

from __future__ import annotations

import re
from typing import Any

_BEGIN = r"\s*(?:(?:<s>|<bos>|<\|begin_of_text\|>|<\|endoftext\|>|\[gMASK\]<sop>)\s*)*"
_MAYBE = re.compile(
    _BEGIN + r"(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(?:system|user)\|>|\[INST\]"
    r"|\[SYSTEM_PROMPT\]|(?:Human|System): |Human:|### (?:Instruction|Human|User|System):"
    r"|Below is an instruction [^\n]*\n+### Instruction:)"
)
_HEADS = (  # the head of a turn, and what ends it
    (re.compile(r"<\|im_start\|>([a-z]+)\n"), re.compile(r"<\|im_end\|>")),
    (re.compile(r"<\|start_header_id\|>([a-z]+)<\|end_header_id\|>\n*"), re.compile(r"<\|eo[tm]_id\|>")),
    (re.compile(r"<start_of_turn>([a-z]+)\n"), re.compile(r"<end_of_turn>")),
    (re.compile(r"<\|(system|user|assistant)\|>\n?"), re.compile(r"</s>|<\|end\|>|<\|endoftext\|>")),
)
_PLAIN = re.compile(r"(?:^|\n\n)(Human|Assistant|System):")  # Anthropic's hh-rlhf writes a whole talk into one string
_HASHES = re.compile(r"(?:\A|\n+)### (Instruction|Input|Response|Human|User|Assistant|System):[ \t]*")  # Alpaca's form
_INST = re.compile(r"\s*(?:<s>\s*)*\[INST\](.*?)\[/INST\](.*?)(</s>|(?=\s*(?:<s>\s*)?\[INST\])|\Z)", re.DOTALL)
_SYS = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>(.*)", re.DOTALL)
_SYSTEM_PROMPT = re.compile(r"\s*\[SYSTEM_PROMPT\](.*?)\[/SYSTEM_PROMPT\]", re.DOTALL)
_END = re.compile(r"(?:\s*(?:<\|im_end\|>|</s>|<\|eo[tm]_id\|>|<end_of_turn>|<eos>|<\|end\|>|<\|endoftext\|>"
                  r"|<\|end_of_text\|>))+\s*\Z")  # fmt: skip
_ROLES = {
    **{r: r for r in ("system", "user", "assistant", "tool")},
    "model": "assistant",
    "human": "user",
    "ipython": "tool",
    "developer": "system",
}

PLAIN_READ, READ = "Human:/Assistant: text read as turns", "text rendered before read as turns"


def looks_rendered(text: str) -> bool:
    return _MAYBE.match(text) is not None


def read(text: str) -> tuple[list[dict[str, Any]], str, str] | None:
    """Messages, the beginning of an answer, and the name of the change; None if the text is not a rendered talk.

    The beginning is "" after a head that only asks for an answer, and if the last turn was ended.
    """
    if not _MAYBE.match(text):
        return None
    begin = re.match(_BEGIN, text)
    body = text[begin.end() :] if begin else text
    if body.startswith(("[INST]", "[SYSTEM_PROMPT]")):
        found = _inst(body)
    elif body.startswith(("### ", "Below is")):
        found = _hashes(body)
    elif _PLAIN.match(body):
        found = _turns(body, _PLAIN, None)
    else:
        found = next((f for head, end in _HEADS if head.match(body) and (f := _turns(body, head, end))), None)
    if not found or not found[0]:
        return None
    return found[0], found[1] or "", PLAIN_READ if _PLAIN.match(body) else READ


def without_end(text: str) -> str:
    """An answer without the end marker that its rendered form had, and the blanks before it."""
    return _END.sub("", text).rstrip()


def _turns(
    body: str, head: re.Pattern[str], end: re.Pattern[str] | None
) -> tuple[list[dict[str, Any]], str | None] | None:
    parts = head.split(body)
    if parts[0].strip():
        return None
    turns: list[dict[str, Any]] = []
    last = len(parts) - 2
    for i in range(1, len(parts), 2):
        role, said = _ROLES.get(parts[i].lower()), parts[i + 1]
        if role is None:
            return None
        stop = end.search(said) if end else None
        if stop and _END.sub("", said[stop.start() :]).strip():
            return None  # text after a turn's end: not what a template writes
        if i == last and stop is None:
            if role == "assistant":
                return turns, said.lstrip()
            if end is not None or len(turns) == 0:
                return None
        turns.append({"role": role, "content": (said[: stop.start()] if stop else said).strip()})
    return turns, None


def _hashes(body: str) -> tuple[list[dict[str, Any]], str | None] | None:
    """Alpaca's instruction, input and response, the sentence before them as the system prompt; or ### Human: turns."""
    preamble, *parts = _HASHES.split(body)
    turns: list[dict[str, Any]] = [{"role": "system", "content": preamble.strip()}] if preamble.strip() else []
    for i in range(0, len(parts), 2):
        name, said = parts[i], parts[i + 1].strip()
        last = turns[-1]["role"] if turns else ""
        if name == "Input":
            if last != "user":
                return None
            turns[-1]["content"] = f"{turns[-1]['content']}\n{said}" if said else turns[-1]["content"]
            continue
        role = {"Instruction": "user", "Response": "assistant"}.get(name) or _ROLES[name.lower()]
        if role == "assistant" and i == len(parts) - 2:
            return (turns, said) if last == "user" else None
        turns.append({"role": role, "content": said})
    return (turns, None) if any(m["role"] == "user" for m in turns) else None


def _inst(body: str) -> tuple[list[dict[str, Any]], str | None] | None:
    turns: list[dict[str, Any]] = []
    at = 0
    if system := _SYSTEM_PROMPT.match(body):
        turns.append({"role": "system", "content": system[1].strip()})
        at = system.end()
    begun: str | None = None
    while found := _INST.match(body, at):
        asked, answer, ended = found.groups()
        if system := _SYS.match(asked):
            turns.append({"role": "system", "content": system[1].strip()})
            asked = system[2]
        turns.append({"role": "user", "content": asked.strip()})
        at = found.end()
        if at >= len(body.rstrip()) and not ended:
            begun = answer.lstrip()
            break
        turns.append({"role": "assistant", "content": answer.strip()})
    if body[at:].strip() or not any(m["role"] == "user" for m in turns):
        return None
    return turns, begun
