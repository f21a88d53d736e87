"""``data check`` and ``data convert``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from kto_core.errors import ConfigError
from kto_core.plain_text import one_line

from . import output


def add(commands: argparse._SubParsersAction, argv: list[str]) -> None:
    data = commands.add_parser("data", help="check or convert a dataset", description="Check or convert a dataset.")
    actions = data.add_subparsers(metavar="ACTION", required=True)

    check = actions.add_parser(
        "check",
        help="count rows, labels, duplicates and problems",
        description="Read a dataset and report what is in it. Exits with 0 if it can be trained on, 1 if not.",
    )
    check.add_argument("file", metavar="FILE", help="JSONL, JSON, CSV or Parquet file, or the Hub id of a dataset")
    check.add_argument("--split", default="train", help="split of a Hub dataset (default: %(default)s)")
    check.add_argument("--model", metavar="M", help="measure lengths in this model's tokens (Hub id, folder or 'demo')")
    check.add_argument(
        "--max-length",
        type=output.number(int, 16),
        metavar="N",
        help="with --model: report which rows would be truncated or dropped at N tokens",
    )
    _add_reading(check, argv)
    output.add_json(check)
    check.set_defaults(run=run_check)

    convert = actions.add_parser(
        "convert", help="save as TRL or ChatML", description="Save a dataset in another format."
    )
    convert.add_argument("file", metavar="FILE", help="JSONL, JSON, CSV or Parquet file, or the Hub id of a dataset")
    convert.add_argument("--split", default="train", help="split of a Hub dataset (default: %(default)s)")
    convert.add_argument(
        "--to",
        choices=("trl", "chatml"),
        required=True,
        help="trl: prompt, completion, label; chatml: conversations, label",
    )
    convert.add_argument("--out", required=True, metavar="OUT", help="output file (JSONL)")
    _add_reading(convert, argv)
    output.add_json(convert)
    convert.set_defaults(run=run_convert)


def _add_reading(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """The settings that say how rows are read, with their help texts."""
    if not output.asks_for(argv, "data"):
        return
    from kto_core.config import resolving

    for field in resolving.cli_fields():
        if field.name in ("good_from", "bad_to"):
            parser.add_argument(*field.flags, type=_finite, metavar=field.metavar, help=field.help)
        elif field.name == "map":
            parser.add_argument(*field.flags, default="", metavar=field.metavar, help=field.help)


def _reading(args: argparse.Namespace) -> dict:
    """Keywords of `dataset.load`."""
    return {"good_from": args.good_from, "bad_to": args.bad_to, "columns": args.map}


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise argparse.ArgumentTypeError(f"{text}: must be a number")
    return value


def run_check(args: argparse.Namespace) -> int:
    from kto_core.data import dataset

    if args.max_length and args.model is None:
        raise ConfigError("--max-length counts tokens. Name the model whose tokenizer to use with --model.")
    if args.split != "train" and Path(args.file).exists():
        output.say(f"--split only applies to Hub datasets; {args.file} is a file and is read completely.")
    with output.Bar() as bar:
        loaded = dataset.load(args.file, args.split, **_reading(args), progress=bar)
        tokenizer = None
        if args.model is not None:
            from kto_core.models.load import load_tokenizer

            bar(None, "Loading the tokenizer…")
            tokenizer = load_tokenizer(args.model)
        report = dataset.check(loaded, tokenizer, args.max_length, progress=bar)
    found = report.to_dict()
    output.emit(found) if args.json else output.show(
        describe(found | {"as_seen": report.seen.sentences() if report.seen else []}, loaded.source)
    )
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
        f"labels       {good:,} good, {bad:,} bad"
        + (f" ({100 * good / (good + bad):.0f} % good)" if good + bad else ""),
        f"duplicates   {report['duplicates']:,}; with both labels: {report['conflicts']:,}",
    ]
    if report["mapping"]:
        lines.append(f"columns      {one_line(mapped(report))}")
    if report.get("scale"):
        lines.append(f"scale        {report['scale']}")
    lines += [f"dropped      {count:,}: {reason}" for reason, count in report["dropped"].items()]
    lines += [f"WARNING      {said}" for said in report.get("warnings", ())]
    lines += [f"changed      {count:,}: {reason}" for reason, count in report["changed"].items()]
    if report["unused"]:
        lines.append(f"not trained  {', '.join(map(one_line, report['unused']))}: columns kept with their rows")
    lengths = ", ".join(f"{k} {v:,}" for k, v in report["lengths"].items())
    lines.append(f"lengths      {lengths} {report['lengths_unit']}")
    if answers := report.get("answers"):
        good_ones, bad_ones = answers["desirable"], answers["undesirable"]
        lines.append(f"answers      median {good_ones:,} characters if good, {bad_ones:,} if bad")
    if "truncated" in report:
        lines.append(f"truncated    {report['truncated']:,} prompts truncated, {report['too_long']:,} rows too long")
        lines += [f"as seen      {line}" for line in report["as_seen"]] if report.get("as_seen") else []
    if good and bad:
        (a, b), (c, d) = report["weights"]["desirable"], report["weights"]["undesirable"]
        lines.append(
            f"weights      desirable_weight {a:.2f} to {b:.2f} (undesirable_weight 1), or undesirable_weight {c:.2f} "
            f"to {d:.2f}"
        )
    return "\n".join(lines)


def mapped(report: dict) -> str:
    """Which column is which, in a line; a star for what the user said."""
    given = report.get("mapped", {})
    parts = [
        f"{target} = {' + '.join(columns)}{'*' if target in given else ''}"
        for target, columns in report["mapping"].items()
    ]
    return ", ".join(parts) + (" (*: given with --map)" if given else "")


def run_convert(args: argparse.Namespace) -> int:
    from kto_core.data import dataset

    with output.Bar() as bar:
        loaded = dataset.convert(args.file, args.to, args.out, args.split, **_reading(args), progress=bar)
    output.say(f"Wrote {len(loaded.rows):,} rows to {args.out}.")
    if lost := loaded.report.dropped:
        output.say("Dropped: " + "; ".join(f"{count:,} {reason}" for reason, count in lost.items()) + ".")
    if args.json:
        found = {"out": args.out, "written": len(loaded.rows), "dropped": dict(lost)}
        output.emit(found | {"mapping": loaded.report.mapping})
    return output.OK
