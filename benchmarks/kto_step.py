"""Speed and memory of KTO training, side by side: TRL's KTOTrainer, the packed engine, Unsloth.

    python benchmarks/kto_step.py --engines trl,packed --data FILE --rows N --model demo
    python benchmarks/kto_step.py --engines trl,packed,unsloth --data FILE --rows 256 --model shape:mistral-7b \\
        --load-in-4bit --lora-r 64 --cap-gib 24

Every engine trains on the same rows with the same number of KL pairs, each in a process of its own, in turns. TRL runs
with its defaults (reference computed in the step; gradient checkpointing unless told otherwise). The packed engine is
measured twice: cold, where scoring the reference counts, and warm, where the reference log-probs are on disk from the
run before. The first steps of each run are not timed. Ratios are rows/s against the first engine named.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

ENGINES = ("trl", "packed", "unsloth")
MARK = "RESULT "


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engines", default="trl,packed", help=f"comma-separated, of {', '.join(ENGINES)}")
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=64, help="the first N rows of the file, shuffled")
    parser.add_argument("--model", default="demo", help="demo, a folder, or shape:NAME (random weights; see shapes.py)")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--cap-gib", type=float, help="GPU memory that a process may take")
    parser.add_argument("--token-budget", type=int, help="packed: tokens of one pass; default what fits")
    parser.add_argument("--checkpoint-layers", type=int, help="packed: layers recomputed; default what memory needs")
    parser.add_argument(
        "--no-gradient-checkpointing",
        action="store_true",
        help="TRL: recompute nothing, if memory allows (its default recomputes)",
    )
    parser.add_argument("--warm-up", type=int, default=1, help="steps that are not timed")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each engine, in turns; the median counts")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--profile", action="store_true", help="packed: where the time of a run goes (stderr)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.names = [name.strip() for name in args.engines.split(",") if name.strip()]
    if unknown := [name for name in args.names if name not in ENGINES]:
        parser.error(f"unknown engine {unknown[0]}; choose from {', '.join(ENGINES)}")
    return args


# ---- one engine, in a process of its own ---------------------------------------------------------------------------


def worker(args: argparse.Namespace) -> dict:
    """Train one engine. Returns rows/s, tokens/s and peak memory; "packed" returns them for cold and warm."""
    if args.worker == "unsloth":
        import unsloth  # noqa: F401  (it must come first)
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    gpu = torch.cuda.is_available()
    if gpu and args.cap_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_gib * 2**30 / total))
    folder = model_folder(args.model)
    encoded, labels, tokenizer = rows(args, folder)
    tokens = sum(len(e.prompt_ids) + len(e.completion_ids) for e in encoded)
    from kto_core.trainer import encoded_dataset

    dataset = encoded_dataset(encoded, labels, args.batch_size, kl=True)

    def run(reference_cache=None):
        model = load(args, folder, gpu)
        with tempfile.TemporaryDirectory() as out:
            trainer = build(args, model, tokenizer, dataset, out, gpu, reference_cache)
            timer = timing_callback(args.warm_up)
            trainer.add_callback(timer)
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            reference = 0.0
            if reference_cache is not None:
                start = time.perf_counter()
                trainer.prepare_reference()
                if gpu:
                    torch.cuda.synchronize()
                reference = time.perf_counter() - start
            with profiled(args.profile and reference_cache is not None):
                trainer.train()
            settings = {}
            if reference_cache is not None:
                settings = {
                    "token_budget": trainer.engine.token_budget,
                    "checkpoint_layers": trainer.engine.checkpoint_layers,
                }
        seconds = timer.seconds / timer.steps / (args.batch_size * args.accumulation) + reference / len(labels)
        peak = torch.cuda.max_memory_reserved() if gpu else peak_rss()
        del trainer, model
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
        return {
            "rows_per_s": 1 / seconds,
            "tokens_per_s": tokens / len(labels) / seconds,
            "peak_gib": peak / 2**30,
            **settings,
        }

    if args.worker != "packed":
        return run()
    cold = run(args.cache)
    return {"cold": cold, "warm": run(args.cache)}


def peak_rss() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def model_folder(name: str) -> str:
    """A folder for ``demo``, a path or ``shape:NAME``."""
    if name.startswith("shape:"):
        import shapes

        where = Path(tempfile.gettempdir()) / "kto-shapes" / name.removeprefix("shape:")
        return str(shapes.make(name.removeprefix("shape:").lower(), where))
    from kto_core.model_info import resolve_model

    return resolve_model(name)


def rows(args, folder: str):
    """The first rows that fit, encoded, in a shuffled order; their labels; the tokenizer."""
    import random

    from kto_core import dataset, template
    from kto_core.model import load_tokenizer

    tokenizer = load_tokenizer(folder)
    found = []
    for row in dataset.load(args.data).rows:
        encoded = template.encode(row, tokenizer, args.max_length)
        if encoded.fate != "too_long":
            found.append((encoded, row.label))
        if len(found) == args.rows:
            break
    random.Random(0).shuffle(found)
    whole = len(found) // (args.batch_size * args.accumulation) * args.batch_size * args.accumulation
    if whole < 2 * args.batch_size * args.accumulation:
        raise SystemExit(f"{len(found)} rows are too few to time; take at least two steps' worth.")
    found = found[:whole]  # equal steps, so that steps can be timed
    return [e for e, _ in found], [label for _, label in found], tokenizer


def load(args, folder: str, gpu: bool):
    import torch

    dtype = torch.bfloat16 if gpu else torch.float32
    if args.worker == "unsloth":
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=args.max_length, dtype=dtype, load_in_4bit=args.load_in_4bit
        )
        return FastLanguageModel.get_peft_model(
            model, r=args.lora_r, lora_alpha=2 * args.lora_r, lora_dropout=0, target_modules=targets(),
            use_gradient_checkpointing="unsloth", random_state=0,
        )  # fmt: skip
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kwargs = {"dtype": dtype, "attn_implementation": "sdpa"}
    if gpu:
        kwargs["device_map"] = {"": 0}
    if args.load_in_4bit:
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def targets() -> list[str]:
    from kto_core.config import TARGETS

    return list(TARGETS)


def build(args, model, tokenizer, dataset, out: str, gpu: bool, cache):
    from peft import LoraConfig
    from trl import KTOConfig, KTOTrainer

    config = KTOConfig(
        output_dir=out,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        num_train_epochs=1,
        learning_rate=1e-6,
        max_length=None,  # rows are cut already
        bf16=gpu,
        use_cpu=not gpu,
        save_strategy="no",
        logging_steps=1000,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        gradient_checkpointing=args.worker == "packed" or not args.no_gradient_checkpointing,
    )
    lora = None
    if args.worker != "unsloth":
        lora = LoraConfig(
            r=args.lora_r, lora_alpha=2 * args.lora_r, lora_dropout=0.0, target_modules=targets(), task_type="CAUSAL_LM"
        )
    common = {"model": model, "args": config, "train_dataset": dataset, "processing_class": tokenizer}
    if args.worker == "packed":
        from kto_core.engine import PackedKTOTrainer

        return PackedKTOTrainer(
            **common, peft_config=lora, cache_dir=cache, token_budget=args.token_budget,
            checkpoint_layers=args.checkpoint_layers,
        )  # fmt: skip

    class OnTokens(KTOTrainer):
        """TRL's trainer on rows that are tokens already."""

        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

    return OnTokens(**common, peft_config=lora)


def timing_callback(warm_up: int):
    import torch
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        start = end = 0.0
        steps = 0

        def _now(self) -> float:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter()

        def on_train_begin(self, *_, **__):
            self.start = self._now()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step <= warm_up:
                self.start = self._now()
            else:
                self.end, self.steps = self._now(), self.steps + 1

        @property
        def seconds(self) -> float:
            return self.end - self.start

    return Timer()


class profiled:
    """Prints the operators that take most of the time, if ``wanted``."""

    def __init__(self, wanted: bool):
        self.wanted = wanted

    def __enter__(self):
        if self.wanted:
            import torch
            from torch.profiler import ProfilerActivity, profile

            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self.key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            self.profile = profile(activities=activities)
            self.profile.__enter__()

    def __exit__(self, *error):
        if self.wanted:
            self.profile.__exit__(*error)
            print(self.profile.key_averages().table(sort_by=self.key, row_limit=25), file=sys.stderr)


# ---- all engines -----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, argv: list[str]) -> dict:
    """Run every engine ``--repeat`` times, in turns. A child that fails is reported and left out."""
    runs: dict[str, list[dict]] = {name: [] for name in args.names}
    errors: dict[str, str] = {}
    for _ in range(args.repeat):
        for name in args.names:
            if name in errors:
                continue
            with tempfile.TemporaryDirectory() as cache:
                child = subprocess.run(
                    [sys.executable, __file__, *argv, "--worker", name, "--cache", cache],
                    stdout=subprocess.PIPE, stderr=None if args.profile else subprocess.PIPE, text=True,
                    env={
                        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # the same for all
                        **os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
                    },
                )  # fmt: skip
            lines = [line for line in child.stdout.splitlines() if line.startswith(MARK)]
            if child.returncode or not lines:
                tail = (child.stderr or child.stdout or "").strip().splitlines()
                errors[name] = tail[-1] if tail else f"exit status {child.returncode}"
                print(f"{name} failed: {errors[name]}", file=sys.stderr)
            else:
                runs[name].append(json.loads(lines[-1].removeprefix(MARK)))
    engines = {name: middle(found) for name, found in runs.items() if found}
    engines |= {name: {"error": text} for name, text in errors.items() if name not in engines}
    result = {"rows": args.rows, "engines": engines, "ratio": {}}
    base = rate(engines.get(args.names[0], {}))
    for name in args.names[1:]:
        if base and name == "packed" and "cold" in engines[name]:
            result["ratio"] |= {kind: engines[name][kind]["rows_per_s"] / base for kind in ("cold", "warm")}
        elif base and rate(engines[name]):
            result["ratio"][name] = rate(engines[name]) / base
    return result


def middle(found: list[dict]) -> dict:
    """Median of the speeds, largest of the peaks."""
    first = found[0]
    if "cold" in first:
        return {kind: middle([f[kind] for f in found]) for kind in ("cold", "warm")}
    pick = {"rows_per_s": statistics.median, "tokens_per_s": statistics.median, "peak_gib": max}
    return first | {key: choose(f[key] for f in found) for key, choose in pick.items()}


def rate(engine: dict) -> float | None:
    return engine.get("cold", engine).get("rows_per_s")


def main(argv=None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = arguments(argv)
    if args.worker:
        print(MARK + json.dumps(worker(args)))
        return 0
    result = measure(args, argv)
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{'':14}{'rows/s':>10}{'tokens/s':>10}{'peak GiB':>10}")
        for name, values in result["engines"].items():
            for kind, v in values.items() if "cold" in values else [("", values)]:
                if "rows_per_s" in v:
                    label = f"{name} {kind}".strip()
                    print(f"{label:14}{v['rows_per_s']:10.2f}{v['tokens_per_s']:10.0f}{v['peak_gib']:10.2f}")
        ratios = "  ".join(f"{kind} x{ratio:.2f}" for kind, ratio in result["ratio"].items())
        print(f"{ratios} (against {args.names[0]})")
    return 0 if all("error" not in v for v in result["engines"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
