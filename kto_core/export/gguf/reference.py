"""What the merged model says and does, for its GGUF files to be compared with. Runs in a child process, on the CPU.

Nothing here depends on the GGUF files, so one reference serves all kinds of a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kto_core.guards.child import tell

TEXTS = (  # what tokenizers treat differently: blanks, digits, scripts, code, marks of turns
    "The quick brown fox jumps over the lazy dog.",
    "  two blanks before,  between and after  ",
    "In 2024 it cost 1,234.56 EUR: 50% more than 0x7F or 1e-5.",
    "def f(x):\n\tif x:\n\t\treturn {'a': [1, 2]}\n\n\n# end",
    "I'm sure they've said we'll don't DON'T isn't.",
    "Straße, naïve café, façade; Ærø; ½ × ¼ ≠ ¾ … “quoted” – dash",
    "Привет, мир! Как дела?",
    "今天天气很好。日本語も、한국어도 됩니다.",
    "مرحبا بالعالم",
    "👍 good 👎 bad 🧑‍🚀 🇫🇷",
    'https://example.org/a?b=c&d=%20#e <tag attr="1">text</tag>',
    "A line\r\nand another\n\n\n    indented",
)
CONVERSATIONS = (
    [("user", "Hello")],
    [("system", "Answer in one sentence."), ("user", "What is the capital of France?")],
    [("user", "Name a colour."), ("assistant", "Blue."), ("user", "Another one?")],
    [("system", "Be brief."), ("user", "Hi!"), ("assistant", "Hello."), ("user", "2 + 2?")],
)
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "How do I boil an egg?",
    "Write a short poem about the sea.",
    "Explain in one sentence why the sky is blue.",
    "Translate 'good morning' into Spanish.",
    "Write a Python function that adds two numbers.",
)
TOKENS = 16  # of an answer; the user's question gets more
MEMORY = 1.3  # times the weights, for one pass


def messages(talk) -> list[dict]:
    return [{"role": role, "content": text} for role, text in talk]


def all_of(merged: str, question: str, length: int) -> dict:
    """`texts`, with ``answers`` (`answers`; [] where there is not enough memory) and ``why_not`` ("" or the reason)."""
    from kto_core.errors import HardwareError

    tokenizer = _tokenizer(merged)
    try:
        said, why_not = answers(merged, tokenizer, question, length), ""
    except HardwareError as e:
        said, why_not = [], str(e)
    return texts(tokenizer) | {"answers": said, "why_not": why_not}


def texts(tokenizer) -> dict:
    """Texts and conversations as the merged model's tokenizer has them.

    Returns:
        ``texts``: list of {text, ids, with_special}; ``conversations``: list of {messages, text, ids}, whose text is
        None where the template refuses; ``tokens``: ids of ``bos``, ``eos``, ``pad``; ``end``: the id that ends an
        assistant's turn, or None.
    """
    shown = []
    for talk in CONVERSATIONS:
        try:
            text = tokenizer.apply_chat_template(messages(talk), tokenize=False, add_generation_prompt=True)
        except Exception:  # a template may raise whatever it likes
            text = None
        ids = None if text is None else tokenizer(text, add_special_tokens=False).input_ids
        shown.append({"messages": messages(talk), "text": text, "ids": ids})
    return {
        "texts": [
            {
                "text": text,
                "ids": tokenizer(text, add_special_tokens=False).input_ids,
                "with_special": tokenizer(text).input_ids,
            }
            for text in TEXTS
        ],
        "conversations": shown,
        "tokens": {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id},
        "end": _end_of_turn(tokenizer),
    }


def answers(merged: str, tokenizer, question: str, length: int) -> list[dict]:
    """The merged model's own greedy answers, ``question``'s first.

    Returns:
        For each question {prompt, prompt_ids, ids, margins, text, stopped}: ``margins`` are the differences of the two
        largest logits at each token of the answer, its end token included if it came to that.

    Raises:
        HardwareError: not enough memory.
    """
    import psutil
    import torch

    from kto_core.errors import HardwareError
    from kto_core.models.load import load_whole

    size = sum(file.stat().st_size for file in Path(merged).glob("*.safetensors"))
    free = psutil.virtual_memory().available
    if size * MEMORY > free:
        raise HardwareError(
            f"Its answers were not compared: the merged model needs {size * MEMORY / 1e9:.1f} GB of CPU memory, and "
            f"{free / 1e9:.1f} GB are free"
        )
    dtype = torch.float32 if 2 * size * MEMORY < free else "auto"
    tell(None, "Loading the merged model…")
    model: Any = load_whole(Path(merged), dtype=dtype, use_safetensors=True)
    found, asked = [], [question, *(q for q in QUESTIONS if q != question)]
    for i, prompt in enumerate(asked):
        tell(i / len(asked), f"The merged model answers: {i + 1} of {len(asked)}")
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with torch.no_grad():
            out: Any = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length if i == 0 else TOKENS,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
        answer = out.sequences[0, ids.shape[1] :].tolist()
        tops = [logits[0].float().topk(2).values for logits in out.logits]
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        found.append({
            "prompt": prompt,
            "prompt_ids": ids[0].tolist(),
            "ids": answer,
            "margins": [float(a - b) for a, b in tops],
            "text": tokenizer.decode(answer, skip_special_tokens=True),
            "stopped": bool(answer) and answer[-1] in ends,
        })  # fmt: skip
    return found


def _tokenizer(merged: str):
    from kto_core.guards.libraries import transformers_ready

    transformers_ready()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(merged, trust_remote_code=False)


def _end_of_turn(tokenizer) -> int | None:
    """The first token that the template writes after an answer: the one that training taught to end with."""
    talk = messages([("user", "Hello"), ("assistant", "ANSWER")])
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False)
    except Exception:  # as above
        return None
    after = text.rpartition("ANSWER")[2].lstrip()
    ids = tokenizer(after, add_special_tokens=False).input_ids if after else []
    return ids[0] if ids and ids[0] in tokenizer.all_special_ids else None
