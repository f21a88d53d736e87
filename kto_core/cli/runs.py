"""``runs list|show|stop|resume|delete``."""

from __future__ import annotations

import argparse
import time

from kto_core.errors import RunError

from . import output


def add(commands: argparse._SubParsersAction, argv: list[str]) -> None:
    runs = commands.add_parser(
        "runs", help="list, show, stop, resume or delete runs", description="List and manage runs."
    )
    actions = runs.add_subparsers(metavar="ACTION", required=True)

    listing = actions.add_parser("list", help="all runs, newest first", description="All runs, newest first.")
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


def _with_run(actions, name: str, text: str, fn) -> argparse.ArgumentParser:
    sub = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    sub.add_argument("name", metavar="RUN", help="id of a run ('runs list'), or its folder")
    sub.set_defaults(run=fn)
    return sub


def run_list(args: argparse.Namespace) -> int:
    from kto_core.runs.run_list import RunList

    known = RunList()
    known.look(whole=True, patient=True)
    found = [summary(r, known.brief(r)) for r in known.runs()]
    if args.json:
        output.emit({"runs": found})
    elif not found:
        output.say("No runs yet. Start one: python -m kto_core train --preset demo --data FILE")
    else:
        head = ("ID", "STATE", "STEP", "LOSS", "MODEL", "STARTED")
        output.show(output.table([head, *(_cells(r) for r in found)]))
    return output.OK


def _cells(r: dict) -> tuple:
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(r["started"])) if r["started"] else ""
    loss = "" if r["loss"] is None else f"{r['loss']:.4f}"
    model = output.one_line(r["model"], 120)
    return r["id"], r["state"], f"{r['step']}/{r['total_steps'] or '?'}", loss, model, started


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
