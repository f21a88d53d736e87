"""The app as a whole: flags, ports, who gets in, what starting costs, and what a call costs the browser."""

import re
import resource
import socket
import subprocess
import sys

import browser
import gradio as gr
import httpx
import pytest

import app
from kto_core import paths
from ui import context, launch


@pytest.fixture
def taken():
    """A port that somebody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        yield s.getsockname()[1]


# ---- ports and flags


def test_a_port_that_was_asked_for_is_taken_or_refused(taken):
    with pytest.raises(OSError, match="taken"):
        launch.free_port("127.0.0.1", taken)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        free = s.getsockname()[1]
    assert launch.free_port("127.0.0.1", free) == free


def test_without_a_port_the_next_free_one_is_taken(taken, monkeypatch):
    monkeypatch.setattr(launch, "FIRST_PORT", taken)
    assert taken < launch.free_port("127.0.0.1", None) < taken + 100


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_a_host_that_is_not_ours_is_one_sentence(host, capsys):
    assert app.main(["--host", host]) == 1
    said = capsys.readouterr().err
    assert host in said and "--host" in said and "Traceback" not in said


def test_a_taken_port_is_one_sentence_and_an_exit_code(taken, capsys):
    assert app.main(["--port", str(taken)]) == 1
    said = capsys.readouterr().err
    assert str(taken) in said and "--port" in said


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_a_port_that_is_none_is_wrong_usage(port):
    with pytest.raises(SystemExit) as e:
        app.parse(["--port", port])
    assert e.value.code == 2


# ---- the page


@pytest.fixture(scope="module")
def blocks():
    return launch.build(demo=True)


def test_no_call_is_an_api_and_none_shows_progress_on_what_it_fills(blocks):
    for fn in blocks.fns.values():
        assert fn.api_visibility == "private"
        if fn.show_progress == "hidden":
            assert [type(c) for c in fn.show_progress_on] == [gr.State]


def test_one_timer_asks_for_everything(blocks):
    timers = [b for b in blocks.blocks.values() if isinstance(b, gr.Timer)]
    ticking = [f for f in blocks.fns.values() if any(event == "tick" for _, event in f.targets)]
    assert len(timers) == 1 and len(ticking) == 1
    bells = ticking[0].outputs
    assert len(bells) > 5 and all(isinstance(b, gr.Number) and b.visible is False for b in bells)


def test_every_control_has_a_label_and_help(blocks):
    """Boxes, lists, sliders and the like; what has no room for help (search, page number, message) has a label."""
    kinds = (gr.Textbox, gr.Number, gr.Dropdown, gr.Radio, gr.Slider, gr.CheckboxGroup)
    controls = [b for b in blocks.blocks.values() if isinstance(b, kinds)]
    controls = [c for c in controls if c.visible is not False or c.label]
    without = [c.elem_id or c.label for c in controls if not c.label]
    assert len(controls) > 40 and not without


def test_only_a_tick_with_something_new_rings():
    skip = gr.skip()
    assert context._nothing(skip) and context._nothing((skip, skip)) and context._nothing({"a": skip})
    assert not context._nothing(("", skip)) and not context._nothing({"a": 1}) and not context._nothing(None)
    assert not context._nothing([gr.update(visible=True)])


def test_starting_is_cheap():
    """Less than six seconds of one core until the page is built, and nothing heavy imported."""
    heavy = "torch", "transformers", "trl", "peft", "datasets", "bitsandbytes"
    code = f"import sys; from ui.launch import build; build(); print([m for m in {heavy} if m in sys.modules])"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.strip() == "[]"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 6


# ---- who gets in


def test_reachable_from_other_machines_only_behind_a_password(tmp_path, capfd):
    """127.0.0.2 is not the address of this machine only, as far as the app knows."""
    command = [sys.executable, "app.py", "--host", "127.0.0.2", "--port", str(browser.free_port())]
    env = {"KTO_STUDIO_RUNS": str(tmp_path / "runs"), "KTO_STUDIO_DATA": str(tmp_path / "data")}
    with browser.started(command, tmp_path, env) as (url, said):
        password = re.search(r"Password: (\S+)", said())[1]
        with httpx.Client(base_url=url.rstrip("/"), timeout=30) as client:
            assert client.get("/config").status_code == 401
            assert client.get("/gradio_api/info").status_code in (401, 404)
            wrong = client.post("/login", data={"username": "kto", "password": password + "x"})
            assert wrong.status_code == 400
            assert client.post("/login", data={"username": "kto", "password": password}).status_code == 200
            assert client.get("/config").status_code == 200
        with httpx.Client(base_url=url.rstrip("/"), timeout=30) as guest:
            assert guest.get("/config").status_code == 401
            assert guest.get("/guest/config").status_code == 401 and guest.get("/guest/").status_code == 200
