"""What a step that was measured on an H200 would take on an RTX 3090, from its operations and bytes: an estimate.

``python benchmarks/estimate.py [--json]``. Where the time of a step went was measured by kind (`RESULTS.md`, "Where the
time of a step goes"). What multiplies large matrices is bound by the card's matrix rate and is scaled by that rate;
all else (sums, norms, copies, 4-bit weights, LoRA's thin products) by the rate of its memory. The lower end takes
the H200's rate as its data sheet has it, the upper end as it was measured. Nothing is assumed of kernels that suit the
other card better or worse, nor of its clocks under load.
"""

from __future__ import annotations

import argparse
import json
import sys

# dense bf16 products with fp32 sums, TFLOP/s, and GB/s of the memory. RTX 3090: NVIDIA's GA102 architecture paper,
# appendix A. H200: NVIDIA's data sheet, and what one large product was measured to reach
RTX_3090 = (71, 936)
H200 = {"low": (989.5, 4800), "high": (775, 4800)}

# one optimizer batch of a 7B in NF4 on an H200, milliseconds, and what bounds each kind
STEP = {
    "products with the frozen weights": (671, "matrix"),
    "LoRA's products": (129, "memory"),
    "RoPE": (105, "memory"),
    "SwiGLU": (67, "memory"),
    "attention": (71, "matrix"),
    "weights out of their 4 bits": (36, "memory"),
    "log-probs and their gradient": (25, "memory"),
    "norms": (16, "memory"),
    "sums, copies, number formats, the rest": (85, "memory"),
}
ROWS, TOKENS = 32, 11_315
ENGINES = {  # rows a second, measured on the H200 within 24 GiB, same rows (`RESULTS.md`)
    "packed, again (reference on disk)": 27.66,
    "packed, first run": 18.92,
    "Unsloth + KTOTrainer": 7.63,
    "TRL's KTOTrainer": 4.54,
}


def slower(end: str) -> float:
    """How many times as long the step takes on an RTX 3090."""
    factor = {kind: H200[end][i] / RTX_3090[i] for i, kind in enumerate(("matrix", "memory"))}
    return sum(ms * factor[kind] for ms, kind in STEP.values()) / sum(ms for ms, _ in STEP.values())


def estimates() -> dict:
    """[low, high] of rows/s, tokens/s and rows/h; every engine's step is scaled as ours, the one that was profiled."""
    times = [slower(end) for end in ("low", "high")]
    return {
        "times_as_long": [round(t, 1) for t in times],
        "engines": {
            name: {
                "rows_per_s": [round(speed / t, 2) for t in times],
                "tokens_per_s": [round(speed / t * TOKENS / ROWS, -1) for t in times],
                "rows_per_h": [round(speed / t * 3600, -2) for t in times],
            }
            for name, speed in ENGINES.items()
        },
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    args = parser.parse_args(argv)
    found = estimates()
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    high, low = found["times_as_long"]
    print(f"RTX 3090: a step takes {low} to {high} times as long as on an H200 (estimate)\n")
    print("| 7B in 4 bits, estimate | rows/s | tokens/s | rows/h |\n|---|---|---|---|")
    for name, e in found["engines"].items():
        cells = [f"{e[k][0]:,g} to {e[k][1]:,g}" for k in ("rows_per_s", "tokens_per_s", "rows_per_h")]
        print(f"| {name} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
