"""The engines that `kto_step.py` measures: model, rows and trainer of each."""

from __future__ import annotations

from step_work import now

OPTIMIZERS = {True: "adamw_8bit", False: "adamw_torch"}  # with and without a GPU, as the product chooses


def model_folder(name: str, nf4: bool = False) -> str:
    """A folder for ``demo``, a path or ``shape:NAME``; of a shape a 4-bit checkpoint, or bf16."""
    if name.startswith("shape:"):
        import shapes

        shape = name.removeprefix("shape:").lower()
        return str(shapes.make(shape, shapes.place(shapes.ROOT, shape, nf4), nf4=nf4))
    from kto_core.models.facts import resolve_model

    return resolve_model(name)


def rows(args, folder: str):
    """Rows that fit, drawn at random (neighbours in a file are alike), encoded; their labels; the tokenizer."""
    import random

    from kto_core.data import dataset
    from kto_core.data.rendering import template
    from kto_core.models.load import load_tokenizer

    tokenizer = load_tokenizer(folder)
    found, drawn = [], list(dataset.load(args.data).rows)
    if not args.first:
        random.Random(0).shuffle(drawn)
    for row in drawn:
        encoded = template.encode(row, tokenizer, args.max_length)
        if encoded.trained:
            found.append((encoded, row.label))
        if len(found) == args.rows:
            break
    random.Random(0).shuffle(found)
    whole = len(found) // (args.batch_size * args.accumulation) * args.batch_size * args.accumulation
    if whole < 2 * args.batch_size * args.accumulation:
        raise SystemExit(f"{len(found)} rows are too few to time; take at least two steps' worth.")
    found = found[:whole]  # equal steps, so that steps can be timed
    return [e for e, _ in found], [label for _, label in found], tokenizer


def load(args, folder: str):
    """The model as the product loads it; Unsloth's with its adapter. Attention as the flag has it, for either."""
    import torch

    model = _load_unsloth(args, folder) if args.worker == "unsloth" else _load_base(args, folder)
    torch.backends.cuda.enable_cudnn_sdp(args.cudnn_attention)
    return model


def _load_unsloth(args, folder: str):
    import torch
    from unsloth import FastLanguageModel

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=args.max_length, dtype=dtype, load_in_4bit=args.load_in_4bit
    )
    return FastLanguageModel.get_peft_model(
        model, r=args.lora_r, lora_alpha=2 * args.lora_r, lora_dropout=0, target_modules=targets(),
        use_gradient_checkpointing="unsloth", random_state=0,
    )  # fmt: skip


def _load_base(args, folder: str):
    from kto_core.config import resolving as config
    from kto_core.models import load as model

    settings = {"model": folder, "data": "none", "load_in_4bit": args.load_in_4bit}
    return model.load_base(config.resolve("demo", settings).config, for_training=True)


def targets() -> list[str]:
    from kto_core.models.shape import ATTENTION, FFN

    return [*ATTENTION, *FFN]


def build(args, model, tokenizer, dataset, out: str, gpu: bool, cache):
    from peft import LoraConfig
    from trl import KTOConfig, KTOTrainer

    from kto_core.models.language.targets import excluded

    config = KTOConfig(
        output_dir=out,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        num_train_epochs=1,
        learning_rate=1e-6,
        optim=args.optim or OPTIMIZERS[gpu],
        precompute_ref_log_probs=args.precompute and args.worker != "packed",
        max_length=None,  # rows are cut already
        bf16=gpu,
        use_cpu=not gpu,
        save_strategy="no",
        logging_steps=1000,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        gradient_checkpointing=args.checkpointing == "on",
    )
    lora = None
    if args.worker != "unsloth":
        lora = LoraConfig(
            r=args.lora_r, lora_alpha=2 * args.lora_r, lora_dropout=0.0, task_type="CAUSAL_LM",
            target_modules="all-linear", exclude_modules=excluded(model, "all-linear"),
        )  # fmt: skip
    common = {"model": model, "args": config, "train_dataset": dataset, "processing_class": tokenizer}
    if args.worker == "packed":
        from kto_core.engine import PackedKTOTrainer

        return PackedKTOTrainer(
            **common, peft_config=lora, cache_dir=cache, token_budget=args.token_budget,
            checkpoint_layers=args.checkpoint_layers,
        )  # fmt: skip

    class OnTokens(KTOTrainer):
        """TRL's trainer on rows that are tokens already."""

        reference_seconds = 0.0

        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def _precompute_ref_logps(self, *args, **kwargs):
            start = now()
            try:
                return super()._precompute_ref_logps(*args, **kwargs)
            finally:
                self.reference_seconds += now() - start

    return OnTokens(**common, peft_config=lora)
