"""Small kernels of a decoder layer, forward and backward: ours, torch.compile's, and Liger's where it is installed.

    python benchmarks/layer_kernels.py --shape mistral-7b --tokens 5400

``ours`` is what the packed step runs (`engine.layers.lean`), ``plain`` transformers' formula, ``compiled`` the same
through torch.compile, ``liger`` liger_kernel's function for it. Each is timed with inputs of the shape's size in bf16
(on a CPU fp32), the median of ``--repeat``; what a gain is worth is said as a share of the layer's products with its
frozen weights (forward, and backward towards the activations), timed in the same process. Whether a whole step waits
for its launches, which CUDA graphs would save, is what ``kto_step.py --profile`` says ("busy").
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

EPS = 1e-5


def plain_swiglu(gate, up):
    import torch.nn.functional as F

    return F.silu(gate) * up


def plain_norm(x, weight):
    import torch

    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def plain_rope(q, k, cos, sin):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return apply_rotary_pos_emb(q, k, cos, sin)


def ours() -> dict:
    from kto_core.engine.layers import lean

    return {
        "swiglu": lambda gate, up: lean._Gated.apply(up, gate),
        "norm": lambda x, weight: lean._rms_norm(weight, EPS, x),
        "rope": lambda q, k, cos, sin: lean._rope(plain_rope, q, k, cos, sin),
    }


def compiled() -> dict:
    import torch

    return {name: torch.compile(function) for name, function in plain().items()}


def plain() -> dict:
    return {"swiglu": plain_swiglu, "norm": plain_norm, "rope": plain_rope}


def liger() -> dict:
    """Raises ImportError where it is not installed."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return {
        "swiglu": lambda gate, up: LigerSiLUMulFunction.apply(gate, up),
        "norm": lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False),
        "rope": lambda q, k, cos, sin: LigerRopeFunction.apply(q, k, cos, sin),
    }


VARIANTS = {"plain": plain, "compiled": compiled, "liger": liger, "ours": ours}


def inputs(args) -> dict[str, list]:
    """What each kernel is given: tensors that want a gradient first."""
    import torch
    from shapes import SHAPES

    _, hidden, wide, _, heads, kv_heads, *_ = SHAPES[args.shape]
    width = hidden // heads

    def random(*size, grad=True):
        return torch.randn(*size, device=args.device, dtype=args.dtype, requires_grad=grad)

    t = args.tokens
    cos, sin = (random(1, t, width, grad=False) for _ in range(2))
    return {
        "swiglu": [random(t, wide), random(t, wide)],
        "norm": [random(t, hidden), random(hidden, grad=False)],
        "rope": [random(1, heads, t, width), random(1, kv_heads, t, width), cos, sin],
    }


def seconds(function, given: list, repeat: int) -> float:
    """Forward and backward, the median."""
    import torch
    from kto_step import now

    wanted, times = [x for x in given if x.requires_grad], []
    grads = [torch.randn_like(o) for o in outputs(function(*given))]
    for _ in range(repeat + 3):
        own = [g.clone() for g in grads]  # a backward may write into what it is given
        began = now()
        torch.autograd.grad(outputs(function(*given)), wanted, own)
        times.append(now() - began)
    return statistics.median(times[3:])


def outputs(found) -> tuple:
    return found if isinstance(found, tuple) else (found,)


def products(args) -> float:
    """Seconds of the products with a layer's frozen weights, forward and backward, as dense matrices."""
    import torch
    from shapes import SHAPES

    _, hidden, wide, _, heads, kv_heads, *_ = SHAPES[args.shape]
    kv = hidden // heads * kv_heads
    total = 0.0
    for rows, columns, number in ((hidden, hidden, 2), (kv, hidden, 2), (wide, hidden, 2), (hidden, wide, 1)):
        weight = torch.randn(rows, columns, device=args.device, dtype=args.dtype)
        x = torch.randn(args.tokens, columns, device=args.device, dtype=args.dtype, requires_grad=True)
        total += number * seconds(lambda x, weight=weight: x @ weight.t(), [x], args.repeat)
    return total


def measure(args) -> dict:
    import torch

    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    found, errors = {}, {}
    for variant in args.names:
        try:
            functions = VARIANTS[variant]()
            found[variant] = {k: 1e3 * seconds(functions[k], v, args.repeat) for k, v in inputs(args).items()}
        except Exception as e:  # not installed, or it does not compile here: no reason to lose the rest
            errors[variant] = f"{type(e).__name__}: {e}".splitlines()[0][:200]
    return {"shape": args.shape, "tokens": args.tokens, "ms": found, "errors": errors, "products": 1e3 * products(args)}


def arguments(argv=None) -> argparse.Namespace:
    from flags import chosen
    from shapes import SHAPES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="mistral-7b", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=5400, help="of a pass (default: %(default)s)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(argv)
    args.names = chosen(parser, args.variants.split(","), VARIANTS, "variant")
    return args


def main(argv=None) -> int:
    args = arguments(argv)
    result = measure(args)
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{args.shape}, {args.tokens:,} tokens, forward and backward; two norms, one of the others in a layer")
    print(f"a layer's products with its frozen weights: {result['products']:.2f} ms\n")
    print("| | swiglu ms | norm ms | rope ms | a layer's, of its products |\n|---|---|---|---|---|")
    for name, ms in result["ms"].items():
        share = (ms["swiglu"] + 2 * ms["norm"] + ms["rope"]) / result["products"]
        print(f"| {name} | {ms['swiglu']:.3f} | {ms['norm']:.3f} | {ms['rope']:.3f} | {share:.1%} |")
    for name, text in result["errors"].items():
        print(f"| {name} | {text} | | | |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
