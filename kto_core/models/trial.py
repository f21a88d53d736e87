"""Tokenizer and chat template of a model that is new here, tried in a child process before they run in this one.

Native code reads a tokenizer: what it is told to do may abort its process, take all memory or never end. The child has
limits; what passed is remembered in the cache by the content of the files, so a model is tried once on a machine.
"""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
import signal
import threading
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from kto_core.errors import ModelError
from kto_core.guards import child, confine
from kto_core.jobs import Progress, no_progress
from kto_core.paths import cache_dir

from .model_gate import TOKENIZER, read_object

SECONDS = 30  # of processor time, after the libraries are imported; large vocabularies take five
MEMORY = 6 * 2**30  # bytes; a tokenizer of 256 thousand tokens takes 2
GROWTH = 256  # times that a text may grow while it is cut into tokens; the rules of known models make it grow by 3
CHARSMAP = 4 * 2**20  # characters of a table of normal forms; the largest known has half a million
VERSION = 1  # of what is tried
LIBRARIES = ("transformers", "tokenizers", "jinja2")
QUIET = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

_failed: dict[str, str] = {}  # in this process: what was said


def require_harmless(folder: Path, progress: Progress = no_progress, cancel: threading.Event | None = None) -> None:
    """Whether the tokenizer and the chat template in ``folder`` do their work in bounded time and memory.

    Raises:
        ModelError: they do not; or the tokenizer does not load at all.
        Cancelled: ``cancel`` was set.
    """
    key = content(folder)
    passed = cache_dir() / "tried" / key
    if passed.exists():
        return
    if key in _failed:
        raise ModelError(_failed[key])
    progress(None, f"Trying the tokenizer of {folder.name} in a process of its own…")
    try:
        child.call("models.trial", "try_out", {"folder": str(folder)}, what="The trial", cancel=cancel, env=QUIET)
    except ModelError as e:
        _failed[key] = str(e)
        raise
    except child.ChildFailed as e:
        _failed[key] = _why(folder.name, e)
        raise ModelError(_failed[key]) from e
    try:
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.touch()
    except OSError:  # it is tried again next time
        return


def content(folder: Path) -> str:
    """Hash of all files that make the tokenizer, and of the versions of the libraries that read them."""
    digest = hashlib.sha256(repr([VERSION, *(metadata.version(name) for name in LIBRARIES)]).encode())
    for file in sorted({f for pattern in (*TOKENIZER, "config.json") for f in folder.glob(pattern)}):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with open(file, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()


def _why(name: str, e: child.ChildFailed) -> str:
    if e.code == -signal.SIGXCPU:
        what = f"takes more than {SECONDS} s of computing for a few pages of text"
    elif e.code in (-signal.SIGABRT, -signal.SIGKILL, -signal.SIGSEGV) or "memory allocation" in e.tail:
        what = f"takes more than {MEMORY // 2**30} GiB of memory, or crashes"
    else:
        what = f"cannot be tried ({str(e)[:200]})"
    return f"The tokenizer of {name} {what}. Choose another model."


# ---- in the child ---------------------------------------------------------------------------------------------------


def try_out(folder: str) -> None:
    """Load the tokenizer in ``folder``, encode all kinds of text, decode all tokens, render conversations.

    Raises:
        ModelError: something fails, or takes more than it should.
    """
    import jinja2  # noqa: F401 - imports are no part of what is measured

    from kto_core.data.rendering.template import encode, render_chat
    from kto_core.guards.libraries import transformers_ready

    from .tokenizer import open_tokenizer

    transformers_ready()
    import transformers.tokenization_utils_tokenizers  # noqa: F401

    confine.close_in()
    confine.limit(seconds=SECONDS, memory=MEMORY)
    place = Path(folder)
    patterns = _require_no_growth(place)
    tokenizer = open_tokenizer(place, place.name)
    try:
        for text in (*texts(), *patterns):
            made = len(tokenizer(text, add_special_tokens=False)["input_ids"])
            if made > GROWTH * max(16, len(text)):
                raise ModelError(
                    f"The tokenizer of {place.name} makes {made:,} tokens of {len(text):,} characters. Choose another "
                    "model."
                )
        for start in range(0, len(tokenizer), 1000):
            tokenizer.decode(range(start, min(start + 1000, len(tokenizer))))
        for row in conversations():
            encode(row, tokenizer)
            render_chat(row.prompt, tokenizer)
    except ModelError:
        raise
    except MemoryError:
        raise ModelError(f"The tokenizer of {place.name} takes more memory than any should.") from None
    except Exception as e:  # a template may refuse what a trial asks; rows say so when they are encoded
        from kto_core.errors import DataError

        if not isinstance(e, DataError):
            raise ModelError(f"The tokenizer of {place.name} does not work ({str(e)[:200]}). Choose another.") from e


def _require_no_growth(folder: Path) -> list[str]:
    """Rules that replace a text by a longer one, multiplied. Returns the texts that they look for."""
    if not (folder / "tokenizer.json").is_file():
        return []
    growth, patterns = 1.0, []
    for rule in _rules(read_object(folder / "tokenizer.json")):
        if rule.get("type") in ("Replace", "Prepend"):
            made = rule.get("content") or rule.get("prepend") or ""
            looked = rule.get("pattern") if isinstance(rule.get("pattern"), dict) else {}
            found = str(looked.get("String") or "")
            patterns.append(found)
            growth *= max(1.0, len(str(made)) / max(1, len(found)))
        if len(str(rule.get("precompiled_charsmap") or "")) > CHARSMAP or growth > GROWTH:
            raise ModelError(
                f"The rules in the tokenizer.json of {folder.name} make a text more than {GROWTH} times as long. "
                "Choose another model."
            )
    return [p for p in patterns if p]


def _rules(value: dict) -> Iterator[dict]:
    """The steps of normalizer, pre-tokenizer and decoder, also those inside sequences."""
    todo = [value.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    while todo:
        rule = todo.pop()
        if isinstance(rule, dict):
            yield rule
            todo += [inner for inner in rule.values() if isinstance(inner, dict | list)]
        elif isinstance(rule, list):
            todo += rule


def texts() -> Iterator[str]:
    """Every assigned character of the planes that people write in, and the runs that patterns stumble over."""
    assigned = [chr(c) for c in range(0x20000) if unicodedata.category(chr(c)) not in ("Cs", "Cn", "Co")]
    for start in range(0, len(assigned), 512):
        yield "".join(assigned[start : start + 512])
    for run in ("a", "A", " ", "\n", "1", "'", "aA1 ", " \n", "é", "漢", "👍"):
        yield run * (10_000 // len(run))


def conversations() -> Iterator:
    """Rows with many turns, long turns, tools and calls."""
    from kto_core.data.records.rows import Row

    call = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": '{"a": 1}'}}
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
    answer = {"role": "assistant", "content": "An answer."}
    turns = [{"role": "user", "content": "A question?"}, answer] * 40
    yield Row([{"role": "system", "content": "Be brief."}, *turns[:-1]], [answer], True, 1)
    yield Row([{"role": "user", "content": "word " * 10_000}], [{**answer, "content": "word " * 10_000}], True, 2)
    used = [{"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1", "name": "f", "tool_call_id": "call00001"}]  # fmt: skip
    yield Row([turns[0], *used * 5], [answer], True, 3, tools)
