"""A tokenizer with a pad token and a chat template, opened from a folder; and its files in what is made from it.

transformers 5 writes a tokenizer anew and leaves out what other programs read: ``added_tokens_decoder``,
``add_bos_token``, ``added_tokens.json``, the tokenizer's class. llama.cpp's converter then takes turn markers for plain
text, and transformers 4 cannot open the folder. So the base's own files travel as they came, and only what was changed
here is written into them: the padding token, the end token and the chat template.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from kto_core.errors import ModelError, first_line
from kto_core.guards.libraries import transformers_ready

CONFIG, TEMPLATE, SPECIAL = "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"
FILES = (
    "tokenizer.json", CONFIG, SPECIAL, "added_tokens.json", "tokenizer.model*", "spiece.model",
    "tekken.json", "*.tiktoken", "vocab.json", "vocab.txt", "merges.txt", "chat_template.json",
    TEMPLATE, "additional_chat_templates/*",
)  # fmt: skip
ANY_CLASS = "PreTrainedTokenizerFast"  # a name of transformers 4 that 5 knows, too
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') + 'TURN_END' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def open_tokenizer(folder: Path, name: str):
    """`load_tokenizer` in this process, without a trial. ``name`` stands in messages only."""
    transformers_ready()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as e:  # tokenizers raises bare Exception for broken files
        raise ModelError(
            f"The tokenizer of {name} cannot be loaded ({first_line(e)}). Download the model again, or choose another."
        ) from e
    if tokenizer.eos_token is None:
        raise ModelError(
            f"The tokenizer of {name} has no end-of-sequence token, so answers would never end. Choose another model."
        )
    if not tokenizer.chat_template:
        known = "<|im_end|>" in tokenizer.get_vocab()
        if known:  # otherwise turns end with the model's own end token: one it knows beats text that looks like one
            tokenizer.eos_token = "<|im_end|>"
        tokenizer.chat_template = CHATML.replace("TURN_END", tokenizer.eos_token)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_tokenizer(tokenizer, folder: Path) -> None:
    """The files of ``tokenizer`` (as `open_tokenizer` gives it) into ``folder``, which is there already.

    Raises:
        OSError: they cannot be read or written.
    """
    base = Path(tokenizer.name_or_path)
    if not _carry(base, folder):  # none of its own: what transformers makes of it
        tokenizer.save_pretrained(folder)
    config = _read(folder / CONFIG)
    _write(folder / CONFIG, _for_all_readers(config | _changed(config, tokenizer)))
    special = _read(folder / SPECIAL)
    if special and (changed := _changed(special, tokenizer)):
        _write(folder / SPECIAL, special | changed)
    if tokenizer.chat_template and not has_template(folder):
        (folder / TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")


def has_template(folder: Path) -> bool:
    """Whether transformers finds a chat template among a folder's tokenizer files."""
    return (folder / TEMPLATE).is_file() or bool(_read(folder / CONFIG).get("chat_template"))


def _carry(base: Path, folder: Path) -> bool:
    """Copy what is there. Returns whether that is a whole tokenizer."""
    found = [file for pattern in FILES for file in base.glob(pattern) if file.is_file()]
    for file in found:
        target = folder / file.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)
    return CONFIG in {file.name for file in found}


def _changed(config: dict, tokenizer) -> dict:
    """Named tokens that differ from what a file says: those that this program has chosen."""
    named = {"pad_token": tokenizer.pad_token, "eos_token": tokenizer.eos_token}
    return {key: text for key, text in named.items() if _text(config.get(key)) != text}


def _text(token) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _for_all_readers(config: dict) -> dict:
    """What only transformers 5 reads, said as transformers 4 says it, which 5 reads as well."""
    found = {key: value for key, value in config.items() if key not in ("is_local", "local_files_only")}
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = ANY_CLASS
    if isinstance(found.get("extra_special_tokens"), list):
        found.setdefault("additional_special_tokens", found.pop("extra_special_tokens"))
    return found


def _read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _write(file: Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
