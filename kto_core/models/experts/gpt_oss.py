"""gpt-oss in 4 bits: experts as linear layers, and attention with sinks that never holds a score for every pair.

transformers keeps the experts of a layer as two three-dimensional parameters, which bitsandbytes leaves in 16 bits: 40
GB for gpt-oss-20b. Checkpoints made for 4 bits (``…-bnb-4bit``) hold each expert as two linear layers; loaded without
`layout`, their experts would be left at random values. Its attention knows only transformers' eager function, whose
scores take 64 heads × length² numbers a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from . import held
from .bank import Bank

ATTENTION = "kto_sinks"
EXPERT = ".experts.gate_up_projs.0.weight"


def register() -> None:
    """Make the attention function and its masks known to transformers; again does nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, sink_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextlib.contextmanager
def layout(names: Collection[str]) -> Iterator[None]:
    """Inside, gpt-oss models are built with the experts and routers of a checkpoint with these tensors."""
    if not any(n.endswith(EXPERT) for n in names):
        yield
        return
    from transformers.models.gpt_oss import modeling_gpt_oss as code

    before = code.GptOssExperts, code.GptOssTopKRouter
    code.GptOssExperts = Experts
    if any(".router.linear." in n for n in names):
        code.GptOssTopKRouter = router_class(code.GptOssTopKRouter)
    try:
        yield
    finally:
        code.GptOssExperts, code.GptOssTopKRouter = before


class Experts(nn.Module):
    """transformers' GptOssExperts with two linear layers an expert. Gate and up alternate in ``gate_up_projs``."""

    def __init__(self, config):
        super().__init__()
        hidden, wide = config.hidden_size, config.intermediate_size
        self.alpha, self.limit = 1.702, getattr(config, "swiglu_limit", None) or 7.0
        self.gate_up_projs = nn.ModuleList(nn.Linear(hidden, 2 * wide) for _ in range(config.num_local_experts))
        self.down_projs = nn.ModuleList(nn.Linear(wide, hidden) for _ in range(config.num_local_experts))
        self.banks = None  # `into_banks`
        for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):
            self.register_buffer(name, torch.empty(0), persistent=False)  # what transformers initializes

    def forward(self, hidden_states, router_indices=None, routing_weights=None):
        """``[n, hidden]``, the experts of each token ``[n, k]`` and their weights ``[n, k]`` -> ``[n, hidden]``."""
        if self.banks is not None:
            biases = {name: getattr(self, f"{name}_bias") for name in held.WEIGHTS}
            return held.through(self.banks, self._gated, hidden_states, router_indices, routing_weights, biases)
        chosen = router_indices.flatten()
        order = chosen.argsort(stable=True)  # each expert's tokens side by side
        token = order // router_indices.shape[1]
        counts = chosen.bincount(minlength=len(self.down_projs)).tolist()
        gate_up = _each(self.gate_up_projs, hidden_states[token], counts)
        answers = _each(self.down_projs, self._gated(gate_up), counts)
        weighted = answers * routing_weights.flatten()[order, None]
        # each token's answers side by side again: adding them where they belong would round by chance on a GPU, and
        # policy and reference would differ before anything is learned
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return weighted.to(hidden_states.dtype)[back].view(*router_indices.shape, -1).sum(1)

    def _gated(self, gate_up):
        gate = gate_up[..., ::2].clamp(max=self.limit)
        up = gate_up[..., 1::2].clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(gate * self.alpha)


def into_banks(model) -> None:
    """Move the experts' 4-bit weights from a linear layer each into a bank a projection, where they all are alike."""
    for module in [m for m in model.modules() if isinstance(m, Experts)]:
        projections = dict(zip(held.WEIGHTS, (module.gate_up_projs, module.down_projs), strict=True))
        states = [getattr(layer.weight, "quant_state", None) for layers in projections.values() for layer in layers]
        if any(s is None for s in states) or len({(s.blocksize, s.quant_type, s.nested) for s in states}) > 1:
            continue
        how, banks = states[0], nn.ModuleDict()
        for name, layers in projections.items():
            first = layers[0]
            bank = Bank(len(layers), first.out_features, first.in_features, 1, dtype=how.dtype,
                        device=first.weight.device, blocksize=how.blocksize, quant_type=how.quant_type,
                        nested=how.nested)  # fmt: skip
            for i, layer in enumerate(layers):
                bank.put_quantized(i, 0, layer.weight.data, layer.weight.quant_state)
            setattr(module, f"{name}_bias", torch.stack([layer.bias.data for layer in layers]))
            banks[name] = bank
        module.banks, module.sizes = banks, {n: (b.experts, b.outputs, b.inputs) for n, b in banks.items()}
        module.gate_up_projs = module.down_projs = None


def _each(layers, rows, counts: list[int]) -> torch.Tensor:
    """Every expert's layer on its own rows."""
    parts = zip(layers, rows.split(counts), strict=True)
    return torch.cat([layer(part) for layer, part in parts if len(part)])


def fuse(model) -> None:
    """Give models of our layout, linear layers out of their 4 bits, transformers' own, which is what others read."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter

    for layer in model.get_decoder().layers:
        for name, kind in (("experts", GptOssExperts), ("router", GptOssTopKRouter)):
            ours = getattr(layer.mlp, name)
            if type(ours) is kind:
                continue
            with torch.device("meta"):
                theirs = kind(model.config)
            if name == "router":
                values = {"weight": ours.weight.data, "bias": ours.bias.data}
            elif ours.banks is not None:
                dtype = model.dtype
                values = {n: b.dense(slice(0, b.experts), dtype).transpose(1, 2) for n, b in ours.banks.items()}
                values |= {f"{n}_bias": getattr(ours, f"{n}_bias").to(dtype) for n in held.WEIGHTS}
            else:
                up, down = ours.gate_up_projs, ours.down_projs
                values = {"gate_up_proj": torch.stack([m.weight.data.t() for m in up])}
                values["gate_up_proj_bias"] = torch.stack([m.bias.data for m in up])
                values["down_proj"] = torch.stack([m.weight.data.t() for m in down])
                values["down_proj_bias"] = torch.stack([m.bias.data for m in down])
            theirs.load_state_dict(values, assign=True)
            theirs.requires_grad_(False)
            setattr(layer.mlp, name, theirs)
            del ours


class _Linear(nn.Module):
    """A linear layer that bitsandbytes does not take for one."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(outputs, inputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def router_class(stock: type) -> type:
    """transformers' router with its weight one level deeper; a subclass, which its recording of router logits finds."""

    class Router(stock):
        def __init__(self, config):
            nn.Module.__init__(self)
            self.top_k, self.num_experts = config.num_experts_per_tok, config.num_local_experts
            self.hidden_dim = config.hidden_size
            self.linear = _Linear(config.hidden_size, config.num_local_experts)

        weight = property(lambda self: self.linear.weight)
        bias = property(lambda self: self.linear.bias)

    return Router


def sink_attention(module, query, key, value, attention_mask, scaling=None, s_aux=None, **_):
    """transformers' attention signature, with a sink for each head: a logit that takes weight and has no value.

    The sink becomes one more key: ``q' = [q, 1]``, ``k' = [k, 0]``, and for the sink ``[0, s / scaling]`` with value 0.
    So any kernel of scaled_dot_product_attention serves. ``attention_mask``: bool ``[B, 1, T, K]`` or None (causal).
    """
    batch, heads, length, width = query.shape
    keys = key.shape[2]
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    pad = 8  # kernels want widths in eights
    query, key, value = (F.pad(t, (0, pad)) for t in (query, key.to(query.dtype), value.to(query.dtype)))
    query[..., width] = 1
    sink = query.new_zeros(batch, heads, 1, width + pad)
    sink[..., 0, width] = (s_aux / scaling).to(query.dtype)
    key, value = torch.cat([sink, key], 2), F.pad(value, (0, 0, 1, 0))
    causal = attention_mask is None and length > 1
    if causal and keys != length:
        rows = torch.arange(keys - length, keys, device=query.device)
        attention_mask = (torch.arange(keys, device=query.device) <= rows[:, None])[None, None]
        causal = False
    if attention_mask is not None:
        if attention_mask.dtype != torch.bool:
            attention_mask = attention_mask == 0
        attention_mask = F.pad(attention_mask, (1, 0), value=True)
    elif causal:  # one more query, so that the square's diagonal is where it was
        query = F.pad(query, (0, 0, 1, 0))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, is_causal=causal, scale=scaling)
    out = out[:, :, 1:, :width] if causal else out[..., :width]
    return out.transpose(1, 2).contiguous(), None
