"""Where prompts come from: lines, data files, and held-out rows that neither run was trained on."""

import json

import pytest

from kto_core.data.splitting import question
from kto_core.errors import DataError
from kto_core.runs import folders
from kto_core.vote import prompts, sides
from tests.support.training import make_data, resolved


def asked(messages) -> str:
    return messages[-1]["content"]


def test_one_prompt_a_line():
    assert [asked(m) for m in prompts.typed("\n Why? \n\nHow?\r\n")] == ["Why?", "How?"]
    for text in ("", " \n\n", "x" * 20_001):
        with pytest.raises(DataError):
            prompts.typed(text)


def test_prompts_of_files(tmp_path):
    text = tmp_path / "asked.txt"
    text.write_text("One?\nTwo?\nOne?\n")
    assert {asked(m) for m in prompts.of_file(str(text), 0)} == {"One?", "Two?"}
    assert len(prompts.of_file(str(text), 0)) == 2, "each once"
    data = make_data(tmp_path / "data.jsonl", rows=20)
    found = prompts.of_file(str(data), 1)
    assert len(found) == 20 and found == prompts.of_file(str(data), 1) != prompts.of_file(str(data), 2)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    odd = tmp_path / "odd.jsonl"
    rows = [
        {"prompt": "With tools?", "completion": "A.", "label": True, "tools": tools},
        {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
         "completion": [{"role": "assistant", "content": "c"}], "label": True},
    ]  # fmt: skip
    odd.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError, match=r"odd\.jsonl has no prompt that ends with a user message"):
        prompts.of_file(str(odd), 0)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00", b"\n \n"])
def test_a_bad_file_is_one_sentence(tmp_path, content):
    path = tmp_path / "asked.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError):
        prompts.of_file(str(path), 0)
    path.with_suffix(".jsonl").write_bytes(content or b"{")
    with pytest.raises(DataError):
        prompts.of_file(str(path.with_suffix(".jsonl")), 0)


def test_held_out_prompts_are_none_that_a_run_was_trained_on(two_runs, tmp_path):
    from kto_core.models.load import load_tokenizer
    from kto_core.verdict.held_out import questions_trained_on

    one, two = two_runs
    trained = {}
    for run in two_runs:
        config = run.config().config
        trained[run] = questions_trained_on(run, config, load_tokenizer(config.model), run.state().started)
    a, base = sides.both(one)
    held, remarks = prompts.of_held_out(a, base, 0)
    assert len(held) > 5 and not remarks and not {asked(m).lower() for m in held} & trained[one]
    both, remarks = prompts.of_held_out(*sides.both(one, two), 0)
    left = {asked(m).lower() for m in both}
    assert left and not remarks and not left & (trained[one] | trained[two])
    assert len(both) < len(held), "with another seed the other run was trained on some of these"


def test_what_the_other_run_was_trained_on_may_not_be_known(two_runs, tiny_model, tmp_path):
    data = make_data(tmp_path / "gone.jsonl")
    lost = folders.create(resolved(tiny_model, data, output_dir=str(tmp_path / "lost")))
    (lost.path / "checkpoints").symlink_to(two_runs[1].path / "checkpoints")
    data.unlink()
    found, remarks = prompts.of_held_out(*sides.both(two_runs[0], lost), 0)
    assert found and len(remarks) == 1 and "was trained on some of these prompts is not known" in remarks[0]


def test_a_question_is_compared_as_everywhere(two_runs):
    class Row:
        prompt = [{"role": "user", "content": "What  IS 2 plus 2?"}]

    assert question(Row) == "what is 2 plus 2?"
