"""What Gradio keeps of uploads: one copy of a data set, nothing of an aborted upload or of an app that is gone."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from kto_core import paths
from kto_studio import __main__ as app
from kto_studio.shared import temporary
from tests.support import browser

ROW = '{"prompt": "Question %d?", "completion": "Yes.", "label": %s}\n'
ROWS = "".join(ROW % (i, "true" if i % 2 else "false") for i in range(40)).encode()
BIG = ROWS * 100  # more than a file's buffer


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    return tmp_path / "gradio"


def folders(base: Path) -> list[Path]:
    return sorted(base.glob(f"{temporary.PREFIX}*"))


def copies(folder: Path, content: bytes) -> list[Path]:
    """Files below ``folder`` that hold these bytes, or begin with some of them."""
    found = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size]
    return [p for p in found if content.startswith(p.read_bytes()[: len(content)])]


def test_an_app_has_a_folder_of_its_own_and_it_goes_with_the_app(base):
    from gradio.utils import get_upload_folder

    with temporary.folder() as own:
        assert own.parent == base and get_upload_folder() == str(own)
        (own / "tmpabc").write_bytes(b"x")
    assert not folders(base) and os.environ["GRADIO_TEMP_DIR"] == str(base)


def test_by_default_it_lies_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    monkeypatch.setenv("KTO_STUDIO_CACHE", str(tmp_path))
    with temporary.folder() as own:
        assert own.parent == paths.cache_dir() / "gradio"
    assert "GRADIO_TEMP_DIR" not in os.environ


def test_a_start_removes_what_dead_apps_left_and_nothing_else(base):
    hold = "from kto_studio.shared import temporary\nwith temporary.folder() as f:\n    (f / 'tmp1').write_text('x'); print(f, flush=True); input()"  # noqa: E501
    kill = "import os\nfrom kto_studio.shared import temporary\nwith temporary.folder() as f:\n    (f / 'tmp1').write_text('x'); os._exit(9)"  # noqa: E501
    living = subprocess.Popen([sys.executable, "-c", hold], cwd=paths.ROOT, stdin=-1, stdout=-1, text=True)
    theirs = Path(living.stdout.readline().strip())
    assert subprocess.run([sys.executable, "-c", kill], cwd=paths.ROOT, check=False).returncode == 9
    (dead,) = (f for f in folders(base) if f != theirs)
    strange = base / f"{temporary.PREFIX}notes"  # has our name, not our lock
    strange.mkdir()
    (strange / "mine.txt").write_text("x")
    (base / f"{temporary.PREFIX}link").symlink_to(strange)
    (base / "0123abcd").mkdir()  # of another Gradio app
    with temporary.folder() as own:
        assert not dead.exists() and (theirs / "tmp1").exists() and own.exists()
        assert (strange / "mine.txt").exists() and (base / "0123abcd").exists()
    living.communicate("\n", timeout=60)
    assert not theirs.exists()


def test_only_what_lies_in_the_folder_is_dropped(base, tmp_path):
    other = tmp_path / "mine.jsonl"
    other.write_text("x")
    temporary.drop(other)  # no folder yet
    with temporary.folder() as own:
        inside = own / "hash" / "a.jsonl"
        inside.parent.mkdir()
        inside.write_text("x")
        (own / "hash" / "link").symlink_to(other)
        for path in (other, own / "hash" / "link", own / "hash" / ".." / ".." / ".." / "mine.jsonl", own, "", "gone"):
            temporary.drop(path)
        assert other.exists() and inside.exists()
        temporary.drop(inside)
        assert not inside.exists() and own.exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "file" / "gradio"))
    assert app.main(["--port", str(browser.free_port())]) == 1
    said = capsys.readouterr().err
    assert "GRADIO_TEMP_DIR" in said and "listen" not in said and said.count("\n") == 1


def abort(url: str) -> None:
    """Send half an upload, then hang up."""
    place = urlsplit(url)
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="half.jsonl"\r\n\r\n'
    with socket.create_connection((place.hostname, place.port)) as line:
        said = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: 9000000\r\n"
        line.sendall(f"{said}Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode() + head + BIG)


@contextlib.contextmanager
def served(folder: Path):
    """The app without a browser; Gradio prints a trace when an upload is aborted."""
    env = {"KTO_STUDIO_RUNS": str(folder / "runs"), "KTO_STUDIO_DATA": str(folder / "data")}
    with browser.started([sys.executable, "app.py", "--port", str(browser.free_port())], folder, env) as (url, _):
        yield url


def test_nothing_of_an_aborted_upload_or_a_killed_app_survives_the_next_start(tmp_path):
    with served(tmp_path) as url:
        abort(url)
        browser.until(lambda: copies(tmp_path / "gradio", BIG))
    assert copies(tmp_path / "gradio", BIG), "the app was killed: it could not tidy up"
    with served(tmp_path) as url:
        assert not copies(tmp_path / "gradio", BIG)
        (first,) = folders(tmp_path / "gradio")
        abort(url)
        browser.until(lambda: copies(first, BIG))
        with served(tmp_path):
            assert copies(first, BIG) and len(folders(tmp_path / "gradio")) == 2, "the first app still runs"


@pytest.mark.browser
def test_one_copy_of_an_upload(tmp_path, demo_model):
    folder = tmp_path / "app"
    file = tmp_path / "own.jsonl"
    file.write_bytes(ROWS)
    with browser.app(folder) as url, browser.chromium() as b, browser.page_of(b, url) as page:
        upload, place = page.locator("#data-upload input[type=file]"), page.locator("#data-range")
        for _ in range(2):
            upload.set_input_files(str(file))
            place.get_by_text("1–40 of 40 rows").wait_for()
            browser.until(lambda: copies(folder, ROWS) == [folder / "data" / "own.jsonl"])

        # what is made here is downloaded from where it lies
        page.locator("button#data-convert").click()
        with page.expect_download() as got:
            page.locator("#data-converted").get_by_text("own-trl.jsonl").click()
        made = Path(got.value.path()).read_bytes()
        assert [p.parent.name for p in folder.rglob("*") if p.is_file() and p.read_bytes() == made] == ["file"]
