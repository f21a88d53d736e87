"""``export merge|gguf|push|check``."""

from __future__ import annotations

import argparse
from pathlib import Path

from kto_core.errors import ExportError

from . import output

QUANTS = ("f16", "q8_0", "q4_k_m", "q5_k_m")
WHAT = ("adapter", "merged", "gguf")


def _list(allowed: tuple[str, ...]):
    def parse(text: str) -> list[str]:
        names = [n.strip().lower() for n in text.split(",") if n.strip()]
        if not names or set(names) - set(allowed):
            raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(allowed)}, separated by commas")
        return list(dict.fromkeys(names))

    return parse


def add(commands: argparse._SubParsersAction, argv: list[str]) -> None:
    export = commands.add_parser(
        "export", help="merge, convert to GGUF, check, upload", description="Give a run to other programs."
    )
    actions = export.add_subparsers(metavar="ACTION", required=True)

    _action(actions, "merge", "merge the adapter into the base model (16 bit)", run_merge)
    gguf = _action(actions, "gguf", "write GGUF files for llama.cpp and Ollama", run_gguf)
    gguf.add_argument(
        "--quant",
        type=_list(QUANTS),
        default=["q4_k_m"],
        metavar="Q",
        help=f"comma-separated: {', '.join(QUANTS)} (default: q4_k_m)",
    )
    check = _action(actions, "check", "load the GGUF files in llama.cpp and let them answer", run_check)
    check.add_argument("--quant", type=_list(QUANTS), metavar="Q", help="check these only (default: all there are)")
    check.add_argument(
        "--prompt", default="What is the capital of France?", metavar="T", help="question to ask (default: %(default)s)"
    )
    push = _action(actions, "push", "upload to the Hugging Face Hub, private unless --public", run_push)
    push.add_argument("--repo", required=True, metavar="R", help="repository, owner/name")
    push.add_argument(
        "--what",
        type=_list(WHAT),
        default=["adapter"],
        metavar="W",
        help=f"comma-separated: {', '.join(WHAT)} (default: adapter)",
    )
    push.add_argument("--public", action="store_true", help="everybody may see it")


def _action(actions, name: str, text: str, fn) -> argparse.ArgumentParser:
    sub = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    sub.add_argument("name", metavar="RUN", help="id of a run ('runs list'), or its folder")
    output.add_json(sub)
    sub.set_defaults(run=fn)
    return sub


def _long(fn, *args, **kwargs):
    """Call a long function of kto_core.export with a bar; Ctrl-C cancels it in good order."""
    from .follow import Interrupts

    with Interrupts() as interrupts, output.Bar() as bar:
        return fn(*args, progress=bar, cancel=interrupts.cancel, **kwargs)


def _found(name: str):
    from kto_core import run

    return run.find(name)


def run_merge(args: argparse.Namespace) -> int:
    from kto_core import export

    folder = _long(export.merge, _found(args.name))
    output.emit({"merged": str(folder)}) if args.json else output.show(str(folder))
    return output.OK


def run_gguf(args: argparse.Namespace) -> int:
    from kto_core import export

    run = _found(args.name)
    files = _long(export.gguf, run, args.quant)
    made = [{"path": str(p), "bytes": p.stat().st_size, "modelfile": str(export.modelfile(run, p))} for p in files]
    if args.json:
        output.emit({"files": made})
    else:
        output.show("\n".join(f"{f['path']}  {f['bytes'] / 1e6:,.0f} MB" for f in made))
        output.say(f"For Ollama: ollama create NAME -f {made[-1]['modelfile']}")
    return output.OK


def run_check(args: argparse.Namespace) -> int:
    from kto_core import export

    files = gguf_files(_found(args.name), args.quant)
    answers = [{"path": str(p)} | export.check_gguf(p, args.prompt) for p in files]
    if args.json:
        output.emit({"checks": answers})
    else:
        output.show("\n\n".join("\n".join(f"{k}: {v}" for k, v in a.items()) for a in answers))
    return output.OK


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
            "No such GGUF file yet. Make one: "
            f"python -m kto_core export gguf {run.id} --quant {','.join(quants or ['q4_k_m'])}"
        )
    return files


def run_push(args: argparse.Namespace) -> int:
    from kto_core import export

    url = _long(export.push, _found(args.name), args.repo, what=args.what, private=not args.public)
    output.emit({"url": url, "private": not args.public}) if args.json else output.show(url)
    return output.OK
