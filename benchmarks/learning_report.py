"""Tables and pictures of a sweep: ``python benchmarks/learning_report.py --inputs INPUTS --results FILE --out FOLDER``.

Reads what `learning.py` wrote and makes ``learning.md`` and its SVGs in ``FOLDER``: loss and margin against the rate,
what each change does, how far the models moved, and how near a rule or a short probe comes to the best rate.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from learning import read
from learning_chart import chart
from learning_curves import Curve, curves, fitted, mean, rules
from learning_plan import PROBE_STEPS

EARLY = (3, 10, 20)
SHOWN = ("loss", "margin", "margin_se", "margin_se_question", "chosen", "rejected", "auc", "accuracy", "moved",
         "moved_token", "drift", "kl", "answers_changed", "answers_same_share", "rate_sum", "steps")  # fmt: skip


def table(head: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(c) for c in row) + " |" for row in rows]) + "\n"


def number(value: float, form: str = ".3g") -> str:
    return "–" if value != value else format(value, form)


# ---- sections --------------------------------------------------------------------------------------------------------


def settings_table(settings: dict, base: dict[str, Curve]) -> str:
    rows = []
    for name, s in settings.items():
        c = base.get(name)
        noise = number(mean([c.first], "noise"), ".2g") if c else "–"
        steps = f"{c.steps:.0f}" if c else "–"
        rows.append([name, f"{s['rows']:,}", f"{s['held']} ({s['held_questions']})", f"{s['median_tokens']:.0f}",
                     f"{s['median_answer']:.0f}", steps, noise])  # fmt: skip
    head = ["setting", "rows", "held out (questions)", "median tokens", "of the answer", "base steps", "rounding, nats"]
    return table(head, rows)


def curve_table(c: Curve) -> str:
    rows = []
    for rate, records in c.at.items():
        v = {k: mean(records, k) for k in SHOWN}
        spread = np.std([r["loss"] for r in records], ddof=1) if len(records) > 1 and v["loss"] == v["loss"] else np.nan
        rows.append([
            f"{rate:g}", len(records), f"{number(v['loss'], '.4f')} ± {number(spread, '.4f')}",
            f"{number(v['margin'], '+.3f')} ± {number(v['margin_se_question'], '.3f')}", number(v["chosen"], "+.2f"),
            number(v["rejected"], "+.2f"), number(v["auc"], ".3f"), number(v["moved"]), number(v["moved_token"], ".2g"),
            number(v["drift"], "+.2f"), f"{number(v['answers_changed'], '.1f')}/{records[0]['answers']}",
        ])  # fmt: skip
    head = ["rate", "seeds", "loss ± seeds", "margin ± error", "chosen", "rejected", "AUC", "nats an answer",
            "nats a token", "other answers", "answers changed"]  # fmt: skip
    return table(head, rows)


def best_table(base: dict[str, Curve]) -> str:
    rows = []
    for name, c in base.items():
        i = c.lowest
        at = c.at[c.rates[i]]
        edge = "" if c.inside else " (edge)"
        rows.append([name, f"{c.best():.2g}{edge}", f"{c.losses[i]:.4f}", f"{c.enough():g}", f"{c.gained(5e-7):.0%}",
                     f"{mean(at, 'moved'):.3g}", f"{mean(at, 'moved_token'):.2g}", f"{mean(at, 'chosen'):+.2f}",
                     f"{mean(at, 'answers_changed'):.0f}/{at[0]['answers']}"])  # fmt: skip
    head = ["setting", "best rate", "its loss", "90 % of the gain from", "gain at 5e-7", "nats an answer at the best",
            "nats a token", "chosen", "answers changed"]  # fmt: skip
    return table(head, rows)


def changes_table(found: dict, base: dict[str, Curve]) -> str:
    """Each change at its own best rate against the base curve at its own, over the settings that have both."""
    rows = []
    for change in dict.fromkeys(c for _, c in found):
        pairs = [(c, base[s]) for (s, name), c in found.items() if name == change and s in base]
        if change in ("base", "probe") or not pairs:
            continue

        def differ(name: str, nats: bool = False, pairs=pairs) -> str:
            values = []
            for c, b in pairs:
                sides = [x.at[x.rates[x.lowest]] for x in (c, b)]
                own, other = (mean(s, name) / (s[0]["beta"] if nats else 1) for s in sides)
                values.append(own - other)
            return f"{np.mean(values):+.3g}"

        ratio = np.exp(np.mean([np.log(c.best() / b.best()) for c, b in pairs]))
        edges = sum(not c.inside for c, _ in pairs)
        rows.append([change, len(pairs), f"{ratio:.2g} × ({edges} at an edge)", differ("loss"), differ("margin", True),
                     differ("chosen", True), differ("auc"), differ("moved"), differ("answers_changed")])  # fmt: skip
    head = ["change", "settings", "best rate", "loss", "margin, nats", "chosen, nats", "AUC", "nats an answer",
            "answers changed"]  # fmt: skip
    return table(head, rows)


def changes_by_setting(found: dict, base: dict[str, Curve]) -> str:
    """What `changes_table` averages: each curve at its own best rate."""
    rows = []
    for setting, curve in base.items():
        others = {c: x for (s, c), x in found.items() if s == setting and c not in ("base", "probe")}
        for change, c in ({"base": curve} | others).items():
            sides = c.at[c.rates[c.lowest]]
            v = {k: mean(sides, k) for k in SHOWN}
            beta = sides[0]["beta"]
            nats = [number(v[k] / beta, "+.1f") for k in ("chosen", "rejected")] + [number(v["moved"], ".1f")]
            changed = f"{number(v['answers_changed'], '.0f')}/{sides[0]['answers']}"
            best = f"{c.rates[c.lowest]:g}"
            rows.append([setting, change, best, len(sides), number(v["auc"], ".3f"), *nats, changed])
    head = ["setting", "change", "best rate", "seeds", "AUC", "good answers, nats", "bad answers, nats",
            "nats an answer", "answers changed"]  # fmt: skip
    return table(head, rows)


def independent(columns: dict[str, np.ndarray], others: np.ndarray) -> dict[str, np.ndarray]:
    """The columns that the others (``[n, k]``) and those before them do not determine: a fit can tell only these."""
    kept, rank = {}, np.linalg.matrix_rank(others)
    for name, column in columns.items():
        tried = np.column_stack([*kept.values(), column, others])
        if np.linalg.matrix_rank(tried) > rank:
            kept[name], rank = column, np.linalg.matrix_rank(tried)
    return kept


def movement_fit(results: list[dict]) -> str:
    """log(nats an answer) as a sum over the logarithms of rate, steps, alpha, r and beta, with a constant a setting.
    Of values that were only changed together, the first stands for both."""
    used = [
        r for r in results if r.get("moved") and 0.1 < r["moved"] < 20 and r["start"] == "B=0" and r["rate_sum"] > 0
    ]
    settings = sorted({r["setting"] for r in used})
    if len(used) < 6 + len(settings) + 5:
        return "Too few trainings for a fit.\n"
    of_setting = np.array([[float(r["setting"] == s) for s in settings] for r in used])
    columns = {n: np.log([r[n] for r in used]) for n in ("rate", "alpha", "r", "beta", "batch")}
    columns["steps, by the schedule"] = np.log([r["rate_sum"] / r["rate"] for r in used])
    kept = independent(columns, of_setting)
    a = np.column_stack([*kept.values(), of_setting])
    y = np.log([r["moved"] for r in used])
    solved = np.linalg.lstsq(a, y, rcond=None)[0]
    off = y - a @ solved
    rows = [[name, f"{k:.2f}"] for name, k in zip(kept, solved, strict=False)]
    said = (
        f"{len(used)} trainings between 0.1 and 20 nats; what the fit leaves: a factor of {np.exp(off.std()):.2f}.\n\n"
    )
    return said + table(["power of", "exponent"], rows)


# ---- rules -----------------------------------------------------------------------------------------------------------


def rules_table(used: list[Curve]) -> str:
    rows = []
    for name, rule in rules(used).items():
        rates = [(c, rule(c)) for c in used]
        rates = [(c, r) for c, r in rates if r == r and c.near(r)]
        if not rates:
            continue
        lost, gained = [c.loss(r) - c.losses.min() for c, r in rates], [c.gained(r) for c, r in rates]
        worst = min(rates, key=lambda cr: cr[0].gained(cr[1]))[0]
        rows.append([name, f"{len(rates)} of {len(used)}", f"{np.mean(lost):.4f}", f"{np.mean(gained):.0%}",
                     f"{np.min(gained):.0%}", f"{worst.setting}, {worst.change}"])  # fmt: skip
    head = ["rule", "curves", "loss above the best", "share of the gain", "at worst", "where"]
    whole = getattr(fitted(used), "said", "")
    return table(head, rows) + (f"\nFitted to all of them, exponents: {whole}.\n" if whole else "")


# ---- probes ----------------------------------------------------------------------------------------------------------


def early(record: dict, step: int) -> dict | None:
    return next((e for e in record["early"] if e["step"] == step), None)


def probe_table(found: dict, base: dict[str, Curve]) -> str:
    """The rate that a short probe picks, judged on the base curve: by the lowest loss so far, or by how far the model
    would have moved in the end (the other settings' movement at their best rate)."""
    target = {s: mean(c.at[c.rates[c.lowest]], "moved") for s, c in base.items()}
    rows = []
    for kind in ("probe", "base"):
        for step in EARLY:
            judged: dict[str, list] = defaultdict(list)
            for setting, whole in base.items():
                c = found.get((setting, kind))
                if c is None:
                    continue
                at = {r: e for r in c.rates if (e := early(c.at[r][0], step)) and e["loss"] is not None}
                if not at:
                    continue
                judged["lowest loss"].append((whole, min(at, key=lambda r: at[r]["loss"])))
                goal = [t for s, t in target.items() if s != setting and t == t]
                slopes = [
                    (e["moved"] / e["rate_sum"]) for e in at.values() if 0.05 < (e["moved"] or 0) < 3 and e["rate_sum"]
                ]
                if goal and slopes:
                    total = mean(whole.at[whole.rates[-1]], "rate_sum") / whole.rates[-1]
                    judged["predicted movement"].append((whole, np.median(goal) / (np.median(slopes) * total)))
            for way, picks in judged.items():
                gained = [c.gained(r) for c, r in picks]
                chosen = ", ".join(f"{c.setting} {r:.1g}" for c, r in picks)
                what = f"own run, {PROBE_STEPS} steps at one rate" if kind == "probe" else "beginning of the training"
                rows.append([what, step, way, len(picks), f"{np.mean(gained):.0%}", f"{np.min(gained):.0%}", chosen])
    return table(["probe", "after steps", "picks by", "settings", "share of the gain", "at worst", "rates"], rows)


# ---- the page --------------------------------------------------------------------------------------------------------


def pictures(base: dict[str, Curve], found: dict) -> dict[str, str]:
    """file name -> SVG; empty ones are left out."""

    def lines(name: str, positive: bool = False) -> dict:
        points = {s: [(r, mean(v, name)) for r, v in c.at.items()] for s, c in base.items()}
        return {s: [(x, y) for x, y in p if y == y and (y > 0 or not positive)] for s, p in points.items()}

    moved = defaultdict(list)
    for (setting, change), c in found.items():
        for records in c.at.values():
            x, y = mean(records, "rate_sum") * records[0]["alpha"], mean(records, "moved")
            if change != "probe" and x > 0 and y > 0:
                moved[setting].append((x, y))
    drawn = {
        "learning-loss.svg": chart("Held-out loss by learning rate", "learning rate", "loss", lines("loss")),
        "learning-margin.svg": chart("Reward margin by learning rate", "learning rate", "margin", lines("margin")),
        "learning-chosen.svg": chart(
            "Good answers by learning rate", "learning rate", "rewards/chosen", lines("chosen")
        ),
        "learning-moved.svg": chart(
            "How far the model moves",
            "sum of the rates × alpha",
            "nats an answer",
            dict(moved),
            log_y=True,
            lines=False,
        ),
    }
    return {name: svg for name, svg in drawn.items() if svg}


def page(settings: dict, results: list[dict], svgs: dict[str, str]) -> str:
    found = curves(results)
    base = {s: c for (s, change), c in found.items() if change == "base"}
    trained = [c for (_, change), c in found.items() if change != "probe" and len(c.rates) > 2]
    picture = {name: f"![{name.split('-')[1].split('.')[0]}]({name})\n" for name in svgs}
    seconds = sum(r["seconds"] for r in results)
    devices = ", ".join(sorted({r["device"] for r in results}))
    parts = [
        "# Learning rates: a sweep\n",
        f"{len(results)} trainings, {seconds / 3600:.1f} hours of workers' time, {devices}. Base: beta 0.1, r 64, "
        f"alpha 128, batch 32, cosine with a warm-up of a tenth, one epoch, {results[0]['optim']}.\n",
        settings_table(settings, base),
        "## Loss, margin and rate\n", *[picture.get(f"learning-{n}.svg", "") for n in ("loss", "margin", "chosen")],
        best_table(base),
        *[f"### {s}\n\n{curve_table(c)}" for s, c in base.items()],
        "## One change at a time\n", changes_table(found, base),
        changes_by_setting(found, base),
        "## Movement\n", picture.get("learning-moved.svg", ""), movement_fit(results),
        "## Rules\n", "On the base curves:\n", rules_table(list(base.values())),
        "On all curves:\n", rules_table(trained),
        "## Probes\n", probe_table(found, base),
    ]  # fmt: skip
    return "\n".join(p for p in parts if p)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=Path, required=True, help="folder of learning_inputs.py")
    parser.add_argument("--results", type=Path, required=True, help="results.jsonl of the sweep")
    parser.add_argument("--out", type=Path, required=True, help="folder for learning.md and its pictures")
    args = parser.parse_args(argv)
    results = list(read(args.results).values())
    if not results:
        parser.error(f"{args.results} has no results yet")
    found = curves(results)
    svgs = pictures({s: c for (s, change), c in found.items() if change == "base"}, found)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, svg in svgs.items():
        (args.out / name).write_text(svg, encoding="utf-8")
    settings = json.loads((args.inputs / "settings.json").read_text())["settings"]
    (args.out / "learning.md").write_text(page(settings, results, svgs), encoding="utf-8")
    print(args.out / "learning.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
