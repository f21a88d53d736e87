"""What native readers of model files may touch: tried in children, on this machine's kernel."""

import os
import socket
import sys
from pathlib import Path

import pytest

from kto_core.export.gguf import agreement, native, tensors
from kto_core.guards import child, confine
from kto_core.hardware import doctor

ROOT = Path(__file__).resolve().parents[2]
TRY = """
import os, socket, sys
sys.path.insert(0, {root!r})
from kto_core.guards import confine
held = confine.close_in([{inside!r}])
def tried(what, *args):
    try:
        what(*args)
        return "done"
    except OSError as e:
        return type(e).__name__
def connect():
    socket.create_connection(("127.0.0.1", {port}), timeout=5).close()
print(held, tried(open, {inside!r} + "/new", "w"), tried(os.rename, {inside!r} + "/new", {inside!r} + "/newer"),
      tried(open, {outside!r} + "/new", "w"), tried(open, {outside!r} + "/there", "w"),
      tried(os.truncate, {outside!r} + "/there", 0), tried(os.unlink, {outside!r} + "/there"),
      tried(os.mkdir, {outside!r} + "/folder"), tried(open, {outside!r} + "/there"), tried(open, "/dev/null", "w"),
      tried(connect), flush=True)
os.execv(sys.executable, [sys.executable, "-c", "open({outside!r} + '/later', 'w')"])
"""


def attempt(tmp_path, code: str = TRY) -> tuple[list[str], Path]:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir(), outside.mkdir()
    (outside / "there").write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        filled = code.format(root=str(ROOT), inside=str(inside), outside=str(outside), port=server.getsockname()[1])
        ended = child.run([sys.executable, "-c", filled])
    return ended.tail.splitlines()[0].split(), outside


def test_a_confined_child_writes_in_its_folder_only_and_has_no_network(tmp_path):
    abi = confine.landlock_abi()
    seen, outside = attempt(tmp_path)
    if not abi:
        assert seen[0] == "False"
        return
    no = "PermissionError"
    assert seen[:10] == ["True", "done", "done", no, no, no if abi >= 3 else "done", no, no, "done", "done"]
    assert abi < 4 or seen[10] != "done"
    assert (outside / "there").read_text() == "kept"
    assert not (outside / "later").exists()  # what the child becomes is held, too


def test_the_same_child_unconfined_does_it_all(tmp_path):
    seen, outside = attempt(tmp_path, TRY.replace("confine.close_in([{inside!r}])", "False"))
    assert seen == ["False"] + ["done"] * 7 + ["FileNotFoundError", "done", "done"] and (outside / "later").exists()


def test_limits_are_never_raised():
    code = (
        f"import resource, sys; sys.path.insert(0, {str(ROOT)!r}); from kto_core.guards import confine\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (50, 60)); confine.close_in()\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    assert child.run([sys.executable, "-c", code]).tail == "50"


@pytest.mark.parametrize("call", ["quantize", "compare", "weights"])
def test_what_reads_a_gguf_is_confined_first(monkeypatch, tmp_path, call):
    class ConfinedError(Exception):
        pass

    asked = []

    def close_in(writable=()):
        asked.append(list(writable))
        raise ConfinedError

    monkeypatch.setattr(confine, "close_in", close_in)
    out = tmp_path / "out" / "a.gguf"
    with pytest.raises(ConfinedError):
        if call == "quantize":
            native.quantize("/a.gguf", str(out), "q8_0", 1)
        if call == "compare":
            agreement.compare("/a.gguf", "", 1, 1, {}, [])
        tensors.compare("/a.gguf", "/merged", "q8_0")
    assert asked == [[out.parent] if call == "quantize" else []]


@pytest.mark.parametrize(("abi", "ok"), [(0, None), (2, None), (4, True), (7, True)])
def test_doctor_says_how_far_it_goes(monkeypatch, abi, ok):
    monkeypatch.setattr(confine, "landlock_abi", lambda: abi)
    found = doctor._confinement()
    assert found.ok is ok and bool(found.remedy) == (ok is None) and found.value


def test_this_kernel_is_asked():
    assert confine.landlock_abi() >= 0 and os.name == "posix"
