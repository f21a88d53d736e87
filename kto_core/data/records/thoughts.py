"""The one place that tells a thought from an answer: in a message's keys, between tags, in gpt-oss's channels.

Pure, standard library only. Rows keep a message as it was written; whoever renders, shows or stores it asks here.
"""

from __future__ import annotations

import re
from typing import Any

KEYS = ("reasoning_content", "thinking", "reasoning")  # of a message, in the order in which one is looked for
KEY = KEYS[0]
OPEN, CLOSE = "<think>\n", "\n</think>\n\n"  # how a thought is written where a template has no form of its own
WRITTEN = ((OPEN, CLOSE), ("<|channel>thought\n", "\n<channel|>"), ("[THINK]", "[/THINK]"))  # forms inside a text

_NAMES = "think|thinking|thought|reasoning|seed:think"
_TAGS = re.compile(rf"\s*<({_NAMES})>(?P<thought>.*?)</\1>(?P<answer>.*)", re.S)
_BRACKETS = re.compile(r"\s*\[THINK\](?P<thought>.*?)\[/THINK\](?P<answer>.*)", re.S)
_UNOPENED = re.compile(r"(?P<thought>(?:(?!<think>).)*?)</think>[ \t]*\n(?P<answer>.*)", re.S)  # the prompt opened it
_GEMMA = re.compile(r"\s*<\|channel>thought\n?(?P<thought>.*?)<channel\|>(?P<answer>.*)", re.S)
_CHANNELS = re.compile(
    r"\s*(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>(?P<thought>.*?)<\|end\|>"
    r"(?:<\|start\|>assistant)?<\|channel\|>final<\|message\|>(?P<answer>.*?)(?:<\|return\|>|<\|end\|>)?\s*",
    re.S,
)
_WORDS = re.compile(r"analysis(?P<thought>.+?)assistantfinal(?P<answer>.+)", re.S)  # channels without their tokens
_FINAL = re.compile(
    r"\s*(?:<\|start\|>assistant)?<\|channel\|>final<\|message\|>(?P<answer>.*?)(?:<\|return\|>|<\|end\|>)?\s*", re.S
)
_FORMS = (_TAGS, _BRACKETS, _GEMMA, _CHANNELS, _WORDS, _UNOPENED)
_BEGUN = re.compile(rf"\s*<(?:{_NAMES})>(?P<thought>.*)", re.S)
_SIGN = re.compile(rf"</(?:{_NAMES})>|\[/THINK\]|<channel\||<\|channel\|>|\Aanalysis")  # what every form has
OPENS = re.compile(  # at the end of a prompt
    rf"(?:<(?P<name>{_NAMES})>|(?P<bracket>\[THINK\])|(?P<channel><\|channel>thought))\s*\Z"
)
EMPTY = re.compile(rf"<({_NAMES})>\s*</\1>|</(?:{_NAMES})>|\[/THINK\]|<channel\|>")  # in a frame: nothing was thought


def split(text: str, unfinished: bool = False) -> tuple[str, str]:
    """(thought, answer) of an assistant's text; the thought is "" where there is none.

    Args:
        unfinished: the text still grows, so a thought that nothing closes is one.
    """
    if _SIGN.search(text):
        for form in _FORMS:
            if (found := form.fullmatch(text)) and found["answer"].strip():
                return found["thought"].strip(), found["answer"].lstrip("\n")
            if found and unfinished:
                return found["thought"].strip(), ""
        if found := _FINAL.fullmatch(text):
            return "", found["answer"]
    if unfinished and (found := _BEGUN.fullmatch(text)):
        return found["thought"].strip(), ""
    return "", text


def join(thought: str, answer: str) -> str:
    """The inverse of `split`."""
    return f"{OPEN}{thought}{CLOSE}{answer}" if thought.strip() else answer


def parted(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose thought, if it has one, stands under `KEY` and nowhere else; others as they are."""
    if message["role"] != "assistant":
        return message
    content = message.get("content") or ""
    given = next((m.strip() for k in KEYS if isinstance(m := message.get(k), str) and m.strip()), "")
    thought, answer = split(content)
    if given and thought != given:  # tags that say something else are part of the answer
        thought, answer = given, content
    if answer == content and not any(k in message for k in KEYS):
        return message
    rest = {k: v for k, v in message.items() if k not in KEYS}
    kept = None if message.get("content") is None else answer
    return {**rest, "content": kept} | ({KEY: thought} if thought else {})


def of(message: dict[str, Any]) -> str:
    """A message's thought, "" if it has none."""
    found = parted(message).get(KEY, "")
    return found if isinstance(found, str) else ""


def closing(text: str) -> str:
    """What closes the thought that a text opens at its very end with nothing thought; "" if it opens none."""
    found = OPENS.search(text)
    if not found:
        return ""
    if found["name"]:
        return f"\n</{found['name']}>\n\n"
    return "\n[/THINK]\n\n" if found["bracket"] else "<channel|>"
