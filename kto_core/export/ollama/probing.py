"""The texts of a chat template, read off it by rendering small conversations whose words are known.

No table of families: what a template does is seen from what it writes. Whatever the pieces do not reproduce is said in
a remark (`derive`), never guessed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from kto_core.errors import ExportError

from .pieces import SYSTEM, TOOLS, Beginning, Calls, Pieces

Render = Callable[..., str]  # (messages, generation=True, tools=None) -> text
S, U, A, V, B = "System text.", "First question?", "An answer.", "Second question?", "Another answer."
R, Q = "First result", "Second result"
OPENING = ("<", "<|", "[", "</")  # a text is never split inside a special token
SPELLINGS: tuple[tuple[dict, str], ...] = (  # of JSON: how it is written, and what a list it stands in indents it by
    ({}, ""),
    ({"separators": (",", ":")}, ""),
    *(({"indent": width}, inside) for width in (4, 2) for inside in ("", " " * width)),
)
NO_SYSTEM = "The model's chat template has no place for a system prompt: SYSTEM has no effect."
JSON = (
    "Ollama writes tools and their arguments as JSON without spaces. The model's chat template writes spaces, so this "
    "text differs slightly from training."
)


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def answer(content: str) -> dict:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict:
    return {"role": "system", "content": content}


def tool(name: str) -> dict:
    one = {"city": {"type": "string", "description": "Name of a city."}}
    parameters = {"type": "object", "required": ["city"], "properties": one}
    about = {"name": name, "description": f"Looks up {name}.", "parameters": parameters}
    return {"type": "function", "function": about}


def calls(*names: str, content: str = "") -> dict:
    made = [
        {"type": "function", "id": f"call0000{i}", "function": {"name": n, "arguments": {"city": f"{n} town"}}}
        for i, n in enumerate(names)
    ]
    return {"role": "assistant", "content": content, "tool_calls": made}


def result(name: str, content: str, number: int = 0) -> dict:
    return {"role": "tool", "name": name, "tool_call_id": f"call0000{number}", "content": content}


ONE, TWO = tool("weather_of"), tool("people_in")
F, G = "weather_of", "people_in"
LISTED = [ONE, TWO]
ARGUMENTS = {name: {"city": f"{name} town"} for name in (F, G)}
ONE_ARGUMENTS = ARGUMENTS[F]
CHATS: dict[str, list[dict]] = {
    "a question": [user(U)],
    "a second question": [user(U), answer(A), user(V)],
    "a third question": [user(U), answer(A), user(V), answer(B), user("Third question?")],
}
TOOL_CHATS: dict[str, list[dict]] = {
    "a question with tools": [user(U)],
    "the result of a tool": [user(U), calls(F), result(F, R)],
}
MORE_TOOL_CHATS: dict[str, list[dict]] = {
    "two calls at once": [user(U), calls(F, G), result(F, R), result(G, Q, 1)],
    "a call after an answer's text": [user(U), calls(F, content=A), result(F, R)],
    "an answer after a call": [user(U), calls(F), result(F, R), answer(A), user(V)],
    "calls one after another": [user(U), calls(F), result(F, R), calls(G), result(G, Q)],
}


def derive(render: Render, bos: str) -> tuple[Pieces | None, list[str]]:
    """The pieces of a chat template, and remarks on what they do not reproduce; None: Ollama cannot express it.

    Args:
        bos: text that Ollama puts before everything by itself, or "".
    """

    def shown(messages: list[dict], generation: bool = True, tools: list[dict] | None = None) -> str:
        return render(messages, generation, tools).removeprefix(bos)

    try:
        plain = _plain(shown)
        _require_plain_text(plain)
    except (ExportError, ValueError) as e:
        return None, [f"The model's chat template cannot be converted to an Ollama template: {e}"]
    if shown(CHATS["a question"]) != plain.text(CHATS["a question"]):
        return None, ["The model's chat template cannot be converted to an Ollama template."]
    pieces, remarks = _with_tools(shown, plain)
    chats = dict(CHATS)
    if pieces.takes_system:
        chats |= {f"{name} after a system prompt": [system(S), *chat] for name, chat in CHATS.items()}
    remarks = [*_differing(shown, pieces, chats), *remarks]
    blank = {"blanks": [user(f"  {U}\n")]}
    if _differing(shown, pieces, blank):
        remarks.append("The model's own chat template removes blanks around a message; Ollama keeps them.")
    thought = {"thoughts": [user(U), answer(f"<think>\nA thought.\n</think>\n\n{A}"), user(V)]}
    if _differing(shown, pieces, thought):
        remarks.append("The model's own chat template leaves the thoughts of earlier answers out; Ollama keeps them "
                       "unless the program that asks removes them.")  # fmt: skip
    if not pieces.takes_system:
        remarks.append(NO_SYSTEM)
    return pieces, remarks


def _differing(shown: Render, pieces: Pieces, chats: dict, tools: list[dict] | None = None) -> list[str]:
    """A remark for each conversation that the template renders otherwise; one it refuses cannot differ."""
    remarks = []
    for name, chat in chats.items():
        try:
            expected = shown(chat, True, tools)
        except ExportError:
            remarks.append(f"The model's own chat template refuses {name}; this TEMPLATE does not.")
            continue
        if expected != pieces.text(chat, tools):
            remarks.append(f"The model's own chat template renders {name} differently from this TEMPLATE.")
    return remarks


def _require_plain_text(pieces: Pieces) -> None:
    texts = pieces.literals()
    if any(sign in text for text in texts for sign in ("{{", "}}", '"""')) or any(t.endswith("{") for t in texts):
        raise ValueError("it contains braces or quotes that have another meaning there.")


# ---- questions and answers ------------------------------------------------------------------------------------------


def _plain(shown: Render) -> Pieces:
    """Raises ValueError where a text is not found, ExportError where the template refuses a plain chat."""
    first, opens = around(shown([user(U)]), U)
    between, following = around(around(shown([user(U), answer(A), user(V)]), U)[1], A)
    following, _ = around(following, V)
    _, stop = around(around(shown([user(U), answer(A)], False), U)[1], A)
    after_user = _common(opens, between)
    end = _common(stop, following)
    # what stands before a question is the longest text that is there before the first one as well
    while following[len(end) :] not in first:
        end = following[: len(end) + 1]
    question = following[len(end) :]
    beginnings = {(False, False): _beginning(first, question)}
    try:
        told, rest = around(shown([system(S), user(U)]), S)
        beginnings[(True, False)] = _beginning(told + SYSTEM + around(rest, U)[0], question)
    except (ExportError, ValueError):
        pass  # no place for a system prompt; `derive` says so
    return Pieces(
        beginnings,
        after={"user": after_user, "assistant": end},
        before={"user": {"": question}, "assistant": {"": between[len(after_user) :]}},
        end={"user": opens[len(after_user) :]},
    )


def _beginning(text: str, question: str) -> Beginning:
    """A text up to the first question's content, split where that question's turn opens."""
    at = text.rfind(question)
    if at < 0:
        raise ValueError("it formats the first question differently from later ones.")
    return text[:at], text[at + len(question) :]


def around(text: str, mark: str) -> tuple[str, str]:
    """Texts before and after a mark. Raises ValueError if it is not there."""
    before, found, after = text.partition(mark)
    if not found:
        raise ValueError("it changes the text of a message.")
    return before, after


def _common(*texts: str) -> str:
    """What all of them begin with, not split inside a special token."""
    found = os.path.commonprefix(list(texts))
    while any(len(t) > len(found) for t in texts) and found.endswith(OPENING):
        found = found[:-1]
    return found


# ---- tools ----------------------------------------------------------------------------------------------------------


def _with_tools(shown: Render, plain: Pieces) -> tuple[Pieces, list[str]]:
    """The pieces with tools, where the template has them and Go can say it; else the plain ones with a remark."""
    try:
        if shown([user(U)], True, LISTED) == shown([user(U)]):
            return plain, []  # the model does not read them either, and Ollama says so itself
        pieces = _tool_pieces(shown, plain)
        _require_plain_text(pieces)
        if _differing(shown, pieces, TOOL_CHATS, LISTED):
            raise ValueError("it puts them together in a way that Ollama's language cannot follow.")
    except (ExportError, ValueError) as e:
        return plain, [f"Tools are not in this TEMPLATE, so Ollama refuses them for this model: {e}"]
    chats = dict(MORE_TOOL_CHATS)
    if pieces.takes_system:
        chats["a question with tools after a system prompt"] = [system(S), user(U)]
    return pieces, [*_differing(shown, pieces, chats, LISTED), JSON]


def _tool_pieces(shown: Render, plain: Pieces) -> Pieces:
    def said(*messages: dict, generation: bool = True) -> str:
        """What follows the first question."""
        return around(shown([user(U), *messages], generation, LISTED), U)[1]

    one_result = said(calls(F), result(F, R))
    beginnings, part, between_items, spelled = _listed(shown, plain, plain.before["user"][""])
    spell = _spelling(one_result, ONE_ARGUMENTS, "calls of tools")
    opened, to_arguments, called, resulted = _one_call(one_result, spell)
    again, next_result = _two_calls(said, spell)
    answered = around(around(said(calls(F), result(F, R), answer(A), user(V)), R)[1], A)[0]
    recalled = around(around(said(calls(F), result(F, R), calls(G), result(G, Q)), R)[1], G)[0]
    stop = _or(lambda: around(said(calls(F), generation=False), spell(ONE_ARGUMENTS))[1], called)
    after_user, after_calls = plain.after["user"], _common(called, stop)
    after_tool = _common(resulted, answered, recalled, *([] if next_result is None else [next_result]))
    if not opened.startswith(after_user):
        raise ValueError("it opens an answer that calls a tool differently.")
    from_user, from_tool = opened[len(after_user) :], recalled[len(after_tool) :]
    second = {} if next_result is None else {"tool": next_result[len(after_tool) :]}
    opens = os.path.commonprefix([from_user[::-1], from_tool[::-1]])[::-1]
    after_text = _or(lambda: around(around(said(calls(F, content=A), result(F, R)), A)[1], F)[0], opens)
    return Pieces(
        beginnings,
        after=plain.after | {"calls": after_calls, "tool": after_tool},
        before=plain.before | {
            "assistant": plain.before["assistant"] | {"tool": answered[len(after_tool) :]},
            "calls": {"": from_user[: len(from_user) - len(opens)], "tool": from_tool[: len(from_tool) - len(opens)]},
            "tool": {"": called[len(after_calls) :]} | second,
        },
        end=plain.end | {"tool": resulted[len(after_tool) :]},
        calls=Calls(part, between_items, spelled, after_text.removesuffix(opens) if after_text.endswith(opens) else "",
                    opens, to_arguments, again, spell),
    )  # fmt: skip


def _one_call(text: str, spell: Callable[[dict], str]) -> tuple[str, str, str, str]:
    """Texts before the name, between name and arguments, between these and the result, and after that."""
    opened, rest = around(text, F)
    to_arguments, rest = around(rest, spell(ONE_ARGUMENTS))
    called, resulted = around(rest, R)
    if "call0000" in text:
        raise ValueError("it writes the ids of calls, which Ollama's templates do not have.")
    return opened, to_arguments, called, resulted


def _two_calls(said: Callable[..., str], spell: Callable[[dict], str]) -> tuple[str, str | None]:
    """Texts between two calls and between their results; a template may refuse more than one call at once."""
    try:
        text = said(calls(F, G), result(F, R), result(G, Q, 1))
    except ExportError:
        return "", None
    again, _ = around(around(text, spell(ARGUMENTS[F]))[1], G)
    return again, around(around(text, R)[1], Q)[0]


def _spelling(text: str, value: dict, what: str) -> Callable[[dict], str]:
    for how, inside in SPELLINGS:

        def spell(v: dict, how: dict = how, inside: str = inside) -> str:
            return json.dumps(v, ensure_ascii=False, **how).replace("\n", "\n" + inside)

        if spell(value) in text:
            return spell
    raise ValueError(f"it writes {what} as something else than JSON.")


def _listed(shown: Render, plain: Pieces, question: str) -> tuple[dict, str, str, Callable[[dict], str]]:
    """How a chat with tools begins; which part of a tool is written, how, and what stands between two."""
    text = around(shown([user(U)], True, LISTED), U)[0]
    for part in ("", ".Function"):
        chosen = (lambda t: t) if not part else (lambda t: t["function"])
        try:
            spell = _spelling(text, chosen(ONE), "tools")
        except ValueError:
            continue
        break
    else:
        raise ValueError("it writes tools as something else than JSON.")
    first, second = spell(chosen(ONE)), spell(chosen(TWO))
    between, _ = around(around(text, first)[1], second)
    beginnings = dict(plain.beginnings)
    for with_system in (False, True)[: 1 + plain.takes_system]:
        chat = [*([system(S)] if with_system else []), user(U)]
        text = around(shown(chat, True, LISTED), U)[0].replace(first + between + second, TOOLS)
        if TOOLS not in text or (with_system and S not in text):
            raise ValueError("it lists them in another way beside a system prompt.")
        beginnings[(with_system, True)] = _beginning(text.replace(S, SYSTEM), question)
    return beginnings, part, between, lambda t: spell(chosen(t))


def _or(made: Callable[[], str], otherwise: str) -> str:
    """A text, or another where the template refuses it."""
    try:
        return made()
    except (ExportError, ValueError):
        return otherwise
