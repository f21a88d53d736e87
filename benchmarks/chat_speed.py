"""Tokens a second of a streamed answer: ``python benchmarks/chat_speed.py [--model M] [--load-in-4bit] [--tokens N]``.

Loads a model as the Chat tab does and answers one question, batch 1, greedy, with the end of turn switched off so that
every variant writes as many tokens: ``chat`` is the product's stream, ``base`` the same with the adapter switched off;
``plain`` is transformers' generate with its growing cache; ``static`` is the same with a static cache, which
transformers compiles and captures on a GPU. The first answer of a variant is not timed (``warm-up`` says how long it
took). ``first token`` counts from the question on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

QUESTION = [{"role": "user", "content": "Tell me, in as many words as you like, how a bicycle stays upright."}]
VARIANTS = ("chat", "base", "plain", "static")


def arguments(argv=None) -> argparse.Namespace:
    from flags import chosen

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="demo, a folder, or shape:NAME (random weights; see shapes.py)")
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument(
        "--adapter-r", type=int, default=0, metavar="R", help="with a LoRA adapter of this rank; 0: none"
    )
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="timed answers of each variant; the median counts")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--cap-gib", type=float, help="GPU memory that the process may take")
    parser.add_argument("--cudnn-attention", action="store_true", help="as torch has it; the product turns it off")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(argv)
    args.names = chosen(parser, args.variants.split(","), VARIANTS, "variant")
    return args


def load(args):
    """A `chat.Chat` of the model, with a random adapter if asked."""
    import torch
    from kto_step import model_folder
    from step_engines import targets

    from kto_core.chat import chat
    from kto_core.config import resolving as config
    from kto_core.models import load as model

    if torch.cuda.is_available() and args.cap_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_gib * 2**30 / total))
    folder = model_folder(args.model, args.load_in_4bit)
    found = config.resolve("demo", {"model": folder, "load_in_4bit": args.load_in_4bit, "data": "none"}).config
    base = model.load_base(found, for_training=False)
    torch.backends.cuda.enable_cudnn_sdp(args.cudnn_attention)
    if args.adapter_r:
        from peft import LoraConfig, get_peft_model

        base = get_peft_model(base, LoraConfig(r=args.adapter_r, target_modules=targets(), task_type="CAUSAL_LM"))
    loaded = chat.Chat(base.eval(), model.load_tokenizer(folder), args.model, bool(args.adapter_r))
    if torch.cuda.is_available():
        began = time.perf_counter()
        loaded.warm_up()
        print(f"warmed up in {time.perf_counter() - began:.1f} s, decoder: {loaded.decoder}", file=sys.stderr)
    return loaded


def answer(loaded, variant: str, tokens: int) -> tuple[float, float, int]:
    """(seconds until the first token, seconds, tokens) of one answer."""
    import torch

    began, first, count = time.perf_counter(), None, 0
    if variant in ("chat", "base"):
        for _ in loaded.stream(QUESTION, temperature=0, max_new_tokens=tokens, tuned=variant == "chat"):
            first = first or time.perf_counter() - began
        return first or 0.0, time.perf_counter() - began, loaded.stats["tokens"]
    from transformers import GenerationConfig
    from transformers.generation.streamers import BaseStreamer

    from kto_core.data.rendering.template import render_chat

    class Times(BaseStreamer):
        def put(self, value):
            nonlocal first, count
            if count:  # the prompt comes first
                first = first or time.perf_counter() - began
            count += 1

        def end(self):
            pass

    ids = torch.tensor([render_chat(QUESTION, loaded.tokenizer)], device=loaded.model.device)
    settings = {"cache_implementation": "static"} if variant == "static" else {}
    config = GenerationConfig(
        max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=loaded.tokenizer.pad_token_id,
        eos_token_id=loaded.tokenizer.eos_token_id, **settings,
    )  # fmt: skip
    with torch.inference_mode():
        loaded.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config,
                              streamer=Times())  # fmt: skip
    return first or 0.0, time.perf_counter() - began, count - 1


def measure(args) -> dict:
    import torch

    loaded, found = load(args), {}
    for variant in args.names:
        try:
            warm_up = answer(loaded, variant, args.tokens)[1]
        except Exception as e:  # what transformers cannot compile here is no reason to lose the rest
            found[variant] = {"error": f"{type(e).__name__}: {e}"[:200]}
            continue
        timed = [answer(loaded, variant, args.tokens) for _ in range(args.repeat)]
        found[variant] = {
            "tokens_per_s": round(statistics.median(n / seconds for _, seconds, n in timed), 2),
            "first_token_s": round(statistics.median(first for first, _, _ in timed), 3),
            "tokens": timed[-1][2],
            "warm_up_s": round(warm_up, 2),
        }
    peak = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None
    return {"model": args.model, "load_in_4bit": args.load_in_4bit, "variants": found, "peak_gib": peak}


def main(argv=None) -> int:
    args = arguments(argv)
    found = measure(args)
    if args.json:
        print(json.dumps(found))
        return 0
    print("| variant | tokens/s | first token s | tokens | warm-up s |\n|---|---|---|---|---|")
    for name, v in found["variants"].items():
        if "error" in v:
            print(f"| {name} | {v['error']} | | | |")
            continue
        print(f"| {name} | {v['tokens_per_s']} | {v['first_token_s']} | {v['tokens']} | {v['warm_up_s']} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
