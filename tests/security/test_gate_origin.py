"""Whose page asks: only our own, and a link to the page from anywhere."""

import httpx
import pytest

from tests.support.gated import PREDICT


@pytest.mark.parametrize("mode", ["public", "local"])
def test_another_page_is_refused(mode, site, local_site, owner):
    place, client = (site, owner) if mode == "public" else (local_site, httpx.Client(base_url=local_site.url))
    own = f"http://127.0.0.1:{place.port}"
    call = {"fn_index": 0, "data": ["a", 1], "session_hash": "s"}
    foreign = [
        {"Origin": f"http://127.0.0.1:{place.port + 1}"},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "https://evil.example"},
        {"Origin": f"http://127.0.0.1.evil.example:{place.port}"},
        {"Origin": f"moz-extension://127.0.0.1:{place.port}"},
        {"Origin": "null"},
        {"Origin": f"{own}/"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "cross-site", "Origin": own},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
    ]
    for headers in foreign:
        for method, path in (
            ("GET", "/config"),
            ("GET", f"/gradio_api/file={place.folder}/page.html"),
            ("GET", "/theme.css"),
        ):
            answer = client.request(method, path, headers=headers)
            assert answer.status_code == 403, (headers, path)
            assert not [h for h in answer.headers if h.startswith("access-control")]
        assert client.post(PREDICT, json=call, headers=headers).status_code == 403, headers
        assert client.post("/gradio_api/upload", files={"files": b"x"}, headers=headers).status_code == 403
    for headers in ({}, {"Origin": own}, {"Sec-Fetch-Site": "same-origin", "Origin": own}, {"Sec-Fetch-Site": "none"}):
        answer = client.post(PREDICT, json=call, headers=headers)
        assert answer.status_code == 200 and not [h for h in answer.headers if h.startswith("access-control")]


@pytest.mark.parametrize("mode", ["public", "local"])
def test_a_preflight_is_refused(mode, site, local_site):
    place = site if mode == "public" else local_site
    for origin in ("http://127.0.0.1:9999", "https://evil.example", place.url):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x"}
        for path in ("/", "/config", PREDICT, "/gradio_api/upload", "/nothing"):
            answer = httpx.options(place.url + path, headers=headers)
            assert answer.status_code == 404 and not [h for h in answer.headers if h.startswith("access-control")]


def test_a_link_from_elsewhere_opens_the_page(site, local_site, owner):
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert "gradio_config" in httpx.get(local_site.url, headers=link).text
    again = owner.get("/", headers=link)  # a browser does not send our cookie along: the page asks once more
    assert again.status_code == 200 and 'http-equiv="refresh"' in again.text
    assert httpx.get(site.url + "/guest", headers=link).headers["location"] == "/guest/"
    for frame in ({**link, "Sec-Fetch-Dest": "iframe"}, {**link, "Sec-Fetch-Mode": "no-cors"}):
        assert httpx.get(local_site.url, headers=frame).status_code == 403
    assert httpx.post(local_site.url, headers=link).status_code == 404


def test_another_page_neither_logs_in_nor_out(site, owner):
    right = {"username": "kto", "password": site.accounts.owner}
    assert httpx.post(site.url + "/login", data=right, headers={"Origin": "https://evil.example"}).status_code == 403
    for headers in ({"Sec-Fetch-Site": "same-site"}, {"Origin": f"http://127.0.0.1:{site.port + 1}"}):
        assert owner.post("/logout", headers=headers).status_code == 403
        assert owner.get("/logout", headers=headers).status_code == 403
    assert owner.get("/config").status_code == 200
