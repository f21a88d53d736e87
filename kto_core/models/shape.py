"""The sizes of a decoder, from its config.json or a table of well-known models: what the memory plan counts with.

Never touches the network and never reads weights. Knows nothing of GPUs, training or configuration.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from kto_core.errors import ModelError

from .language import recurrent_sizes
from .language.recurrent_sizes import Recurrent
from .model_gate import read_object

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN = ("gate_proj", "up_proj", "down_proj")
REQUIRED = (
    ("num_hidden_layers", "n_layer"),
    ("hidden_size", "n_embd"),
    ("num_attention_heads", "n_head"),
    ("vocab_size",),
)
TIED = re.compile("gemma|^lfm2$")  # types that share the embedding's weights unless they say otherwise
FUSED = {"qkv_proj": ATTENTION[:3], "gate_up_proj": FFN[:2]}  # Phi-3 stores several projections as one


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only transformer. ``source`` says where they come from; ``exact`` whether they are its own."""

    architecture: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool  # lm_head shares the embedding's weights
    max_position_embeddings: int | None
    head_dim: int
    experts: int = 0
    experts_per_token: int = 0
    extra: int = 0  # linear weights that a mixture has beyond its experts and plain attention; may be negative
    quantized: bool = False  # the checkpoint is in 4 bits already
    query_gate: bool = False  # the query projection also makes a gate of its width
    recurrent: Recurrent | None = None
    source: str = ""
    exact: bool = True

    @property
    def busy_experts(self) -> int:
        """Experts that compute a token; 1 where the FFN is not a mixture."""
        return max(1, self.experts_per_token)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer of a decoder layer that attends; the FFN's are those of one expert."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        h, i = self.hidden, self.intermediate
        shapes = [(h, q * (1 + self.query_gate)), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)]
        return dict(zip(ATTENTION + FFN, shapes, strict=True))

    @property
    def linear_parameters(self) -> int:
        """Parameters of all decoder layers' linear layers, every expert counted."""
        experts = max(self.experts, 1)
        parts = [a * b * (experts * self.layers if n in FFN else self.attending) for n, (a, b) in self.linears.items()]
        if self.recurrent:
            parts += [a * b * self.recurrent.layers for _, (a, b) in self.recurrent.linears]
        return sum(parts) + self.extra

    @property
    def attending(self) -> int:
        """Layers that attend."""
        return self.layers - (self.recurrent.layers if self.recurrent else 0)

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts, which LoRA and sharding leave alone."""
        return self.layers * self.experts * sum(a * b for n, (a, b) in self.linears.items() if n in FFN)

    @property
    def other_parameters(self) -> int:
        """Embeddings, output head, norms and router: what 4-bit loading leaves alone."""
        head = 0 if self.tied else self.vocabulary * self.hidden
        return self.vocabulary * self.hidden + head + self.layers * self.hidden * (2 + self.experts) + self.hidden

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.other_parameters

    @property
    def kv_width(self) -> int:
        """Numbers a token keeps in one layer's K/V store."""
        return 2 * self.kv_heads * self.head_dim

    def adapted(self, target_modules: list[str] | str) -> dict[str, tuple[int, int]]:
        """The linear layers of a decoder layer that attends which LoRA adapts. Fused expert weights are none."""
        names = set(self.linears) if target_modules == "all-linear" else set()
        if not names:
            for target in target_modules:
                names |= set(FUSED.get(target.rpartition(".")[2], (target.rpartition(".")[2],)))
        return {n: s for n, s in self.linears.items() if n in names and not (self.experts and n in FFN)}

    def lora_parameters(self, target_modules: list[str] | str, r: int) -> int:
        adapted = self.adapted(target_modules).items()
        count = sum((self.layers if n in FFN else self.attending) * (a + b) for n, (a, b) in adapted)
        if self.recurrent:
            names = None if target_modules == "all-linear" else {t.rpartition(".")[2] for t in target_modules}
            linears = [s for name, s in self.recurrent.linears if names is None or name in names]
            count += self.recurrent.layers * sum(a + b for a, b in linears)
        return r * count


def decoder_part(config: dict, name: str) -> dict:
    """The part of a config.json that describes the decoder: models that also see images nest their language model.

    Raises:
        ModelError: it is no object.
    """
    text = config.get("text_config") or config
    if not isinstance(text, dict) or not isinstance(config.get("quantization_config") or {}, dict):
        raise ModelError(f"The config.json of {name} is no model's: its parts have the wrong kinds. Choose another.")
    return text


def from_config(config: dict, name: str, source: str = "config.json") -> Shape:
    """The Shape that the config.json of model ``name`` describes.

    Raises:
        ModelError: it has not the fields of a decoder-only transformer, or one that makes no sense.
    """
    text = decoder_part(config, name)
    kind = str(text.get("model_type") or config.get("model_type", ""))
    if not all(any(key in text for key in keys) for keys in REQUIRED):
        text = recurrent_sizes.defaults(kind) | text

    def number(*keys: str, default: int | None = None) -> int:
        for key in keys:
            if isinstance(text.get(key), int):
                if not (0 if default == 0 else 1) <= text[key] < 2**31:
                    raise ModelError(f"The config.json of {name} says {key}: {str(text[key])[:30]}. Choose another.")
                return text[key]
        if default is None:
            raise ModelError(
                f"{name} is not a supported text model: its config.json lacks {keys[0]}. Choose another model."
            )
        return default

    layers, hidden, heads = (number(*keys) for keys in REQUIRED[:3])
    experts = number("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", default=0)
    widths = (*(("moe_intermediate_size",) if experts else ()), "intermediate_size", "n_inner")
    shape = Shape(
        architecture=kind,
        hidden=hidden,
        intermediate=recurrent_sizes.ffn_width(text, kind, number(*widths, default=4 * hidden)),
        layers=layers,
        heads=heads,
        kv_heads=number("num_key_value_heads", default=heads),
        vocabulary=number(*REQUIRED[3]),
        tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", bool(TIED.search(kind))))),
        max_position_embeddings=number("max_position_embeddings", "n_positions", default=0) or None,
        head_dim=number("head_dim", default=hidden // heads),
        experts=experts,
        experts_per_token=number("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", default=0),
        quantized="4bit" in str(config.get("quantization_config") or {}).replace("_", ""),
        source=source,
        query_gate=kind.startswith(("qwen3_5", "qwen3_next")),
        recurrent=recurrent_sizes.from_config(text, kind, hidden, layers, number),
    )
    return replace(shape, extra=_extra(shape, text)) if experts else shape


def _extra(s: Shape, text: dict) -> int:
    """Linear weights of a mixture beyond `Shape`'s: shared experts, layers without experts, latent attention."""

    def size(key: str) -> int:
        return value if isinstance(value := text.get(key), int) and 0 < value < 2**31 else 0

    kinds = text.get("mlp_layer_types")
    first = size("first_k_dense_replace") or size("num_dense_layers") or size("moe_layer_start_index")
    plain, one = min(kinds.count("dense") if isinstance(kinds, list) else first, s.layers), 3 * s.hidden
    shared = size("n_shared_experts") or size("num_shared_experts") or size("moe_num_shared_experts")
    shared *= s.intermediate
    shared = shared or size("shared_expert_intermediate_size") or size("shared_intermediate_size")
    if text.get("enable_moe_block"):  # Gemma 4: beside the layer's own FFN
        shared = size("intermediate_size")
    found = (s.layers - plain) * one * shared + plain * one * (size("intermediate_size") - s.experts * s.intermediate)
    if rank := size("kv_lora_rank"):
        rope, content, value = size("qk_rope_head_dim"), size("qk_nope_head_dim"), size("v_head_dim")
        query = s.heads * (rope + content)
        latent = size("q_lora_rank") * (s.hidden + query) if size("q_lora_rank") else s.hidden * query
        latent += s.hidden * (rank + rope) + s.heads * (rank * (content + value) + value * s.hidden)
        found += s.layers * (latent - sum(a * b for n, (a, b) in s.linears.items() if n in ATTENTION))
    return found


def _known(arch, hidden, intermediate, layers, heads, kv_heads, vocabulary, tied, positions, head_dim=None, experts=0,
           busy=0):  # fmt: skip
    return Shape(arch, hidden, intermediate, layers, heads, kv_heads, vocabulary, tied, positions,
                 head_dim or hidden // heads, experts, busy, source="published sizes")  # fmt: skip


def _gated_delta(hidden, intermediate, layers, heads, values):
    """Qwen3.5 and later: three layers of Gated DeltaNet, ``values`` heads wide, for each that attends."""
    sizes = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, "vocab_size": 248320,
        "num_attention_heads": heads, "num_key_value_heads": 4, "head_dim": 256, "full_attention_interval": 4,
        "linear_num_key_heads": 16, "linear_num_value_heads": values, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "max_position_embeddings": 262144, "tie_word_embeddings": False,
    }  # fmt: skip
    return from_config({"model_type": "qwen3_5_text", **sizes}, "", source="published sizes")


# From the published config.json files. The presets and their alternatives are all here, so that a plan can be made
# before anything was downloaded.
KNOWN = {
    "smollm2-135m": _known("llama", 576, 1536, 30, 9, 3, 49152, True, 8192),
    "qwen2.5-0.5b": _known("qwen2", 896, 4864, 24, 14, 2, 151936, True, 32768),
    "qwen2.5-1.5b": _known("qwen2", 1536, 8960, 28, 12, 2, 151936, True, 32768),
    "qwen2.5-3b": _known("qwen2", 2048, 11008, 36, 16, 2, 151936, True, 32768),
    "qwen2.5-7b": _known("qwen2", 3584, 18944, 28, 28, 4, 152064, False, 32768),
    "qwen2.5-14b": _known("qwen2", 5120, 13824, 48, 40, 8, 152064, False, 32768),
    "qwen3-4b": _known("qwen3", 2560, 9728, 36, 32, 8, 151936, True, 40960, 128),
    "qwen3-8b": _known("qwen3", 4096, 12288, 36, 32, 8, 151936, False, 40960, 128),
    "qwen3-14b": _known("qwen3", 5120, 17408, 40, 40, 8, 151936, False, 40960, 128),
    "qwen3-32b": _known("qwen3", 5120, 25600, 64, 64, 8, 151936, False, 40960, 128),
    "qwen3.5-9b": _gated_delta(4096, 12288, 32, 16, 32),
    "qwen3.8-27b": _gated_delta(5120, 17408, 64, 24, 48),
    "smollm3-3b": _known("smollm3", 2048, 11008, 36, 16, 4, 128256, True, 65536),
    "gemma-3-4b": _known("gemma3_text", 2560, 10240, 34, 8, 4, 262208, True, 131072, 256),
    "gemma-3-12b": _known("gemma3_text", 3840, 15360, 48, 16, 8, 262208, True, 131072, 256),
    "gemma-3-27b": _known("gemma3_text", 5376, 21504, 62, 32, 16, 262208, True, 131072, 128),
    "gemma-4-31b": _known("gemma4_text", 5376, 21504, 60, 32, 16, 262144, True, 262144, 256),
    "olmo-3-7b": _known("olmo3", 4096, 11008, 32, 32, 32, 100278, False, 65536),
    "ministral-3-3b": _known("ministral3", 3072, 9216, 26, 32, 8, 131072, True, 262144, 128),
    "ministral-3-8b": _known("ministral3", 4096, 14336, 34, 32, 8, 131072, False, 262144, 128),
    "ministral-3-14b": _known("ministral3", 5120, 16384, 40, 32, 8, 131072, False, 262144, 128),
    "llama-3.2-1b": _known("llama", 2048, 8192, 16, 32, 8, 128256, True, 131072),
    "llama-3.2-3b": _known("llama", 3072, 8192, 28, 24, 8, 128256, True, 131072),
    "llama-3.1-8b": _known("llama", 4096, 14336, 32, 32, 8, 128256, False, 131072),
    "llama-2-7b": _known("llama", 4096, 11008, 32, 32, 32, 32000, False, 4096),
    "llama-2-13b": _known("llama", 5120, 13824, 40, 40, 40, 32000, False, 4096),
    "mistral-7b": _known("mistral", 4096, 14336, 32, 32, 8, 32768, False, 32768),
    "mistral-nemo-12b": _known("mistral", 5120, 14336, 40, 32, 8, 131072, False, 131072, 128),
    "phi-3-mini-4k": _known("phi3", 3072, 8192, 32, 32, 32, 32064, False, 4096),
    "phi-4": _known("phi3", 5120, 17920, 40, 40, 10, 100352, False, 16384),
    "mistral-small-24b": _known("mistral", 5120, 32768, 40, 32, 8, 131072, False, 32768, 128),
    "gpt-oss-20b": _known("gpt_oss", 2880, 2880, 24, 64, 8, 201088, False, 131072, 64, 32, 4),
    "qwen3-30b-a3b": _known("qwen3_moe", 2048, 768, 48, 32, 4, 151936, False, 40960, 128, 128, 8),
}
ALIASES = {
    "demo": "smollm2-135m",
    "meta-llama-3.1-8b": "llama-3.1-8b",
    "mistral-nemo": "mistral-nemo-12b",
    "mistral-small-3.2-24b": "mistral-small-24b",
    "qwen3-coder-30b-a3b": "qwen3-30b-a3b",
    "qwen3.5-27b": "qwen3.8-27b",
    "qwen3.6-27b": "qwen3.8-27b",
}
SUFFIX = re.compile(r"(-unsloth|-bnb-4bit|-instruct|-chat|-hf|-it|-bf16|-v0\.\d|-\d{4})+$")
SIZE = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)b(?![a-z])")


def find(name: str) -> Shape | None:
    """The Shape of a model: from its folder, the Hub's local cache, the table, or scaled to the size in its name.

    Returns None where the name tells nothing. Reads at most one small file; never the network.
    """
    if (local := _local(name)) is not None:
        return local
    stem = SUFFIX.sub("", name.rstrip("/").rpartition("/")[2].lower())
    stem = ALIASES.get(stem, stem)
    if stem in KNOWN:
        return replace(KNOWN[stem], quantized="4bit" in name.lower())
    if found := SIZE.search(stem):
        return estimate(float(found.group(1)) * 1e9)
    return None


def estimate(parameters: float) -> Shape:
    """The known dense Shape nearest in size, its layers scaled so that the parameters agree."""
    dense = [s for s in KNOWN.values() if not s.experts and s.recurrent is None]
    near = min(dense, key=lambda s: abs(s.parameters / parameters - 1))
    layers = max(1, round((parameters - near.vocabulary * near.hidden) / (near.linear_parameters / near.layers)))
    text = f"estimated for {parameters / 1e9:g} billion parameters"
    return replace(near, layers=layers, source=text, exact=False, max_position_embeddings=None)


def _local(name: str) -> Shape | None:
    own = Path(name).expanduser() / "config.json"
    path = own if own.is_file() else _cached(name)
    if path is None:
        return None
    try:
        return from_config(read_object(Path(path)), name)
    except (ModelError, ValueError, TypeError, AttributeError, ArithmeticError):
        return None  # not a decoder we can count; loading the model will say what is wrong with it


def _cached(name: str) -> str | None:
    """config.json of a Hub id in the Hub's local cache."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return found if isinstance(found, str) else None
