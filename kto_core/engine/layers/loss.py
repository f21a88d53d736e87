"""Log-probabilities of completion tokens, and the KTO loss. Only tensors; knows nothing of trees or trainers."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from kto_core.engine.packing.passes import chunk_tokens
from kto_core.models.language.part import decoder_name, decoder_of


@dataclass(frozen=True)
class Head:
    """The output head of a causal LM: ``softcap(scale * (h W^T + b))``.

    ``scale``: what the model multiplies its logits by, measured (`scale_of`), since configurations that say so differ:
    Granite divides by the number that HyperCLOVA X multiplies by. ``softcap``: Gemma 2's final_logit_softcapping.
    """

    weight: torch.Tensor  # [vocabulary, hidden]
    bias: torch.Tensor | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, model) -> Head:
        linear, config = model.get_output_embeddings(), model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(linear.weight, getattr(linear, "bias", None), scale_of(model), softcap)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[n, hidden]`` -> ``[n, vocabulary]`` in fp32 (fp64 stays)."""
        z = torch.nn.functional.linear(hidden, self.weight, self.bias)
        z = z if z.dtype == torch.float64 else z.float()
        if self.scale != 1.0:
            z = z * self.scale
        return z if not self.softcap else self.softcap * torch.tanh(z / self.softcap)


_SCALES: WeakKeyDictionary = WeakKeyDictionary()  # of each model, measured once


def scale_of(model) -> float:
    """The factor between a causal LM's logits and the product of its hidden states with its output head.

    Found by giving it a hidden state in place of its decoder's. A number of its configuration, or its inverse, is taken
    instead where one is as near.
    """
    if model not in _SCALES:
        _SCALES[model] = _measured_scale(model)
    return _SCALES[model]


@torch.no_grad()
def _measured_scale(model) -> float:
    linear, config = model.get_output_embeddings(), model.config.get_text_config()
    weight = linear.weight
    hidden = torch.randn(1, 1, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.autocast(weight.device.type, enabled=False):
        plain = linear(hidden).double()
        hidden = hidden * (0.02 / float(plain.std()))  # far below any soft cap
        plain = linear(hidden).double().flatten()
        decoder = decoder_of(model)
        parent, _, name = decoder_name(model).rpartition(".")
        around = model.get_submodule(parent)
        around._modules[name] = _Instead(decoder, hidden)
        try:
            ids = torch.ones(1, 1, dtype=torch.long, device=weight.device)  # wrappers look for tokens of images
            given = model(input_ids=ids, use_cache=False).logits.double().flatten()
        finally:
            around._modules[name] = decoder
    found = float(given @ plain / (plain @ plain))
    numbers = [v for v in vars(config).values() if isinstance(v, int | float) and not isinstance(v, bool) and v > 0]
    known = [1.0, *(float(v) for v in numbers), *(1.0 / v for v in numbers)]
    near = min(known, key=lambda v: abs(v - found))
    return near if abs(near - found) < 1e-3 * abs(found) else found


class _Instead(torch.nn.Module):
    """Stands where a decoder stood and answers with the same hidden states, whatever it is asked."""

    def __init__(self, decoder, hidden):
        super().__init__()
        self.__dict__["decoder"], self.__dict__["hidden"] = decoder, hidden
        self.register_parameter("place", torch.nn.Parameter(hidden, requires_grad=False))  # tells wrappers the device

    def forward(self, *_, **__):
        from transformers.modeling_outputs import BaseModelOutputWithPast

        class Answer(BaseModelOutputWithPast):
            def __getattr__(self, name):  # what a wrapper hands on
                if name.startswith("__"):
                    raise AttributeError(name)

        return Answer(last_hidden_state=self.hidden)

    def __getattr__(self, name):
        return getattr(self.__dict__["decoder"], name)


@dataclass
class TokenScores:
    """One fp32 value a scored token: ``logps`` (with gradient), ``entropy`` and ``mean_logits`` (None unless asked)."""

    logps: torch.Tensor
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None


def token_logps(head: Head, hidden: torch.Tensor, targets: torch.Tensor, stats: bool = False) -> TokenScores:
    """log p(target) for each hidden state, without ever holding more than a chunk of logits.

    Args:
        hidden: ``[n, hidden]``, after the model's final norm. targets: ``[n]`` token ids.
        stats: also entropies and mean logits, for the log.

    The log-sum-exp is fp32 (fp64 for fp64 models). The gradient with respect to ``hidden`` is formed in the forward,
    chunk by chunk, so that the backward needs neither logits nor a second product with the head. The head is frozen.
    """
    out = _TokenLogps.apply(hidden.to(head.weight.dtype), head, targets, stats)
    return TokenScores(*out) if stats else TokenScores(out[0])


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head: Head, targets, stats):
        step = chunk_tokens(head.weight.shape[0], hidden.device.type)
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logps = torch.empty(len(targets), dtype=exact, device=hidden.device)
        entropy, mean = (torch.empty_like(logps), torch.empty_like(logps)) if stats else (None, None)
        wanted = ctx.needs_input_grad[0]
        direction = torch.empty_like(hidden) if wanted else None
        with torch.autocast(hidden.device.type, enabled=False):
            for a in range(0, len(targets), step):
                part = slice(a, a + step)
                z = head.logits(hidden[part])
                lse = z.logsumexp(-1)
                chosen = targets[part, None]
                logps[part] = z.gather(1, chosen)[:, 0] - lse
                if stats:
                    mean[part] = z.mean(-1)
                if not (wanted or stats):
                    continue
                p = torch.exp(z - lse[:, None])
                if stats:
                    entropy[part] = lse - (p * z).sum(-1)
                if wanted:  # d logp / d logits = onehot - p, then through softcap and scale
                    p.neg_().scatter_add_(1, chosen, torch.ones_like(chosen, dtype=p.dtype))
                    if head.softcap:
                        p *= 1 - (z / head.softcap) ** 2
                    if head.scale != 1.0:
                        p *= head.scale
                    direction[part] = p.to(hidden.dtype) @ head.weight
        if wanted:
            ctx.save_for_backward(direction)
        if stats:
            ctx.mark_non_differentiable(entropy, mean)
        return (logps, entropy, mean) if stats else (logps,)

    @staticmethod
    def backward(ctx, grad, *_):
        (direction,) = ctx.saved_tensors
        return (grad[:, None] * direction).to(direction.dtype), None, None, None


def sequence_sums(values: torch.Tensor, sequence: torch.Tensor, count: int) -> torch.Tensor:
    """Sums of token values by sequence number: ``[n]`` -> ``[count]``."""
    return torch.zeros(count, dtype=values.dtype, device=values.device).index_add(0, sequence, values)


def kto_losses(logps, ref_logps, z0, labels, beta, desirable_weight, undesirable_weight, loss_type="kto"):
    """Loss of each row (KTO, arXiv 2402.01306, equation 8): ``[n]``, not averaged.

    desirable: ``lambda_D (1 - sigmoid(beta (r - z0)))``; undesirable: ``lambda_U (1 - sigmoid(beta (z0 - r)))``.
    ``apo_zero_unpaired`` has z0 = 0 (APO, arXiv 2408.06266).
    """
    reward = logps - ref_logps
    z0 = 0.0 if loss_type == "apo_zero_unpaired" else z0
    yes = labels.to(reward.dtype)
    weight = desirable_weight * yes + undesirable_weight * (1 - yes)
    return weight * (1 - torch.sigmoid(beta * (2 * yes - 1) * (reward - z0)))
