"""Work in child processes: lines while they come, cancel, death of the child and of the parent."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from kto_core.errors import Cancelled, ExportError
from kto_core.guards import child
from tests.support.training import wait

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> list[str]:
    return [sys.executable, "-u", "-c", code]


def test_lines_and_bars_come_as_they_are_written():
    seen = []
    code = "import sys\nprint('one')\nsys.stderr.write('  10%|#   |\\r  90%|### |\\n')\nprint('é', end='')\nsys.exit(3)"
    ended = child.run(python(code), on_line=seen.append)
    assert seen == ["one", "  10%|#   |", "  90%|### |", "é"]
    assert ended == child.Ended(3, "one\né")


def test_environment_is_added_and_taken_away(monkeypatch):
    monkeypatch.setenv("GOES", "1")
    ended = child.run(
        python("import os; print(os.environ.get('GOES'), os.environ['NEW'])"), env={"GOES": None, "NEW": "x"}
    )
    assert ended.tail == "None x"


def test_cancel_kills_the_child_and_its_children(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(p.pid)\ntime.sleep(600)"
    )
    cancel, pids = threading.Event(), []

    def seen(line: str) -> None:
        pids.append(int(line))
        cancel.set()

    began = time.monotonic()
    with pytest.raises(Cancelled):
        child.run(python(code), on_line=seen, cancel=cancel)
    assert time.monotonic() - began < 20
    wait(lambda: not running(pids[0]), 10)


def running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_child_that_ends_while_a_grandchild_holds_its_output_is_not_waited_for():
    code = (
        "import subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\nprint('done')"
    )
    began = time.monotonic()
    assert child.run(python(code)).tail == "done"
    assert time.monotonic() - began < 60


def test_results_and_errors_of_functions():
    assert child.call("export.gguf.writing", "known", {"quants": "Q8_0"}, what="It") == ["q8_0"]
    with pytest.raises(ExportError, match="Unknown GGUF type: q9"):
        child.call("export.gguf.writing", "known", {"quants": "q9"}, what="It")
    with pytest.raises(child.ChildFailed, match=r"It failed: .*no_such"):
        child.call("export.gguf.writing", "no_such", {}, what="It")


@pytest.mark.parametrize(
    "fails", ["open('/dev/full', 'wb', 0).write(b'x')", "raise RuntimeError('I/O error: No space left on device')"]
)
def test_a_full_disk_in_the_child_is_a_sentence(fails):
    asked = json.dumps({"module": "export.gguf.native", "function": "full", "arguments": {}})
    code = (
        "import kto_core.export.gguf.native as g, kto_core.guards.child as c, sys\n"
        f"def full(): {fails}\n"
        "g.full = full\nsys.exit(c.main())"
    )
    ended = child.run(python(code), env={"PYTHONPATH": str(ROOT)}, given=asked)
    assert ended.code == 1 and '"kind": "DiskError"' in ended.tail and "disk is full" in ended.tail


def test_a_crash_is_told():
    for code, words in (("import os; os.abort()", "it crashed (SIGABRT)"), ("raise SystemExit(4)", "exit code 4")):
        ended = child.run(python(code))
        assert words in str(child.ChildFailed(ended, "The check"))
    assert "memory ran out" in str(child.ChildFailed(child.Ended(-signal.SIGKILL, ""), "The merge"))


def test_a_child_ends_when_its_parent_is_killed():
    """The child here works as `child.main` does, for ten minutes."""
    inner = (
        "import sys, threading, time; from kto_core.guards import child; sys.stdin.readline(); "
        "threading.Thread(target=child._end_with_parent).start(); time.sleep(600)"
    )
    outer = f"import sys; from kto_core.guards import child; child.run([sys.executable, '-c', {inner!r}], given='{{}}')"
    parent = subprocess.Popen(python(outer), env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        found = wait(lambda: psutil.Process(parent.pid).children(), 60)
    finally:
        parent.kill()
        parent.wait()
    wait(lambda: not running(found[0].pid), 30)
