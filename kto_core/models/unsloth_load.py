"""Base model and adapter through Unsloth. Only in a process that has imported unsloth before torch and trl."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from kto_core.errors import HardwareError, ModelError

if TYPE_CHECKING:
    from kto_core.config.run_config import RunConfig


def import_first() -> None:
    """Import unsloth; called before anything else of the training process is imported.

    Raises:
        HardwareError: Unsloth finds no GPU that it can use.
        ModelError: it is not installed, or does not fit the other packages.
    """
    try:
        import unsloth  # noqa: F401 - replaces parts of transformers, peft and trl
    except NotImplementedError as e:  # its answer to a machine without a GPU
        raise HardwareError(f"Unsloth does not support this machine ({e}). Choose engine `auto` or `trl`.") from e
    except (ImportError, RuntimeError) as e:
        raise ModelError(
            f"Unsloth cannot be imported ({e}). Install requirements-unsloth.txt into a new virtual environment, or "
            "choose engine `auto` or `trl`."
        ) from e


def targets(config: RunConfig) -> list[str]:
    """Names of the layers to adapt, which it wants one by one; of a mixture of experts the attention's, as everywhere
    here.

    Unsloth would adapt each expert, for gpt-oss-20b with rank 128 by 1.4 billion parameters: 5.3 GiB, and as much for
    their gradients. Where nothing but FFN projections is asked for, experts are meant.
    """
    from .facts import local_folder, model_facts
    from .language.targets import suffixes
    from .shape import ATTENTION, FFN
    from .whole import bare

    chosen = config.target_modules
    if not model_facts(config.model).shape.experts:
        return suffixes(bare(local_folder(config.model))) if isinstance(chosen, str) else chosen
    if isinstance(chosen, str):
        return list(ATTENTION)
    return [n for n in chosen if n.rpartition(".")[2] not in FFN] or chosen


def load_unsloth(config: RunConfig):
    """Unsloth's model with a fresh LoRA adapter, ready for its KTOTrainer.

    Raises:
        ModelError: unsloth was not imported first, or the model does not load.
    """
    if "unsloth" not in sys.modules:
        raise ModelError("Unsloth needs its own process. Set worker to `process`.")
    from unsloth import FastLanguageModel

    from kto_core.hardware.gpus import prepare
    from kto_core.hardware.out_of_memory import at_loading, is_out_of_memory

    from .facts import local_folder
    from .load import training_dtype

    prepare()
    try:
        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(local_folder(config.model)),
            max_seq_length=config.max_length,
            dtype=None if config.dtype == "auto" else training_dtype(config),
            load_in_4bit=config.load_in_4bit,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError, NotImplementedError) as e:
        if is_out_of_memory(e):
            raise at_loading(config.model) from e
        raise ModelError(f"Unsloth cannot load {config.model}: {str(e)[:300]}. Choose engine `auto` or `trl`.") from e
    checkpointing = config.gradient_checkpointing
    return FastLanguageModel.get_peft_model(
        model,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets(config),
        bias="none",
        use_gradient_checkpointing="unsloth" if checkpointing == "auto" else checkpointing,
        random_state=config.seed,
    )
