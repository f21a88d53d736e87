"""What a run will need at its peak, before anything is loaded: fits, tight, or not, and the one change that helps most.

Counts from the model's sizes (`model_shape`), the settings and the rows' lengths; also chooses how many layers to
checkpoint and how many tokens to pack into one pass. Knows nothing of torch. All sizes in GiB = 2**30 bytes.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from . import hardware, model_shape
from .engine import MIXTURES, passes
from .hardware import GIB, Device
from .memory_coefficients import Coefficients
from .model_shape import Shape

if TYPE_CHECKING:
    from .config import RunConfig
    from .engine.sample import Sample

OFFLOADED = "The longest rows have room because the inputs of recomputed layers wait in main memory."
SMALLER = {"20b": "13b", "13b": "7b", "7b": "3b", "3b": "demo"}
UNKNOWN = 7e9  # parameters assumed of a model whose name tells nothing
PROMPTS = 0.5  # of a batch's tokens, prefixes that rows share counted once
Y_TOKENS = 1.0625  # what a batch counts in a token budget, for each of its own tokens: half of it completions


def remarks(sharded: bool, offload: bool, gpus: int) -> list[str]:
    """Where a plan puts what one card has no room for, a sentence each."""
    found = {f"The frozen weights are divided over {gpus} GPUs.": sharded, OFFLOADED: offload}
    return [text for text, holds in found.items() if holds]


@dataclass(frozen=True)
class MemoryPlan:
    predicted_gib: float
    available_gib: float
    verdict: str  # "fits" | "tight" | "does not fit" | "cpu"
    advice: str  # the one change that helps most; "" where none is needed
    parts: dict[str, float]  # GiB of weights, adapters, optimizer, activations, K/V store, logits, …; sums to the total
    layers: int
    checkpoint_layers: int  # computed twice instead of kept
    offload: bool  # their inputs wait in main memory
    token_budget: int  # tokens of one pass
    sharded: bool  # the frozen weights are divided over the GPUs
    model: str  # where the model's sizes come from
    device: str

    def to_dict(self) -> dict:
        """JSON types; ``predicted_gib``, ``available_gib`` and ``verdict`` are a contract of ``--dry-run --json``."""
        d = asdict(self)
        d["parts"] = {k: round(v, 3) for k, v in self.parts.items()}
        return {**d, "predicted_gib": round(self.predicted_gib, 2), "available_gib": round(self.available_gib, 2)}


def plan(
    config: RunConfig,
    lengths: Sequence[int] = (),
    *,
    packed: Sample | None = None,
    device: Device | None = None,
    coefficients: Coefficients | None = None,
) -> MemoryPlan:
    """Predict the peak memory of training ``config`` on rows of these lengths.

    Args:
        lengths: tokens of each row, prompt and completion; empty: every row is ``max_length`` long.
        packed: what the batches of these rows pack into (`engine.sample`); without it no prefix counts as shared.
        device: the GPU to plan for; default the one of this machine with the least room among ``num_gpus``, and in a
            process of several GPUs its own.
    """
    k = coefficients or Coefficients()
    gpus = [device] if device else hardware.devices()
    rank = os.environ.get("LOCAL_RANK", "")
    if device is None and rank.isdigit() and int(rank) < len(gpus):
        gpus = [device := gpus[int(rank)]]  # its own card: on a neighbour's, the neighbour's model would be "others"
    shape = _shape(config)
    lengths = [min(n, config.max_length) for n in lengths] or [config.max_length]
    if not gpus:
        return _on_cpu(config, shape, lengths, packed, k)
    if config.num_gpus > len(gpus) and device is None:
        found = _fit(config, shape, lengths, packed, min(g.available_gib for g in gpus), k, gpu=True)
        advice = f"num_gpus is {config.num_gpus}, but this machine has {len(gpus)}. Set num_gpus to {len(gpus)}."
        return _made(found, config, shape, "does not fit", advice, gpus[0].name)
    gpu = min(gpus[: config.num_gpus], key=lambda g: g.available_gib)
    found = _fit(config, shape, lengths, packed, gpu.available_gib, k, gpu=True)
    verdict = _verdict(found, k)
    divided = config.model_copy(update={"shard": True})
    if verdict == "does not fit" and config.shard == "auto" and _sharded(divided, shape):
        config, found = divided, _fit(divided, shape, lengths, packed, gpu.available_gib, k, gpu=True)
        verdict = _verdict(found, k)
    advice = "" if verdict == "fits" else _advice(config, lengths, packed, gpu, found, k)
    return _made(found, config, shape, verdict, advice, gpu.name)


# ---- counting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fit:
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


def _fit(c: RunConfig, s: Shape, lengths: list[int], packed, available: float, k: Coefficients, *, gpu: bool) -> _Fit:
    """Choose tokens of a pass and layers to checkpoint, as the engine will."""
    if _engine(c, s) == "packed":
        return _fit_packed(c, s, lengths, packed, available, k, gpu=gpu)
    tokens = min(c.per_device_train_batch_size, _rows(c)) * max(lengths)  # padded to the longest row of the micro-batch
    choices = (0, s.layers)
    if c.gradient_checkpointing != "auto":
        choices = (s.layers if c.gradient_checkpointing else 0,)
    elif c.engine == "unsloth":  # its own checkpointing is always on
        choices = (s.layers,)
    found = [_Fit(_parts(c, s, _padded(c, s, tokens, n, k, gpu), k, gpu), available, n, tokens) for n in choices]
    return next((f for f in found if f.total <= available * k.aim), found[-1])


def _rows(c: RunConfig) -> int:
    return max(1, c.effective_batch_size // c.num_gpus)


def _fit_packed(c, s: Shape, lengths, packed: Sample | None, available: float, k: Coefficients, *, gpu: bool) -> _Fit:
    longest, rows = max(lengths), _rows(c)
    sums = _batches(lengths, packed, rows)
    nothing = dict.fromkeys(("activations", "K/V store", "logits"), 0.0)
    base = _parts(c, s, nothing, k, gpu)
    fixed = ("weights", "gathered layers", "adapters", "CUDA context" if gpu else "program")
    taken = sum(base[n] for n in fixed if n in base)
    state = base["optimizer"] + base["adapters"] / 2  # the other half, the weights, is there already
    room = (available - (taken - base["adapters"] / 2)) * (1 if gpu else 0.5) * GIB
    fixed = state * GIB + passes.RESERVE["cuda" if gpu else "cpu"]
    free = room * passes.SHARE - fixed

    token = _token(c, s, k, gpu)
    offloads = gpu and passes.inputs_fit(longest, s.layers, token.entry, hardware.memory_gib()[1] * GIB)

    def most(n: int) -> int:
        return max(0, int(free / token.peak(s.layers, n)))

    choices = range(s.layers + 1)
    if c.gradient_checkpointing != "auto":
        choices = [s.layers if c.gradient_checkpointing else 0]
    elif not gpu:
        choices = [0] if most(0) >= longest else [0, s.layers]
    if offload := offloads and most(max(choices)) < longest:
        token = token.offloaded()
    if most(max(choices)) < longest:
        copies = 0 if _number(c, gpu)[0] else 2 * s.lora_parameters(c.target_modules, c.r)  # the adapter's, in 16 bits
        free = room * passes.LAST_SHARE - fixed - copies
    groups = [int(n * Y_TOKENS) for n in sums]
    budget, layers = passes.cheapest(groups, longest, s.layers, choices, most)
    single = max(groups) <= budget
    tokens = max(sums) if single else max(longest, min(budget, max(sums)))
    moving = _peak(token, s, tokens, layers, k, gpu, store=PROMPTS if single else 0)
    smallest = token.offloaded() if offloads else token
    least = _parts(c, s, _peak(smallest, s, longest, max(choices), k, gpu, store=0), k, gpu)
    return _Fit(_parts(c, s, moving, k, gpu), available, layers, tokens, sum(least.values()), offload, budget < longest)


def _batches(lengths: Sequence[int], packed: Sample | None, rows: int, most: int = 64) -> list[int]:
    """Tokens of the optimizer batches of an epoch; of some of them where there are many."""
    if packed and packed.tokens:
        return packed.tokens
    share = packed.share if packed else 1.0
    shuffled = random.Random(0).sample(list(lengths), min(len(lengths), most * rows))
    starts = range(0, max(1, len(shuffled) - rows + 1), rows)
    return [math.ceil(share * sum(shuffled[a : a + rows])) for a in starts]


def _packed_layer(c, s: Shape, k: Coefficients, gpu: bool) -> float:
    """Bytes that the packed engine keeps of a token in one layer that is not computed again."""
    wide, _ = _number(c, gpu)
    saved = (k.packed | k.packed_varlen if gpu else k.packed).get(s.architecture, k.packed[""])
    widths = saved.hidden[wide] * s.hidden + saved.kv[wide] * s.kv_width + saved.query[wide] * s.heads * s.head_dim
    widths += s.busy_experts * (saved.ffn[wide] * s.intermediate + saved.routed[wide] * s.hidden)
    return (widths + saved.other[wide]) * (k.packed_gpu if gpu else 1)


def _token(c, s: Shape, k: Coefficients, gpu: bool) -> passes.Token:
    """What the engine will measure of a token."""
    _, number = _number(c, gpu)
    return passes.Token(
        layer=_packed_layer(c, s, k, gpu),
        entry=s.hidden * number,
        rest=3 * s.hidden * number,
        store=s.layers * s.kv_width * number,
        busy=passes.working(s.hidden, s.intermediate * s.busy_experts, number),
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
    if _sharded(c, s):
        moved = s.linear_parameters * (0.5 if four_bits else number)  # the scales of 4-bit weights stay whole
        weights += moved / c.num_gpus - moved
        gathered = passes.GATHERED * moved / s.layers
    bytes_ = {
        "weights": weights + s.other_parameters * number,
        **({"gathered layers": gathered} if gathered else {}),
        "adapters": adapters * (k.adapter + (k.ddp if c.num_gpus > 1 and _engine(c, s) != "packed" else 0)),
        "optimizer": adapters * (k.adam8 if "8bit" in c.optim else k.adam32),
        **moving,
        "dequantized layer": 2 * _largest(s) * number if four_bits else 0,
        "CUDA context" if gpu else "program": k.context if gpu else k.process,
    }
    come_and_go = sum(moving.values()) + bytes_["dequantized layer"]
    bytes_["fragmentation"] = (k.slack if gpu else k.slack_cpu) * come_and_go
    return {name: b / GIB for name, b in bytes_.items()}


def _largest(s: Shape) -> int:
    """Parameters of the largest linear layer. Experts are layers of their own, one of which is computed at a time."""
    sizes = [a * b for a, b in s.linears.values()]
    if s.architecture == "gpt_oss":  # an expert's gate and up are one layer
        sizes.append(2 * s.hidden * s.intermediate)
    return max(sizes)


def _engine(c: RunConfig, s: Shape) -> str:
    """auto takes the packed engine where it serves the model: dense decoders and the mixtures of experts it knows."""
    served = not s.experts or s.architecture in MIXTURES
    return c.engine if c.engine != "auto" else "packed" if served else "trl"


def _sharded(c: RunConfig, s: Shape) -> bool:
    """Whether the layers' weights are divided; ``auto`` is decided in `plan`."""
    return c.shard is True and c.num_gpus > 1 and _engine(c, s) == "packed"


def _verdict(found: _Fit, k: Coefficients) -> str:
    if found.refused:
        return "does not fit"
    need = found.total if found.least is None else found.least
    if need <= found.available * k.safe and found.total <= found.available:
        return "fits"
    return "tight" if found.total <= found.available else "does not fit"


def _made(found: _Fit, c: RunConfig, s: Shape, verdict: str, advice: str, device: str) -> MemoryPlan:
    return MemoryPlan(
        predicted_gib=found.total,
        available_gib=found.available,
        verdict=verdict,
        advice=advice,
        parts=found.parts,
        layers=s.layers,
        checkpoint_layers=found.checkpoint,
        offload=found.offload,
        token_budget=found.tokens,
        sharded=_sharded(c, s),
        model=f"{c.model}: {s.parameters / 1e9:.3g} billion parameters, {s.source}",
        device=device,
    )


# ---- advice ---------------------------------------------------------------------------------------------------------


def _on_cpu(c: RunConfig, s: Shape, lengths: Sequence[int], packed, k: Coefficients) -> MemoryPlan:
    available = hardware.memory_gib()[1]
    found = _fit(c, s, lengths, packed, available, k, gpu=False)
    advice = ""
    if found.total > available:
        advice = (
            f"There is no GPU here, and the {found.total:.1f} GiB needed are more than the {available:.1f} GiB of free "
            "main memory. Take preset demo, or a machine with a GPU."
        )
    elif s.parameters > 1e9:
        advice = "There is no GPU here: a model of this size takes days. Take preset demo, or a machine with a GPU."
    return _made(found, c, s, "cpu", advice, "CPU")


def _advice(c: RunConfig, lengths: Sequence[int], packed, gpu: Device, now: _Fit, k: Coefficients) -> str:
    """The change that saves most, with its numbers; a smaller model only where no setting is enough."""
    s = _shape(c)
    options = []
    for text, update in _changes(c, lengths):
        changed = c.model_copy(update=update)
        cut = [min(n, changed.max_length) for n in lengths]
        same = packed if cut == lengths or packed is None else packed._replace(tokens=[])
        found = _fit(changed, s, cut, same, gpu.available_gib, k, gpu=True)
        options.append((found.total, text, found))
    others = gpu.used_by_others_gib
    if others > 1:
        found = _fit(c, s, lengths, packed, gpu.total_gib, k, gpu=True)
        options.append((found.total - others, f"Close what else uses the card ({others:.1f} GiB)", found))
    better = [o for o in options if o[0] < now.total]
    for level in ("fits", "tight"):
        if pool := [o for o in better if _verdict(o[2], k) == level]:
            _, text, found = min(pool, key=lambda o: o[0])
            still = ", which is still tight" if level == "tight" else ""
            return f"{text}: {found.total:.1f} of {found.available:.1f} GiB would be needed{still}."
    return f"No single setting is enough. {_smaller(c)}."


def helps_most(c: RunConfig, lengths: Sequence[int]) -> str:
    """The change that saves most where the memory ran out although everything is cut as small as it can be; without
    its full stop."""
    k = Coefficients()

    def least(changed: RunConfig) -> float:
        found = _fit(changed, _shape(changed), [min(n, changed.max_length) for n in lengths], None, 0.0, k, gpu=True)
        return found.total if found.least is None else found.least

    options = [(least(c.model_copy(update=update)), text) for text, update in _changes(c, lengths)]
    need, text = min(options, default=(math.inf, ""))
    return text if need < least(c) else _smaller(c)


def _smaller(c: RunConfig) -> str:
    name = SMALLER.get(c.preset)
    return f"Take preset {name}, a smaller model" if name else "Take a smaller model"


def _shape(c: RunConfig) -> Shape:
    return model_shape.find(c.model) or model_shape.estimate(UNKNOWN)


def _changes(c: RunConfig, lengths: Sequence[int]):
    """(what to do, update) of each setting that can save memory."""
    batch, steps = c.per_device_train_batch_size, c.gradient_accumulation_steps
    if c.gradient_checkpointing is False:
        yield "Set gradient_checkpointing to auto", {"gradient_checkpointing": "auto"}
    if not c.load_in_4bit:
        yield "Set load_in_4bit to true", {"load_in_4bit": True}
    if batch >= 4 and batch % 2 == 0:
        update = {"per_device_train_batch_size": batch // 2, "gradient_accumulation_steps": steps * 2}
        yield f"Set batch size to {batch // 2} and accumulation to {steps * 2}, the same step", update
    if (longest := max(lengths)) > 256:
        shorter = 2 ** (math.ceil(math.log2(longest)) - 1)
        yield f"Set max_length to {shorter}", {"max_length": shorter}
    if c.r >= 16:
        yield f"Set r to {c.r // 2} and lora_alpha to {c.lora_alpha // 2}", {"r": c.r // 2}
    if c.shard is False and c.num_gpus > 1 and c.engine in ("auto", "packed"):
        yield "Set shard to auto", {"shard": True}
    if "8bit" not in c.optim:
        yield "Set optim to adamw_8bit", {"optim": "adamw_8bit"}
