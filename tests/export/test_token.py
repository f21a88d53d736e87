"""An access token, planted in the environment and in the page's box, is nowhere to be found afterwards."""

import os
import sys

import pytest

from kto_core.runs import folders
from tests.support import browser, fake_hub
from tests.support.train_page import DATA, begin, choose_data, in_state
from tests.support.training import make_data, tiny_cache

TYPED, IN_ENVIRONMENT = "hf_PLANTEDtyped1234567890", "hf_PLANTEDenv0987654321"


@pytest.mark.browser
def test_a_token_is_used_and_found_nowhere(tmp_path, demo_model, monkeypatch):
    """A run is trained and pushed twice from the page, once without success; then everything there is is searched:
    files of runs, data, caches and uploads, the terminal, the page, the browser's own files, and what was published."""
    home, profile = tmp_path / "home", tmp_path / "profile"
    (home / "data").mkdir(parents=True)
    make_data(home / "data" / DATA)
    monkeypatch.setenv("KTO_STUDIO_RUNS", str(home / "runs"))  # looks where the app looks
    monkeypatch.setitem(fake_hub.USERS, TYPED, "write")
    with fake_hub.running() as hub:
        env = {
            "KTO_STUDIO_RUNS": str(home / "runs"),
            "KTO_STUDIO_DATA": str(home / "data"),
            "KTO_STUDIO_CACHE": str(tiny_cache(home / "cache", demo_model)),
            "HF_HOME": str(home / "hf"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": IN_ENVIRONMENT,
        }
        command = [sys.executable, "app.py", "--port", str(browser.free_port())]
        with browser.started(command, home, env) as (url, said):
            shown = _use(url, profile, hub)
            terminal = said()
    assert hub.repos["jane/tuned"].files and any(token == TYPED for *_, token in hub.requests)
    published = b"".join([*hub.repos["jane/tuned"].files.values(), *hub.bodies]).decode(errors="replace")
    for secret in (TYPED, IN_ENVIRONMENT):
        assert secret not in terminal and secret not in shown and secret not in published
        files = [p for p in (*home.rglob("*"), *profile.rglob("*")) if p.is_file() and not p.is_symlink()]
        assert len(files) > 50
        assert not [
            p for p in files if secret.encode() in p.read_bytes() or secret.encode("utf-16-le") in p.read_bytes()
        ]
    assert os.environ.get("HF_TOKEN") != IN_ENVIRONMENT


def _use(url: str, profile, hub) -> str:
    """Train, push, fail to push; what the page and the browser's storage had at the end."""
    import shutil

    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        kept = play.chromium.launch_persistent_context(
            profile,
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox"],
            viewport={"width": 1280, "height": 1000},
        )
        kept.set_default_timeout(browser.PATIENCE)
        page = kept.pages[0]
        page.goto(url)
        choose_data(page)
        browser.tab(page, "Train")
        page.locator("#train-data").get_by_text("24 rows").wait_for()
        new = begin(page, steps=3)
        in_state(page, "finished")
        page.locator("#train-export").click()
        page.locator("#export-facts").get_by_text("finished").wait_for()
        page.locator("#export-repo input, #export-repo textarea").fill("jane/tuned")
        for fails, outcome in ((False, "done in"), (True, "failed")):
            if fails:
                hub.fail["/commit/"] = 400  # the server's message has the token in it
                (folders.find(new).adapter / "adapter_config.json").write_text('{"changed": 1}')
            page.locator("#export-token input").fill(TYPED)
            page.locator("#export-push").click()
            page.locator(".jobs .job").first.get_by_text(outcome).wait_for()
        storage = page.evaluate("JSON.stringify(localStorage) + JSON.stringify(sessionStorage)")
        shown = page.content() + storage + str(kept.storage_state(indexed_db=True))
        kept.close()
    return shown
