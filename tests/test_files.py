"""Files that are whole or not there: replaced at once, kept when writing fails, on the disk where that is asked for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kto_core import files

ROOT = Path(files.__file__).resolve().parents[1]


def test_text_and_bytes_replace_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    path.with_name("a.json.part").write_text("of a killed writer, and longer")
    files.write_whole(path, "ä\n")
    assert path.read_bytes() == b"\xc3\xa4\n"
    files.write_whole(str(path), b"\x00")
    assert path.read_bytes() == b"\x00" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("sync", [False, True])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_beside(tmp_path, sync, monkeypatch):
    path = tmp_path / "a.json"
    files.write_whole(path, "old")
    with pytest.raises(ZeroDivisionError), files.beside(path, sync=sync) as part:
        part.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(UnicodeEncodeError):
        files.write_whole(path, "\ud800", sync=sync)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        files.write_whole(path, "new", sync=sync)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def synced(monkeypatch) -> list[str]:
    """What is put on the disk from now on, by name, and what is renamed, in order."""
    order, fsync, replace = [], os.fsync, os.replace

    def look(fd):
        order.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    def rename(old, new):
        order.append(f"-> {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", look)
    monkeypatch.setattr(os, "replace", rename)
    return order


def test_the_content_is_on_the_disk_before_its_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    order = synced(monkeypatch)
    files.write_whole(tmp_path / "a", "x", sync=True)
    assert order == ["a.part", "-> a", tmp_path.name]
    order.clear()
    files.write_whole(tmp_path / "a", "x")
    assert order == ["-> a"]


def test_a_sealed_folder_is_on_the_disk_before_its_manifest_and_the_manifest_before_its_name(tmp_path, monkeypatch):
    (work := tmp_path / "work" / "below").mkdir(parents=True)
    (work / "weights").write_bytes(b"1" * 1000)
    (work.parent / "config").write_text("{}")
    order = synced(monkeypatch)
    files.seal(work.parent, sync=True)
    files.move_into_place(work.parent, tmp_path / "final", sync=True)
    assert sorted(order[:3]) == ["below", "config", "weights"]
    assert order[3:] == ["manifest.json.part", "-> manifest.json", "work", "-> final", tmp_path.name]
    assert not files.problem(tmp_path / "final")
    order.clear()
    files.seal(tmp_path / "final")
    assert order == ["-> manifest.json"]


KILLED = """
import sys
from kto_core import files
print("begun", flush=True)
while True:
    for letter in "ab":
        files.write_whole(sys.argv[1], letter * 3_000_000)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "a"
    for _ in range(5):
        child = subprocess.Popen([sys.executable, "-c", KILLED, path], cwd=ROOT, stdout=subprocess.PIPE)
        child.stdout.readline()
        while not path.exists():
            pass
        child.kill()
        child.wait()
        child.stdout.close()
        text = path.read_text()
        assert text in ("a" * 3_000_000, "b" * 3_000_000)


def test_nobody_writes_beside_by_hand():
    """Only `files` knows how; a stop, which two may ask for at once, has a name of its own each time."""
    by_hand = re.compile(r"\+ ?[\"']\.part[\"']|\.part[\"']\)\s*\n.*(write_text|open)")
    sources = [*(ROOT / "kto_core").rglob("*.py"), *(ROOT / "kto_studio").rglob("*.py")]
    found = {p.name for p in sources if by_hand.search(p.read_text(encoding="utf-8"))}
    assert found == {"files.py"}
