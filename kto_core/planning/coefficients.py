"""The memory plan's constants: bytes per unit of everything that `memory_plan` counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kto_core.hardware.gpus import CONTEXT_GIB, GIB

MIXTURE = "mixture"


class Saved(NamedTuple):
    """Bytes kept of one token in one layer, per unit of a width: with 16-bit activations, with float32 activations."""

    hidden: tuple[float, float]
    kv: tuple[float, float]
    ffn: tuple[float, float]
    other: tuple[float, float] = (134.0, 262.0)
    query: tuple[float, float] = (0.0, 0.0)  # of the width of all heads
    routed: tuple[float, float] = (0.0, 0.0)  # of the hidden size, for each of a token's experts; ``ffn`` too


class SavedAlong(NamedTuple):
    """The same of a layer that goes along the sequence (`recurrent_sizes.Recurrent`)."""

    hidden: tuple[float, float]
    ffn: tuple[float, float]
    channels: tuple[float, float]
    keys: tuple[float, float] = (0.0, 0.0)
    values: tuple[float, float] = (0.0, 0.0)
    heads: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Coefficients:
    """Bytes per unit of everything that is counted.

    Calibration: ``saved_*`` are the bytes autograd keeps for one token in one decoder layer with LoRA on all seven
    projections, per unit of hidden size, K/V heads' width and FFN width: a least-squares fit (residual < 1 byte) to
    ``torch.autograd.graph.saved_tensors_hooks`` over Llama layers of six sizes. The frozen weights' own format does
    not change them. ``packed`` is the same of the packed engine's lean layers (`engine.lean`), by model type, since
    they do not replace everything in every architecture; the rank adds nothing there. The rest follows from
    formats, except ``working`` and ``slack``: assumptions, to be measured on a card, for the temporaries of one layer's
    backward and fragmentation. ``process`` and ``slack_cpu`` come from the demo model's
    peak resident memory with TRL's step, 4 rows of up to 294 tokens: 4.36 GiB, of which the plan counts 4.2.
    """

    nf4: float = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits, 8 for every 64 weights, a float for 256 of those: 4.127 bits
    plain4: float = 0.5 + 4 / 64  # without double quantization
    saved_hidden: tuple[float, float] = (36.1, 24.1)  # 16-bit activations, float32 activations
    saved_kv: tuple[float, float] = (4.0, 8.0)
    saved_ffn: tuple[float, float] = (10.0, 16.0)
    saved_lora: float = 4.0  # per unit of rank, for each adapted projection
    saved_other: float = 232.0
    packed: Mapping[str, Saved] = field(
        default_factory=lambda: {
            "": Saved((14.1, 22.1), (2.0, 4.0), (4.0, 8.0)),  # Llama, Mistral, Qwen2
            "qwen3": Saved((18.1, 26.1), (4.0, 6.0), (4.0, 8.0)),
            "phi3": Saved((16.1, 26.1), (3.0, 6.0), (8.0, 16.0)),
            "gemma": Saved((14.1, 22.1), (2.0, 4.0), (8.0, 16.0)),
            "gemma2": Saved((58.3, 70.3), (0.0, 0.0), (8.0, 16.0)),
            "gpt_oss": Saved((8.0, 10.0), (0.0, 0.0), (12.0, 24.0), (214.0, 294.0), (11.06, 22.06), (2.0, 4.0)),
            "gemma3_text": Saved((26.1, 34.1), (4.0, 6.0), (8.0, 16.0)),
            "qwen3_5_text": Saved((10.0, 14.0), (4.0, 6.0), (4.0, 8.0), (62.0, 63.0), (14.1, 28.2)),
            "lfm2": Saved((18.0, 27.0), (4.0, 6.0), (8.0, 16.0)),
            # Qwen3-MoE with 128 experts, of which a token takes 8; of all mixtures but gpt-oss
            MIXTURE: Saved((8.0, 10.3), (4.0, 6.0), (6.0, 12.0), (823.0, 1140.0), (8.4, 12.4), (2.0, 3.9)),
        }
    )
    # layers that go along the sequence
    packed_along: Mapping[str, SavedAlong] = field(
        default_factory=lambda: {
            "": SavedAlong((10.1, 14.1), (4.0, 8.0), (4.0, 8.0), (4.0, 8.0), (6.0, 12.0), (14.0, 16.0)),  # Qwen3.5
            "lfm2": SavedAlong((22.0, 38.0), (8.0, 16.0), (0.0, 0.0)),
        }
    )
    # on a card, where it differs: keys and values are not repeated for every query head
    packed_varlen: Mapping[str, Saved] = field(
        default_factory=lambda: {
            "gpt_oss": Saved((8.0, 10.0), (2.0, 4.0), (12.0, 24.0), (179.0, 319.0), (4.03, 8.06), (2.0, 4.0))
        }
    )
    packed_gpu: float = 1.065  # on a card, of the same: blocks' rounding, attention's statistics; measured, 3B to 14B
    working: float = 1.25  # of one layer's saved bytes, while it is computed again and its gradients flow
    adapter: float = 4.0 + 4.0  # float32 weight and gradient
    adam8: float = 2.0 + 8 / 256  # two 8-bit moments, a float for 256 of each
    adam32: float = 8.0
    ddp: float = 4.0  # buckets of the gradients' exchange
    logits: float = 10.0  # 16-bit and float32 logits, float32 gradient; per token of a chunk and vocabulary entry
    chunk_tokens: int = 1024
    packed_logits: float = 15.0  # the same of the packed engine, which also takes entropy and mean; measured
    context: float = CONTEXT_GIB * GIB
    process: float = 1.3 * GIB  # main memory of Python with its libraries, on a CPU
    slack: float = 0.06  # of everything that comes and goes
    slack_cpu: float = 0.3  # the same in main memory, whose allocator keeps what was freed
    safe: float = 0.92  # share of the available memory up to which a plan "fits"
    aim: float = 0.88  # share that TRL's checkpointing stays under
