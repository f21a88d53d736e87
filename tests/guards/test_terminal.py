"""What comes from outside is shown in the terminal, never obeyed by it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kto_core import cli
from kto_core.cli import follow, output
from kto_core.plain_text import cut, one_line, printable, shown
from tests.support.bad_runs import GOOD, make, text_of

ROOT = Path(__file__).resolve().parents[2]
TITLE, CLEAR, LINK = "\x1b]0;owned\x07", "\x1b[2J\x1b[H", "\x1b]8;;http://x\x1b\\here\x1b]8;;\x1b\\"
C1, BACK, OVER = "\x9b31m", "secret\b\b\b\b\b\bpublic", "real\rfake"
BIDI = "\u202egnp.exe\u202c \u2066x\u2069 \u200f \u061c"
EVIL = [TITLE, CLEAR, LINK, C1, BACK, OVER, BIDI, "\u2028line", "\x7f", "\ud800", "\x00", "\ufeff", "\u200b"]
OBEYED = {*map(chr, range(32)), *map(chr, range(0x7F, 0xA0)), *"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
          "\u200b\u200e\u200f\u061c\u2028\u2029\ufeff\ud800"} - {"\n", "\t"}  # fmt: skip


def require_harmless(text: str) -> None:
    assert not OBEYED & set(text), repr(OBEYED & set(text))


@pytest.mark.parametrize("evil", EVIL, ids=ascii)
def test_what_is_obeyed_is_written_out(evil, capsys):
    output.say(f"a {evil} b")
    output.show(f"a {evil} b")
    output.emit({evil: evil})
    said = capsys.readouterr()
    require_harmless(said.out + said.err)
    assert said.err.startswith("a ") and said.err.endswith(" b\n") and len(said.err) > 6
    last = said.out.splitlines()[-1]
    assert json.loads(last) == {evil: evil}, "the JSON says the same"
    require_harmless(one_line(evil) + shown(evil))


def test_plain_text_is_left_alone():
    for text in ("Grüße, 世界 – שלום مرحبا", "👩‍👩‍👧 🏳️‍🌈", "a\tb\nc", "नमस्ते क्‍ष", ""):
        assert printable(text) == text
    assert one_line("a\tb\nc") == "a\\x09b\\x0ac" and cut("abcdef", 4) == "abc…" and cut("abcd", 4) == "abcd"
    assert printable(CLEAR) == "\\x1b[2J\\x1b[H" and printable("\u202e") == "\\u202e"


def test_a_value_in_an_error_is_cut_and_never_raises():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    many = dict.fromkeys(range(10**5))
    for value in ("x" * 10**7, 10**6000, -(10**6000), list(range(10**6)), many, deep, b"\x1b" * 999):
        assert len(shown(value)) <= 100
    while deep:
        deep = deep.pop()


def test_a_runs_texts_are_shown(runs_dir, capsys):
    evil = "".join(EVIL)
    middle = [
        {"t": 1.7e9, "kind": "metric", "step": 2, f"x{evil}": 0.5},
        {"t": 1.7e9, "kind": "error", "message": evil},
        {"t": 1.7e9, "kind": "status", "state": "failed", "message": evil},
    ]
    folder = make(runs_dir / f"r{CLEAR}\u202e\n", text_of([GOOD[0], *middle]))
    text = (folder / "config.yaml").read_text()
    text = text.replace("model: demo", "model: " + json.dumps(evil))
    (folder / "config.yaml").write_text(text.replace("run_name: ''", "run_name: " + json.dumps(BIDI)))
    (folder / "dataset.json").write_text(json.dumps({"source": evil, "report": {"kept": 3}}))
    for args in (["runs", "list"], ["runs", "show", folder.name], ["runs", "show", folder.name, "--json"],
                 ["runs", "list", "--json"], ["runs", "stop", folder.name], ["runs", "show", evil], [evil],
                 ["data", "check", evil], ["chat", evil, "--prompt", "x"]):  # fmt: skip
        try:
            cli.main(args)
        except SystemExit as e:
            assert e.code == 2
        said = capsys.readouterr()
        require_harmless(said.out + said.err)
        assert said.out or said.err
    cli.main(["runs", "list"])
    assert len(capsys.readouterr().out.splitlines()) == 2, "a line a run, whatever it is called"


def test_a_bug_of_ours_is_shown_with_a_harmless_trace(capsys):
    assert "Unexpected" in output.sentence(TypeError(CLEAR + BIDI))
    said = capsys.readouterr().err
    require_harmless(said)
    assert "\\x1b[2J" in said


def test_the_apps_own_prints(capsys):
    from kto_studio.shared import context

    context.error(TypeError(CLEAR))
    context.quiet(lambda: [][BIDI])()
    require_harmless(capsys.readouterr().err)
    done = subprocess.run([sys.executable, "app.py", "--host", CLEAR], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    require_harmless(done.stderr)


def test_the_lines_of_a_run_that_is_followed(capsys):
    class Terminal:
        def write(self, text, file):
            print(text, file=file)

    screen = follow._Screen()
    screen.line(CLEAR)
    screen.bar = Terminal()
    screen.line(CLEAR)
    said = capsys.readouterr().err
    require_harmless(said)
    assert said.count("\\x1b[2J") == 2
    with output.Bar() as bar:
        bar._shown = 0
        bar(0.5, OVER + CLEAR)
    require_harmless(capsys.readouterr().err)


def test_a_terminal_that_has_no_unicode():
    env = {"PYTHONIOENCODING": "ascii", "PATH": ""}
    code = "from kto_core.cli import output; output.show('Grüße \\ud800 \\x1b'); output.emit({'a': 1})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, env=env)
    assert done.returncode == 0 and done.stdout.startswith(b"Gr??e \\ud800 \\x1b"), done.stderr
