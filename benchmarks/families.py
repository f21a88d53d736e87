"""Does the packed engine give each family's own log-probs on this device? Small random models, fp32 and bf16.

    python benchmarks/families.py [--json OUT]

For each architecture of tests/support/oracle.py: the comparison that every run makes at its start (`engine.probe`),
then 16 rows scored in packed passes beside one row at a time through the model's own forward. In bf16 both sides are
also compared with the fp32 values, so that a packed pass that is further off than the model's own rounding shows.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WIDER = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}  # a card's fast kernels want real head sizes
ROWS = 16
EXACT = 1e-3  # nats a row, fp32 with the card's own order of sums: the median row
ROUNDING = 3.0  # times the model's own distance from fp32, in bf16


def measured(architecture: str, dtype: str, device: str) -> dict:
    """Distances in nats a row, of the median row and of the largest; ``refused``: why the engine does not take it.

    In half precision a near tie between two experts falls either way, so that one row of a mixture may be off by more.
    """
    import numpy as np
    import torch

    from kto_core.engine.probe import check_head_and_attention
    from kto_core.engine.step import Engine
    from kto_core.errors import KTOError
    from tests.support import oracle

    model = oracle.get_peft_model(oracle.base_model(architecture, **WIDER), oracle.lora())
    oracle.fill_adapter(model)
    exact = model.float().to(device).eval()
    prompts, completions, _ = oracle.random_rows(ROWS)

    def plain(m) -> np.ndarray:
        with torch.no_grad():
            return np.array([float(oracle.logp(m, p, c)) for p, c in zip(prompts, completions, strict=True)])

    torch.backends.cuda.enable_cudnn_sdp(False)  # as `hardware.prepare` does
    truth = plain(exact)
    half = exact.to(getattr(torch, dtype))
    own = plain(half)
    engine = Engine(half)
    try:
        check_head_and_attention(engine, prompts[0])
    except KTOError as e:
        return {"refused": str(e)}
    with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
        packed = engine.score(prompts, completions)
    pairs = {"packed_to_own": packed - own, "packed_to_fp32": packed - truth, "own_to_fp32": own - truth}
    largest = {f"{name}_largest": float(np.abs(off).max()) for name, off in pairs.items()}
    return {name: float(np.median(np.abs(off))) for name, off in pairs.items()} | largest


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)

    import torch

    import kto_core  # noqa: F401  (it chooses the allocator)
    from tests.support import oracle

    device = "cuda" if torch.cuda.is_available() else "cpu"
    results, bad = {}, 0
    for architecture in oracle.ARCHITECTURES:
        for dtype in ("float32", "bfloat16"):
            r = results[f"{architecture}, {dtype}"] = measured(architecture, dtype, device)
            if "refused" in r:
                verdict = f"refused: {r['refused']}"
            else:
                limit = EXACT if dtype == "float32" else EXACT + ROUNDING * r["own_to_fp32"]
                verdict = "ok" if r["packed_to_fp32"] <= limit else "OFF"
                verdict += ", ".join([""] + [f"{k} {v:.2g}" for k, v in r.items()])
            bad += not verdict.startswith("ok")
            print(f"{architecture}, {dtype}: {verdict}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"device": device, "torch": torch.__version__, "results": results}, indent=1))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
