"""Logins: the right password always passes, wrong ones are slowed, and a session is one browser's."""

import asyncio
import concurrent.futures
import time

import httpx
import pytest

from kto_studio.security import logins
from tests.support import gated
from tests.support.gated import PREDICT, login, said


def test_the_right_password_passes_whatever_happened_before(site, anonymous):
    """Also in the middle of many wrong ones, which are slowed and never hold the server."""
    wrong, right = {"username": "kto", "password": "x"}, {"username": "kto", "password": site.accounts.owner}

    def guess(_):
        return httpx.post(site.url + "/login", data=wrong, timeout=60).status_code

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        guesses = [pool.submit(guess, i) for i in range(60)]
        time.sleep(0.5)
        began = time.monotonic()
        assert anonymous.post("/login", data=right).status_code == 200
        assert anonymous.get("/").status_code == 200
        assert time.monotonic() - began < 5
        codes = [g.result() for g in guesses]
    gated.calm(site)
    assert set(codes) == {400, 429} and codes.count(400) >= logins.MAX_WAITING


def test_wrong_passwords_are_slowed_more_and_more():
    brake = logins.Brake()
    delays = []
    for i in range(10):
        delays.append(brake.delay(100.0))
        brake._wrong.append(100.0 + i)
    assert delays[:4] == [0.25, 0.5, 1.0, 2.0] and delays[-1] == logins.MAX_DELAY
    assert brake.delay(100.0 + logins.WINDOW + 20) == logins.FIRST_DELAY


def test_wrong_passwords_that_come_together_wait_in_a_bounded_room():
    async def many():
        brake = logins.Brake()
        waits = [asyncio.create_task(brake.wrong()) for _ in range(logins.MAX_WAITING + 5)]
        done, pending = await asyncio.wait(waits, timeout=0.05)
        for task in pending:
            task.cancel()
        return len(pending), [t.result() for t in done]

    waiting, refused = asyncio.run(many())
    assert waiting == logins.MAX_WAITING and len(refused) == 5 and all(wait > 0 for wait in refused)


@pytest.mark.parametrize(
    "body, kind",
    [
        (b"", ""),
        (b"username=kto", "application/x-www-form-urlencoded"),
        (b"{}", "application/json"),
        (b"\xff\xfe" * 100, "application/x-www-form-urlencoded"),
        (b"x", "multipart/form-data"),
        (b"x", "multipart/form-data; boundary=y"),
        (b"username=kto&password=" + b"x" * 10**5, "application/x-www-form-urlencoded"),
        (b"username=kto&password=%ed%b0%80", "application/x-www-form-urlencoded"),
    ],
)
def test_what_is_no_login_form_is_refused(body, kind, site, anonymous, capfd):
    gated.calm(site)
    assert anonymous.post("/login", content=body, headers={"content-type": kind}).status_code == 400
    assert not said(capfd)


@pytest.mark.parametrize("other", ['prefs={"theme":"dark"}', "a b=c", "=", ";;", 'x="', "\xe9=\xff", "a,b", "n=v;n"])
def test_cookies_of_other_programs_keep_nobody_out(other, owner, site):
    ours = "; ".join(f"{c.name}={c.value}" for c in owner.cookies.jar)
    for cookie in (f"{other}; {ours}", f"{ours}; {other}", f"{ours.partition('=')[0]}=wrong; {ours}"):
        assert httpx.get(site.url + "/config", headers={"cookie": cookie.encode("latin-1")}).status_code == 200, cookie


def test_the_cookie_is_strict_and_no_other_is_accepted(site):
    answer = httpx.post(site.url + "/login", data={"username": "kto", "password": site.accounts.owner})
    (cookie,) = answer.headers.get_list("set-cookie")
    assert cookie.startswith(f"kto-studio-{site.port}-kto=") and "HttpOnly" in cookie and "SameSite=Strict" in cookie
    assert "Secure" not in cookie
    secret = cookie.partition("=")[2].partition(";")[0]
    inner = site.app.cookie_id
    for name in (f"access-token-{inner}", f"access-token-unsecure-{inner}", f"kto-studio-{site.port + 1}-kto"):
        for value in (secret, *site.app.tokens):
            assert httpx.get(site.url + "/config", headers={"cookie": f"{name}={value}"}).status_code == 401
    assert (
        httpx.get(site.url + "/guest/config", headers={"cookie": f"kto-studio-{site.port}-guest={secret}"}).status_code
        == 401
    )
    assert (
        httpx.get(site.url + "/config", headers={"cookie": f"kto-studio-{site.port}-kto={secret}"}).status_code == 200
    )


def test_the_cookie_is_secure_where_the_browser_says_https(site):
    data = {"username": "kto", "password": site.accounts.owner}
    headers = {"Host": "app.example", "Origin": "https://app.example"}
    answer = httpx.post(site.url + "/login", data=data, headers=headers)
    assert answer.status_code == 200 and "Secure" in answer.headers["set-cookie"]
    cookie = answer.headers["set-cookie"].partition(";")[0]
    call = {"fn_index": 0, "data": ["a", 1], "session_hash": "s"}
    for origin, status in (("https://app.example", 200), ("http://app.example", 403), ("https://app.example:444", 403)):
        headers = {"Host": "app.example", "Origin": origin, "Cookie": cookie}
        assert httpx.post(site.url + PREDICT, json=call, headers=headers).status_code == status, origin


@pytest.mark.parametrize("role", ["kto", "guest"])
def test_a_logout_ends_one_session_only(role, site):
    base = "" if role == "kto" else "/guest"
    with login(site, role) as one, login(site, role) as other:
        page = one.get(base + "/logout")
        assert page.status_code == 200 and 'method="post"' in page.text
        assert one.get(base + "/config").status_code == 200, "a link ends no session"
        former = "; ".join(f"{c.name}={c.value}" for c in one.cookies.jar)
        assert one.post(base + "/logout").headers["location"] == base + "/"
        assert httpx.get(site.url + base + "/config", headers={"cookie": former}).status_code == 401
        assert other.get(base + "/config").status_code == 200


def test_sessions_end_and_are_bounded():
    sessions = logins.Sessions()
    secret = sessions.begin(now=0.0)
    assert sessions.find([secret], now=logins.IDLE - 1)
    assert sessions.find(["wrong", secret], now=2 * logins.IDLE - 2), "it was used in between"
    assert not sessions.find([secret], now=4 * logins.IDLE)
    secret, now = sessions.begin(now=0.0), 0.0
    while sessions.find([secret], now=now):
        now += logins.IDLE / 2
    assert logins.LONGEST < now <= logins.LONGEST + logins.IDLE
    kept, idle = sessions.begin(now=now), sessions.begin(now=now)
    for i in range(2 * logins.MAX_SESSIONS):
        sessions.begin(now=now + i)
        assert sessions.find([kept], now=now + i)
    assert len(sessions) == logins.MAX_SESSIONS and not sessions.find([idle], now=now)


def test_what_a_proxy_says_is_not_believed(owner, site):
    forged = {
        "X-Forwarded-For": "9.9.9.9",
        "X-Forwarded-Host": "evil.example",
        "X-Forwarded-Proto": "https",
        "X-Gradio-Server": "https://evil.example",
        "Forwarded": "host=evil.example",
    }
    assert "evil" not in owner.get("/config", headers=forged).text
    assert "evil" not in httpx.get(site.url + "/", headers=forged).text


def test_uvicorn_is_told_to_believe_no_proxy():
    """Behind a tunnel every request comes from 127.0.0.1, whose word uvicorn takes otherwise."""
    from uvicorn.config import Config

    from kto_studio import launch

    assert launch.os.environ["FORWARDED_ALLOW_IPS"] == "" and Config("app").forwarded_allow_ips == ""
