"""Tokenizers and chat templates of strangers: they end, in bounded memory, or are refused with one sentence."""

import json
import resource
import shutil
import threading
import time
from pathlib import Path

import pytest

from kto_core.data.rendering import bounded_template, template
from kto_core.errors import Cancelled, ExportError, ModelError
from kto_core.export.gguf import header
from kto_core.models import load, trial
from tests.data.test_template import (
    CALLS,
    GOOD,
    NAMES,
    RESULT,
    ROWS,
    SYSTEM,
    TOOLS,
    USER,
    made,
    row,
    tokenizers,  # noqa: F401 - its fixture
)

NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GROWS = "{% set n = namespace(x=START) %}{% for a in range(60) %}{% set n.x = STEP %}{% endfor %}"
TALK = [USER, GOOD] * 3
RUNAWAY = {  # each would take hours, or gigabytes
    "rounds": NESTED,
    "output": "{% for a in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
    "constant output": NESTED.replace("{% endfor %}", "y" * 1000 + "{% endfor %}", 1),
    "a block": "{% set x %}" + NESTED.replace("{% endfor %}", "abcdefgh{% endfor %}", 1) + "{% endset %}",
    "a product": "{{ 'a' * 10 ** 10 }}",
    "a power": "{{ 10 ** (10 ** 9) }}",
    "doubled text": GROWS.replace("START", "'a'").replace("STEP", "n.x ~ n.x"),
    "added text": GROWS.replace("START", "'a'").replace("STEP", "n.x + n.x"),
    "doubled lists": GROWS.replace("START", "[1]").replace("STEP", "n.x + n.x"),
    "lists in lists": GROWS.replace("START", "[1]").replace("STEP", "[n.x, n.x]") + "{{ n.x | tojson }}",
    "lists in lists, written": GROWS.replace("START", "[1]").replace("STEP", "[n.x, n.x]") + "{{ n.x }}",
    "squared numbers": GROWS.replace("START", "3").replace("STEP", "n.x * n.x"),
    "slices": "{% set n = namespace(l=[]) %}{% set a = 'a' * 1000000 %}"
    "{% for i in range(99999) %}{% set n.l = n.l + [a[1:]] %}{% endfor %}",
    "center": "{{ 'a' | center(10 ** 9) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format from a variable": "{{ '{:>{}}'.format(1, 1000000000) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "replace": "{% set a = 'a' * 1000000 %}{% set b = a.replace('a', a) %}",
    "replace filter": "{% set a = 'a' * 1000000 %}{% set b = a | replace('a', a) %}",
    "join": "{% set a = 'a' * 1000000 %}{% set b = a.join(range(9999) | map('string') | list) %}",
    "join filter": "{% set a = 'a' * 1000000 %}{% set b = range(9999) | join(a) %}",
    "indent": "{% set a = '\n' * 1000000 %}{{ a | indent(99999) }}",
    "json": "{{ messages | tojson(indent=10 ** 9) }}",
    "batches": "{{ [1] | batch(1000000000, 'x') | list }}",
    "tabs": "{{ ('\t' * 1000000).expandtabs(99999) }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a macro in itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro's text": "{% macro f() %}" + "z" * 100_000 + "{% endmacro %}"
    "{% for i in range(99999) %}{% set x = f() %}{% endfor %}",
    "a loop in itself": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "sums": "{% for i in range(99999) %}{% set x = range(99999) | sum %}{% endfor %}",
    "only when long": "{% if messages | length > 4 %}" + NESTED + "{% endif %}",
    "huge": "x" * 2_000_000,
}


@pytest.mark.parametrize("name", RUNAWAY)
def test_a_template_that_runs_away_is_ended(name, monkeypatch):
    monkeypatch.setattr(bounded_template, "SECONDS", 1.0)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(ModelError, match="chat template"):
        bounded_template.render(RUNAWAY[name], TALK)
    assert time.thread_time() - began < 2 * bounded_template.SECONDS + 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB: a gigabyte


def test_a_row_a_chat_and_a_gguf_are_bounded_alike():
    evil = made("{% if messages | length > 1 %}" + NESTED + "{% endif %}", [])
    with pytest.raises(ModelError, match="did not come to an end"):
        template.encode(ROWS[0], evil)
    with pytest.raises(ModelError, match="did not come to an end"):
        template.render_chat(TALK, evil)
    facts = header.Facts("", "", "", RUNAWAY["doubled text"], None, None, None, "", "", False, "")
    with pytest.raises(ExportError, match="writes without end"):
        header.render(facts, TALK)


def test_cancel_in_the_middle_of_a_template(monkeypatch):
    monkeypatch.setattr(bounded_template, "SECONDS", 600)
    evil, cancel = made("{% if messages | length > 3 %}" + NESTED + "{% endif %}", []), threading.Event()
    template._frame(evil)
    threading.Timer(0.5, cancel.set).start()
    began = time.monotonic()
    with pytest.raises(Cancelled):
        template.encode_rows([row(*TALK)], evil, cancel=cancel)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("name", [n for n in NAMES if n != "none"])
def test_the_text_is_what_transformers_renders(tokenizers, name):
    """Word for word, and refused where it refuses."""
    tokenizer = tokenizers[name]
    for messages, tools in (([USER], None), (TALK, None), ([SYSTEM, USER], None), ([USER, GOOD], TOOLS),
                            ([USER, CALLS, RESULT, GOOD], TOOLS)):  # fmt: skip
        for generation in (True, False):

            def theirs(m=messages, t=tools, g=generation):
                return tokenizer.apply_chat_template(m, tools=t, tokenize=False, add_generation_prompt=g)

            def ours(m=messages, t=tools, g=generation):
                chosen = tokenizer.get_chat_template(None, t)
                return bounded_template.render(chosen, m, t, g, **tokenizer.special_tokens_map)

            assert outcome(ours) == outcome(theirs)


def outcome(render) -> str:
    try:
        return render()
    except ModelError:
        raise
    except Exception as e:
        return f"{type(e).__name__}: {e}"


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}{{ loop.index }}{{ loop.length }}{{ loop.last }}{{ loop.previtem.role }}{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% else %}none{% endfor %}",
        "{% for m in nothing %}x{% else %}none{% endfor %}{% for m in none %}{% endfor %}",
        "{% for k, v in messages[0] | dictsort %}{{ k }}{{ v }}{% if loop.first %}{% break %}{% endif %}{% endfor %}",
        "{{ messages[::-1][0].content[:5] ~ 1 ~ none ~ undefined_thing }}{{ messages[1:] | length }}",
        "{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 2 * loop.index %}{% endfor %}{{ n.x }}",
        "{{ '%s and %d' % ('a', 3) }}{{ 'a{}b{:>4}'.format(1, 2) }}{{ '%s' | format('x') }}{{ 7 ** 2 }}{{ 7 % 4 }}",
        "{{ 'a,b'.split(',') | join('; ') }}{{ ' x '.strip() }}{{ 'ab' * 3 }}{{ messages | tojson(indent=2) }}",
        "{% macro f(x) %}<{{ x }}{{ caller() if caller }}>{% endmacro %}{{ f('a') }}{% call f('b') %}c{% endcall %}",
        "{% generation %}{{ messages[1].content }}{% endgeneration %}{{ messages | map(attribute='role') | join }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 'a\nb' | indent(2) }}",
        "{{ raise_exception('no') }}",
        "{% for a in [[1, [2]], [3]] recursive %}{{ a if a is number else loop(a) }}{% endfor %}",
        "{{ strftime_now('%Y') }}{{ messages.append(1) }}",
    ],
)
def test_everything_that_templates_use_renders_alike(text):
    from transformers.utils.chat_template_utils import render_jinja_template

    def theirs():
        return render_jinja_template([TALK], chat_template=text, bos_token="<s>")[0][0]

    assert outcome(lambda: bounded_template.render(text, TALK, bos_token="<s>")) == outcome(theirs)


# ---- the trial -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_model, tmp_path, monkeypatch) -> Path:
    """A good model that a test may spoil, in a cache that knows none."""
    monkeypatch.setenv("KTO_STUDIO_CACHE", str(tmp_path / "cache"))
    return shutil.copytree(tiny_model, tmp_path / "stranger")


def spoil(folder: Path, **parts) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts))


def replaced(pattern: dict, content: str, times: int) -> dict:
    rule = {"type": "Replace", "pattern": pattern, "content": content}
    return {"type": "Sequence", "normalizers": [rule] * times}


def test_a_good_model_is_tried_once(folder, monkeypatch):
    from kto_core.guards import child

    calls = []
    real = child.call
    monkeypatch.setattr(child, "call", lambda *a, **k: calls.append(a) or real(*a, **k))
    said = []
    load.load_tokenizer(str(folder), lambda f, t: said.append(t))
    assert len(calls) == 1 and any("Trying the tokenizer" in t for t in said)
    began = time.thread_time()
    load.load_tokenizer(str(folder))
    trial.require_harmless(folder)
    assert len(calls) == 1 and time.thread_time() - began < 5
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    load.load_tokenizer(str(folder))
    assert len(calls) == 2  # another content


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"normalizer": replaced({"String": "a"}, "a" * 100, 6)}, "times as long"),
        ({"normalizer": replaced({"Regex": "."}, "a" * 100, 6)}, "times as long"),
        ({"decoder": replaced({"String": "☃"}, "☃" * 1000, 2) | {"type": "Sequence"}}, "times as long"),
        ({"model": {"type": "BPE"}}, "cannot be loaded"),
    ],
)
def test_a_tokenizer_that_harms_is_refused_and_this_process_lives(folder, parts, words):
    spoil(folder, **parts)
    for _ in range(2):  # the second time from memory
        with pytest.raises(ModelError, match=words):
            load.load_tokenizer(str(folder))


def test_a_template_that_harms_is_refused_when_the_model_is_chosen(folder):
    (folder / "chat_template.jinja").write_text("{% if messages | length > 20 %}" + NESTED + "{% endif %}")
    with pytest.raises(ModelError, match="did not come to an end"):
        load.load_tokenizer(str(folder))


def test_a_trial_can_be_cancelled(folder):
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        load.load_tokenizer(str(folder), cancel=cancel)
    assert not (Path(trial.cache_dir()) / "tried").exists()


def test_processor_time_and_memory_end_the_child():
    from kto_core.guards import child, confine

    ended = child.run(_python("confine.limit(seconds=1)\nwhile True: pass"))
    assert "computing" in trial._why("x", child.ChildFailed(ended, "It"))
    ended = child.run(_python("confine.limit(memory=2**28)\ntry: b'x' * 2**30\nexcept MemoryError: print('held')"))
    assert ended.tail == "held" and confine.FILES


def _python(code: str) -> list[str]:
    import sys

    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
            f"from kto_core.guards import confine\n{code}"]  # fmt: skip
