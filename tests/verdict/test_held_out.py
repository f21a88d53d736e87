"""What a question is, and the neutral text."""

import pytest

from kto_core.data.records.rows import Row
from kto_core.verdict import held_out, neutral


def asking(*prompt) -> str:
    return held_out.question(Row(list(prompt), [{"role": "assistant", "content": "a"}], True, 1))


def user(content) -> dict:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    "prompt",
    [
        [user("  WHAT is\n\n this? ")],
        [{"role": "system", "content": "Be brief."}, user("What is this?")],
        [user("Hi"), {"role": "assistant", "content": "Hello"}, user("what\u00a0is this?")],
        [user([{"type": "text", "text": "What is"}, {"type": "text", "text": "this?"}])],
        [user("Ｗhat is this?")],
        [user("What is this?"), {"role": "assistant", "content": None}, {"role": "tool", "content": "42"}],
    ],
)
def test_the_same_question(prompt):
    assert asking(*prompt) == asking(user("What is this?"))


@pytest.mark.parametrize("text", ["What is that?", "What is this", "Whatisthis?", ""])
def test_another_question(text):
    assert asking(user(text)) != asking(user("What is this?"))


def test_a_prompt_without_a_user_asks_as_a_whole():
    system = {"role": "system", "content": "Write a poem."}
    assert asking(system) == "write a poem." != asking({"role": "system", "content": "Write a song."})


def test_the_neutral_text_is_long_and_of_several_subjects():
    paragraphs = neutral.paragraphs()
    assert len(paragraphs) >= 10 and 1400 <= sum(len(p.split()) for p in paragraphs) <= 1700
    assert all(p.isascii() and p.endswith(".") for p in paragraphs)


def test_windows_predict_each_token_once(demo_model):
    """But the first of a window where the tokenizer begins a text with nothing; then it is the context."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    ids = [tokenizer(p, add_special_tokens=False).input_ids for p in neutral.paragraphs()]
    windows = neutral.windows(tokenizer)
    assert [i for context, part in windows for i in context + part] == [i for p in ids for i in p]
    assert all(len(context) == 1 and len(part) < neutral.WINDOW for context, part in windows)

    class Begins:
        bos_token_id = 7

        def __call__(self, text, add_special_tokens=True):
            found = tokenizer(text, add_special_tokens=False)
            found["input_ids"] = [7] * add_special_tokens + found["input_ids"]
            return found

    windows = neutral.windows(Begins())
    assert {context[0] for context, _ in windows} == {7}
    assert [i for _, part in windows for i in part] == [i for p in ids for i in p]
