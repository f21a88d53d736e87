"""``runs compare|tag|note|rename|settings``: several runs beside each other, and what a person says of one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from . import output

RUN = "id of a run ('runs list'), or its folder"


def add(actions: argparse._SubParsersAction) -> None:
    """Add these actions of ``runs``."""
    compare = _action(actions, "compare", "settings that differ, metrics and verdicts of several runs", run_compare)
    compare.add_argument("others", nargs="+", metavar="RUN", help=RUN)
    tag = _action(actions, "tag", "add or remove tags of a run, or list them", run_tag)
    tag.add_argument("tags", nargs="*", metavar="TAG", help="tags to add; without any, the run's tags are listed")
    tag.add_argument("-d", "--delete", nargs="+", default=[], metavar="TAG", help="tags to remove")
    note = _action(actions, "note", "write a note on a run, or show it", run_note)
    note.add_argument("text", nargs="?", help='the note; "" deletes it; without one, the note is shown')
    rename = _action(actions, "rename", "give a run another name", run_rename)
    rename.add_argument("new", metavar="NAME", help='its name in all lists; "" is the name in its settings')
    settings = _action(actions, "settings", "settings of a run, for 'train --config' or as a command", run_settings)
    form = settings.add_mutually_exclusive_group()
    form.add_argument("--yaml", action="store_true", help="as YAML (default)")
    form.add_argument("--command", action="store_true", help="as the command line that trains with them")


def _action(actions, name: str, text: str, fn: Callable) -> argparse.ArgumentParser:
    sub = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    sub.add_argument("name", metavar="RUN", help=RUN)
    output.add_json(sub)
    sub.set_defaults(run=fn)
    return sub


def run_compare(args: argparse.Namespace) -> int:
    from kto_core import labels
    from kto_core.compare import facts, judged, settings
    from kto_core.runs import folders, run_list

    runs = list({r.path: r for r in map(folders.find, [args.name, *args.others])}.values())
    rows = [facts.facts_of(r.id, run_list.brief(r), labels.read(r.path), judged.short(r)) for r in runs]
    found = {
        "runs": [f.to_dict() for f in rows],
        "differences": dict(settings.differences(runs)),
        "metrics": dict(settings.metrics(runs)),
        "verdicts": settings.verdicts(runs),
        "answers": [
            {"prompt": prompt, "before": before, "after": after} for prompt, before, after in settings.answers(runs)
        ],
    }
    output.emit(found) if args.json else output.show(_compared(rows, found))
    return output.OK


def _compared(rows: Sequence, found: dict) -> str:
    numbers = {name: ["" if v is None else f"{v:.4g}" for v in values] for name, values in found["metrics"].items()}
    about = [("RUN", *(f.id for f in rows))]
    about += [("name", *(f.name for f in rows))] if any(f.name for f in rows) else []
    about += [("state", *(f.state for f in rows))]
    differ = [(name, *values) for name, values in found["differences"].items()]
    readable = [f for f in rows if not f.problem]
    same = "All settings are the same." if len(readable) > 1 else ""
    none = [""] * len(rows)
    shown = [*about, ("SETTING" if differ else same, *none), *differ, ("METRIC", *none)]
    shown += [(n, *v) for n, v in numbers.items()]
    verdicts = [f"{f.id}: {said}" for f, said in zip(rows, found["verdicts"], strict=True) if said]
    problems = [f"{f.id} cannot be read: {f.problem}" for f in rows if f.problem]
    return "\n".join([output.table(shown), *map(output.one_line, verdicts + problems)])


def _change(args: argparse.Namespace, **changes) -> tuple:
    """(run, its label after the change)."""
    from kto_core import labels
    from kto_core.runs import folders

    r = folders.find(args.name)
    return r, labels.change(r.path, **changes)


def _said(args: argparse.Namespace, r, label, text: str) -> int:
    if args.json:
        output.emit({"id": r.id, "name": label.name, "tags": list(label.tags), "note": label.note})
    else:
        output.show(text)
    return output.OK


def run_tag(args: argparse.Namespace) -> int:
    r, label = _change(args, add=args.tags, remove=args.delete)
    return _said(args, r, label, " ".join(label.tags) or f"{r.id} has no tags.")


def run_note(args: argparse.Namespace) -> int:
    r, label = _change(args, note=args.text)
    return _said(args, r, label, label.note or f"{r.id} has no note.")


def run_rename(args: argparse.Namespace) -> int:
    r, label = _change(args, name=args.new)
    return _said(args, r, label, f"{r.id} is called {label.name}." if label.name else f"{r.id} has its own name again.")


def run_settings(args: argparse.Namespace) -> int:
    from kto_core.config import sharing
    from kto_core.runs import folders

    config = folders.find(args.name).config().config
    text = sharing.as_command(config) if args.command else sharing.as_yaml(config).rstrip("\n")
    if args.json:
        preset, values = sharing.differing(config)
        output.emit({"preset": preset, "settings": values, "yaml": sharing.as_yaml(config),
                     "command": sharing.as_command(config)})  # fmt: skip
    else:
        output.show(text)
    return output.OK
