"""A GGUF file in llama.cpp beside what the merged model says (`reference`). Runs in a confined child process."""

from __future__ import annotations

import time

from kto_core.errors import ExportError
from kto_core.guards import confine
from kto_core.guards.child import tell

from . import header
from .llama import CONTEXT, engine


def compare(path: str, prompt: str, max_tokens: int, threads: int, expected: dict, given: list[dict]) -> dict:
    """Compare the file's texts, ids and choices with the merged model's; let it answer ``prompt`` freely, greedily.

    Args:
        expected: `reference.texts`, or {} if there is no merged model. given: `reference.answers`, or [].

    Returns:
        ``text``, ``tokens`` (of the free answer), ``stopped_at_eos``, ``tokens_per_second`` (of generation alone),
        ``file_type``, ``chat_template`` (bool), ``bos``, ``eos``, ``pad`` (ids or None), ``engine``; and
        ``rendered``: {messages, here, there} of each conversation that differs; ``tokenized``: the same of texts;
        ``ends``: whether the end of a turn ends an answer here (None if unknown);
        ``choices``: for each given answer the file's first choice at each of its places.

    Raises:
        ExportError: not a GGUF file, it does not load, or its template does not render.
    """
    confine.close_in()
    facts = header.read_facts(path)
    text = header.prompt_text(facts, prompt)
    tell(None, "Loading the file in llama.cpp…")
    loaded = engine()
    model = loaded(path, threads)
    ids = tokens_of(model, facts, text)
    if len(ids) + max_tokens > CONTEXT:
        raise ExportError(f"This question is too long for a check ({len(ids):,} tokens). Enter a shorter one.")
    tell(None, "Comparing texts and tokens…")
    rendered, tokenized = _texts(model, facts, expected)
    choices = []
    for i, answer in enumerate(given):
        tell(i / (len(given) + 1), f"Comparing answers: {i + 1} of {len(given)}")
        choices.append(_choices(model, answer["prompt_ids"], answer["ids"]))
    tell(len(given) / (len(given) + 1), "Generating an answer…")
    end = expected.get("end")
    return {
        **_free(model, ids, max_tokens),
        "file_type": facts.file_type,
        "chat_template": bool(facts.template),
        "bos": facts.bos,
        "eos": facts.eos,
        "pad": facts.pad,
        "engine": loaded.name,
        "rendered": rendered,
        "tokenized": tokenized,
        "ends": None if end is None else model.ends(end),
        "choices": choices,
    }


def tokens_of(model, facts, text: str) -> list[int]:
    """Ids of a rendered prompt as llama.cpp's chat has them: with a BOS, unless the template wrote it itself."""
    double = facts.add_bos and bool(facts.bos_text) and text.startswith(facts.bos_text)
    return model.tokenize(text, add_special=not double)


def _texts(model, facts, expected: dict) -> tuple[list[dict], list[dict]]:
    rendered, tokenized = [], []
    for talk in expected.get("conversations", []):
        try:
            here = header.render(facts, talk["messages"])
        except ExportError:
            here = None
        if here != talk["text"]:
            rendered.append({"messages": talk["messages"], "here": here, "there": talk["text"]})
        elif here is not None and (ids := tokens_of(model, facts, here)) != talk["ids"]:
            tokenized.append({"text": here, "here": ids, "there": talk["ids"]})
    for one in expected.get("texts", []):
        for special, there in ((False, one["ids"]), (True, one["with_special"])):
            if (ids := model.tokenize(one["text"], add_special=special)) != there:
                tokenized.append({"text": one["text"], "here": ids, "there": there})
    return rendered, tokenized


def _choices(model, prompt: list[int], answer: list[int]) -> list[int]:
    """The first choice at each place of a given answer."""
    model.forget()
    found = [model.first(prompt)]
    for token in answer[:-1]:
        found.append(model.next(token))
    return found


def _free(model, ids: list[int], max_tokens: int) -> dict:
    model.forget()
    answer: list[int] = []
    stopped = False
    token, started = model.first(ids), 0.0
    for i in range(max_tokens):
        if i == 1:
            started = time.perf_counter()
        if stopped := model.ends(token):
            break
        answer.append(token)
        token = model.next(token)
    seconds = time.perf_counter() - started if started else 0.0
    return {
        "text": model.text(answer),
        "tokens": len(answer),
        "stopped_at_eos": stopped,
        "tokens_per_second": (len(answer) - 1) / seconds if seconds else 0.0,
    }
