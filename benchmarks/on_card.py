"""The measurements on a card that RESULTS.md asks for, with one command, in the order of their worth.

    python benchmarks/on_card.py --tools nexus_behaviors.jsonl --chat sharegpt_pairs.json --out FOLDER
    python benchmarks/on_card.py --list

on_card.yaml has them: each is one of the other scripts with its flags, held to 24 GiB, in a process of its own. What it
prints goes to FOLDER/NAME.txt; how it ended is said here. Those that measure memory alone share the card, those that
measure time have it to themselves. One that fails, or is not done in its time, does not keep the others from running;
``--minutes`` ends the list early. A model's shape is made once and kept in the system's temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

PATIENCE = 20  # seconds between the request to end and the end


@dataclass(frozen=True)
class Measurement:
    """An entry of on_card.yaml, which says what its fields mean."""

    name: str
    run: str
    seconds: int
    shape: str
    gpus: int = 1
    shared: bool = False
    bf16: bool = False

    def words(self, tools: str, chat: str) -> list[str]:
        """The script and its arguments."""
        return [word.format(tools=tools, chat=chat) for word in shlex.split(self.run)]

    def says(self, tools: str, chat: str) -> str:
        script, *flags = self.words(tools, chat)
        return shlex.join(["python", f"benchmarks/{script}", *flags])


def measurements() -> list[Measurement]:
    import yaml

    found = yaml.safe_load((HERE / "on_card.yaml").read_text(encoding="utf-8"))
    filled = {"tools": "{tools}", "chat": "{chat}", **found["flags"]}
    return [
        Measurement(name, **entry | {"run": entry["run"].format(**filled)})
        for name, entry in found["measurements"].items()
    ]


def run(m: Measurement, args, deadline: float) -> str:
    """Run it to its end or the end of its time; how it ended, in one line."""
    began = time.monotonic()
    limit = min(m.seconds, deadline - began)
    if limit <= 0:
        return f"{m.name}: no time was left for it"
    script, *flags = m.words(args.tools, args.chat)
    with tempfile.TemporaryDirectory(prefix="kto-card-") as cache, open(args.out / f"{m.name}.txt", "w") as log:
        log.write(f"$ {m.says(args.tools, args.chat)}\n")
        log.flush()
        # a cache of its own: the card has one owner a cache, and the reference scores of another would be found
        env = {**os.environ, "KTO_STUDIO_CACHE": cache, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [sys.executable, str(HERE / script), *flags], stdout=log, stderr=subprocess.STDOUT, env=env
        )
        try:
            code = process.wait(limit)
            ended = "done" if code == 0 else f"failed with exit status {code}"
        except subprocess.TimeoutExpired:
            ended = f"not done in {limit:.0f} s"
        finally:
            end(process)
    return f"{m.name}: {ended}, {time.monotonic() - began:.0f} s"


def end(process: subprocess.Popen) -> None:
    """End a process and all that it started, workers with a session of their own too: asked first, then told."""
    import psutil

    try:
        parent = psutil.Process(process.pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for p in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            p.terminate()
    for p in psutil.wait_procs(family, PATIENCE)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            p.kill()
    process.wait()


def groups(chosen: list[Measurement], at_once: int) -> list[list[Measurement]]:
    """What runs at the same time: neighbours that share the card, so many at once; each of the others by itself."""
    found: list[list[Measurement]] = []
    for m in chosen:
        if m.shared and found and found[-1][0].shared and len(found[-1]) < at_once:
            found[-1].append(m)
        else:
            found.append([m])
    return found


def make_shapes(chosen: list[Measurement], tokenizer: str | None, deadline: float) -> None:
    """Make the models side by side, in processes that leave the card afterwards, where the scripts look for them."""
    import shapes

    made = []
    for name, nf4 in dict.fromkeys((m.shape, not m.bf16) for m in chosen):
        line = [sys.executable, shapes.__file__, name, str(shapes.place(shapes.ROOT, name, nf4)), *["--nf4"] * nf4]
        made.append(subprocess.Popen(line + ["--tokenizer", tokenizer] * bool(tokenizer), stdout=subprocess.DEVNULL))
    for process in made:
        try:
            process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            end(process)


def arguments(argv=None) -> argparse.Namespace:
    from flags import chosen, listed

    there = measurements()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tools", help="rows with long prompts, for example nexus_behaviors.jsonl")
    parser.add_argument("--chat", help="rows of conversations, for example sharegpt_pairs.json")
    parser.add_argument("--out", type=Path, default=Path("card-results"), help="folder (default: %(default)s)")
    parser.add_argument("--only", default="", help="comma-separated names; default all that there are GPUs for")
    parser.add_argument("--minutes", type=float, default=90, help="for everything together (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=3, help="that share a card, 24 GiB each (default: %(default)s)")
    parser.add_argument("--tokenizer", help="folder of a tokenizer for the shapes; default the demo model's")
    parser.add_argument("--list", action="store_true", help="print the commands and do nothing")
    args = parser.parse_args(argv)
    names = chosen(parser, listed(args.only), [m.name for m in there], "measurement")
    args.chosen = [m for m in there if m.name in names or not names]
    for flag in ("tools", "chat"):
        needed = not args.list and any(f"{{{flag}}}" in m.run for m in args.chosen)
        if needed and not Path(getattr(args, flag) or "").is_file():
            parser.error(f"--{flag} needs a file of rows")
    return args


def main(argv=None) -> int:
    args = arguments(argv)
    if args.list:
        for m in args.chosen:
            print(f"{m.name}: {m.says(args.tools or 'TOOLS', args.chat or 'CHAT')}")
        return 0
    import torch

    cards = torch.cuda.device_count()
    chosen = [m for m in args.chosen if m.gpus <= cards]
    for m in args.chosen:
        if m.gpus > cards:
            print(f"{m.name}: needs {m.gpus} GPUs; this machine has {cards}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    make_shapes(chosen, args.tokenizer, deadline)
    said: list[str] = []
    for group in groups(chosen, args.at_once):
        with ThreadPoolExecutor(len(group)) as pool:
            for line in pool.map(lambda m: run(m, args, deadline), group):
                said.append(line)
                print(line, flush=True)
    return 0 if said and all(": done" in line for line in said) else 1


if __name__ == "__main__":
    sys.exit(main())
