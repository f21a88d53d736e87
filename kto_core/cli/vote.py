"""``vote``: a blind vote in the terminal, its result, and its rows."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kto_core.errors import Cancelled, ConfigError, DataError, KTOError

from . import output
from .chat import add_sampling, sampling

if TYPE_CHECKING:
    from kto_core.vote.ahead import Ahead
    from kto_core.vote.session import Session

KEYS = {"l": "left", "r": "right", "t": "tie", "b": "bad"}
HELP = "l: left is better, r: right is better, t: no difference, b: both are bad, e: edit an answer, q: quit."
POLL = 0.2  # seconds between two looks whether a pair is there


def add(commands: argparse._SubParsersAction, argv: list[str]) -> None:
    vote = commands.add_parser(
        "vote",
        help="compare two models blind, and make rows of the votes",
        description="Compare a run with its base model or another run, without knowing which answer is whose. "
        "`vote result` shows the result of the newest vote, `vote rows --out FILE` makes rows of it. "
        "Keys in a vote: " + HELP,
    )
    vote.add_argument("what", metavar="RUN|result|rows", help="the run to vote on, or what to do with a vote")
    vote.add_argument(
        "vote", metavar="VOTE", nargs="?", help="with result and rows: id of a vote (default: the newest)"
    )
    vote.add_argument("--against", metavar="RUN", default="base", help="another run, or base (default: %(default)s)")
    vote.add_argument("--checkpoint", metavar="STEP", default="", help="vote on this checkpoint of the run")
    source = vote.add_mutually_exclusive_group()
    source.add_argument(
        "--prompts", metavar="FILE", help="prompts from a data file, or from a text file with one in each line"
    )
    source.add_argument("--held-out", action="store_true", help="prompts from the rows that the run held out")
    vote.add_argument(
        "--n",
        type=output.number(int, 1, 10_000),
        default=20,
        metavar="N",
        help="how many prompts to take (default: %(default)s)",
    )
    vote.add_argument("--new", action="store_true", help="start a new vote instead of continuing the last one")
    vote.add_argument("--out", metavar="FILE", help="with rows: the JSONL file to write")
    add_sampling(vote)
    output.add_json(vote)
    vote.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.what in ("result", "rows"):
        if args.what == "rows" and not args.out:
            raise ConfigError("vote rows requires --out.")
        return (_result if args.what == "result" else _rows)(_chosen(args.vote), args)
    if args.vote is not None:
        raise ConfigError(f"{args.vote}: a vote is on one run. Give the other one with --against.")
    if args.json or args.out:
        raise ConfigError("--json and --out go with `vote result` and `vote rows`.")
    return _vote(args)


def _chosen(name: str | None) -> Session:
    from kto_core.vote import folder

    if name is not None:
        return folder.find(name)
    if (found := folder.newest()) is None:
        raise DataError("There is no vote yet. Start one with `vote RUN`.")
    return found


# ---- result and rows -------------------------------------------------------------------------------------------------


def _result(session: Session, args: argparse.Namespace) -> int:
    from kto_core.vote import wording

    if args.json:
        output.emit(wording.to_dict(session))
    else:
        _show_result(session)
    return output.OK


def _show_result(session: Session) -> None:
    from kto_core.vote import wording

    found, s = wording.judged(session), session.settings
    lines = [("Vote", session.id), ("For", s.a.name), ("Against", s.b.name), *wording.facts(found)]
    lines += [("Note", text) for text in session.remarks]
    output.show("\n".join(f"{name:<9} {value}" for name, value in lines))
    for text in (wording.sentence(found, s.a, s.b), wording.left(found), wording.RULE):
        if text:
            output.show(text)
    if session.skipped:
        output.say(f"{session.skipped:,} lines of the vote's file cannot be read and do not count.")


def _rows(session: Session, args: argparse.Namespace) -> int:
    from kto_core.vote import rows

    out = Path(args.out)
    if out.suffix.lower() != ".jsonl":
        raise ConfigError(f"--out: {out.name} must end in .jsonl.")
    path, good, bad = rows.write(session, out)
    side = session.settings.a
    where = Path(side.folder) / (f"checkpoints/{side.checkpoint}" if side.checkpoint else "adapter")
    command = shlex.join(["kto", "train", "--data", path, "--adapter", str(where)])
    if args.json:
        output.emit({"vote": session.id, "path": path, "desirable": good, "undesirable": bad, "train": command,
                     "reference": rows.reference(side)})  # fmt: skip
        return output.OK
    output.show(f"{good + bad} rows in {path}: {good} good, {bad} bad.")
    output.say(f"Train on them, with the run's --preset and --model: {command}\n{rows.reference(side)}")
    return output.OK


# ---- voting ----------------------------------------------------------------------------------------------------------


def _vote(args: argparse.Namespace) -> int:
    from kto_core.chat.chat import Chat
    from kto_core.vote import ahead, folder, sides

    a, b = sides.both(args.what, args.against, checkpoint=args.checkpoint)
    chosen = sampling(args)
    session = None if args.new else folder.resume(a, b, chosen, args.system)
    prompts, remarks = _prompts(args, a, b)
    if session is None:
        session = folder.create(a, b, chosen, args.system, args.seed)
    session.add_remarks(remarks)
    if prompts and not session.add_prompts(prompts, args.n) and not session.unanswered() and not session.waiting():
        output.say("All of these prompts were voted on already. Give others, or start a new vote with --new.")
    loaded: list[Chat] = []

    def load(session, progress, cancel):
        loaded[:] = loaded or [ahead.load(session, progress, cancel)]
        return loaded[0]

    supply = ahead.Ahead(session, load)
    try:
        output.say(f"{a.name[0].upper()}{a.name[1:]} against {b.name}. {HELP}")
        _ask(session, supply, typed=not (args.prompts or args.held_out))
    finally:
        supply.stop()
        for chat in loaded:
            chat.unload()
    _show_result(session)
    return output.OK


def _prompts(args: argparse.Namespace, a, b) -> tuple[list, list[str]]:
    """Prompts of the file or of the held-out rows, and remarks; none if they are typed."""
    from kto_core.vote import prompts

    from .follow import Interrupts

    seed = args.seed or 0
    with Interrupts() as interrupts, output.Bar() as bar:
        if args.prompts:
            return prompts.of_file(args.prompts, seed, bar, interrupts.cancel), []
        if args.held_out:
            return prompts.of_held_out(a, b, seed, bar, interrupts.cancel)
    return [], []


def _ask(session: Session, supply: Ahead, typed: bool) -> None:
    """Show pairs and take votes until the prompts, or the input, end."""
    asked = 0
    while True:
        pair = _next(session, supply)
        if pair is None:
            if not typed or not _typed(session):
                return
            continue
        asked += 1
        _show(pair, session)
        while True:
            key = _line("vote> ")
            if key is None or key == "q":
                return
            if key in KEYS:
                session.vote(pair.number, KEYS[key])
                break
            if key == "e":
                _edit(session, pair.number)
            else:
                output.say(HELP)


def _next(session: Session, supply: Ahead):
    """The next pair, waiting for it; None if every prompt has its vote.

    Raises:
        KTOError: the models cannot be loaded, or failed. Cancelled: Ctrl-C.
    """
    from .follow import Interrupts

    with Interrupts() as interrupts, output.Bar() as bar:
        while True:
            pair = session.refresh().shown()
            supply.kick()
            if pair is not None or not session.unanswered():
                return pair
            job = supply.job
            if interrupts.cancel.is_set():
                raise Cancelled("Stopped. The votes are kept.")
            if job is not None:
                job.wait(POLL)
                if job.state == "failed":
                    raise KTOError(job.error)
                bar(job.fraction, job.text)


def _show(pair, session: Session) -> None:
    counts = session.counts()
    output.show(f"\n--- {counts.asked + 1} of {len(session.prompts()) - counts.identical} ---")
    for message in pair.prompt:
        output.show(f"[{message['role']}] {message['content']}")
    output.show(f"\n[left]\n{pair.left or '(no text)'}\n\n[right]\n{pair.right or '(no text)'}\n")


def _typed(session: Session) -> bool:
    """Take one prompt from the terminal; False at the end of the input."""
    from kto_core.vote import prompts

    while True:
        text = _line("prompt> ")
        if text is None or text in ("q", "exit", "quit"):
            return False
        if text and session.add_prompts(prompts.typed(text)):
            return True
        if text:
            output.say("This prompt was voted on already. Type another.")


def _edit(session: Session, number: int) -> None:
    place = KEYS.get(_line("Which answer, l or r? ") or "", "")
    if place not in ("left", "right"):
        output.say("Nothing edited.")
        return
    output.say("Type the better answer. A line with only a dot ends it.")
    lines = []
    while (line := _raw()) is not None and line.rstrip("\n") != ".":
        lines.append(line)
    if not "".join(lines).strip():
        output.say("Nothing edited.")
        return
    session.edit(number, place, "".join(lines))
    output.say("Kept. Now vote on the pair.")


def _line(prompt: str) -> str | None:
    """A line that somebody typed, without blanks around it; None at the end of the input."""
    if sys.stdin.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
    line = _raw()
    return None if line is None else line.strip()


def _raw() -> str | None:
    return sys.stdin.readline() or None
