"""What shared prefixes are worth to a model with Gated DeltaNet layers: a packed KTO step on tool-calling-like rows.

    python benchmarks/hybrid_step.py [--type qwen3_5_text] [--rows 16] [--system 700] [--json OUT]

A small random model, float32 on a CPU and bfloat16 on a GPU. Every row has the same system prompt, two rows have each
question. Three steps on the same number of tokens: with shared prefixes; with rows whose first token differs, so that
each is a path of its own; and row by row, through the model's own forward. The loss of the last is compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIZES = {
    "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2048, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
}  # fmt: skip
BETA = 0.1


def rows_of(count: int, system: int, question: int, answer: int, *, shared: bool):
    """Prompts, completions and labels. Not ``shared``: the first one is the row's own."""
    import numpy as np

    rng = np.random.default_rng(0)
    start = rng.integers(3, SIZES["vocab_size"], system).astype(np.int32)
    questions = [rng.integers(3, SIZES["vocab_size"], question).astype(np.int32) for _ in range(count // 2)]
    prompts = [np.concatenate([start, q]) for q in questions for _ in (0, 1)]
    completions = [rng.integers(3, SIZES["vocab_size"], answer - i % 9).astype(np.int32) for i in range(count)]
    if not shared:
        for i, prompt in enumerate(prompts):
            prompt[0] = 3 + i
    return prompts, completions, [bool(i % 2) for i in range(count)]


def build(kind: str, device: str):
    """A random model with an adapter that is not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **SIZES)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model = model.to(device, torch.bfloat16 if device == "cuda" else torch.float32).requires_grad_(False)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data = p.data.float()
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.01)
    return model.train()


def best(step, device: str, repeat: int) -> float:
    """Seconds of the fastest of some calls after a first one."""
    import torch

    times = []
    for _ in range(repeat + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--type", default="qwen3_5_text")
    for name, value in (("rows", 16), ("system", 700), ("question", 60), ("answer", 80), ("repeat", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)

    import torch

    import kto_core  # noqa: F401  (it chooses the allocator)
    from kto_core.engine.group import Group, Objective
    from kto_core.engine.step import Engine
    from tests.support import oracle

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(args.type, device)
    engine = Engine(model)
    autocast = partial(torch.autocast, "cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext
    results: dict = {
        "device": device,
        "torch": torch.__version__,
        "type": args.type,
        "threads": torch.get_num_threads(),
    }

    def zeroed() -> None:
        model.zero_grad(set_to_none=True)

    for name in ("shared", "each row alone"):
        prompts, completions, labels = rows_of(
            args.rows, args.system, args.question, args.answer, shared=name == "shared"
        )
        borrowed = [*completions[1:], completions[0]]
        with model.disable_adapter(), autocast():
            scores = [torch.tensor(engine.score(prompts, c, 4096)).to(device) for c in (completions, borrowed)]
        group = Group(prompts, completions, borrowed, torch.tensor(labels, device=device), *scores)
        found = []

        def packed(group=group, found=found) -> None:
            with engine.using_tree():
                found.append(engine.run(group, Objective(BETA), backward=lambda x: x.backward(), autocast=autocast))
            zeroed()

        seconds = best(packed, device, args.repeat)
        results[name] = {"seconds": seconds, "tokens": found[-1].tokens, "packed": found[-1].packed}
        results[name] |= {"loss": float(found[-1].loss)}
        print(f"{name}: {seconds:.2f} s, {found[-1].packed:,} of {found[-1].tokens:,} tokens computed", flush=True)
        if name != "shared":
            continue

        def logp(i: int, completion, prompts=prompts):
            return oracle.logp(model, prompts[i], completion)

        def row_by_row(rows=range(args.rows), logp=logp, group=group, scores=scores, labels=labels) -> None:
            with autocast():
                with torch.no_grad():
                    kl = sum(float(logp(i, group.borrowed[i]) - scores[1][i]) for i in rows) / len(rows)
                loss = 0.0
                for i in rows:
                    ratio = logp(i, group.completions[i]) - scores[0][i] - max(0.0, kl)
                    part = (1 - torch.sigmoid(BETA * (1 if labels[i] else -1) * ratio)) / len(rows)
                    part.backward()
                    loss += float(part.detach())
            results["row by row"] = {"loss": loss}
            zeroed()

        seconds = best(row_by_row, device, 1)
        results["row by row"]["seconds"] = seconds
        print(
            f"row by row: {seconds:.2f} s, loss off by {abs(results['row by row']['loss'] - results[name]['loss']):.1g}"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
