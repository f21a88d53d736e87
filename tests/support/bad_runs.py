"""Run folders that nobody should have made, and a good one beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from kto_core.config import resolving
from kto_core.runs import folders, run

DEPTH = 3000
BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(f'*{chr(97 + i)}' for _ in range(10))}]\n" for i in range(8)
)
BOMB += "model: *i\n"  # a setting that there is: its value is looked at, and shown
GOOD = [
    {"t": 1.7e9, "kind": "status", "state": "training", "total_steps": 3, "message": "Training: 3 steps."},
    {"t": 1.7e9 + 1, "kind": "metric", "step": 3, "loss": 0.25},
    {"t": 1.7e9 + 2, "kind": "status", "state": "finished", "message": "Finished: 3 steps."},
]


def text_of(events: list[dict]) -> str:
    return "".join(json.dumps(e) + "\n" for e in events)


def make(folder: Path, events: str | None = None) -> Path:
    """A finished run with an adapter."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "manifest.json").write_text('{"files": {}}')
    resolving.save_config(resolving.resolve("demo", {"data": "rows.jsonl"}), folder / "config.yaml")
    (folder / "events.jsonl").write_text(text_of(GOOD) if events is None else events)
    return folder


def _settings(text: str | bytes) -> Callable[[Path], None]:
    data = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / "config.yaml").write_bytes(data) and None


def _events(*lines: str | bytes) -> Callable[[Path], None]:
    """These lines before the good ones' last."""
    data = b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)
    kept = text_of(GOOD).encode().splitlines(keepends=True)
    return lambda folder: (folder / "events.jsonl").write_bytes(b"".join(kept[:-1]) + data + kept[-1]) and None


def _instead(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def _long_line(folder: Path) -> None:
    with open(folder / "events.jsonl", "ab") as f:
        f.write(b'{"t": 1, "kind": "log", "text": "')
        f.truncate(f.tell() + (1 << 30))  # a hole: takes no room


# what it is -> how to make it of a good run; these cannot be read
UNREADABLE = {
    "aliases that multiply": _settings(BOMB),
    "one alias": _settings("a: &a 1\nb: *a\n"),
    "a date that there is not": _settings("preset: demo\nrun_name: 2025-13-45\n"),
    "a huge integer": _settings("preset: demo\nmax_steps: " + "9" * 5000 + "\n"),
    "a huge hexadecimal integer": _settings("preset: demo\nmax_steps: 0x" + "f" * 8000 + "\n"),
    "sixties": _settings("preset: demo\nmax_steps: 1" + ":59" * 2500 + "\n"),
    "open brackets": _settings("target_modules: " + "[" * DEPTH + "\n"),
    "closed brackets": _settings("target_modules: " + "[" * DEPTH + "]" * DEPTH + "\n"),
    "a long value": _settings("model: " + "x" * 100_000 + "\n"),
    "many names": _settings("".join(f"name{i}: 1\n" for i in range(4000))),
    "a large file": _settings("# " + "x" * (1 << 20) + "\npreset: demo\n"),
    "no UTF-8": _settings(b"preset: \xff\xfe\n"),
    "a list": _settings("- 1\n"),
    "names that are none": _settings("? [a]\n: 1\n"),
    "numbers as names": _settings("1: 2\n"),
    "a wrong value": _settings("preset: demo\nbeta: -1\n"),
    "a wrong kind": _settings("preset: demo\nmodel: {a: 1}\n"),
    "a set": _settings("preset: demo\nmodel: !!set {a, b}\n"),
    "Python": _settings("model: !!python/object/apply:os.getcwd []\n"),
    "NUL": _settings("model: \x00\n"),
    "settings are a folder": _instead("config.yaml", Path.mkdir),
    "settings are a pipe": _instead("config.yaml", os.mkfifo),
    "settings are lost": lambda folder: (folder / "config.yaml").unlink(),
    "settings point at themselves": _instead("config.yaml", lambda p: p.symlink_to(p)),
    "events are a folder": _instead("events.jsonl", Path.mkdir),
    "events are a pipe": _instead("events.jsonl", os.mkfifo),
    "events are a device": _instead("events.jsonl", lambda p: p.symlink_to("/dev/zero")),
    "events are noise": lambda folder: (folder / "events.jsonl").write_bytes(os.urandom(4096) + b"\n") and None,
}

# these can, without the lines that are no events
SKIPPED = {
    "step NaN": _events('{"t": 1, "kind": "metric", "step": NaN, "loss": 1}'),
    "step 1e999": _events('{"t": 1, "kind": "metric", "step": 1e999}'),
    "resumed from 1e999": _events('{"t": 1, "kind": "status", "state": "training", "resumed_from": 1e999}'),
    "resumed from NaN": _events('{"t": 1, "kind": "status", "state": "training", "resumed_from": NaN}'),
    "resumed from a list": _events('{"t": 1, "kind": "status", "state": "training", "resumed_from": [1]}'),
    "a message that is a number": _events('{"t": 1, "kind": "status", "state": "training", "message": 123}'),
    "a state that there is not": _events('{"t": 1, "kind": "status", "state": "<b>"}'),
    "a state that is a list": _events('{"t": 1, "kind": "status", "state": ["training"]}'),
    "no state": _events('{"t": 1, "kind": "status"}'),
    "time 1e300": _events('{"t": 1e300, "kind": "log", "text": "x"}'),
    "time before time": _events('{"t": -5, "kind": "log", "text": "x"}'),
    "time as text": _events('{"t": "now", "kind": "log", "text": "x"}'),
    "a huge step": _events('{"t": 1, "kind": "metric", "step": ' + "9" * 400 + "}"),
    "a step of 5,000 digits": _events('{"t": 1, "kind": "metric", "step": ' + "9" * 5000 + "}"),
    "total steps as text": _events('{"t": 1, "kind": "status", "state": "training", "total_steps": "many"}'),
    "a share as text": _events('{"t": 1, "kind": "status", "state": "preparing", "fraction": "half"}'),
    "a text that is a list": _events('{"t": 1, "kind": "log", "text": [1]}'),
    "a level that is none": _events('{"t": 1, "kind": "log", "text": "x", "level": {}}'),
    "a path that is a number": _events('{"t": 1, "kind": "checkpoint", "step": 1, "path": 5}'),
    "an error that is an object": _events('{"t": 1, "kind": "error", "message": {"a": 1}}'),
    "brackets": _events("[" * 100_000, '{"t": 1, "kind": ' + "[" * 100_000),
    "noise": _events(b"\xff\xfe\x00{[", b"\x00" * 100),
    "other JSON": _events("1", "null", '"x"', "[]", "{}", '{"kind": {}}', '{"kind": null}'),
    "a line of 1 GiB": _long_line,
}

# these are as good as any
HARMLESS = {
    "huge values": _events('{"t": 1, "kind": "metric", "step": 1, "kl": 1e999, "loss": ' + "9" * 400 + "}"),
    "values that are none": _events(
        '{"t": 1, "kind": "metric", "step": 1, "loss": "low", "kl": {}, "eta": "soon", "epoch": []}'
    ),
    "half a character": _events('{"t": 1, "kind": "log", "text": "\\ud800"}'),
    "half a character in a name": _events('{"t": 1, "kind": "metric", "step": 1, "\\ud800": 1}'),
    "no end of a line": lambda folder: (folder / "events.jsonl").open("a").write('{"t": 1, "ki') and None,
    "unknown kinds": _events('{"t": 1, "kind": "passed", "rows": "x"}', '{"t": 1, "kind": "?", "step": "x"}'),
    "data that are deep": lambda folder: (folder / "dataset.json").write_text('{"report": ' + "[" * 100_000) and None,
    "data of another form": lambda folder: (folder / "dataset.json").write_text('{"report": 5, "source": []}') and None,
    "data that are a pipe": lambda folder: os.mkfifo(folder / "dataset.json"),
    "a manifest that is deep": lambda folder: (folder / "adapter/manifest.json").write_text("[" * 100_000) and None,
    "a long manifest": lambda folder: os.truncate(folder / "adapter/manifest.json", 1 << 30),
    "checkpoints are a file": lambda folder: (folder / "checkpoints").write_text("") and None,
    "waiting since ever": lambda folder: (folder / "waiting").write_text("9" * 5000) and None,
    "a stop that is a folder": lambda folder: (folder / "stop").mkdir(),
    "origins that are a number": lambda folder: _settings("preset: demo\norigins: 5\n")(folder),
}


def of(name: str) -> run.Run:
    return folders.find(name)
