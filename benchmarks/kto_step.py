"""Speed and memory of KTO training, side by side: TRL's KTOTrainer, the packed engine, Unsloth.

    python benchmarks/kto_step.py --engines trl,packed --data FILE --rows N --model demo
    python benchmarks/kto_step.py --engines trl,packed,unsloth --data FILE --rows 256 --model shape:mistral-7b \\
        --load-in-4bit --lora-r 64 --cap-gib 24 --precompute --micro-batches 4,8,16

Every engine trains on the same rows with the same number of KL pairs, each in a process of its own, in turns. TRL runs
with its defaults (reference computed in the step; gradient checkpointing unless told otherwise). The packed engine is
measured twice: cold, where scoring the reference counts, and warm, where the reference log-probs are on disk from the
run before. With ``--precompute`` TRL and Unsloth score the reference before they train as well, and are measured in
the same two ways. ``--micro-batches`` and ``--checkpointing both`` try TRL and Unsloth at several settings of the same
optimizer batch and keep the fastest (the packed engine chooses for itself). The first steps of each run are not timed.
Ratios are rows/s against the first engine named, cold against cold and warm against warm where there are both.

``of peak`` is the share of the device's matrix rate that the timed steps reach: operations of the products with the
frozen weights of the decoder layers (every token that went through them counts, padding too: the policy's forward and
backward, recomputed layers, y', and the reference where a step computes it), by the rate of one large product, bf16
(on a CPU fp32), measured in the same process. LoRA, attention, head and optimizer take time and count nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from step_engines import OPTIMIZERS, build, load, model_folder, rows  # noqa: E402
from step_work import Work, layer_operations, matrix_rate, now, profiled, recomputed  # noqa: E402

ENGINES = ("trl", "packed", "unsloth")
MARK = "RESULT "


def arguments(argv=None) -> argparse.Namespace:
    from flags import chosen, listed

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engines", default="trl,packed", help=f"comma-separated, of {', '.join(ENGINES)}")
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=64, help="so many rows of the file, drawn at random")
    parser.add_argument("--first", action="store_true", help="the file's first rows instead, which are often alike")
    parser.add_argument("--model", default="demo", help="demo, a folder, or shape:NAME (random weights; see shapes.py)")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="a shape is made in bf16 and put into 4 bits on loading")
    parser.add_argument("--optim", help=f"default {OPTIMIZERS[True]} on a GPU, {OPTIMIZERS[False]} on a CPU")
    parser.add_argument(
        "--precompute", action="store_true", help="TRL, Unsloth: score the reference before training, not in the step"
    )
    parser.add_argument(
        "--micro-batches", default="", help="TRL, Unsloth: also these rows of a micro-batch; the fastest counts"
    )
    parser.add_argument("--cap-gib", type=float, help="GPU memory that a process may take")
    parser.add_argument("--token-budget", type=int, help="packed: tokens of one pass; default what fits")
    parser.add_argument("--checkpoint-layers", type=int, help="packed: layers recomputed; default what memory needs")
    parser.add_argument(
        "--checkpointing",
        choices=("on", "off", "both"),
        default="on",
        help="TRL: recompute layers as is its default, or nothing if memory allows; both: the faster counts",
    )
    parser.add_argument(
        "--no-gradient-checkpointing", dest="checkpointing", action="store_const", const="off", help="the same as off"
    )
    parser.add_argument(
        "--cudnn-attention", action="store_true", help="as torch has it; without, no engine uses it, as in the product"
    )
    parser.add_argument("--warm-up", type=int, default=1, help="steps that are not timed")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each engine, in turns; the median counts")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--profile", action="store_true", help="packed: where the time of a run goes (stderr)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.names = chosen(parser, listed(args.engines), ENGINES, "engine")
    whole = args.batch_size * args.accumulation
    try:
        args.micro = list(dict.fromkeys([args.batch_size, *(int(n) for n in args.micro_batches.split(",") if n)]))
    except ValueError:
        parser.error("--micro-batches takes whole numbers, separated by commas")
    if odd := [n for n in args.micro if n < 1 or whole % n]:
        parser.error(f"a micro-batch of {odd[0]} does not divide the {whole} rows of a step")
    return args


def settings(args: argparse.Namespace, name: str) -> list[list[str]]:
    """Flags of each setting that the engine is measured at."""
    if name == "packed":
        return [[]]
    whole = args.batch_size * args.accumulation
    modes = ["on", "off"] if args.checkpointing == "both" else [args.checkpointing]
    modes = modes if name == "trl" else ["on"]  # Unsloth's own is a part of it
    return [
        ["--batch-size", str(n), "--accumulation", str(whole // n), "--checkpointing", mode]
        for mode in modes
        for n in args.micro
    ]


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
    folder = model_folder(args.model, args.load_in_4bit and not args.bf16)
    encoded, labels, tokenizer = rows(args, folder)
    tokens = sum(len(e.prompt_ids) + len(e.completion_ids) for e in encoded)
    from kto_core.training.train import give_back
    from kto_core.training.trainer import encoded_dataset

    dataset = encoded_dataset(encoded, labels, args.batch_size, kl=True)

    def run(reference_cache=None):
        model = load(args, folder)
        work = Work(model, layer_operations(folder))
        with tempfile.TemporaryDirectory() as out:
            trainer = build(args, model, tokenizer, dataset, out, gpu, reference_cache)
            work.share = partial(recomputed, args, trainer, folder)
            timer = timing_callback(args.warm_up, work)
            trainer.add_callback(timer)
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            reference, found = 0.0, {}
            if reference_cache is not None:
                start = now()
                trainer.prepare_reference()
                reference = now() - start
                found = {
                    "token_budget": trainer.engine.limits.token_budget,
                    "checkpoint_layers": trainer.engine.limits.checkpoint_layers,
                }
            with profiled(args.profile and reference_cache is not None):
                trainer.train()
            reference += getattr(trainer, "reference_seconds", 0.0)
        step = timer.seconds / timer.steps / (args.batch_size * args.accumulation)
        peak = torch.cuda.max_memory_reserved() if gpu else peak_rss()
        operations = work.operations / timer.seconds
        work.remove()
        del trainer, model
        give_back()
        found |= {"peak_gib": peak / 2**30, "tflops": operations / 1e12}
        if args.worker != "packed":
            found |= {"micro_batch": args.batch_size, "checkpointing": args.checkpointing}

        def speeds(seconds: float) -> dict:
            return {"rows_per_s": 1 / seconds, "tokens_per_s": tokens / len(labels) / seconds, **found}

        cold = speeds(step + reference / len(labels))
        return {"cold": cold, "warm": speeds(step)} if args.precompute and args.worker != "packed" else cold

    result = {"cold": run(args.cache), "warm": run(args.cache)} if args.worker == "packed" else run()
    most = matrix_rate("cuda" if gpu else "cpu")
    for found in (result["cold"], result["warm"]) if "cold" in result else (result,):
        found |= {"matrix_tflops": most / 1e12, "of_peak": found["tflops"] * 1e12 / most}
    return result


def peak_rss() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timing_callback(warm_up: int, work: Work):
    """Times the steps after the first ``warm_up``; ``work`` then holds what those steps computed."""
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        start = end = 0.0
        steps = 0

        def _begin(self):
            work.reset()
            self.start = now()

        def on_train_begin(self, *_, **__):
            self._begin()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step <= warm_up:
                self._begin()
            else:
                self.end, self.steps = now(), self.steps + 1

        @property
        def seconds(self) -> float:
            return self.end - self.start

    return Timer()


# ---- all engines -----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, argv: list[str]) -> dict:
    """Run every engine at each of its settings ``--repeat`` times, in turns. What fails is reported and left out."""
    tried = {name: settings(args, name) for name in args.names}
    runs: dict[str, list[list[dict]]] = {name: [[] for _ in flags] for name, flags in tried.items()}
    errors: dict[tuple[str, int], str] = {}
    for _ in range(args.repeat):
        for name, i, flags in ((name, i, f) for name, all_of in tried.items() for i, f in enumerate(all_of)):
            if (name, i) in errors:
                continue
            found = child([*argv, *flags, "--worker", name], show=args.profile)
            if "error" in found:
                errors[name, i] = found["error"]
                print(f"{' '.join([name, *flags])} failed: {found['error']}", file=sys.stderr)
            else:
                runs[name][i].append(found)
                print(f"{' '.join([name, *flags])}: {brief(found)}", file=sys.stderr, flush=True)
    engines = {}
    for name, by_setting in runs.items():
        found = [middle(r) for r in by_setting if r]
        if found:
            engines[name] = max(found, key=rate)
            if len(tried[name]) > 1:
                engines[name]["tried"] = [r for r in found if r is not engines[name]]
        else:
            engines[name] = {"error": next(text for (n, _), text in errors.items() if n == name)}
    return {"rows": args.rows, "engines": engines, "ratio": ratios(engines, args.names)}


def ratios(engines: dict, names: list[str]) -> dict[str, float]:
    """Speeds against the first engine's; where both are measured cold and warm, each against its like."""
    found: dict[str, float] = {}
    first = engines[names[0]]
    for name in names[1:]:
        for kind in ("cold", "warm") if "cold" in engines[name] else ("",):
            own, base = rate(engines[name], kind), rate(first, kind)
            if own and base:
                label = kind if name == "packed" else f"{name} {kind}".strip()
                found[label] = own / base
    return found


def child(argv: list[str], show: bool = False) -> dict:
    """The result of this script's worker in a process of its own, or ``{"error": its last line}``."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, __file__, *argv, "--cache", cache],
            stdout=subprocess.PIPE, stderr=None if show else subprocess.PIPE, text=True,
            env={
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # the same for all
                **os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            },
        )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not done.returncode and lines:
        return json.loads(lines[-1].removeprefix(MARK))
    tail = (done.stderr or done.stdout or "").strip().splitlines()
    return {"error": tail[-1] if tail else f"exit status {done.returncode}"}


def middle(found: list[dict]) -> dict:
    """Median of the speeds, largest of the peaks."""
    first = found[0]
    if "cold" in first:
        return {kind: middle([f[kind] for f in found]) for kind in ("cold", "warm")}
    pick = dict.fromkeys(("rows_per_s", "tokens_per_s", "tflops", "matrix_tflops", "of_peak"), statistics.median)
    return first | {key: choose(f[key] for f in found) for key, choose in (pick | {"peak_gib": max}).items()}


def rate(engine: dict, kind: str = "cold") -> float | None:
    """Rows a second; of an engine measured in two ways those of a first run, or ``kind``'s."""
    return engine.get(kind or "cold", engine).get("rows_per_s")


def brief(engine: dict) -> str:
    """One result in a line, for who does not wait for the others."""
    kinds = [(f" {kind}", engine[kind]) for kind in ("cold", "warm") if kind in engine] or [("", engine)]
    return ", ".join(
        f"{v['rows_per_s']:.2f} rows/s and {v['tokens_per_s']:.0f} tokens/s{kind} with {v['peak_gib']:.2f} GiB"
        for kind, v in kinds
    )


def table(engines: dict) -> str:
    """A line an engine; of one that was tried at several settings the fastest."""
    lines = [f"{'':14}{'rows/s':>10}{'tokens/s':>10}{'peak GiB':>10}{'of peak':>9}  setting"]
    for name, values in engines.items():
        for kind in ("cold", "warm") if "cold" in values else ("",):
            v = values[kind] if kind else values
            if "rows_per_s" not in v:
                continue
            label = f"{name} {kind}".strip()
            if "micro_batch" in v:
                how = f"micro-batch {v['micro_batch']}, checkpointing {v['checkpointing']}"
            else:
                budget = f"{v['token_budget']:,}" if v["token_budget"] else "all"
                how = f"{budget} tokens a pass, {v['checkpoint_layers']} layers recomputed"
            share = f"{v['of_peak']:.0%}" if v["tflops"] else "–"
            speeds = f"{v['rows_per_s']:10.2f}{v['tokens_per_s']:10.0f}{v['peak_gib']:10.2f}"
            lines.append(f"{label:14}{speeds}{share:>9}  {how}")
    return "\n".join(lines)


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
        print(table(result["engines"]))
        line = "  ".join(f"{kind} x{ratio:.2f}" for kind, ratio in result["ratio"].items())
        print(f"{line} (against {args.names[0]})")
    return 0 if all("error" not in v for v in result["engines"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
