"""The small templates of tests/data/cases, each with the rows that it used to spoil."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from kto_core.data import dataset
from kto_core.data.rendering import template
from kto_core.data.rendering.style import Style

CASES = Path(__file__).parent / "cases"
HEAD = "<|im_start|>assistant\n"


@pytest.fixture
def opened(demo_model):
    def opened(name, shape):
        tokenizer = AutoTokenizer.from_pretrained(demo_model)
        tokenizer.chat_template = (CASES / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
        loaded = dataset.load(str(CASES / "shapes" / f"{shape}.jsonl"))
        report = dataset.check(loaded, tokenizer)
        assert report.kept == 8 and report.fitting == (4, 4) and not report.seen.rows
        rows = [template.render(r, tokenizer) for r in loaded.rows]
        for row in loaded.rows:
            found = template.encode(row, tokenizer)
            asked = template.render_chat(row.prompt, tokenizer, row.tools, Style("on" if found.thought else "off"))
            assert found.prompt_ids == asked
        return rows, report

    return opened


def test_system_on_last_turn(opened):
    rows, _ = opened("system_on_last_turn", "system")
    assert rows[0].prompt == f"<|im_start|>user\nAnswer in CAPITALS. Nam\n\nName a river.<|im_end|>\n{HEAD}"
    assert rows[0].completion == "The Nile.<|im_end|>"


def test_strips_think(opened):
    rows, report = opened("strips_think", "think")
    assert rows[0].prompt.endswith(f"{HEAD}<think>\n") and report.seen.thoughts == 8
    wanted = "The user asks: Name a river. I will recall.\n</think>\n\nThe Nile.<|im_end|>"
    assert rows[0].completion == wanted


@pytest.mark.parametrize("name", ["one_call", "single_call_refuses"])
def test_two_calls(opened, name):
    rows, report = opened(name, "two_calls")
    assert rows[0].prompt.startswith("<|im_start|>system\nTools: [") and report.conflicts == 0
    assert '"Lima"' in rows[0].completion and '"Rome"' in rows[0].completion
    assert rows[0].completion != rows[1].completion and '"Oslo"' in rows[1].completion


def test_no_reasoning_key(opened):
    rows, _ = opened("no_reasoning_key", "reasoning_content")
    assert rows[0].completion == "<think>\nREASON Name a river.\n</think>\n\nThe Nile.<|im_end|>"


def test_dated(opened, demo_model):
    opened("dated", "system")
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    tokenizer.chat_template = (CASES / "templates" / "dated.jinja").read_text(encoding="utf-8")
    row = dataset.load(str(CASES / "shapes" / "system.jsonl")).rows[0]
    began = 1_750_000_000.0
    first, later = (template.encode(row, tokenizer, style=Style(began=began + s)) for s in (0, 60))
    assert first == template.encode(row, tokenizer, style=Style(began=began)) and first.prompt_ids != later.prompt_ids
