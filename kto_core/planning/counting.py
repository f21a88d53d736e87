"""How many bytes a run takes, part by part."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kto_core.engine.packing import passes
from kto_core.engine.support import MIXTURES
from kto_core.hardware import gpus as hardware
from kto_core.hardware.gpus import GIB
from kto_core.models import shape as model_shape
from kto_core.models.experts import CHUNK_BYTES
from kto_core.models.shape import Shape

from .coefficients import MIXTURE, Coefficients

if TYPE_CHECKING:
    from kto_core.config.run_config import RunConfig
    from kto_core.engine.packing.sample import Sample


UNKNOWN = 7e9  # parameters assumed of a model whose name tells nothing
PROMPTS = 0.5  # of a batch's tokens, prefixes that rows share counted once
Y_TOKENS = 1 + 0.5 / passes.Y_PART  # a batch in a token budget, for each of its own tokens: half of it completions


@dataclass(frozen=True)
class Fit:
    """What a training takes on a device, part by part in GiB, beside the ``available`` GiB; how much is recomputed
    (``checkpoint`` layers) and how many ``tokens`` a pass has."""

    parts: dict[str, float]
    available: float
    checkpoint: int
    tokens: int
    least: float | None = None  # what the packed engine can make do with; it takes more where there is more
    offload: bool = False
    refused: bool = False  # the packed engine will not begin: a pass cannot hold the longest row

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def fit(
    c: RunConfig,
    s: Shape,
    lengths: Sequence[int],
    packed: Sample | None,
    available: float,
    k: Coefficients,
    *,
    gpu: bool,
) -> Fit:
    """Choose tokens of a pass and layers to checkpoint, as the engine will."""
    if _engine(c, s) == "packed":
        return _fit_packed(c, s, lengths, packed, available, k, gpu=gpu)
    tokens = min(c.per_device_train_batch_size, _rows(c)) * max(lengths)  # padded to the longest row of the micro-batch
    choices: tuple[int, ...] = (0, s.layers)
    if c.gradient_checkpointing != "auto":
        choices = (s.layers if c.gradient_checkpointing else 0,)
    elif c.engine == "unsloth":  # its own checkpointing is always on
        choices = (s.layers,)
    found = [Fit(_parts(c, s, _padded(c, s, tokens, n, k, gpu), k, gpu), available, n, tokens) for n in choices]
    return next((f for f in found if f.total <= available * k.aim), found[-1])


def _rows(c: RunConfig) -> int:
    return max(1, c.effective_batch_size // c.num_gpus)


def _fit_packed(
    c: RunConfig,
    s: Shape,
    lengths: Sequence[int],
    packed: Sample | None,
    available: float,
    k: Coefficients,
    *,
    gpu: bool,
) -> Fit:
    longest, rows = max(lengths), _rows(c)
    sums = _batches(lengths, packed, rows)
    nothing = dict.fromkeys(("activations", "K/V store", "logits"), 0.0)
    base = _parts(c, s, nothing, k, gpu)
    there = ("weights", "gathered layers", "adapters", "CUDA context" if gpu else "program")
    taken = sum(base[n] for n in there if n in base)
    state = base["optimizer"] + base["adapters"] / 2  # the other half, the weights, is there already
    room = (available - (taken - base["adapters"] / 2)) * (1 if gpu else 0.5) * GIB
    fixed = state * GIB + passes.RESERVE["cuda" if gpu else "cpu"] + _recurrence(s, gpu)
    copies = 0 if _number(c, gpu)[0] else 2 * s.lora_parameters(c.target_modules, c.r)  # the adapter's, in 16 bits
    token = _token(c, s, k, gpu, sum(sums) / len(sums) / rows)
    offloads = gpu and passes.inputs_fit(longest, s.layers, token.entry, hardware.memory_gib()[1] * GIB)
    groups = [int(n * Y_TOKENS) for n in sums]
    budget, layers, offload, choices, _ = passes.limits(
        groups,
        longest,
        s.layers,
        token,
        room * passes.SHARE - fixed,
        room * passes.LAST_SHARE - fixed - copies,
        given=None if c.gradient_checkpointing == "auto" else s.layers if c.gradient_checkpointing else 0,
        recompute=gpu,
        can_offload=lambda: offloads,
    )
    smallest = token.offloaded() if offloads else token
    token = token.offloaded() if offload else token
    single = max(groups) <= budget
    tokens = max(sums) if single else max(longest, min(budget, max(sums)))
    moving = _peak(token, s, tokens, layers, k, gpu, store=PROMPTS if single else 0)
    least = _parts(c, s, _peak(smallest, s, longest, max(choices), k, gpu, store=0), k, gpu)
    return Fit(_parts(c, s, moving, k, gpu), available, layers, tokens, sum(least.values()), offload, budget < longest)


def _batches(lengths: Sequence[int], packed: Sample | None, rows: int, most: int = 64) -> list[int]:
    """Tokens of the optimizer batches of an epoch; of some of them where there are many."""
    if packed and packed.tokens:
        return packed.tokens
    share = packed.share if packed else 1.0
    shuffled = random.Random(0).sample(list(lengths), min(len(lengths), most * rows))
    starts = range(0, max(1, len(shuffled) - rows + 1), rows)
    return [math.ceil(share * sum(shuffled[a : a + rows])) for a in starts]


def _recurrence(s: Shape, gpu: bool) -> int:
    """Bytes that the packed engine's gated delta rule takes for itself."""
    return passes.RECURRENCE["cuda" if gpu else "cpu"] if s.recurrent and s.recurrent.state else 0


def _packed_layer(c: RunConfig, s: Shape, k: Coefficients, gpu: bool) -> float:
    """Bytes that the packed engine keeps of a token in one layer that is not computed again: the mean of its layers."""
    attends = _attending_layer(c, s, k, gpu)
    if (along := s.recurrent) is None:
        return attends
    wide, _ = _number(c, gpu)
    saved = k.packed_along.get(s.architecture, k.packed_along[""])
    widths = (s.hidden, s.intermediate * s.busy_experts, along.channels, along.keys, along.values, along.heads)
    other = sum(each[wide] * width for each, width in zip(saved, widths, strict=True)) * (k.packed_gpu if gpu else 1)
    return (s.attending * attends + along.layers * other) / s.layers


def _attending_layer(c: RunConfig, s: Shape, k: Coefficients, gpu: bool) -> float:
    wide, _ = _number(c, gpu)
    known = {**k.packed, **k.packed_varlen} if gpu else k.packed
    saved = known[MIXTURE] if _held(s) else known.get(s.architecture, known[""])
    widths = saved.hidden[wide] * s.hidden + saved.kv[wide] * s.kv_width + saved.query[wide] * s.heads * s.head_dim
    widths += s.busy_experts * (saved.ffn[wide] * s.intermediate + saved.routed[wide] * s.hidden)
    return (widths + saved.other[wide]) * (k.packed_gpu if gpu else 1)


def _token(c: RunConfig, s: Shape, k: Coefficients, gpu: bool, prompt: float = passes.PROMPT) -> passes.Token:
    """What the engine will measure of a token. ``prompt``: tokens of a batch for each of its rows."""
    _, number = _number(c, gpu)
    ends = 0  # bytes of what recurrent layers keep at the end of a prompt
    if (along := s.recurrent) is not None:
        ends = along.layers * (4 * along.state + (along.width - 1) * along.channels * number)
    return passes.Token(
        layer=_packed_layer(c, s, k, gpu),
        entry=s.hidden * number,
        rest=3 * s.hidden * number,
        store=s.attending * s.kv_width * number + ends / prompt,
        busy=passes.working(s.hidden, s.intermediate * s.busy_experts, number, s.busy_experts if _held(s) else 0),
    )


def _peak(
    token: passes.Token, s: Shape, tokens: int, checkpoint: int, k: Coefficients, gpu: bool, *, store: float
) -> dict[str, float]:
    """Bytes at the peak of a pass: when its answers are scored, or in the backward, when K/V store and logits are gone.
    ``store``: share of the tokens whose keys and values are kept. Measured: `benchmarks/RESULTS.md`."""
    kept, backward = tokens * token.kept(s.layers, checkpoint), tokens * token.backward(s.layers, checkpoint)
    chunk = min(tokens, passes.chunk_tokens(s.vocabulary, "cuda" if gpu else "cpu"))
    scoring = {"K/V store": store * tokens * token.store, "logits": chunk * s.vocabulary * k.packed_logits}
    if sum(scoring.values()) >= backward:
        return {"activations": kept, **scoring}
    return {"activations": kept + backward, "K/V store": 0, "logits": 0}


def _padded(c: RunConfig, s: Shape, tokens: int, checkpoint: int, k: Coefficients, gpu: bool) -> dict[str, float]:
    """Bytes that come and go in TRL's step."""
    wide, number = _number(c, gpu)
    ffn = s.intermediate * s.busy_experts
    layer = tokens * (
        k.saved_hidden[wide] * s.hidden
        + k.saved_kv[wide] * s.kv_width / 2
        + k.saved_ffn[wide] * ffn
        + k.saved_lora * c.r * len(s.adapted(c.target_modules))
        + k.saved_other
    )
    kept = (s.layers - checkpoint) * layer + checkpoint * tokens * s.hidden * number
    return {
        "activations": kept + layer * (k.working if checkpoint else k.working - 1),
        "logits": min(tokens, k.chunk_tokens) * s.vocabulary * k.logits,
    }


def _number(c: RunConfig, gpu: bool) -> tuple[bool, int]:
    """Whether activations are float32, and the bytes of one number."""
    wide = c.dtype == "float32" or (c.dtype == "auto" and not gpu)
    return wide, 4 if wide else 2


def _parts(c: RunConfig, s: Shape, moving: dict[str, float], k: Coefficients, gpu: bool) -> dict[str, float]:
    """GiB of each part at the peak: the backward pass of the first layers, gradients and optimizer state in place."""
    _, number = _number(c, gpu)
    four_bits = c.load_in_4bit or s.quantized
    linear = (k.nf4 if c.bnb_4bit_use_double_quant else k.plain4) if four_bits else number
    adapters = s.lora_parameters(c.target_modules, c.r)
    weights, gathered = s.linear_parameters * linear, 0.0
    if is_sharded(c, s):
        divided = s.linear_parameters - (s.expert_parameters if _held(s) and four_bits else 0)  # experts in banks stay
        moved = divided * (0.5 if four_bits else number)  # whole, and the scales of 4-bit weights
        weights += moved / c.num_gpus - moved
        gathered = passes.GATHERED * moved / s.layers
    bytes_ = {
        "weights": weights + s.other_parameters * number,
        **({"gathered layers": gathered} if gathered else {}),
        "adapters": adapters * (k.adapter + (k.ddp if c.num_gpus > 1 and _engine(c, s) != "packed" else 0)),
        "optimizer": adapters * (k.adam8 if "8bit" in c.optim else k.adam32),
        **moving,
        **({"recurrent layers": _recurrence(s, gpu)} if _engine(c, s) == "packed" and _recurrence(s, gpu) else {}),
        "dequantized layer": _dequantized(s, number, gpu) if four_bits else 0,
        "CUDA context" if gpu else "program": k.context if gpu else k.process,
    }
    come_and_go = sum(moving.values()) + bytes_["dequantized layer"]
    bytes_["fragmentation"] = (k.slack if gpu else k.slack_cpu) * come_and_go
    return {name: b / GIB for name, b in bytes_.items()}


def _held(s: Shape) -> bool:
    """Whether the experts are in banks from the start (`models.experts`): gpt-oss's are linear layers that may be
    divided, and its coefficients are its own."""
    return s.experts > 0 and s.architecture != "gpt_oss"


def _dequantized(s: Shape, number: int, gpu: bool) -> float:
    """Bytes of what is out of its 4 bits at once: two linear layers, or as many of a layer's experts as go together."""
    sizes = [a * b for a, b in s.linears.values()]
    sizes += [a * b for _, (a, b) in s.recurrent.linears] if s.recurrent else []
    if s.experts:  # an expert's gate and up are one layer
        sizes.append(2 * s.hidden * s.intermediate)
    largest = 2 * max(sizes) * number
    together = s.experts * sizes[-1] * number if s.experts and gpu else 0
    return max(largest, min(CHUNK_BYTES, together))


def _engine(c: RunConfig, s: Shape) -> str:
    """auto takes the packed engine where it serves the model: dense decoders and the mixtures of experts it knows."""
    served = not s.experts or s.architecture in MIXTURES
    return c.engine if c.engine != "auto" else "packed" if served else "trl"


def is_sharded(c: RunConfig, s: Shape) -> bool:
    """Whether the layers' weights are divided; ``auto`` is decided in `plan`."""
    return c.shard is True and c.num_gpus > 1 and _engine(c, s) == "packed"


def verdict_of(found: Fit, k: Coefficients) -> str:
    """ "fits", "tight" or "does not fit"."""
    if found.refused:
        return "does not fit"
    need = found.total if found.least is None else found.least
    if need <= found.available * k.safe and found.total <= found.available:
        return "fits"
    return "tight" if found.total <= found.available else "does not fit"


def shape_of(c: RunConfig) -> Shape:
    """The model's sizes: its own, or those of a model of `UNKNOWN` parameters."""
    return model_shape.find(c.model) or model_shape.estimate(UNKNOWN)
