"""The app as a whole: flags, ports, who gets in, what starting costs, and what a call costs the browser."""

import re
import socket
import sys

import gradio as gr
import httpx
import pytest

from kto_studio import __main__ as app
from kto_studio import launch
from kto_studio.shared import context
from tests.support import browser, tabs
from tests.support.commands import processor_seconds


@pytest.fixture
def taken():
    """A port that somebody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        yield s.getsockname()[1]


# ---- ports and flags


def test_a_port_that_was_asked_for_is_taken_or_refused(taken):
    with pytest.raises(OSError, match="in use"):
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


def test_no_number_stops_the_calls_that_have_it_among_their_inputs(blocks):
    """Gradio refuses a call for a number out of bounds, whichever control made it; so numbers have none."""
    numbers = [b for b in blocks.blocks.values() if type(b) is gr.Number]
    assert len(numbers) > 15 and not [n.elem_id for n in numbers if (n.minimum, n.maximum) != (None, None)]


def test_no_value_of_a_control_stops_a_tick():
    """What Gradio would refuse of one control reaches its own tick, and the others go on."""
    seen = {}

    def build(ctx):
        number, choice = gr.Number(1, minimum=1, maximum=6, precision=0), gr.Dropdown(["a"], value="a")
        kept, text = gr.BrowserState("default"), gr.HTML("")
        odd, other = gr.HTML(""), gr.HTML("")

        def tick(*values):
            seen["values"] = values
            raise ValueError("a tick of ours that fails")

        ctx.on_tick(tick, [odd], [number, choice, kept])
        ctx.on_tick(lambda shown: "new", [other], [text])

    with tabs.served(only=build) as url:
        config = httpx.get(url + "config").json()
        (ask,) = (f for f in config["dependencies"] if f["targets"][0][1] == "tick")
        raw = [99, "gone", None, 0, "", 0]
        call = {"fn_index": ask["id"], "data": raw, "session_hash": "x"}
        answer = httpx.post(url + "gradio_api/run/predict", json=call)
        assert answer.status_code == 200, answer.text
        first, second = answer.json()["data"]
        assert first["__type__"] == "update" and second == 1, "only the bell of what is new rings"
        assert seen["values"] == (99, "gone", "default")
        call["data"] = [2.6, "a", "mine", 0, "", 0]
        httpx.post(url + "gradio_api/run/predict", json=call)
        assert seen["values"] == (3, "a", "mine"), "what Gradio would take comes as Gradio would pass it"


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
    """Until the page is built, little more time of a core than Gradio alone needs, and nothing heavy imported."""
    heavy = "torch", "transformers", "trl", "peft", "datasets", "bitsandbytes"
    ours = f"import sys; from kto_studio.launch import build; build(); print([m for m in {heavy} if m in sys.modules])"

    def seconds(code: str, says: str) -> float:
        done, took = processor_seconds(sys.executable, "-c", code)
        assert done.stdout.strip() == says
        return took

    assert seconds(ours, "[]") < 1.7 * seconds("import gradio", "")


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


def test_the_page_of_a_share_link_has_its_scripts_from_here(tmp_path, monkeypatch):
    """Gradio's own page for such links loads them from a server of its makers."""
    from gradio import networking

    built = []
    monkeypatch.setenv("KTO_STUDIO_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(networking, "setup_tunnel", lambda **_: "https://some.tunnel.example")
    monkeypatch.setattr(gr.Blocks, "block_thread", lambda self: built.append(self))
    launch.launch(port=browser.free_port(), share=True)
    try:
        assert built[0].share_url == "https://some.tunnel.example"
        page = httpx.get(built[0].local_url).text
        sources = re.findall(r"<script[^>]* src=\"([^\"]*)", page)
        assert sources and all(source.startswith("./assets/") for source in sources)
        assert httpx.get(built[0].local_url + "config").status_code == 401
    finally:
        built[0].close()
