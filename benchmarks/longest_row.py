"""The longest row that each engine can train within a card's memory, by bisection.

    python benchmarks/longest_row.py --model shape:mistral-7b --load-in-4bit --lora-r 64 --cap-gib 24

A try is a process of its own that loads the model, makes one optimizer step on two rows of that length (half of it the
answer, random tokens, nothing shared, so that nothing is saved by chance) and ends, or runs out of memory. Each try
prints a line, each engine a row of the table. TRL and Unsloth take both rows at once (they refuse a micro-batch of
one) and recompute all layers; the packed engine chooses for itself, refuses what it believes not to fit (its limits are
in its line), and as ``forced`` is told to try all the same, one row a pass, all layers recomputed, their inputs in
main memory on a GPU.
Without a GPU ``--cap-gib`` is a limit on the process's data (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

ENGINES = ("packed", "forced", "trl", "unsloth")
MARK = "RESULT "
MEMORY = ("out of memory", "alloc_failed", "can't allocate memory", "bad_alloc", "cannot allocate memory")
ALL = 10**6  # layers; the engine has no more than it has


def arguments(argv=None) -> argparse.Namespace:
    from flags import chosen, listed

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--model", default="demo", help="demo, a folder, or shape:NAME (random weights; see shapes.py)")
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="a shape is made in bf16 and put into 4 bits on loading")
    parser.add_argument("--lora-r", type=int, default=64)
    parser.add_argument("--cap-gib", type=float, default=24.0, help="memory of a process (default: %(default)s)")
    parser.add_argument("--low", type=int, default=512, help="shortest row tried (default: %(default)s)")
    parser.add_argument("--high", type=int, default=32768, help="longest row tried (default: %(default)s)")
    parser.add_argument("--step", type=int, default=512, help="lengths are multiples of this (default: %(default)s)")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one try (default: %(default)s)")
    parser.add_argument("--optim", help="default adamw_8bit on a GPU")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--json", metavar="OUT", help="write all tries to this file")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.names = chosen(parser, listed(args.engines), ENGINES, "engine")
    if not 4 <= args.low <= args.high or args.step < 1:
        parser.error("--low is at least 4 and at most --high; --step is at least 1")
    return args


def longest(fits: Callable[[int], bool], low: int, high: int, step: int) -> int:
    """The largest multiple of ``step`` from ``low`` to ``high`` that fits, 0 if none does.

    Assumes that what is shorter than something that fits, fits as well.
    """
    good, bad = -(-low // step) - 1, high // step + 1
    first = good + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle * step):
            good = middle
        else:
            bad = middle
    return good * step if good >= first else 0


# ---- one try, in a process of its own --------------------------------------------------------------------------------


def rows(length: int, count: int, vocabulary: int):
    """Rows of exactly ``length`` tokens with nothing in common, and labels of both kinds."""
    import numpy as np

    from kto_core.data.rendering.template import Encoded

    random = np.random.default_rng(0)
    ids = random.integers(3, vocabulary, (count, length)).tolist()
    middle = length // 2
    return [Encoded(i[:middle], i[middle:], "ok", length) for i in ids], [n % 2 == 0 for n in range(count)]


def attempt(args) -> dict:
    """One optimizer step; {"fits": bool, "why": …, peak_gib, seconds, limits}."""
    if args.worker == "unsloth":
        import unsloth  # noqa: F401  (it must come first)
    import torch

    from kto_core.errors import HardwareError

    found: dict = {"fits": False}
    try:
        _attempt(args, found)
        found["fits"] = True
    except HardwareError as e:
        found["why"] = str(e)
    except (torch.cuda.OutOfMemoryError, MemoryError, RuntimeError) as e:
        if not isinstance(e, torch.cuda.OutOfMemoryError | MemoryError) and not of_memory(str(e)):
            raise
        found["why"] = "out of memory"
    return found


def of_memory(text: str) -> bool:
    return any(word in text.lower() for word in MEMORY)


def _attempt(args, found: dict) -> None:
    import kto_step
    import torch

    from kto_core.models.load import load_tokenizer
    from kto_core.training.trainer import encoded_dataset

    if args.threads:
        torch.set_num_threads(args.threads)
    gpu = torch.cuda.is_available()
    engine = "packed" if args.worker == "forced" else args.worker
    folder = kto_step.model_folder(args.model, args.load_in_4bit and not args.bf16)
    tokenizer = load_tokenizer(folder)
    encoded, labels = rows(args.length, 2, len(tokenizer))
    flags = ["--data", "none", "--max-length", str(args.length), "--lora-r", str(args.lora_r)]
    flags += ["--worker", engine, "--batch-size", "2", "--accumulation", "1"]
    flags += ["--load-in-4bit"] * args.load_in_4bit + (["--optim", args.optim] if args.optim else [])
    if args.worker == "forced":
        flags += ["--token-budget", str(args.length), "--checkpoint-layers", str(ALL)]
    one = kto_step.arguments(flags)
    hold(args.cap_gib, gpu)
    model = kto_step.load(one, folder)
    dataset = encoded_dataset(encoded, labels, one.batch_size, kl=True)
    with tempfile.TemporaryDirectory() as out:
        cache = str(Path(out) / "cache")
        trainer = kto_step.build(one, model, tokenizer, dataset, out, gpu, cache)
        if args.worker == "forced":
            trainer.engine.limits = replace(trainer.engine.limits, offload=gpu)
        began = time.perf_counter()
        trainer.train()
        if gpu:
            torch.cuda.synchronize()
        found["seconds"] = round(time.perf_counter() - began, 2)
        if engine == "packed":
            e, cut = trainer.engine, trainer.engine.limits
            found["limits"] = {"token_budget": cut.token_budget, "recomputed": cut.checkpoint_layers}
            found["limits"] |= {"of": len(e.layers), "offload": cut.offload}
    peak = torch.cuda.max_memory_reserved() if gpu else kto_step.peak_rss()
    found["peak_gib"] = round(peak / 2**30, 2)


def hold(gib: float, gpu: bool) -> None:
    """Hold this process to so much memory."""
    if gpu:
        import torch

        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))
    else:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30), hard))


# ---- all tries -------------------------------------------------------------------------------------------------------


def child(args, argv: list[str], engine: str, length: int) -> dict:
    """What one try came to. One that ends for another reason than memory has ``error``."""
    command = [sys.executable, __file__, *argv, "--worker", engine, "--length", str(length)]
    env = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ, "HF_HUB_OFFLINE": "1"}
    found: dict = {"engine": engine, "length": length, "fits": False}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout, env=env)
    except subprocess.TimeoutExpired:
        return found | {"error": f"not done in {args.timeout} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if lines:
        return found | json.loads(lines[-1].removeprefix(MARK))
    said = (done.stderr or done.stdout).strip()
    if of_memory(said[-2000:]) or done.returncode == -9:  # ended before it could say so
        return found | {"why": "out of memory"}
    return found | {"error": (said.splitlines() or [f"exit status {done.returncode}"])[-1][:300]}


def line(found: dict) -> str:
    """A try in one line."""
    head = f"{found['engine']}, {found['length']:,} tokens: "
    if "error" in found:
        return head + f"failed ({found['error']})"
    if not found["fits"]:
        return head + found["why"]
    text = head + f"fits, {found['peak_gib']:.2f} GiB, {found['seconds']:.1f} s with the reference"
    if "limits" in found:
        n = found["limits"]
        budget = f"{n['token_budget']:,}" if n["token_budget"] else "all"
        text += f"; limits: {budget} tokens a pass, {n['recomputed']} of {n['of']} layers recomputed"
        text += ", their inputs in main memory" if n["offload"] else ""
    return text


class Failed(Exception):
    """A try ended for another reason than memory: the search would mean nothing."""


def search(args, attempt: Callable[[str, int], dict]) -> tuple[list[str], list[dict]]:
    """(rows of the table, all tries) of every engine."""
    table, tries = [], []
    for engine in args.names:
        mine: dict[int, dict] = {}

        def fits(length: int, engine: str = engine, mine: dict = mine) -> bool:
            found = mine[length] = attempt(engine, length)
            tries.append(found)
            print(line(found), file=sys.stderr, flush=True)
            if "error" in found:
                raise Failed(found["error"])
            return found["fits"]

        try:
            best = longest(fits, args.low, args.high, args.step)
        except Failed as e:
            table.append(f"| {engine} | failed: {e} | – | – |")
            continue
        if not best:
            table.append(f"| {engine} | none of {args.low:,} tokens or more | – | – |")
            continue
        top = best + args.step > args.high
        name = f"{best:,}{' (the longest tried)' if top else ''}"
        table.append(f"| {engine} | {name} | {mine[best]['peak_gib']:.2f} | {mine[best]['seconds']:.1f} |")
    return table, tries


def main(argv=None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = arguments(argv)
    if args.worker:
        print(MARK + json.dumps(attempt(args)), flush=True)
        return 0
    table, tries = search(args, lambda engine, length: child(args, argv, engine, length))
    if args.json:
        Path(args.json).write_text(json.dumps(tries, indent=1))
    print(f"{args.model}, {args.cap_gib:g} GiB, LoRA r {args.lora_r}, multiples of {args.step:,} tokens\n")
    print("| engine | longest row, tokens | peak GiB | s for two rows, reference included |\n|---|---|---|---|")
    print("\n".join(table))
    return 1 if any("error" in t for t in tries) else 0


if __name__ == "__main__":
    sys.exit(main())
