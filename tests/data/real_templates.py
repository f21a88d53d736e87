"""The chat templates that come with TRL, each on a small tokenizer that knows its special tokens."""

import re
from pathlib import Path

import trl

FOLDER = Path(trl.__file__).parent / "chat_templates"
_ALIKE = {"gemma4_v2", "gemma4_v3", "gemma4_v4", "lfm2_v2", "lfm2_2_5_vl", "llama3_2", "phi3", "qwen2_5_vl", "qwen3_vl"}
NAMES = sorted(p.stem for p in FOLDER.glob("*.jinja") if not p.stem.endswith("_training") and p.stem not in _ALIKE)
_SPECIAL = re.compile(
    r"<\|[^|<>{}'\"\s]+\|>|<｜[^｜{}'\"]+｜>|<(?:start|end)_of_turn>|<end_of_utterance>|<\|?turn\|?>|<\|?channel\|?>"
    r"|<\|tool\w*>|<tool\w*\|>|\[/?INST\]|<bos>"
)
_ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|return|>", "<|eot|>", "<turn|>", "<end_of_turn>", "<|end|>", "<end_of_utterance>",
    "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>",
)  # fmt: skip
_alphabet = []


def of(name):
    return with_template((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))


def with_template(template):
    """A byte-level tokenizer without merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if not _alphabet:
        _alphabet.extend(sorted(pre_tokenizers.ByteLevel.alphabet()))
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(_alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    end = next((e for e in _ENDS if e in template), "</s>")
    bos = "<bos>" if "bos_token" in template else None
    names = {end, *_SPECIAL.findall(template), *([bos] if bos else [])}
    core.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in sorted(names)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=end, chat_template=template)
