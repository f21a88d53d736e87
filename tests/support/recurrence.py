"""The gated delta rule by its formula, one token at a time, in the format of its inputs: for models in float64, where
transformers' own function computes in float32 (Gated DeltaNet, arXiv 2412.06464, equation 10)."""

import contextlib
import sys

import torch

RULE = "torch_chunk_gated_delta_rule"


def gated_delta_rule(query, key, value, *, g, beta, use_qk_l2norm_in_kernel=False, initial_state=None, **_):
    if use_qk_l2norm_in_kernel:
        query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    state = initial_state
    if state is None:
        state = value.new_zeros(len(value), value.shape[2], key.shape[-1], value.shape[-1])
    answers = []
    for t in range(value.shape[1]):
        q, k, v = query[:, t], key[:, t], value[:, t]
        state = state * g[:, t, :, None, None].to(state.dtype).exp()
        known = torch.einsum("bhk,bhkv->bhv", k, state)
        state = state + torch.einsum("bhk,bhv->bhkv", k, beta[:, t, :, None] * (v - known))
        answers.append(torch.einsum("bhk,bhkv->bhv", q * q.shape[-1] ** -0.5, state))
    return torch.stack(answers, 1), state


@contextlib.contextmanager
def exact(model):
    """Inside, the model's own forward computes the rule by `gated_delta_rule`."""
    files = {sys.modules[type(m).__module__] for m in model.modules()}
    before = [(file, vars(file)[RULE]) for file in files if hasattr(file, RULE)]
    try:
        for file, _ in before:
            setattr(file, RULE, gated_delta_rule)
        yield
    finally:
        for file, theirs in before:
            setattr(file, RULE, theirs)


def remember(model) -> None:
    """Make random layers forget so slowly that the state at a row's start still matters at its end."""
    for name, p in model.named_parameters():
        if name.endswith("A_log"):
            p.data.copy_(torch.linspace(-4, -1, p.numel()))
