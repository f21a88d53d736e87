"""``export merge|gguf|check|compare|serve|push``."""

from __future__ import annotations

import argparse
from pathlib import Path

from kto_core.errors import ExportError
from kto_core.export import publish
from kto_core.export.gguf import writing
from kto_core.paths import is_hub_id
from kto_core.plain_text import one_line

from . import output

QUANTS = tuple(writing.QUANTS)
WHAT = ("adapter", "merged", "gguf")


def _list(allowed: tuple[str, ...]):
    def parse(text: str) -> list[str]:
        names = [n.strip().lower() for n in text.split(",") if n.strip()]
        if not names or set(names) - set(allowed):
            raise argparse.ArgumentTypeError(
                f"{text!r}: must be one or more of {', '.join(allowed)}, separated by commas"
            )
        return list(dict.fromkeys(names))

    return parse


def add(commands: argparse._SubParsersAction, argv: list[str]) -> None:
    export = commands.add_parser(
        "export", help="merge, convert to GGUF, check, upload", description="Export a run for other programs."
    )
    actions = export.add_subparsers(metavar="ACTION", required=True)

    _action(actions, "merge", "merge the adapter into the base model (16 bit)", run_merge)
    gguf = _action(actions, "gguf", "create GGUF files for llama.cpp and Ollama", run_gguf)
    gguf.add_argument(
        "--quant",
        type=_list(QUANTS),
        default=["q4_k_m"],
        metavar="Q",
        help=f"comma-separated: {', '.join(QUANTS)} (default: q4_k_m)",
    )
    gguf.add_argument("--no-check", action="store_true", help="do not compare the files with the merged model")
    check = _action(actions, "check", "compare the GGUF files with the merged model, in llama.cpp", run_check)
    check.add_argument(
        "--quant", type=_list(QUANTS), metavar="Q", help="check only these (default: all existing files)"
    )
    check.add_argument(
        "--prompt", default="What is the capital of France?", metavar="T", help="question to ask (default: %(default)s)"
    )
    about = "size, agreement, KL divergence and speed of each GGUF file, and which one to take"
    compare = _action(actions, "compare", about, run_compare)
    compare.add_argument("--quant", type=_list(QUANTS), metavar="Q", help="create what is missing of these first")
    _action(actions, "serve", "commands that serve what the run has exported", run_serve)
    push = _action(actions, "push", "upload to the Hugging Face Hub, private unless --public", run_push)
    push.add_argument("--repo", required=True, metavar="R", help="repository, owner/name")
    push.add_argument(
        "--what",
        type=_list(WHAT),
        default=["adapter"],
        metavar="W",
        help=f"comma-separated: {', '.join(WHAT)} (default: adapter)",
    )
    push.add_argument("--public", action="store_true", help="make the repository public")
    push.add_argument("--base", metavar="M", help="Hub id of the base model, if the run has it in a folder; kept")


def _action(actions, name: str, text: str, fn) -> argparse.ArgumentParser:
    sub = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    sub.add_argument("name", metavar="RUN", help="id of a run ('runs list'), or its folder")
    output.add_json(sub)
    sub.set_defaults(run=fn)
    return sub


def _long(fn, *args, **kwargs):
    """Call a long function of kto_core.export.export with a bar; Ctrl-C cancels it in good order."""
    from .follow import Interrupts

    with Interrupts() as interrupts, output.Bar() as bar:
        return fn(*args, progress=bar, cancel=interrupts.cancel, **kwargs)


def _found(name: str):
    from kto_core.runs import folders

    return folders.find(name)


def run_merge(args: argparse.Namespace) -> int:
    from kto_core.export import export

    folder = _long(export.merge, _found(args.name))
    output.emit({"merged": str(folder)}) if args.json else output.show(str(folder))
    output.say(f"To serve it: vllm serve {folder}")
    return output.OK


def run_serve(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from kto_core.export import serving

    found = serving.commands(_found(args.name))
    if args.json:
        output.emit({"commands": [asdict(c) for c in found]})
    else:
        output.show("\n\n".join(f"# {c.program}: {c.what}\n{c.text}" for c in found))
    return output.OK


def run_gguf(args: argparse.Namespace) -> int:
    from kto_core.export import export

    run = _found(args.name)
    if args.no_check:
        files = _long(export.gguf, run, args.quant)
        made = []
        for path in files:
            written = export.modelfile(run, path)
            made.append({"path": path, "bytes": path.stat().st_size, "modelfile": written.path,
                         "remarks": written.remarks})  # fmt: skip
    else:
        made = _long(export.gguf_and_check, run, args.quant)
    good = all(m.get("check", {}).get("ok", True) for m in made)
    if args.json:
        output.emit({"files": [m | {"path": str(m["path"]), "modelfile": str(m["modelfile"])} for m in made]})
        return output.OK if good else output.FAILED
    for m in made:
        output.show(f"{m['path']}  {m['bytes'] / 1e6:,.0f} MB")
        if "check" in m:
            output.show(checked(m["check"]))
    for remark in dict.fromkeys(r for m in made for r in m["remarks"]):
        output.say(f"Ollama: {remark}")
    if good:
        output.say(f"To use it in Ollama: ollama create NAME -f {made[-1]['modelfile']}")
        output.say(f"In llama.cpp: llama-server -m {made[-1]['path']}")
    return output.OK if good else output.FAILED


def run_check(args: argparse.Namespace) -> int:
    from kto_core.export import export

    files = gguf_files(_found(args.name), args.quant)
    answers = [{"path": str(p)} | _long(export.check_gguf, p, args.prompt) for p in files]
    if args.json:
        output.emit({"checks": answers})
    else:
        output.show("\n\n".join(f"{a['path']}\n{checked(a)}" for a in answers))
    return output.OK if all(a["ok"] for a in answers) else output.FAILED


def run_compare(args: argparse.Namespace) -> int:
    from kto_core.export import export

    run = _found(args.name)
    if args.quant:
        _long(export.gguf, run, args.quant)
    found = _long(export.compare, run, gguf_files(run, args.quant))
    if args.json:
        output.emit({"files": [row | {"path": str(row["path"])} for row in found]})
    else:
        output.show(compared(found))
    return output.OK


def compared(rows: list[dict]) -> str:
    """What `export.compare` found, as a table; the file that we would take is marked."""
    table: list[tuple] = [("File", "Size", "Agrees with your model", "KL (nats)", "Tokens/s", "")]
    for row in rows:
        of = row["agreement"]["of"]
        agrees = f"{row['agreement']['same']} of {of} ({row['agreement']['same'] / of:.0%})" if of else "undecided"
        table.append((row["path"].name, f"{row['bytes'] / 1e6:,.0f} MB", agrees, f"{row['kl']:.2g}",
                      f"{row['tokens_per_second']:.1f}", "<- recommended" if row["taken"] else ""))  # fmt: skip
    return output.table(table)


def checked(verdict: dict) -> str:
    """A verdict of `export.check_gguf` as lines; the file's answer stands beside the merged model's own."""
    marks = {True: "ok", False: "FAILED", None: "-"}
    lines = [f"  {marks[c['ok']]:<7}{c['name']}: {c['text']}" for c in verdict["checks"]]
    lines.append(f"  llama.cpp answers: {one_line(verdict['text']) or '(nothing)'}")
    if verdict["reference_text"] is not None:
        lines.append(f"  your model:        {one_line(verdict['reference_text']) or '(nothing)'}")
    return "\n".join(lines)


def gguf_files(run, quants: list[str] | None = None) -> list[Path]:
    """The GGUF files of a run.

    Raises:
        ExportError: there is none (of these quantizations).
    """
    files = sorted((run.path / "exports").rglob("*.gguf"))
    if quants:
        files = [p for p in files if any(p.stem.lower().endswith(q) for q in quants)]
    if not files:
        raise ExportError(
            f"No such GGUF file yet. Create one: python -m kto_core export gguf {run.id} --quant "
            f"{','.join(quants or ['q4_k_m'])}"
        )
    return files


def run_push(args: argparse.Namespace) -> int:
    run = _found(args.name)
    url = _long(publish.push, run, args.repo, what=args.what, private=not args.public, base=args.base)
    if not is_hub_id(base := publish.public_base(run)):
        output.say(f"Others cannot find the base model {base}. Say its Hub id: --base owner/name")
    output.emit({"url": url, "private": not args.public}) if args.json else output.show(url)
    return output.OK
