"""``chat``: talk to a run or a model in the terminal."""

from __future__ import annotations

import argparse
import sys

from kto_core.data.records import thoughts
from kto_core.errors import ConfigError, KTOError

from . import output

HELP = "Commands: clear (forget the conversation), system TEXT (set the system prompt), base / tuned (switch), exit."


def add(commands: argparse._SubParsersAction, argv: list[str]) -> None:
    chat = commands.add_parser(
        "chat",
        help="chat with a run or a model",
        description="Chat with a run or a model. Ctrl-C stops an answer. " + HELP,
    )
    chat.add_argument(
        "model", metavar="RUN_OR_MODEL", help="id or folder of a run, Hub id or folder of a model, or 'demo'"
    )
    chat.add_argument("--base", action="store_true", help="answer with the base model (adapter off)")
    chat.add_argument("--checkpoint", metavar="STEP", help="use the adapter from this checkpoint instead of the latest")
    chat.add_argument("--prompt", metavar="T", help="print the answer to T and exit")
    add_sampling(chat)
    output.add_json(chat)
    chat.set_defaults(run=run)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Flags of how a model answers."""
    parser.add_argument("--system", metavar="TEXT", default="", help="system prompt")
    parser.add_argument(
        "--temperature",
        type=output.number(float, 0, 2),
        default=0.7,
        metavar="X",
        help="0: always pick the most likely token (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=output.number(float, 0.01, 1),
        default=0.9,
        metavar="X",
        help="sample from the most likely tokens whose probabilities add up to X (default: %(default)s)",
    )
    parser.add_argument(
        "--top-k",
        type=output.number(int, 0),
        default=50,
        metavar="N",
        help="sample from the N most likely tokens; 0: no limit (default: %(default)s)",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=output.number(float, 0.5, 2),
        default=1.0,
        metavar="X",
        help="above 1: fewer repetitions (default: %(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=output.number(int, 1),
        default=512,
        metavar="N",
        help="maximum length of an answer in tokens (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")


def sampling(args: argparse.Namespace) -> dict:
    """These flags as `Chat.stream` takes them."""
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
    return {name: getattr(args, name) for name in names}


def run(args: argparse.Namespace) -> int:
    if args.json and args.prompt is None:
        raise ConfigError("--json requires --prompt.")
    chat = load(args)
    messages = [{"role": "system", "content": args.system}] if args.system else []
    try:
        if args.prompt is not None:
            messages.append({"role": "user", "content": args.prompt})
            answer = _answer(chat, messages, args, shown=not args.json)
            if args.json:
                thought, answer = thoughts.split(answer, unfinished=True)
                output.emit(
                    {
                        "model": args.model,
                        "tuned": chat.has_adapter and not args.base,
                        **({"thought": thought} if thought else {}),
                        "answer": answer,
                        "stats": chat.stats,
                    }
                )
            return output.OK
        return converse(chat, messages, args)
    finally:
        chat.unload()


def load(args: argparse.Namespace):
    """The loaded Chat. A name that is no run is taken as a model."""
    from kto_core.chat.chat import Chat

    from .follow import Interrupts

    with Interrupts() as interrupts, output.Bar() as bar:
        return Chat.load(args.model, checkpoint=args.checkpoint, progress=bar, cancel=interrupts.cancel)


def _answer(chat, messages: list[dict], args: argparse.Namespace, *, shown: bool = True) -> str:
    """Stream one answer to stdout and return it; Ctrl-C ends the answer only."""
    from .follow import Interrupts

    parts = []
    with Interrupts() as interrupts:
        for part in chat.stream(
            messages,
            tuned=not args.base,
            **sampling(args),
            seed=args.seed,
            cancel=interrupts.cancel,
        ):
            parts.append(part)
            if shown:
                output.show(part, end="")
    if shown:
        output.show("")
    return "".join(parts)


def converse(chat, messages: list[dict], args: argparse.Namespace) -> int:
    """The conversation: reads lines until exit, quit or the end of input."""
    terminal = sys.stdin.isatty()
    if terminal:
        output.say(HELP)
    while True:
        if terminal:
            print(
                f"\n{'base' if args.base or not chat.has_adapter else 'tuned'}> ", end="", file=sys.stderr, flush=True
            )
        line = sys.stdin.readline()
        if not line:
            return output.OK
        word, _, rest = (text := line.strip()).partition(" ")
        if not text:
            continue
        if text in ("exit", "quit", "/exit", "/quit"):
            return output.OK
        if text in ("clear", "/clear"):
            messages = [m for m in messages if m["role"] == "system"]
            output.say("Conversation cleared.")
        elif word in ("system", "/system"):
            messages = [m for m in messages if m["role"] != "system"]
            messages = ([{"role": "system", "content": rest}] if rest else []) + messages
            output.say(f"System prompt: {rest}" if rest else "No system prompt.")
        elif text in ("base", "tuned", "/base", "/tuned"):
            args.base = text.endswith("base")
            output.say(
                "This model has no adapter, so base and tuned are the same."
                if not chat.has_adapter
                else f"Now answering: {text.strip('/')}."
            )
        elif text in ("help", "/help", "?"):
            output.say(HELP)
        else:
            try:
                answer = _answer(chat, [*messages, {"role": "user", "content": text}], args)
            except KTOError as e:  # one answer failed, the conversation goes on
                output.say(str(e))
                continue
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
