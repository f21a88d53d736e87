"""The sizes of a decoder's layers that go along the sequence instead of attending, from its config.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Recurrent(NamedTuple):
    """The layers that go along the sequence instead of attending, ``layers`` of them.

    ``linears``: name, (in, out) of each linear layer beside the FFN's. ``channels`` of the convolution over ``width``
    tokens. Of the gated delta rule the numbers of a token's keys and values, all ``heads`` together; 0 where a layer is
    a convolution only.
    """

    layers: int
    linears: tuple[tuple[str, tuple[int, int]], ...]
    channels: int
    width: int
    keys: int = 0
    values: int = 0
    heads: int = 0

    @property
    def state(self) -> int:
        """Numbers of one layer's state."""
        return self.keys * self.values // max(1, self.heads)


def ffn_width(text: dict, kind: str, intermediate: int) -> int:
    """LFM2 says the width of a plain FFN; its gated one has as many weights."""
    if kind != "lfm2" or not text.get("block_auto_adjust_ff_dim", True):
        return intermediate
    factor, unit = text.get("block_ffn_dim_multiplier", 1.0), text.get("block_multiple_of", 256)
    width = 2 * intermediate // 3
    return width if factor is None else -(-int(factor * width) // unit) * unit


def from_config(text: dict, kind: str, hidden: int, layers: int, number: Callable[..., int]) -> Recurrent | None:
    """Of the families whose layers are known: Qwen3.5, Qwen3-Next, OLMo hybrid and LFM2."""
    kinds = text.get("layer_types")
    if isinstance(kinds, list):
        count = sum(k in ("linear_attention", "conv") for k in kinds)
    elif isinstance(attending := text.get("full_attn_idxs"), list):
        count = layers - len(attending)
    else:
        count = layers - layers // number("full_attention_interval", default=4)
    if not 0 < count <= layers:
        return None
    if kind.startswith("lfm2"):
        both = (("in_proj", (hidden, 3 * hidden)), ("out_proj", (hidden, hidden)))
        return Recurrent(count, both, hidden, number("conv_L_cache", default=3))
    if not kind.startswith(("qwen3_5", "qwen3_next", "olmo_hybrid")):
        return None
    names = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    silent = defaults(kind) if any(n not in text for n in names) else {}
    few, heads, key, value = (number(n, default=silent.get(n)) for n in names)
    keys, values = few * key, heads * value
    if kind == "olmo_hybrid":
        outs = {"q_proj": keys, "k_proj": keys, "v_proj": values, "a_proj": heads, "b_proj": heads, "g_proj": values}
        last = "o_proj"
    elif kind == "qwen3_next":
        outs, last = {"in_proj_qkvz": 2 * keys + 2 * values, "in_proj_ba": 2 * heads}, "out_proj"
    else:
        outs = {"in_proj_qkv": 2 * keys + values, "in_proj_z": values, "in_proj_b": heads, "in_proj_a": heads}
        last = "out_proj"
    linears = (*((name, (hidden, out)) for name, out in outs.items()), (last, (values, hidden)))
    width = number("linear_conv_kernel_dim", default=4)
    return Recurrent(count, linears, 2 * keys + values, width, heads * key, values, heads)


def defaults(kind: str) -> dict:
    """What transformers takes where a config.json is silent, as Gemma 3's is of its heads; {} for unknown types."""
    from kto_core.guards.libraries import transformers_ready

    transformers_ready()
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[kind]().get_text_config().to_dict() if kind in CONFIG_MAPPING else {}
