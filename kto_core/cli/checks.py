"""``evaluate``, ``demo``, ``doctor`` and ``cache``: does it work, is it better, what does it keep?"""

from __future__ import annotations

import argparse
import dataclasses

from kto_core.plain_text import one_line

from . import output

SHOWN, WIDE = 3, 300  # answers that are printed, and characters of one
MARKS = {"same": "{}", "gone": "[-{}-]", "new": "{{+{}+}}"}
SIDES = (("Prompt", "prompt"), ("Before", "base"), ("After", "tuned"))


def add(commands: argparse._SubParsersAction, argv: list[str]) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="say whether a run is better than before training",
        description="Measure a run on rows that it was not trained on, and say whether it is better, no different, "
        "worse or drifted. The verdict is kept in the run's folder.",
    )
    evaluate.add_argument("name", metavar="RUN", help="id of a run ('runs list'), or its folder")
    evaluate.add_argument(
        "--data",
        metavar="F",
        help="held-out rows: a file, or the Hub id of a dataset (default: the run's validation rows)",
    )
    output.add_json(evaluate)
    evaluate.set_defaults(run=run_evaluate)

    demo = commands.add_parser(
        "demo",
        help="train on the example and compare before and after",
        description="Train the built-in demo model on the example data and show what it learned. Runs on any computer.",
    )
    demo.add_argument("--seed", type=int, default=3407, metavar="N", help="seed (default: %(default)s)")
    output.add_json(demo)
    demo.set_defaults(run=run_demo)

    doctor = commands.add_parser(
        "doctor",
        help="check this installation",
        description="Check Python, packages, GPU, disk and Hub access. Each problem comes with a fix.",
    )
    output.add_json(doctor)
    doctor.set_defaults(run=run_doctor)

    cache = commands.add_parser(
        "cache",
        help="show the size of the reference log-probs on disk; --clear deletes them",
        description="The packed engine caches reference log-probs, so that a later run on the same rows does not "
        "compute them again.",
    )
    cache.add_argument("--clear", action="store_true", help="delete them")
    output.add_json(cache)
    cache.set_defaults(run=run_cache)


def run_evaluate(args: argparse.Namespace) -> int:
    from kto_core.chat import evaluate
    from kto_core.runs import folders

    from .follow import Interrupts

    found = folders.find(args.name)
    with Interrupts() as interrupts, output.Bar() as bar:
        result = evaluate.evaluate(found, args.data, progress=bar, cancel=interrupts.cancel)
    output.emit(result) if args.json else output.show(described(result))
    return output.OK


def described(result: dict) -> str:
    """A result of `evaluate` as text: answers that changed, the numbers, and the verdict last."""
    from kto_core.verdict import wording

    changed = [s for s in result["samples"] if s["base"] != s["tuned"]][:SHOWN]
    lines = []
    for sample in changed:
        lines += [f"{name:<8}{one_line(sample[key], WIDE)}" for name, key in SIDES]
        pieces = wording.changed(sample["base"], sample["tuned"])
        lines += [f"{'Diff':<8}{one_line(''.join(MARKS[kind].format(text) for kind, text in pieces), 2 * WIDE)}", ""]
    lines += [f"{name:<16}{text}" for name, text in wording.lines(result)]
    lines += [f"{'Note':<16}{remark}" for remark in result["remarks"]]
    return "\n".join([*lines, "", result["verdict"]["sentence"]])


def _lines(result: dict, indent: str = "") -> str:
    """A nested dict as indented lines; numbers to five places."""
    lines = []
    for key, value in result.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}", _lines(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [f"{indent}{key}", *("\n".join((_lines(v, indent + "  "), "")) for v in value)]
        else:
            lines.append(f"{indent}{key}: {value:.5g}" if isinstance(value, float) else f"{indent}{key}: {value}")
    return "\n".join(lines)


def run_demo(args: argparse.Namespace) -> int:
    from kto_core import demo

    from .follow import Interrupts

    with Interrupts() as interrupts, output.Bar() as bar:
        result = demo.run_demo(seed=args.seed, progress=bar, cancel=interrupts.cancel)
    output.emit(result) if args.json else output.show(_lines(result))
    return output.OK


def run_doctor(args: argparse.Namespace) -> int:
    from kto_core.hardware import doctor

    checks = doctor.doctor()
    ok = all(c.ok is not False for c in checks)
    if args.json:
        output.emit({"ok": ok, "checks": [dataclasses.asdict(c) for c in checks]})
    else:
        output.show("\n".join(_check_line(c) for c in checks))
    if not ok:
        output.say("Problems: " + ", ".join(c.name for c in checks if c.ok is False))
    return output.OK if ok else output.FAILED


def run_cache(args: argparse.Namespace) -> int:
    from kto_core import engine
    from kto_core.engine.reference import folder

    size = engine.clear_cache() if args.clear else engine.cache_size()
    if args.json:
        output.emit({"folder": str(folder()), "freed_bytes" if args.clear else "bytes": size})
    else:
        output.show(f"{'Freed ' if args.clear else ''}{size / 1e6:,.1f} MB in {folder()}")
    return output.OK


def _check_line(check) -> str:
    mark = {True: "ok  ", False: "FAIL", None: "note"}[check.ok]
    return f"{mark}  {check.name}: {check.value}" + (
        f"\n      → {check.remedy}" if check.remedy and check.ok is not True else ""
    )
