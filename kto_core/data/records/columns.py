"""Columns as people name them -> ours: prompt, completion, label, chosen, rejected, messages, system, tools.

Names count in any case and spelling. A record in our own names passes as it is. This module knows whole records,
but not what a text or a message is.
"""

from __future__ import annotations

from typing import Any

from .answers import Several, column_of_scores, earlier, scored, two_texts
from .labels import COLUMNS as LABEL_COLUMNS
from .labels import column_of
from .mapping import Columns, Found
from .names import (
    ABOUT,
    ANSWERS,
    CHOSEN,
    HISTORY,
    IMAGES,
    MESSAGES,
    PERHAPS,
    PROMPTS,
    QUESTIONS,
    RANKED,
    REJECTED,
    SYSTEM,
    TOOLS,
    holds,
    spelled,
)  # fmt: skip
from .talks import answers_only, ends_in_answer, has_system, messages_of
from .turns import NEEDS_EYES, DroppedRow, read_tools, unpacked_messages

COLUMNS = frozenset(("prompt", "completion", "label", "conversations", "messages", "chosen", "rejected", "tools"))

_KNOWN = frozenset(
    (*PROMPTS, *ANSWERS, *MESSAGES, *CHOSEN, *REJECTED, *RANKED, *SYSTEM, *HISTORY, *TOOLS, *IMAGES)
) | set(LABEL_COLUMNS)
_OURS = COLUMNS | {"system"}
_BESIDE = ("system", "tools")
_plain: dict[tuple[str, ...], Found | None] = {}  # what records with these columns are made of; None: to be looked at


def canonical(obj: dict[str, Any], changes: list[str], columns: Columns) -> tuple[dict[str, Any], str]:
    """A record in our names, and the columns it was read from ("" if it passes as it is).

    Raises:
        DroppedRow: it has images; or several columns may be its question; or it lacks one that its owner named.
    """
    keys = tuple(obj)
    columns.meet(keys)
    if columns.given:
        obj, unread = columns.put(obj)
        record = _Record(obj, changes, unread)
        out, source = record.read()
        own = columns.given
        columns.note(tuple((target, own.get(target, column)) for target, column in record.made_of(out)))
        return out, ", ".join(dict.fromkeys((*own.values(), *filter(None, source.split(", ")))))
    if keys not in _plain:
        talks = ("messages" in obj or "conversations" in obj) and "prompt" not in obj
        plain = all(k in _OURS or spelled(k) not in _KNOWN for k in keys)
        plain = plain and not (talks and ("completion" in obj or ("rejected" in obj and "chosen" not in obj)))
        found = _own(obj) if plain else None
        if len(_plain) < 1000:
            _plain[keys] = found
    else:
        found = _plain[keys]
    if found is None:
        record = _Record(obj, changes)
        out, source = record.read()
        columns.note(record.made_of(out))
        return out, source
    if obj.get("system") or obj.get("tools"):
        found += tuple((name, name) for name in _BESIDE if obj.get(name))
    columns.note(found)
    return obj, ""


def _own(obj: dict[str, Any]) -> Found:
    """What a record in our own names is made of, but for what stands beside it."""
    if "chosen" in obj and "rejected" in obj:
        before = next((c for c in ("prompt", "conversations", "messages") if c in obj), None)
        sides = (("chosen", "chosen"), ("rejected", "rejected"))
        return sides if before is None else ((_target(before), before), *sides)
    if "prompt" in obj and "completion" in obj:
        found: Found = (("prompt", "prompt"), ("completion", "completion"))
    else:
        found = tuple(("messages", c) for c in ("conversations", "messages") if c in obj)[:1]
    name = column_of(obj)
    return (*found, ("label", name)) if found and name in obj else found


def _target(ours: str) -> str:
    """What a column of our names is, in the words of a map."""
    return "messages" if ours == "conversations" else ours


def maybe_question(obj: dict[str, Any]) -> list[str]:
    """Columns that may hold the question of a record in our names that has none."""
    taken = {*COLUMNS, *LABEL_COLUMNS, *SYSTEM}
    return [
        str(k)
        for k, v in obj.items()
        if k not in taken
        and not str(k).startswith("original_")  # renamed by us: beside a column that was read
        and isinstance(v, str | list | dict)
        and holds(v)
        and not ABOUT.fullmatch(spelled(k))
    ]


class _Record:
    """One record on its way to our names."""

    def __init__(self, obj: dict[str, Any], changes: list[str], unread: frozenset[str] = frozenset()):
        self.obj, self.changes, self.unread = obj, changes, unread
        self.used: dict[str, str] = {}  # column -> what it is
        self.found: dict[str, Any] = {}

    def read(self) -> tuple[dict[str, Any], str]:
        there = self._names(False)
        held = self._names(True)
        for name in IMAGES:
            if name in held:
                raise DroppedRow(NEEDS_EYES, f"column {held[name]}")
        if not any(self._shape(names) for names in (held, there)):
            return self.obj, ""
        if "completion" in self.found and "completion" not in self.obj and _first(there, LABEL_COLUMNS) is None:
            return self.obj, ""  # "wrong columns" says more than "no label"
        self._label(held)
        self._tools(held)
        self._before(held)
        out = dict(self.found)
        for key, value in self.obj.items():
            if key in self.used or (not holds(value) and spelled(key) in _KNOWN):
                continue
            if key not in out:
                out[key] = value
            elif holds(value):
                out[self._free(key)] = value
        renamed = [k for k in self.used if k not in _OURS]
        return out, ", ".join(renamed)

    def made_of(self, out: dict[str, Any]) -> Found:
        """What this record, ``out`` in our names, was read from."""
        if not self.found:
            return ()
        found = dict.fromkeys((_target(ours), column) for column, ours in self.used.items())
        known = {target for target, _ in found}
        if "chosen" not in self.found and "label" not in known and (name := column_of(out)) in out:
            found[("label", name)] = None
        found |= {(name, name): None for name in _BESIDE if name not in known and self.obj.get(name)}
        return tuple(found)

    def _free(self, key: str) -> str:
        name = f"original_{key}"
        while name in self.obj:
            name += "_"
        self.changes.append(f"column {key} renamed to {name}")
        return name

    def _names(self, held: bool) -> dict[str, str]:
        """Spelled name -> the column; our own names go before other spellings of them."""
        out: dict[str, str] = {}
        for key, value in self.obj.items():
            name = spelled(key)
            if (
                key not in self.unread
                and name in _KNOWN
                and (not held or holds(value))
                and (name not in out or key == name)
            ):
                out[name] = key
        return out

    def _take(self, ours: str, key: str) -> None:
        self.used[key] = ours if ours not in LABEL_COLUMNS else "label"
        self.found[ours] = self.obj[key]

    # --- shapes ---

    def _shape(self, names: dict[str, str]) -> bool:
        chosen, rejected = _first(names, CHOSEN), _first(names, REJECTED)
        answer, talk = _first(names, ANSWERS), _first(names, MESSAGES)
        labelled = _first(names, LABEL_COLUMNS) is not None
        if chosen is not None and rejected is not None:
            self._take("chosen", chosen)
            self._take("rejected", rejected)
            if not self._question(names) and talk is not None:
                self._take(_talk_name(talk), talk)
            return True
        own_talk = talk is not None and talk in ("conversations", "messages") and "prompt" not in names
        if rejected is not None and not labelled and talk is not None and own_talk and ends_in_answer(self.obj[talk]):
            return self._talk_against(talk, rejected)
        if (
            own_talk
            and talk is not None
            and not (answer and not ends_in_answer(self.obj[talk]) and messages_of(self.obj[talk]))
        ):
            self._take(_talk_name(talk), talk)
            return True
        if answer is not None and (own_talk or self._question(names)):
            if own_talk and talk is not None:
                self._take("prompt", talk)
            if rejected is not None and not labelled:
                self._take("chosen", answer)
                self._take("rejected", rejected)
            elif not labelled and spelled(answer) == "output" and two_texts(self.obj[answer]):
                good, bad = self.obj[answer]
                self.used[answer] = "ranked"
                self.found |= {"chosen": good, "rejected": bad}
                self.changes.append("two outputs read as the better and the worse one")
            else:
                self._take("completion", answer)
            return True
        ranked = _first(names, RANKED)
        if ranked is not None and self._rank(self.obj[ranked], ranked):
            if self._question(names):
                return True
            if talk is not None:
                self._take("prompt", talk)
                return True
        self.used, self.found = {}, {}
        if talk is not None:
            self._take(_talk_name(talk), talk)
            return True
        return False

    def _talk_against(self, talk: str, rejected: str) -> bool:
        """A talk that is the good one, and what was rejected: another talk, or other last answers."""
        turns, other = messages_of(self.obj[talk]), self.obj[rejected]
        self.used |= {talk: "messages", rejected: "rejected"}
        whole = isinstance(other, list) and any(isinstance(m, dict) for m in other) and not answers_only(other)
        if whole:
            self.found |= {"chosen": turns, "rejected": other}
        else:
            self.found |= {"prompt": turns[:-1], "chosen": [turns[-1]], "rejected": other}
        return True

    def _question(self, names: dict[str, str]) -> bool:
        """Finds the question and puts it under ``prompt``."""
        if "prompt" in names:
            self._take("prompt", names["prompt"])
            return True
        lead = names.get("instruction")
        keys = [names[a] for a in QUESTIONS if a in names] or [names[a] for a in PERHAPS if a in names]
        asked = {v if isinstance(v := self.obj[k], str) else id(v): k for k in reversed(keys)}  # one of those alike
        context = names.get("context")
        texts = [k for k in (*asked.values(), *([context] if context else ())) if isinstance(self.obj[k], str)]
        if lead is not None:
            self._take("prompt", lead)
            if isinstance(self.obj[lead], str):
                self.used |= dict.fromkeys(texts, "prompt")
                parts = (self.obj[lead], *(self.obj[k] for k in texts))
                self.found["prompt"] = "\n".join(p for p in parts if p.strip())
            return True
        if len(asked) > 1:
            raise DroppedRow("more than one column may be the prompt", ", ".join(asked.values()))
        if asked:
            key = next(iter(asked.values()))
            self._take("prompt", key)
            value = self.obj[key]
            if isinstance(value, dict) and isinstance(value.get("messages"), list):  # OpenAI's preference files
                self.found["prompt"] = value["messages"]
                if holds(value.get("tools")):
                    self.found["tools"] = value["tools"]
            elif isinstance(value, str) and context in texts:
                self.used[str(context)] = "prompt"
                self.found["prompt"] = f"{self.obj[str(context)]}\n\n{value}"
                self.changes.append("context put before the question")
            return True
        if context is not None and isinstance(self.obj[context], list):
            self._take("prompt", context)
            return True
        return False

    def _rank(self, answers: object, key: str) -> bool:
        """Puts the answers of a list under ``chosen`` and ``rejected``: by labels, else the best and the worst."""
        if not isinstance(answers, list) or not answers:
            return False
        column, scores = column_of_scores(self.obj, len(answers))
        self.used |= {column: "ranked"} if column else {}
        items = list(scored(answers, scores))
        if not items:
            return False
        self.used[key] = "ranked"
        if all(isinstance(s, bool) for _, s in items):
            good, bad = [t for t, s in items if s], [t for t, s in items if not s]
        else:
            top, low = max(s for _, s in items), min(s for _, s in items)
            if top == low:
                raise DroppedRow("all answers are ranked alike", key)
            good, bad = [t for t, s in items if s == top], [t for t, s in items if s == low]
            if len(good) + len(bad) < len(items):
                self.changes.append("ranked answers between the best and the worst left out")
        self.found |= {"chosen": Several(good), "rejected": Several(bad)}
        return True

    # --- what stands beside ---

    def _label(self, held: dict[str, str]) -> None:
        key = _first(held, LABEL_COLUMNS)
        if key is not None and key != spelled(key) and "chosen" not in self.found and key not in self.used:
            self._take(spelled(key), key)  # under its own name, by which the whole data set's numbers are told apart

    def _tools(self, held: dict[str, str]) -> None:
        key = held.get("functions")
        if key is None or holds(self.obj.get("tools")) or "tools" in self.found:
            return
        try:
            tools = read_tools(self.obj[key])
        except DroppedRow:
            return  # named among the columns that go unused
        self.used[key] = "tools"
        self.found["tools"] = [t if "function" in t else {"type": "function", "function": t} for t in tools or ()]

    def _before(self, held: dict[str, str]) -> None:
        """A system prompt and earlier turns that have columns of their own."""
        at = next((c for c in ("prompt", "conversations", "messages") if c in self.found), None)
        if at is None:
            return
        value = self.found[at]
        turns = unpacked_messages(value) if isinstance(value, str) else [value] if isinstance(value, dict) else value
        instructed = has_system(turns)
        key = _first(held, SYSTEM)
        if key is not None and key != "system" and isinstance(self.obj[key], str) and not instructed:
            self._take("system", key)
        key = _first(held, HISTORY)
        before = earlier(self.obj[key]) if key is not None and key not in self.used else []
        if not before or key is None:
            return
        if isinstance(value, str) and turns is None:
            turns = [{"role": "user", "content": value}]
        if isinstance(turns, list) and turns[: len(before)] != before:
            first = 1 if has_system(turns[:1]) else 0
            self.found[at] = [*turns[:first], *before, *turns[first:]]
            self.changes.append("history put before the prompt")
        self.used[key] = "history"


def _talk_name(key: str) -> str:
    return key if key == "messages" else "conversations"


def _first(names: dict[str, str], aliases: tuple[str, ...]) -> str | None:
    return next((names[a] for a in aliases if a in names), None)
