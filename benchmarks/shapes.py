"""Models of a real architecture's shape with random weights: speed and memory do not depend on the values.

``python benchmarks/shapes.py NAME FOLDER [--nf4]`` saves one (bf16, safetensors) with the demo model's tokenizer. With
``--nf4`` it is written as a 4-bit checkpoint in bitsandbytes' layout, which the presets' Hub ids are too: a quarter of
the bytes, and never more than one layer in memory. Sizes are those of the published config.json files; gpt-oss is
written in the layout of its 4-bit checkpoints; a vocabulary smaller than the tokenizer's (49,152) is enlarged to it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ROOT = Path(tempfile.gettempdir()) / "kto-shapes"  # where the scripts look for shapes, and make them
# name: model_type, hidden, intermediate (of an expert, in a mixture), layers, heads, key/value heads, vocabulary, tied
# embeddings
SHAPES = {
    "smollm2-135m": ("llama", 576, 1536, 30, 9, 3, 49152, True),
    "llama-3.2-3b": ("llama", 3072, 8192, 28, 24, 8, 128256, True),
    "qwen2.5-3b": ("qwen2", 2048, 11008, 36, 16, 2, 151936, True),
    "mistral-7b": ("mistral", 4096, 14336, 32, 32, 8, 32768, False),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "llama-3.1-8b": ("llama", 4096, 14336, 32, 32, 8, 128256, False),
    "llama-2-13b": ("llama", 5120, 13824, 40, 40, 40, 32000, False),
    "qwen2.5-14b": ("qwen2", 5120, 13824, 48, 40, 8, 152064, False),
    "gpt-oss-20b": ("gpt_oss", 2880, 2880, 24, 64, 8, 201088, False),
    "qwen3.5-9b": ("qwen3_5_text", 4096, 12288, 32, 16, 4, 248320, False),
    "qwen3-30b-a3b": ("qwen3_moe", 2048, 768, 48, 32, 4, 151936, False),
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
EXTRA = {
    "mistral-7b": {"sliding_window": None},
    "qwen3.5-9b": {"head_dim": 256},  # of its recurrent layers transformers' own defaults, which are its sizes
    "gpt-oss-20b": {"num_local_experts": 32},
    "qwen3-30b-a3b": {
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "moe_intermediate_size": 768,
    },
}  # fmt: skip

# transformers' name of all experts' weights -> the linear layers of one
EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def place(root: str | Path, name: str, nf4: bool = False) -> Path:
    """Where below ``root`` a shape is kept; its two forms lie beside each other."""
    return Path(root) / (f"{name}-nf4" if nf4 else name)


def make(
    name: str,
    folder: str | Path,
    tokenizer_dir: str | Path | None = None,
    device: str | None = None,
    *,
    nf4: bool = False,
) -> Path:
    """Save the shape ``name`` with random weights and a tokenizer; a folder that is whole already is kept.

    Args:
        tokenizer_dir: where the tokenizer comes from; default the demo model.
        device: where the weights are drawn; default the GPU if there is one (a 14B model: seconds, not minutes).
        nf4: in 4 bits, layer by layer; else bf16. gpt-oss is always in 4 bits.
    Raises:
        KeyError: no such shape.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = Path(folder)
    if (folder / "tokenizer_config.json").exists():  # saved last
        return folder
    if tokenizer_dir is None:
        from kto_core.models.demo_model import demo_model_dir

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
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if model_type == "gpt_oss":
        write_gpt_oss(config, folder, device)
    elif nf4:
        write_nf4(config, folder, device)
    else:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class _Checkpoint:
    """A checkpoint written file by file, NF4 with double quantization where asked."""

    def __init__(self, folder: Path, device: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.device, self.where = folder, device, {}

    def random(self, *shape: int):
        import torch

        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16) * 0.02

    def quantized(self, name: str, outputs: int, inputs: int) -> dict:
        """A weight in 4 bits with what it takes to undo that, as bitsandbytes names it."""
        from bitsandbytes.functional import quantize_4bit

        weight = self.random(outputs, inputs)
        data, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        parts = state.as_dict(packed=True)
        return {f"{name}.weight": data} | {f"{name}.weight.{k}": v for k, v in parts.items()}

    def write(self, name: str, tensors: dict) -> None:
        from safetensors.torch import save_file

        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, self.folder / name, {"format": "pt"})
        self.where.update(dict.fromkeys(tensors, name))

    def finish(self, config, architecture: str) -> None:
        """The index and config.json."""
        import json

        config.architectures = [architecture]
        config.quantization_config = {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16",
            "llm_int8_skip_modules": ["lm_head"],
        }  # fmt: skip
        config.save_pretrained(self.folder)
        index = {"metadata": {}, "weight_map": self.where}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_nf4(config, folder: Path, device: str) -> None:
    """A decoder's 4-bit checkpoint: its linear layers in NF4, an expert's too; all else in bf16.

    A file a layer, so that no more than one is in memory. Names and sizes are those of transformers' own model, built
    without memory.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    files: dict[str, dict] = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        layer = name.removeprefix("model.layers.").partition(".")[0]
        files.setdefault(f"model-{int(layer):05}" if layer.isdigit() else "model-ends", {})[name] = value.shape
    checkpoint = _Checkpoint(folder, device)
    for file, shapes in files.items():
        tensors = {}
        for name, shape in shapes.items():
            owner, _, kind = name.rpartition(".")
            if owner in linear and kind == "weight":
                tensors |= checkpoint.quantized(owner, *shape)
            elif len(shape) == 3 and kind in EXPERTS:
                for expert in range(shape[0]):
                    for part in EXPERTS[kind]:
                        tensors |= checkpoint.quantized(
                            f"{owner}.{expert}.{part}", shape[1] // len(EXPERTS[kind]), shape[2]
                        )
            elif kind == "weight" and len(shape) == 1:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            else:
                tensors[name] = checkpoint.random(*shape)
        checkpoint.write(f"{file}.safetensors", tensors)
    checkpoint.finish(config, type(model).__name__)


def write_gpt_oss(config, folder: Path, device: str) -> None:
    """The 4-bit layout of gpt-oss checkpoints for QLoRA: every expert two linear layers, NF4 with double quantization.

    A file a layer, so that no more than one is in memory.
    """
    import torch

    checkpoint = _Checkpoint(folder, device)
    random = checkpoint.random
    h, wide = config.hidden_size, config.intermediate_size
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))

    def quantized(name: str, outputs: int, inputs: int) -> dict:
        return checkpoint.quantized(name, outputs, inputs) | {f"{name}.bias": random(outputs)}

    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        tensors = {f"{at}.{n}.weight": torch.ones(h) for n in ("input_layernorm", "post_attention_layernorm")}
        tensors[f"{at}.self_attn.sinks"] = random(config.num_attention_heads)
        for n, (o, n_in) in {"q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q)}.items():
            tensors |= quantized(f"{at}.self_attn.{n}_proj", o, n_in)
        tensors[f"{at}.mlp.router.linear.weight"] = random(config.num_local_experts, h)
        tensors[f"{at}.mlp.router.linear.bias"] = random(config.num_local_experts)
        for e in range(config.num_local_experts):
            tensors |= quantized(f"{at}.mlp.experts.gate_up_projs.{e}", 2 * wide, h)
            tensors |= quantized(f"{at}.mlp.experts.down_projs.{e}", h, wide)
        checkpoint.write(f"model-{i:05}.safetensors", tensors)
    ends = {"model.embed_tokens.weight": random(config.vocab_size, h), "model.norm.weight": torch.ones(h)}
    checkpoint.write("model-ends.safetensors", ends | {"lm_head.weight": random(config.vocab_size, h)})
    checkpoint.finish(config, "GptOssForCausalLM")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder")
    parser.add_argument("--tokenizer", help="folder of a tokenizer; default the demo model's")
    parser.add_argument("--nf4", action="store_true", help="a 4-bit checkpoint instead of bf16")
    args = parser.parse_args()
    print(make(args.name, args.folder, args.tokenizer, nf4=args.nf4))
