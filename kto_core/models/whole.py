"""A model with every weight of its checkpoint, its experts in 4 bits where they are asked for; and what cannot be."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kto_core.errors import ModelError
from kto_core.guards.libraries import one_model_at_a_time
from kto_core.jobs import Progress, no_progress

from .facts import model_facts
from .language.part import auto_class
from .model_fit import build, require_fit, unused
from .model_gate import tensors_of

if TYPE_CHECKING:
    from kto_core.config.run_config import RunConfig

Layout = Callable[[], AbstractContextManager]


def bare(folder: Path):
    """The model whose config.json is in ``folder``, in this project's layout, without weights. Raises like `build`."""
    with one_model_at_a_time:
        return build(folder, _layout(folder, four_bits=False))[1]


def _layout(folder: Path, *, four_bits: bool) -> Layout:
    """The context in which the model in ``folder`` is built as its weights are to be held."""
    from transformers import AutoConfig

    from .experts import gpt_oss, held

    if model_facts(str(folder)).model_type == "gpt_oss":
        return partial(gpt_oss.layout, tensors_of(folder))
    if not four_bits:
        return contextlib.nullcontext
    try:
        return partial(held.layout, AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception:  # `build` says what is wrong with it
        return contextlib.nullcontext


def require_trainable(config: RunConfig, folder: Path) -> None:
    """The formats of ``config``'s model that cannot be trained. ``folder``: with its config.json.

    Raises:
        ModelError: MXFP4, or experts that 4-bit loading would leave in 16 bits.
    """
    from kto_core.hardware.gpus import GIB

    facts = model_facts(str(folder))
    if facts.quantized == "mxfp4":
        raise ModelError(
            f"{config.model} is stored in MXFP4, which cannot be trained directly and needs four times the memory "
            "when unpacked. Use the bitsandbytes version, for gpt-oss-20b unsloth/gpt-oss-20b-unsloth-bnb-4bit."
        )
    if not facts.shape.experts or not config.load_in_4bit or facts.quantized:
        return
    from .experts import held

    with one_model_at_a_time:
        _, model = build(folder, _layout(folder, four_bits=True))
    left = {n: p.numel() for n, p in model.named_parameters() if ".experts." in n and p.dim() == 3}
    if fused := sum(left.values()):
        module = model.get_submodule(next(iter(left)).rpartition(".")[0])
        reason = f": {held.why_not(module)}" if hasattr(module, "_apply_gate") else ""
        ours = " (for gpt-oss-20b unsloth/gpt-oss-20b-unsloth-bnb-4bit)" if facts.model_type == "gpt_oss" else ""
        raise ModelError(
            f"The experts of {config.model} ({fused / 1e9:.1f} billion parameters) cannot be quantized to 4-bit "
            f"while loading{reason}, and need {2 * fused / GIB:.0f} GiB in 16-bit. Use a checkpoint with 4-bit "
            f"experts{ours}, or set load_in_4bit to false."
        )


def load_whole(folder: Path, *, progress: Progress = no_progress, cancel: threading.Event | None = None, **kwargs: Any):
    """The model in ``folder``, whose checkpoint has every weight of it. ``kwargs``: as for ``from_pretrained``.

    Raises:
        ModelError: weights are missing or do not fit.
        Cancelled: ``cancel`` was set while experts were read.
    """
    from transformers import AutoConfig

    from .experts import filling, gpt_oss

    facts, there = model_facts(str(folder)), tensors_of(folder)
    ours = facts.model_type == "gpt_oss"
    if ours:
        gpt_oss.register()
    settings = kwargs.get("quantization_config")
    four_bits = facts.quantized == "bitsandbytes" or getattr(settings, "load_in_4bit", False)
    layout = _layout(folder, four_bits=four_bits)
    with one_model_at_a_time:
        built = require_fit(folder, layout)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        banks = filling.sources(built, {name: (kind, shape) for name, (_, kind, shape) in there.items()}, folder.name)
    for attention in (gpt_oss.ATTENTION,) if ours else _attentions(config):
        try:
            with one_model_at_a_time, layout():
                model, info = auto_class(config).from_pretrained(
                    folder, attn_implementation=attention, output_loading_info=True, **kwargs
                )
            break
        except ValueError as e:
            if attention == "eager" or "scaled_dot_product_attention" not in str(e):
                raise
    filling.fill(
        model,
        banks,
        folder,
        {name: file for name, (file, _, _) in there.items()},
        dtype=model.dtype,
        device=model.get_input_embeddings().weight.device,
        quant_type=getattr(settings, "bnb_4bit_quant_type", "nf4"),
        double=getattr(settings, "bnb_4bit_use_double_quant", True),
        progress=lambda share: progress(None, f"Loading experts: {share:.0%}"),
        cancel=cancel,
    )
    missing = sorted(info["missing_keys"])
    for name, module in model.named_modules():  # 4-bit weights say nothing without their scales
        if type(module).__name__ == "Linear4bit" and getattr(module.weight, "quant_state", None) is None:
            missing.append(f"{name}.weight.quant_state")
    if missing:
        raise ModelError(
            f"{len(missing)} weights are missing from {folder.name} ({', '.join(missing[:3])}…) and would be random. "
            "The download is incomplete, or the format is not supported. Download it again, or choose another model."
        )
    if sentence := unused(info["unexpected_keys"]):
        logging.getLogger(__name__).warning("%s: %s", folder.name, sentence)
    return model


def _attentions(config) -> tuple[str, ...]:
    """What to try, by transformers' names: SDPA, which leaves a soft cap of the attention's logits out without a word,
    only where the model has none."""
    return ("eager",) if getattr(config.get_text_config(), "attn_logit_softcapping", None) else ("sdpa", "eager")
