"""A packed trainer over random rows, with the settings that its tests share."""

from datasets import Dataset
from trl import KTOConfig

from kto_core.engine import PackedKTOTrainer
from tests.support import oracle


def dataset(n=16, seed=0, labels=None):
    prompts, completions, y = oracle.random_rows(n, seed)
    return Dataset.from_dict(
        {
            "prompt_ids": [p.tolist() for p in prompts],
            "completion_ids": [c.tolist() for c in completions],
            "label": labels or y,
        }
    )


def arguments(folder, **extra):
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 2,
        "max_length": None,
        "beta": 0.1,
        "desirable_weight": 1.2,
        "undesirable_weight": 0.9,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return KTOConfig(output_dir=str(folder), **{**settings, **extra})


def packed(folder, tokenizer, data, model=None, args=None, peft_config=True, **extra):
    return PackedKTOTrainer(
        model=model if model is not None else oracle.base_model(),
        args=args or arguments(folder),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=oracle.lora() if peft_config else None,
        **{"cache_dir": folder / "cache", **extra},
    )


def metrics(trainer):
    return [h for h in trainer.state.log_history if "loss" in h]
