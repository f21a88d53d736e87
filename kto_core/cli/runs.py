"""``runs list|show|stop|resume|delete``."""

from __future__ import annotations

import argparse
import time

from kto_core.errors import ConfigError

from . import output


def add(commands: argparse._SubParsersAction, argv: list[str]) -> None:
    runs = commands.add_parser(
        "runs", help="list, show, stop, resume or delete runs", description="What was trained, and what trains now."
    )
    actions = runs.add_subparsers(metavar="ACTION", required=True)

    listing = actions.add_parser("list", help="all runs, newest first", description="All runs, newest first.")
    output.add_json(listing)
    listing.set_defaults(run=run_list)

    show = _with_run(actions, "show", "settings, data, metrics and files of a run", run_show)
    output.add_json(show)
    stop = _with_run(actions, "stop", "end a run after its step and save it", run_stop)
    stop.add_argument(
        "--wait", type=float, default=0, metavar="SECONDS", help="wait that long for the run to end (default: do not)"
    )
    output.add_json(stop)
    resume = _with_run(actions, "resume", "go on from the last checkpoint, and follow", run_resume)
    resume.add_argument("--queue", action="store_true", help="if another run trains now, wait for its end")
    output.add_json(resume)
    delete = _with_run(actions, "delete", "delete a run's folder for good", run_delete)
    delete.add_argument("--yes", action="store_true", help="do not ask")
    output.add_json(delete)


def _with_run(actions, name: str, text: str, fn) -> argparse.ArgumentParser:
    sub = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    sub.add_argument("name", metavar="RUN", help="id of a run ('runs list'), or its folder")
    sub.set_defaults(run=fn)
    return sub


def run_list(args: argparse.Namespace) -> int:
    from kto_core import run

    found = [summary(r) for r in run.list_runs()]
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
    return r["id"], r["state"], f"{r['step']}/{r['total_steps'] or '?'}", loss, r["model"], started


def summary(r) -> dict:
    """One run in short. A folder whose configuration cannot be read is shown as such, not hidden."""
    state = r.state()
    try:
        config = r.config().config
        model, preset = config.model, config.preset
    except ConfigError:  # a hand-made or half-written folder must not hide the others
        model, preset = "config.yaml cannot be read", None
    return {
        "id": r.id,
        "path": str(r.path),
        "state": state.state,
        "alive": r.alive(),
        "step": state.step,
        "total_steps": state.total_steps,
        "loss": state.latest("loss"),
        "model": model,
        "preset": preset,
        "started": state.started,
        "updated": state.updated,
        "adapter": str(r.adapter) if r.adapter else None,
        "error": state.error,
    }


def run_show(args: argparse.Namespace) -> int:
    from kto_core import run

    r = run.find(args.name)
    resolved, state = r.config(), r.state()
    shown = summary(r) | {
        "config": resolved.config.model_dump(),
        "origins": resolved.origins,
        "data": r.dataset(),
        "eta": state.eta,
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
        report = data.get("report", data)
        kept = [f"{report[k]:,} {k}" for k in ("kept", "desirable", "undesirable") if isinstance(report.get(k), int)]
        lines.append(f"data     {data.get('source') or resolved.config.data}: {', '.join(kept)}")
    lines += [
        f"metric   {k} = {v:.6g}"
        for k, v in shown["metrics"].items()
        if isinstance(v, int | float) and k not in ("t", "step")
    ]
    width = max(len(k) for k in shown["config"])
    lines += [f"{k.ljust(width)}  {v}  [{resolved.origins.get(k, 'default')}]" for k, v in shown["config"].items()]
    output.show("\n".join(lines))
    return output.OK


def run_stop(args: argparse.Namespace) -> int:
    from kto_core import run

    from .follow import wait_stopped

    r = run.find(args.name)
    r.stop()
    if args.wait:
        wait_stopped(r, args.wait)
    output.say(f"{r.id}: {r.state().state if args.wait else 'stops after its step and saves'}.")
    if args.json:
        output.emit(summary(r))
    return output.OK


def run_resume(args: argparse.Namespace) -> int:
    from kto_core import run

    from .follow import Interrupts, follow

    r = run.find(args.name)
    with Interrupts() as interrupts:
        run.resume(r, queue=args.queue)
        code = follow(r, interrupts)
    if args.json:
        output.emit(summary(r))
    return code


def run_delete(args: argparse.Namespace) -> int:
    from kto_core import run

    r = run.find(args.name)
    if not args.yes:
        output.say(f"Delete {r.path} with its adapter, checkpoints and exports for good? Type yes to do it: ")
        try:
            answer = input()
        except EOFError:
            answer = ""
        if answer.strip().lower() != "yes":
            output.say("Kept.")
            return output.FAILED
    r.delete()
    output.say(f"Deleted {r.id}.")
    if args.json:
        output.emit({"deleted": r.id})
    return output.OK
