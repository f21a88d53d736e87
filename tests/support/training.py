"""Helpers of the training tests: a two-layer model that trains in a blink, small data, and waiting without sleeping."""

import json
import os
import time
from pathlib import Path

from kto_core.config import resolving
from kto_core.runs.events import fold, read

# where runs of several processes train: KTO_TESTS_CARDS=1 takes this machine's cards and NCCL, not its CPU and gloo
PLACE = {} if os.environ.get("KTO_TESTS_CARDS") else {"ACCELERATE_USE_CPU": "1"}

FAST = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_length": 256,
    "r": 4,
    "lora_alpha": 8,
    "learning_rate": 0.01,
    "save_steps": 100,
    "engine": "trl",
    "warmup_ratio": 0.0,
}


def make_tiny(folder: Path, demo: Path) -> Path:
    """A random two-layer Llama that reads bytes, with the demo model's chat template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(special + letters)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|im_end|>", **names)
    tokenizer.chat_template = (demo / "chat_template.jinja").read_text()
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            **shape,
            **ids,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_other(folder: Path, tiny: Path, model_type: str, **settings) -> Path:
    """A random model of another architecture, of the size and with the tokenizer of ``tiny``."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from kto_core.guards.libraries import transformers_ready

    transformers_ready()
    shutil.copytree(tiny, folder)
    own = AutoConfig.from_pretrained(tiny)
    names = ("intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
             "hidden_size", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")  # fmt: skip
    config = AutoConfig.for_model(model_type, **{n: getattr(own, n) for n in names}, head_dim=16, **settings)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def make_wrapper(folder: Path, tiny: Path, architecture: str) -> Path:
    """A random model that also takes images (`oracle.WRAPPERS`), all of it, with the tokenizer of ``tiny``."""
    import shutil

    import torch

    from kto_core.guards.libraries import transformers_ready

    transformers_ready()
    from transformers import AutoModelForImageTextToText

    from tests.support import oracle

    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(oracle.config_of(architecture)).save_pretrained(folder)
    return folder


def tiny_cache(folder: Path, demo: Path) -> Path:
    """A cache folder whose demo model is the one of `make_tiny`."""
    from kto_core.models import demo_model as maker

    make_tiny(folder / "demo" / maker.FOLDER, demo)
    maker._write_manifest(folder / "demo" / maker.FOLDER)
    return folder


def make_data(file: Path, rows: int = 24) -> Path:
    """Short answers are good, long ones are not."""
    with open(file, "w") as f:
        for i in range(rows):
            answer = f"It is {2 * i}." if i % 2 else f"Well, that is a long story about the number {i}, dear friend."
            row = {
                "prompt": [{"role": "user", "content": f"What is {i} plus {i}?"}],
                "completion": [{"role": "assistant", "content": answer}],
                "label": bool(i % 2),
            }
            f.write(json.dumps(row) + "\n")
    return file


def resolved(model, data, **overrides):
    return resolving.resolve("demo", {"model": str(model), "data": str(data), **FAST, **overrides}, origin="test")


def events(run_dir) -> list[dict]:
    return read(Path(run_dir) / "events.jsonl")[0]


def state(run_dir):
    return fold(events(run_dir))


def metrics(
    run_dir, ignore=("t", "tokens_per_second", "examples_per_second", "eta", "gpu_memory", "kind")
) -> list[dict]:
    """The run's metrics after folding (a resumed run's repeated steps once), without what depends on the clock."""
    return [{k: v for k, v in m.items() if k not in ignore and "second" not in k and "runtime" not in k}
            for m in state(run_dir).metrics]  # fmt: skip


def wait(condition, seconds: float = 60.0):
    """Poll until ``condition()`` is true; its value. Fails after ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"nothing happened within {seconds} s")
