"""Whether a GGUF file is the merged model: its template, tokens, weights, choices and end, each with a sentence."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from kto_core import files
from kto_core.guards import bounded, child
from kto_core.jobs import Progress, no_progress, part_of

from .writing import threads

TOKENS = 48  # of the free answer
SURE = 0.5  # difference of the two largest logits from which the merged model counts as decided
ENOUGH = 10  # decided places, below which nothing follows from them
# of decided places at which a kind's first choice is the merged model's
RATES = {"f16": 0.99, "q8_0": 0.95, "q2_k": 0.6}
RATE = 0.8  # of other kinds
NOT_THERE = "not compared, because the merged model is not there"
REFERENCE = "reference.json"  # beside the GGUF files: what the merged model says


def prove(
    path: Path,
    question: str,
    *,
    merged: Path | None,
    key: str = "",
    kind: str = "",
    progress: Progress = no_progress,
    cancel: threading.Event | None = None,
) -> dict:
    """Compare a GGUF file with the merged model it was made from, and let it answer ``question``.

    Args:
        merged: folder of the merged model, or None: then only the file itself is looked at.
        key: what merged model and file were made of (`sources.key_of`). kind: what the file is to be ("f16", …).

    Returns:
        What `agreement.compare` says, and ``ok``; ``checks``: list of {name, ok, text}, whose ``ok`` is None where
        nothing could be compared; ``problems``: the sentences of those that failed; ``agreement``: {same, of,
        undecided} places, or None; ``reference_text``: the merged model's own answer, or None.

    Raises:
        ExportError: it is no GGUF file, or llama.cpp does not run it. Cancelled: ``cancel`` was set.
    """
    expected = reference(path.parent, merged, key, question, part_of(progress, 0.0, 0.4), cancel) if merged else {}
    given = expected.get("answers", [])
    # half: llama.cpp's threads wait for each other at every layer, and one that finds its core busy holds up all
    arguments = {"path": str(path), "prompt": question, "max_tokens": TOKENS, "threads": threads(0.5),
                 "expected": expected, "given": given}  # fmt: skip
    what = "The check in llama.cpp"
    found = child.call("export.gguf.agreement", "compare", arguments, what=what,
                       progress=part_of(progress, 0.4, 0.8), cancel=cancel)  # fmt: skip
    weights = None
    if merged:
        arguments = {"path": str(path), "merged": str(merged), "kind": kind}
        weights = child.call("export.gguf.tensors", "compare", arguments, what="The comparison of the weights",
                             progress=part_of(progress, 0.8, 1.0), cancel=cancel)  # fmt: skip
    agreement = agreement_of(found.pop("choices"), given)
    checks = [
        _template(found, expected),
        _tokens(found, expected),
        _weights(weights, kind),
        _answers(agreement, kind, expected),
        _end(found, expected),
    ]
    del found["rendered"], found["tokenized"], found["ends"]
    problems = [f"{c['name']}: {c['text']}" for c in checks if c["ok"] is False]
    if not found["tokens"]:
        problems.append("Answer: llama.cpp gives an empty answer.")
    return {
        "ok": not problems,
        **found,
        "checks": checks,
        "problems": problems,
        "agreement": agreement,
        "reference_text": given[0]["text"] if given else None,
    }


def reference(folder: Path, merged: Path, key: str, question: str, progress: Progress, cancel) -> dict:
    """What the merged model says; kept beside the files, since all kinds are compared with the same."""
    kept = bounded.read_dict(folder / REFERENCE)
    if key and kept.get("key") == key and kept.get("question") == question:
        return kept["expected"]
    arguments = {"merged": str(merged), "question": question, "length": TOKENS}
    env = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    expected = child.call("export.gguf.reference", "all_of", arguments, what="The merged model's own answers",
                          progress=progress, cancel=cancel, env=env)  # fmt: skip
    if key and expected["answers"]:
        files.write_whole(folder / REFERENCE, json.dumps({"key": key, "question": question, "expected": expected}))
    return expected


# ---- verdicts -------------------------------------------------------------------------------------------------------


def _check(name: str, ok: bool | None, text: str) -> dict:
    return {"name": name, "ok": ok, "text": text}


def _template(found: dict, expected: dict) -> dict:
    name, total, wrong = "Chat template", len(expected.get("conversations", [])), found["rendered"]
    if not total:
        return _check(name, None, NOT_THERE)
    if wrong:
        return _check(
            name,
            False,
            f"{len(wrong)} of {total} conversations are rendered differently, so programs ask your model in another "
            f"way than training did. First difference: {_difference(wrong[0])}",
        )
    return _check(name, True, f"renders {total} of {total} conversations as your model does")


def _difference(one: dict) -> str:
    here, there = one["here"] or "(refused)", one["there"] or "(refused)"
    at = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there)))
    return f"{here[at : at + 40]!r} instead of {there[at : at + 40]!r}"


def _tokens(found: dict, expected: dict) -> dict:
    name, wrong = "Tokens", found["tokenized"]
    if not expected:
        return _check(name, None, NOT_THERE)
    total = 2 * len(expected["texts"]) + len(expected["conversations"])
    if wrong:
        first = wrong[0]
        return _check(
            name,
            False,
            f"{len(wrong)} of {total} texts become other tokens than in training, so the model reads something else. "
            f"First: {first['text'][:40]!r} is {first['here'][:8]} instead of {first['there'][:8]}",
        )
    return _check(name, True, f"{total} of {total} texts become the same tokens, BOS included")


def _weights(weights: dict | None, kind: str) -> dict:
    name = "Weights"
    if weights is None:
        return _check(name, None, NOT_THERE)
    compared, wrong = weights["compared"], weights["wrong"]
    if not weights["known"]:
        return _check(name, None, "not compared: how llama.cpp stores this architecture is not known here")
    if weights["other_types"]:
        return _check(
            name, False, f"{len(weights['other_types'])} tensors are stored in a way that {kind} does not use. Create "
            "the file again."
        )  # fmt: skip
    if wrong:
        first, type_ = wrong[0], kind or "this type"
        return _check(
            name,
            False,
            f"{len(wrong)} of {compared} tensors differ from your model's by more than rounding to {type_} explains, "
            f"most of all {first['name']} ({first['rows']:,} rows). Create the file again.",
        )
    if weights["missing"]:
        return _check(name, False, f"{len(weights['missing'])} tensors are missing, such as {weights['missing'][0]}.")
    worst = max(weights["worst"].values(), default=0.0)
    return _check(name, True, f"all {compared} tensors are your model's; a row differs by {worst:.1%} at most")


def agreement_of(choices: list[list[int]], given: list[dict]) -> dict | None:
    if not given:
        return None
    same = sure = undecided = 0
    for chosen, answer in zip(choices, given, strict=True):
        for mine, theirs, margin in zip(chosen, answer["ids"], answer["margins"], strict=True):
            if margin < SURE:
                undecided += 1
            else:
                sure, same = sure + 1, same + (mine == theirs)
    return {"same": same, "of": sure, "undecided": undecided}


def _answers(agreement: dict | None, kind: str, expected: dict) -> dict:
    name = "Answers"
    if agreement is None:
        why = expected.get("why_not") or "Its answers were not compared: the merged model is not there"
        return _check(name, None, why.removeprefix("Its answers were ").removesuffix("."))
    same, of, undecided = agreement["same"], agreement["of"], agreement["undecided"]
    more = f"; at {undecided:,} more the model itself is undecided" if undecided else ""
    if of < ENOUGH:
        return _check(name, None, f"nothing to compare: your model is undecided at {undecided:,} places")
    needed = RATES.get(kind, RATE)
    if same < needed * of:
        return _check(
            name,
            False,
            f"agrees with your model at only {same:,} of {of:,} places ({same / of:.0%}; expected for "
            f"{kind or 'this type'}: {needed:.0%} or more), so it is not the model you trained{more}",
        )
    return _check(name, True, f"agrees with your model at {same:,} of {of:,} places{more}")


def _end(found: dict, expected: dict) -> dict:
    name = "End of an answer"
    if not expected:
        return _check(name, None, NOT_THERE)
    eos, end = expected["tokens"]["eos"], expected["end"]
    if found["eos"] not in (eos, end) or found["ends"] is False:
        return _check(
            name,
            False,
            f"the file's end token is {found['eos']}, your model's is {eos if end is None else end}: answers would not "
            "stop where they should",
        )
    return _check(name, True, "answers stop where your model's do")
