"""``runs list|show|stop|resume|delete``; the other actions are in `compare`."""

from __future__ import annotations

import argparse
import time

from kto_core.errors import ConfigError, DiskError, RunError
from kto_core.jobs import duration

from . import compare, output

COLUMNS = (
    "name",
    "state",
    "data",
    "preset",
    "model",
    "changed",
    "rate",
    "loss",
    "eval_loss",
    "margin",
    "verdict",
    "seconds",
    "memory",
    "tags",
    "note",
    "started",
)  # of `compare.table.COLUMNS`, without importing it


def add(commands: argparse._SubParsersAction, argv: list[str]) -> None:
    runs = commands.add_parser(
        "runs",
        help="list, show, compare, tag, stop, resume or delete runs",
        description="List, compare and manage runs.",
    )
    actions = runs.add_subparsers(metavar="ACTION", required=True)

    listing = actions.add_parser("list", help="all runs, newest first", description="All runs, newest first.")
    listing.add_argument("--sort", choices=COLUMNS, default="started", metavar="COLUMN",
                         help=f"sort by {', '.join(COLUMNS)} (default: started, newest first)")  # fmt: skip
    listing.add_argument("--reverse", action="store_true", help="the other way round")
    listing.add_argument("--tag", default="", help="only runs with this tag")
    listing.add_argument("--csv", nargs="?", const="-", metavar="FILE",
                         help="as CSV, into a file or to standard output; all columns, full precision")  # fmt: skip
    output.add_json(listing)
    listing.set_defaults(run=run_list)

    show = _with_run(actions, "show", "settings, data, metrics and files of a run", run_show)
    output.add_json(show)
    stop = _with_run(actions, "stop", "finish the current step, save, and stop", run_stop)
    stop.add_argument(
        "--wait",
        type=float,
        default=0,
        metavar="SECONDS",
        help="wait this long for the run to stop (default: do not wait)",
    )
    output.add_json(stop)
    resume = _with_run(actions, "resume", "resume from the last checkpoint and show progress", run_resume)
    resume.add_argument("--queue", action="store_true", help="if another run is training, wait until it ends")
    output.add_json(resume)
    delete = _with_run(actions, "delete", "permanently delete a run's folder", run_delete)
    delete.add_argument("--yes", action="store_true", help="do not ask for confirmation")
    output.add_json(delete)
    compare.add(actions)


def _with_run(actions, name: str, text: str, fn) -> argparse.ArgumentParser:
    sub = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    sub.add_argument("name", metavar="RUN", help="id of a run ('runs list'), or its folder")
    sub.set_defaults(run=fn)
    return sub


def run_list(args: argparse.Namespace) -> int:
    from kto_core.compare import facts, table
    from kto_core.runs.run_list import RunList

    if args.json and args.csv == "-":
        raise ConfigError("--csv: with --json, name a file for the CSV.")
    known = RunList()
    known.look(whole=True, patient=True)
    rows = table.filtered(facts.Table(known).facts(patient=True), tag=args.tag)
    down = not table.COLUMNS[args.sort].lower
    rows = table.ordered(rows, args.sort, down != args.reverse)
    if args.csv:
        _csv(args.csv, table.as_csv(rows))
    if args.json:
        runs = {r.id: r for r in known.runs()}
        output.emit({"runs": [_facts(f) | summary(runs[f.id], known.brief(runs[f.id])) for f in rows]})
    elif args.csv:
        pass
    elif not rows:
        none = f"No run has the tag {args.tag}." if args.tag and known.runs() else "No runs yet."
        output.say(f"{none} Start one: python -m kto_core train --preset demo --data FILE")
    else:
        head = ("ID", "NAME", "STATE", "STEP", "LOSS", "VAL LOSS", "MARGIN", "VERDICT", "TIME", "DATA", "MODEL", "TAGS",
                "STARTED")  # fmt: skip
        output.show(output.table(_without_empty([head, *map(_cells, rows)], keep=("ID", "STATE", "STEP", "LOSS"))))
    return output.OK


def _facts(f) -> dict:
    """What `summary` does not have, under the names of the settings and of `evaluate`."""
    return {
        "name": f.name, "data": f.data, "changed": dict(f.changed), "learning_rate": f.rate, "eval_loss": f.eval_loss,
        "margin": f.margin, "margin_interval": list(f.interval) if f.interval else None, "verdict": f.verdict or None,
        "seconds": f.seconds and round(f.seconds, 3), "memory_gib": f.memory, "tags": list(f.tags), "note": f.note,
    }  # fmt: skip


def _csv(name: str, text: str) -> None:
    from kto_core.files import write_whole

    if name == "-":
        output.show(text, end="")
        return
    try:
        write_whole(name, text)
    except OSError as e:
        raise DiskError.of(name, e) from e


def _without_empty(rows: list[tuple], keep: tuple[str, ...]) -> list[tuple]:
    """Without columns that are empty in all rows."""
    wanted = [i for i, name in enumerate(rows[0]) if name in keep or any(row[i] for row in rows[1:])]
    return [tuple(row[i] for i in wanted) for row in rows]


def _cells(f) -> tuple:
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(f.started)) if f.started else ""
    loss, held_out, margin = (
        "" if value is None else form.format(value)
        for form, value in (("{:.4f}", f.loss), ("{:.4f}", f.eval_loss), ("{:+.3g}", f.margin))
    )
    model = f"cannot be read: {f.problem}" if f.problem else f.model
    took = duration(f.seconds) if f.seconds else ""
    return (f.id, output.one_line(f.name, 40), f.state, f"{f.step}/{f.total_steps or '?'}", loss, held_out, margin,
            f.verdict, took, output.one_line(f.data, 40), output.one_line(model, 120), " ".join(f.tags),
            started)  # fmt: skip


def summary(r, known=None) -> dict:
    """One run in short. A folder that cannot be read is shown as such, not hidden.

    Args:
        known: its `run_list.Brief`, if there is one.
    """
    from kto_core.runs.run_list import brief

    known = known or brief(r)
    adapter = r.adapter
    return {
        "id": r.id,
        "path": str(r.path),
        "state": known.state,
        "alive": r.alive(),
        "step": known.step,
        "total_steps": known.total_steps,
        "loss": known.loss,
        "model": known.model,
        "preset": known.preset,
        "started": known.started,
        "updated": known.updated,
        "adapter": str(adapter) if adapter else None,
        "error": known.error,
    }


def run_show(args: argparse.Namespace) -> int:
    from kto_core.health import reading
    from kto_core.runs import folders

    r = folders.find(args.name)
    if problem := r.problem():
        raise RunError(f"Run {r.id} cannot be read: {problem}. Its folder is {r.path}.")
    resolved, state = r.config(), r.state()
    shown = summary(r) | {
        "config": resolved.config.model_dump(),
        "origins": resolved.origins,
        "data": r.dataset(),
        "eta": state.eta,
        "seconds": round(state.seconds, 3),
        "skipped_events": state.skipped,
        "message": state.message,
        "metrics": state.metrics[-1] if state.metrics else {},
        "health": [finding.to_dict() for finding in reading.of_run(r)],
        "checkpoints": [str(p) for p in r.checkpoints()],
    }
    if args.json:
        output.emit(shown)
        return output.OK
    lines = [
        f"{shown['id']}: {shown['state']}, step {shown['step']}/{shown['total_steps'] or '?'}",
        f"folder   {shown['path']}",
    ]
    lines += [f"error    {shown['error']}"] if shown["error"] else []
    lines += [f"adapter  {shown['adapter']}"] if shown["adapter"] else []
    if data := shown["data"]:
        report = data["report"] if isinstance(data.get("report"), dict) else data
        words = {"kept": "kept", "desirable": "good", "undesirable": "bad"}
        kept = [f"{report[k]:,} {word}" for k, word in words.items() if isinstance(report.get(k), int)]
        lines.append(f"data     {data.get('source') or resolved.config.data}: {', '.join(kept)}")
    lines += [
        f"metric   {k} = {v:.6g}"
        for k, v in shown["metrics"].items()
        if isinstance(v, int | float) and k not in ("t", "step")
    ]
    lines += [f"health   {found['sentence']} {found['change']}" for found in shown["health"]]
    width = max(len(k) for k in shown["config"])
    lines += [f"{k.ljust(width)}  {v}  [{resolved.origins.get(k, 'default')}]" for k, v in shown["config"].items()]
    output.show("\n".join(output.one_line(line) for line in lines))
    return output.OK


def run_stop(args: argparse.Namespace) -> int:
    from kto_core.runs import folders

    from .follow import wait_stopped

    r = folders.find(args.name)
    r.stop()
    if args.wait:
        wait_stopped(r, args.wait)
    output.say(f"{r.id}: {r.state().state if args.wait else 'is finishing its step, then saving'}.")
    if args.json:
        output.emit(summary(r))
    return output.OK


def run_resume(args: argparse.Namespace) -> int:
    from kto_core.runs import folders
    from kto_core.training import start as starting

    from .follow import Interrupts, follow

    r = folders.find(args.name)
    with Interrupts() as interrupts:
        starting.resume(r, queue=args.queue)
        code = follow(r, interrupts)
    if args.json:
        output.emit(summary(r))
    return code


def run_delete(args: argparse.Namespace) -> int:
    from kto_core.runs import folders

    r = folders.find(args.name)
    if not args.yes:
        output.say(f"Permanently delete {r.path} with its adapter, checkpoints and exports? Type yes to confirm: ")
        try:
            answer = input()
        except EOFError:
            answer = ""
        if answer.strip().lower() != "yes":
            output.say("Cancelled. Nothing was deleted.")
            return output.FAILED
    folders.delete(r)
    output.say(f"Deleted {r.id}.")
    if args.json:
        output.emit({"deleted": r.id})
    return output.OK
