"""A mixture of experts in 4 bits on a card of 24 GiB: ``python benchmarks/mixture_card.py [--shape qwen3-30b-a3b]``.

Makes a 4-bit checkpoint of the shape (random weights, an expert three linear layers, as on the Hub), loads it as the
program does and trains it with the packed engine on made-up rows with a shared prompt, `--mean` tokens on average and
one of `--length`. Prints the seconds of loading, the plan, peak memory and rows a second, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

SHARED = 200  # tokens that all prompts begin with
GIB = 2**30


def rows(args) -> tuple[list[int], list]:
    """Lengths in tokens, and encoded rows."""
    import numpy as np

    from kto_core.data.rendering.template import Encoded

    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(np.log(args.mean * 0.8), 0.6, args.rows).astype(int), 24, args.length)
    lengths[0] = args.length
    shared, encoded = draw.integers(3, 290, SHARED).tolist(), []
    for n in lengths.tolist():
        completion = max(8, n // 3)
        prompt = (shared + draw.integers(3, 290, 4096).tolist())[: n - completion]
        encoded.append(Encoded(prompt, draw.integers(3, 290, completion).tolist(), "ok", len(prompt) + completion))
    return lengths.tolist(), encoded


def measure(args, folder: str) -> dict:
    import torch
    from transformers import AutoTokenizer, TrainerCallback
    from trl import KTOConfig

    from kto_core.config import resolving
    from kto_core.engine import PackedKTOTrainer
    from kto_core.hardware import gpus
    from kto_core.models import load
    from kto_core.planning import memory
    from kto_core.training.trainer import encoded_dataset

    gpu, out = torch.cuda.is_available(), {"torch": torch.__version__, "shape": args.shape}
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": args.batch // 2}
    settings = {"model": folder, "data": "none", "load_in_4bit": True, "r": args.r, "lora_alpha": 2 * args.r,
                "max_length": args.length, "target_modules": "all-linear", "engine": "packed", **batch}  # fmt: skip
    config = resolving.resolve("demo", settings).config
    began = time.perf_counter()
    model = load.load_base(config, for_training=True)
    out["seconds of loading"] = round(time.perf_counter() - began, 1)
    lengths, encoded = rows(args)
    plan = memory.plan(config, lengths, device=gpus.devices()[0] if gpu else gpus.imagined(args.gib))
    out["plan"] = {"verdict": plan.verdict, "gib": round(plan.predicted_gib, 2)}
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            if gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)

    with tempfile.TemporaryDirectory() as folder_out:
        trained = KTOConfig(
            output_dir=folder_out, num_train_epochs=1, learning_rate=1e-6, max_length=None, bf16=gpu, use_cpu=not gpu,
            optim="adamw_8bit" if gpu else "adamw_torch", save_strategy="no", logging_steps=1000, report_to=[],
            remove_unused_columns=False, disable_tqdm=True, dataloader_pin_memory=False, **batch,
        )  # fmt: skip
        trainer = PackedKTOTrainer(
            model=model, args=trained, processing_class=AutoTokenizer.from_pretrained(folder), reference_cache=False,
            train_dataset=encoded_dataset(encoded, [bool(i % 2) for i in range(args.rows)], 2, kl=True),
            peft_config=load.lora_config(config, model), callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    rest = seconds[1:] or seconds  # the first step also makes kernels ready
    out["rows/s"] = round(args.batch * len(rest) / sum(rest), 2)
    if gpu:
        out["peak GiB"] = {
            "allocated": round(torch.cuda.max_memory_allocated() / GIB, 2),
            "reserved": round(torch.cuda.max_memory_reserved() / GIB, 2),
        }
    return out


def main(argv=None) -> int:
    import shapes

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=shapes.SHAPES)
    parser.add_argument("--model", help="a folder with a model instead of a shape")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--mean", type=int, default=470, help="tokens of the mean row (default: %(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the longest (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="rows of an optimizer step (default: %(default)s)")
    parser.add_argument("--r", type=int, default=32, help="LoRA rank (default: %(default)s)")
    parser.add_argument("--gib", type=float, default=24.0, help="of the card that may be used (default: %(default)s)")
    args = parser.parse_args(argv)
    os.environ["KTO_STUDIO_GPU_GIB"] = str(args.gib)
    folder = Path(args.model) if args.model else shapes.place(shapes.ROOT, args.shape, True)
    if not (folder / "config.json").is_file():
        shapes.make(args.shape, folder, nf4=True)
    print(json.dumps(measure(args, str(folder)), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
