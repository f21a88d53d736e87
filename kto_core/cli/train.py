"""``train``: start a run (or go on with one) and follow it; ``--dry-run`` says what would happen."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from kto_core.errors import ConfigError, RunError

from . import output

OWN = ("preset", "data")  # fields whose flags are written out below

CTRL_C = """\
Ctrl-C finishes the current step, saves and stops; a second Ctrl-C stops now. A stopped run resumes from its last
checkpoint.
With --worker process the run continues after this terminal is closed ('runs show', 'runs stop'). If the output
folder already has checkpoints, training resumes from the last one."""


def add(commands: argparse._SubParsersAction, argv: list[str]) -> None:
    train = commands.add_parser(
        "train",
        help="train with KTO",
        description="Train with KTO: choose a preset and a dataset, and change any setting.",
        epilog=CTRL_C,
    )
    train.set_defaults(run=run)
    preset = train.add_mutually_exclusive_group()
    preset.add_argument(
        "--preset",
        metavar="P",
        help="settings to start from: demo, 3b, 4b, 7b, 8b, 13b, 14b, 20b, 27b, 30b-a3b, or a YAML "
        "file (default: 7b with a GPU, demo without)",
    )
    preset.add_argument("--model-size", metavar="P", help="alias of --preset")
    train.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with settings, as 'runs settings RUN' prints them; its preset is the one to start from, and "
        "other options go before its values",
    )
    data = train.add_mutually_exclusive_group()
    data.add_argument("--data", metavar="FILE", help="JSONL, JSON, CSV or Parquet file, or the Hub id of a dataset")
    data.add_argument("--local-file", metavar="F", help="alias of --data, for files")
    data.add_argument("--dataset-name", metavar="HUB", help="alias of --data, for Hub datasets")
    train.add_argument("--wandb", action="store_true", help="log to Weights & Biases")
    again = train.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="resume from the last checkpoint; fail if there is none")
    again.add_argument(
        "--no-resume", action="store_true", help="start from scratch even if the output folder has checkpoints"
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check the settings without loading weights: print the rows, the steps and the memory plan",
    )
    train.add_argument(
        "--for-gpu",
        metavar="GIB",
        type=output.number(float, 1, 1000),
        help="with --dry-run: plan for a GPU of this many GiB that is not in this machine",
    )
    train.add_argument(
        "--prepare",
        action="store_true",
        help="write the run's folder and exit, for `accelerate launch` on several machines (docs/several-gpus.md)",
    )
    train.add_argument("--queue", action="store_true", help="if another run is training, wait until it ends")
    output.add_json(train)
    if output.asks_for(argv, "train"):
        _add_fields(train)


def _add_fields(train: argparse.ArgumentParser) -> None:
    """A flag for every field of RunConfig; its help comes from the field, its value is checked with all others."""
    from kto_core.config import resolving

    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in resolving.cli_fields():
        if field.name in OWN or field.group == "Hidden":
            continue
        if field.group not in groups:
            groups[field.group] = train.add_argument_group(field.group)
        group = groups[field.group]
        how = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"metavar": field.metavar}
        flags = [f for f in field.flags if f != "--wandb"]  # that one has no value
        group.add_argument(*flags, dest=field.name, default=None, help=field.help.replace("%", "%%"), **how)


def overrides(args: argparse.Namespace) -> dict:
    """The fields that were given on the command line."""
    from kto_core.config import resolving

    given = {f.name: getattr(args, f.name, None) for f in resolving.cli_fields() if f.name not in OWN}
    given["data"] = args.data or args.local_file or args.dataset_name
    given["report_to"] = "wandb" if args.wandb else given["report_to"]
    return {name: value for name, value in given.items() if value is not None}


def _resolved(args: argparse.Namespace, preset: str | None = None):
    """What preset, file and options say. ``preset``: where none is named."""
    from kto_core.config import resolving

    named = args.preset or args.model_size
    if args.config:
        return resolving.resolve_file(args.config, named, overrides(args))
    return resolving.resolve(named or preset, overrides(args))


def run(args: argparse.Namespace) -> int:
    from kto_core.planning import checks

    if args.local_file and not Path(args.local_file).is_file():
        raise ConfigError(f"--local-file: {args.local_file} does not exist.")
    if args.for_gpu is not None and not args.dry_run:
        raise ConfigError("--for-gpu: only --dry-run plans for another GPU. Add --dry-run.")
    resolved = _resolved(args)
    checks.check_length(resolved.config)
    if args.dry_run:
        return dry_run(resolved, args)
    return start(resolved, args)


def dry_run(resolved, args: argparse.Namespace) -> int:
    from kto_core.planning.dry_run import dry_run

    with output.Bar() as bar:
        found = dry_run(resolved.config, bar, for_gpu=args.for_gpu)
    output.emit(found) if args.json else output.show(describe(found, resolved.origins))
    if problem := _problem(found["data"]) or found["problem"]:
        output.say(problem)
        return output.FAILED
    return output.OK


def _problem(data: dict) -> str:
    """Why these rows cannot be trained on; "" if they can."""
    from kto_core.data.report import Report

    counts = {k: data[k] for k in ("rows", "kept", "desirable", "undesirable")}
    labels = (data["desirable"], data["undesirable"])
    return Report(**counts, dropped=Counter(data["dropped"]), scale=data.get("scale", ""), fitting=labels).problem


def describe(found: dict, origins: dict) -> str:
    """What a dry run found, as text: settings with their origins, data, steps, memory."""
    from kto_core.planning.memory import remarks

    from . import data

    settings = found["config"]
    width = max(len(k) for k in settings)
    memory = found["memory"]
    on = f" on {memory['device']}" if memory.get("device") else ""
    need = f"about {memory['predicted_gib']:.1f} GiB needed"
    if memory.get("available_gib") is not None:
        need += f", {memory['available_gib']:.1f} GiB free"
    lines = ["Settings"]
    lines += [f"  {k.ljust(width)}  {v}" + (f"  [{origins[k]}]" if k in origins else "") for k, v in settings.items()]
    lines += ["Data", "  " + data.describe(found["data"], settings.get("data") or "data").replace("\n", "\n  ")]
    lines += [f"Steps   {found['steps']:,}", f"Memory  {memory['verdict']}{on}: {need}"]
    said = remarks(memory["sharded"], memory["offload"], settings.get("num_gpus", 1))
    lines += [f"        {text}" for text in [*said, memory["advice"]] if text]
    if engine := found.get("engine"):
        lines.append(f"Engine  {engine['why'].removeprefix('Training engine: ') or engine['name']}")
    if says := found.get("adapter", {}).get("says"):
        lines.append(f"Adapter {says}")
    if gauge := found.get("rate", {}).get("gauge"):
        lines.append(f"Rate    {gauge}")
    return "\n".join(lines)


def start(resolved, args: argparse.Namespace) -> int:
    """Create or find the run, start it, follow it to its end."""
    from kto_core.runs import folders
    from kto_core.training import start as starting

    from .follow import Interrupts, follow
    from .runs import summary

    r = _existing(resolved.config.output_dir, args)
    if r is None and not resolved.config.data:
        raise ConfigError("No dataset given. Add --data with a file or the Hub id of a dataset.")
    with Interrupts() as interrupts:
        if r is None:
            r = folders.create(resolved)
            if args.prepare:
                output.emit(summary(r)) if args.json else output.show(str(r.path))
                return output.OK
            output.say(f"Run {r.id}: {resolved.config.model}. Folder: {r.path}")
            starting.start(r, queue=args.queue)
        else:
            names = _unused(r, args)
            if not resolved.config.output_dir and {"data", "model"} & set(names):
                own = r.config().config
                raise RunError(
                    f"The newest run that can be resumed, {r.id}, uses {own.model} and {own.data}. To resume it: "
                    f"runs resume {r.id}. To start a new run, leave out --resume."
                )
            if names:
                output.say(
                    f"Ignored, because the run resumes with its own settings: {', '.join(names)}. (--no-resume "
                    "starts from scratch.)"
                )
            output.say(f"Run {r.id}: resuming from {r.checkpoints()[-1].name}.")
            starting.resume(r, queue=args.queue)
        if r.config().config.worker == "process":
            output.say(
                "It runs in its own process and continues after this terminal is closed ('runs show', 'runs stop')."
            )
        code = follow(r, interrupts)
    if args.json:
        output.emit(summary(r))
    return code


def _existing(output_dir: str, args: argparse.Namespace):
    """The run to go on with: the output folder's, if it has checkpoints; with --resume and no folder, the newest.

    Raises:
        RunError: --resume, but there is nothing to go on from; or that run has finished.
    """
    from kto_core.runs import folders

    if args.no_resume:
        return None
    if output_dir:
        found = folders.find(output_dir) if (Path(output_dir).expanduser() / "config.yaml").is_file() else None
    elif args.resume:
        ended = ("stopped", "failed", "interrupted")
        left = (r for r in folders.list_runs() if r.checkpoints() and r.glance().state in ended)
        found = next((r for r in left if not r.problem()), None)
    else:
        return None
    if found is None or not found.checkpoints():
        if args.resume:
            raise RunError("There is no checkpoint to resume from. Leave out --resume to start a new run.")
        return None
    if found.state().state == "finished":
        raise RunError(
            f"The run in {found.path} has finished. Choose another --output-dir, or add --no-resume to train from "
            "scratch (the finished run is kept under another name)."
        )
    return found


def _unused(run, args: argparse.Namespace) -> list[str]:
    """A run goes on with its own settings: the fields given by flags that differ from them."""
    own = run.config().config
    found = _resolved(args, own.preset)
    given, file = found.config, f"file {Path(args.config).name}" if args.config else ""
    asked = dict.fromkeys([*overrides(args), *(n for n, origin in found.origins.items() if origin == file)])
    names = [n for n in asked if n != "output_dir" and getattr(given, n) != getattr(own, n)]
    return [n for n in names if n != "data" or Path(given.data).resolve() != Path(own.data)]
