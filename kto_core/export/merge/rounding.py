"""fp32 to 16 bits: what is lost of a change, and how it is kept; see `merging`."""

from __future__ import annotations

import hashlib

SEED = 3407
F16_MAX = 65504.0
PIECE = 2**18  # numbers rounded at a time


def generator_of(layer: str):
    """The generator of a layer's rounding: it depends on the layer's name alone, so layers may come in any order."""
    import torch

    digest = hashlib.sha256(f"{SEED} {layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def layer_name(name: str) -> str:
    """A layer's name in the model, of its name in PEFT's."""
    return name.removeprefix("base_model.model.")


def target_of(own, greatest: float):
    """The 16-bit dtype of a merged model. bf16 and fp16 stay. fp32 becomes fp16, which has 8 times bf16's resolution,
    if all weights lie in its range.

    Args:
        own: the dtype of most weights of the base. greatest: their greatest magnitude, which only counts for fp32.
    """
    import torch

    if own != torch.float32:
        return own if own == torch.float16 else torch.bfloat16
    return torch.float16 if greatest < F16_MAX else torch.bfloat16


def rounded(before, after, dtype, generator):
    """(``after`` in ``dtype``, how far it then lies from ``before`` along the change, the change's squared length).

    Piece by piece: what a piece needs stays in the processor's cache, a quarter of the time of whole layers at once.
    """
    import torch

    before, after = before.contiguous(), after.contiguous()
    result, along, whole = torch.empty_like(after, dtype=dtype), 0.0, 0.0
    pieces = (t.view(-1).split(PIECE) for t in (before, after, result))
    for old, new, out in zip(*pieces, strict=True):
        old = old.float()
        out.copy_(round_to(new, dtype, generator))
        wanted = new - old
        along += float(torch.dot(out.float() - old, wanted))
        whole += float(torch.dot(wanted, wanted))
    return result, along, whole


def round_to(values, dtype, generator=None):
    """fp32 -> fp16 or bf16; stochastically with a ``generator`` (the expectation is exact), else to nearest.

    A value that lies on the 16-bit grid is never moved.
    """
    import torch

    if generator is None:
        return values.to(dtype)
    dropped = 16 if dtype == torch.bfloat16 else 13  # bits of fp32's mantissa that go
    noise = torch.randint(0, 1 << dropped, values.shape, generator=generator, dtype=torch.int32)
    rounded = ((values.view(torch.int32) + noise) & -(1 << dropped)).view(torch.float32)
    if dtype == torch.float16:  # below 2^-14 its steps are all 2^-24
        fine = torch.floor(values * 2.0**24 + noise / float(1 << dropped)) * 2.0**-24
        rounded = torch.where(values.abs() < 2.0**-14, fine, rounded).clamp(-F16_MAX, F16_MAX)
    return rounded.to(dtype)
