"""The rules on recorded trainings: a rate that does nothing and one that drifts are told, a good one is left alone."""

import gzip
import json
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from kto_core.health.about import WARNING, About
from kto_core.health.rules import findings
from kto_core.runs.events import fold
from kto_core.runs.rates import Trial
from kto_core.training.rate import choosing

ROOT = Path(__file__).resolve().parent.parent.parent
EVAL = {"loss": "loss", "rewards/chosen": "chosen", "rewards/rejected": "rejected", "kl": "kl"}


@cache
def recorded() -> list[dict]:
    with gzip.open(ROOT / "benchmarks" / "learning_results.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


def trained() -> list[dict]:
    return [r for r in recorded() if r["change"] == "base"]


def said(r: dict, upto: int = 0, by: str = "user") -> dict[str, str]:
    """kind -> level of what is found in a recorded training's first ``upto`` steps; 0: all."""
    judged = {e["step"]: e for e in r["early"]} | {r["steps"]: r}
    events = [{"t": 1, "kind": "status", "state": "training", "total_steps": r["steps"]}]
    for step, (loss, norm) in enumerate(zip(r["losses"], r["norms"], strict=True), 1):
        if upto and step > upto:
            break
        events.append({"t": step, "kind": "metric", "step": step, "loss": loss, "grad_norm": norm})
        if held := judged.get(step):
            numbers = {f"eval_{name}": held[key] for name, key in EVAL.items()}
            events.append({"t": step, "kind": "metric", "step": step, **numbers})
    about = About(rate=r["rate"], rate_by=by, beta=r["beta"], schedule=r["schedule"], batch=r["batch"])
    return {f.kind: f.level for f in findings(fold(events), about)}


def test_a_rate_at_which_nothing_moves_is_told():
    low = [r for r in trained() if r["rate"] == 5e-7]
    still = [r for r in low if r["loss"] > 0.49]
    assert len(low) == 21 and len(still) == 18
    assert all(said(r) == {"little": WARNING} for r in still)
    assert not any("little" in said(r) for r in low if r not in still), "these learned something at 5e-7"


def test_a_rate_at_which_the_model_drifts_is_told_each_time():
    high = [r for r in trained() if r["rate"] == 1e-2]
    assert len(high) == 7 and all(said(r).get("large") == WARNING for r in high)
    assert not any({"alike", "little", "falling"} & said(r).keys() for r in high), "the rate is why, and that is said"


def test_a_rate_that_auto_takes_gives_no_warning():
    """At every evaluation of every training at the rate that the trials choose; one of them falls far for a while."""
    trials = defaultdict(list)
    for r in recorded():
        if r["change"] == "probe" and r["rate"] < 5e-3:
            e = next(e for e in r["early"] if e["step"] == 10)
            trials[r["setting"]].append(Trial(r["rate"], e["loss"], (), e["margin"], e["chosen"], e["rejected"]))
    took = {s: choosing.choose(sorted(t, key=lambda t: t.rate), 0.5, 1e-4)[0] for s, t in trials.items()}
    runs = [r for r in trained() if r["rate"] == took[r["setting"]]]
    looked, warned = 0, []
    for r in runs:
        for step in {*(e["step"] for e in r["early"]), r["steps"]}:
            looked += 1
            warned += [(r["id"], step, k) for k, v in said(r, step, "auto").items() if v == WARNING]
    assert len(runs) == 21 and looked > 60
    assert len(warned) <= 1, warned
    assert not any(WARNING in said(r, by="auto").values() for r in runs), "at the end none"


@pytest.mark.parametrize("kind", ["nan", "entropy", "labels"])
def test_what_did_not_happen_is_not_said(kind):
    fine = [r for r in trained() if 1e-5 <= r["rate"] <= 1e-4]
    assert fine and not any(kind in said(r) for r in fine)
