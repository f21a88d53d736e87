"""``data check`` and ``data convert``."""

from __future__ import annotations

import argparse
from pathlib import Path

from kto_core.errors import ConfigError

from . import output


def add(commands: argparse._SubParsersAction, argv: list[str]) -> None:
    data = commands.add_parser(
        "data", help="look at a data set, or convert it", description="Look at a data set, or convert it."
    )
    actions = data.add_subparsers(metavar="ACTION", required=True)

    check = actions.add_parser(
        "check",
        help="count rows, labels, duplicates and problems",
        description="Read a data set and report what is in it. Exit code 0 if it can be trained on, 1 if not.",
    )
    check.add_argument("file", metavar="FILE", help="JSONL, JSON, CSV or Parquet file, or the Hub id of a data set")
    check.add_argument("--split", default="train", help="split of a Hub data set (default: %(default)s)")
    check.add_argument("--model", metavar="M", help="count lengths in this model's tokens (Hub id, folder or 'demo')")
    check.add_argument(
        "--max-length",
        type=output.number(int, 16),
        metavar="N",
        help="with --model: say which rows would be cut or dropped at N tokens",
    )
    output.add_json(check)
    check.set_defaults(run=run_check)

    convert = actions.add_parser(
        "convert", help="save as TRL or ChatML rows", description="Save a data set in another form."
    )
    convert.add_argument("file", metavar="FILE", help="JSONL, JSON, CSV or Parquet file, or the Hub id of a data set")
    convert.add_argument("--split", default="train", help="split of a Hub data set (default: %(default)s)")
    convert.add_argument(
        "--to",
        choices=("trl", "chatml"),
        required=True,
        help="trl: prompt, completion, label; chatml: conversations, label",
    )
    convert.add_argument("--out", required=True, metavar="OUT", help="file to write (JSONL)")
    output.add_json(convert)
    convert.set_defaults(run=run_convert)


def run_check(args: argparse.Namespace) -> int:
    from kto_core import dataset

    if args.max_length and args.model is None:
        raise ConfigError("--max-length counts tokens: name the model whose tokens they are with --model.")
    if args.split != "train" and Path(args.file).exists():
        output.say(f"--split is for data sets of the Hub: {args.file} is read whole.")
    with output.Bar() as bar:
        loaded = dataset.load(args.file, args.split, progress=bar)
        tokenizer = None
        if args.model is not None:
            from kto_core.model import load_tokenizer

            bar(None, "Reading the model's tokenizer…")
            tokenizer = load_tokenizer(args.model)
        report = dataset.check(loaded, tokenizer, args.max_length, progress=bar)
    found = report.to_dict()
    output.emit(found) if args.json else output.show(describe(found, loaded.source))
    if report.problem:
        output.say(report.problem)
        return output.FAILED
    return output.OK


def describe(report: dict, source: str) -> str:
    """The report as text for a terminal."""
    good, bad = report["desirable"], report["undesirable"]
    lines = [
        f"{source}: {report['format']}",
        f"rows         {report['rows']:,}, kept {report['kept']:,}",
        f"labels       {good:,} desirable, {bad:,} undesirable"
        + (f" ({100 * good / (good + bad):.0f} % desirable)" if good + bad else ""),
        f"duplicates   {report['duplicates']:,}; with both labels: {report['conflicts']:,}",
    ]
    lines += [f"dropped      {count:,}: {reason}" for reason, count in report["dropped"].items()]
    lines += [f"changed      {count:,}: {reason}" for reason, count in report["changed"].items()]
    lengths = ", ".join(f"{k} {v:,}" for k, v in report["lengths"].items())
    lines.append(f"lengths      {lengths} {report['lengths_unit']}")
    if "truncated" in report:
        lines.append(f"cut          {report['truncated']:,} prompts cut, {report['too_long']:,} rows too long")
    if good and bad:
        (a, b), (c, d) = report["weights"]["desirable"], report["weights"]["undesirable"]
        lines.append(f"weights      desirable {a:.2f} to {b:.2f} (undesirable 1), or undesirable {c:.2f} to {d:.2f}")
    return "\n".join(lines)


def run_convert(args: argparse.Namespace) -> int:
    from kto_core import dataset

    with output.Bar() as bar:
        loaded = dataset.convert(args.file, args.to, args.out, args.split, progress=bar)
    output.say(f"{len(loaded.rows):,} rows written to {args.out}.")
    if lost := loaded.report.dropped:
        output.say("Left out: " + "; ".join(f"{count:,} {reason}" for reason, count in lost.items()) + ".")
    if args.json:
        output.emit({"out": args.out, "written": len(loaded.rows), "dropped": dict(lost)})
    return output.OK
