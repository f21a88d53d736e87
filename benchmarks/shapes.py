"""Models of a real architecture's shape with random weights: speed and memory do not depend on the values.

``python benchmarks/shapes.py NAME FOLDER`` saves one (bf16, safetensors) with the demo model's tokenizer. Sizes are
those of the published config.json files; a vocabulary smaller than the tokenizer's (49,152) is enlarged to it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# name: model_type, hidden, intermediate, layers, heads, key/value heads, vocabulary, tied embeddings
SHAPES = {
    "llama-3.2-3b": ("llama", 3072, 8192, 28, 24, 8, 128256, True),
    "qwen2.5-3b": ("qwen2", 2048, 11008, 36, 16, 2, 151936, True),
    "mistral-7b": ("mistral", 4096, 14336, 32, 32, 8, 32768, False),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "llama-3.1-8b": ("llama", 4096, 14336, 32, 32, 8, 128256, False),
    "llama-2-13b": ("llama", 5120, 13824, 40, 40, 40, 32000, False),
    "qwen2.5-14b": ("qwen2", 5120, 13824, 48, 40, 8, 152064, False),
    "gpt-oss-20b": ("gpt_oss", 2880, 2880, 24, 64, 8, 201088, False),
}
FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
EXTRA = {"mistral-7b": {"sliding_window": None}, "gpt-oss-20b": {"num_local_experts": 32}}


def make(name: str, folder: str | Path, tokenizer_dir: str | Path | None = None, device: str | None = None) -> Path:
    """Save the shape ``name`` with random bf16 weights and a tokenizer; a folder that is whole already is kept.

    Args:
        tokenizer_dir: where the tokenizer comes from; default the demo model.
        device: where the weights are drawn; default the GPU if there is one (a 14B model: seconds, not minutes).
    Raises:
        KeyError: no such shape.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = Path(folder)
    if (folder / "tokenizer_config.json").exists():  # saved last
        return folder
    if tokenizer_dir is None:
        from kto_core.model import demo_model_dir

        tokenizer_dir = demo_model_dir()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    model_type, *sizes = SHAPES[name]
    config = AutoConfig.for_model(model_type, **dict(zip(FIELDS, sizes, strict=True)), **EXTRA.get(name, {}))
    config.vocab_size = max(config.vocab_size, len(tokenizer))
    config.max_position_embeddings = 32768
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, getattr(tokenizer, key))
    config.dtype = torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder")
    parser.add_argument("--tokenizer", help="folder of a tokenizer; default the demo model's")
    args = parser.parse_args()
    print(make(args.name, args.folder, args.tokenizer))
