"""Signing a browser in to the admin listener: by the token, by a link that works once, and what its cookie may do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from proxy.admin import assets
from proxy.admin.auth import Gate
from proxy.admin.roles import FIRST, Role, Token
from proxy.admin.routes import ROUTES
from proxy.admin.server import build
from proxy.admin.sessions import MOST, SESSION_S, TICKET_S, Sessions
from proxy.watch.telemetry import Telemetry
from tests.edge.test_admin import CLIENT_KEY, TOKEN, FakeOperations, answer, path_of, refused

Browser = TestClient[web.Request, web.Application]
OWN = {"Sec-Fetch-Site": "same-origin"}


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def sessions(clock: Clock) -> Sessions:
    return Sessions(clock)


@pytest.fixture
def operations() -> FakeOperations:
    return FakeOperations()


@pytest.fixture
async def browser(operations: FakeOperations, sessions: Sessions) -> AsyncIterator[Browser]:
    """A client that keeps cookies, as a browser does."""
    server = TestServer(build(operations, Telemetry(), Gate(TOKEN, sessions=sessions)))
    async with TestClient(server, cookie_jar=aiohttp.CookieJar(unsafe=True)) as client:
        yield client


async def signed_in(browser: Browser) -> bool:
    return bool((await answer(await browser.get("/session")))["signed_in"])


async def test_the_token_opens_a_session_whose_cookie_no_script_and_no_other_site_gets(browser: Browser) -> None:
    assert not await signed_in(browser)
    response = await browser.post("/session", json={"token": TOKEN}, headers=OWN)
    assert response.status == 200
    cookie = response.headers["Set-Cookie"]
    assert cookie.startswith(f"ibid-session-{browser.port}=")  # of this port: browsers share cookies among ports
    for part in ("HttpOnly", "SameSite=Strict", f"Max-Age={SESSION_S}", "Path=/"):
        assert part in cookie
    assert TOKEN not in cookie + await response.text()
    assert await signed_in(browser)
    assert (await browser.get("/cache/stats")).status == 200


@pytest.mark.parametrize("body", [
    {"token": TOKEN[:-1] + "x"}, {"token": CLIENT_KEY}, {"ticket": "never-given"}, {"token": "\u00e9"},
], ids=str)  # fmt: skip
async def test_anything_else_opens_none(browser: Browser, body: dict[str, Any]) -> None:
    response = await browser.post("/session", json=body, headers=OWN)
    assert "Set-Cookie" not in response.headers
    error = await refused(response, 403)
    assert error["code"] == ("invalid_ticket" if "ticket" in body else "invalid_admin_token")
    assert not await signed_in(browser)


@pytest.mark.parametrize("body", [{}, {"token": TOKEN, "ticket": "both"}, {"token": 5}, {"password": TOKEN}], ids=str)
async def test_a_sign_in_names_one_secret(browser: Browser, body: dict[str, Any]) -> None:
    await refused(await browser.post("/session", json=body, headers=OWN), 400)


async def test_another_sites_page_cannot_sign_in_or_out(browser: Browser) -> None:
    for headers in ({"Sec-Fetch-Site": "same-site"}, {"Origin": "http://localhost:1"}):
        await refused(await browser.post("/session", json={"token": TOKEN}, headers=headers), 403)
        await refused(await browser.delete("/session", headers=headers), 403)


async def test_a_link_works_once_and_for_a_short_time(browser: Browser, sessions: Sessions, clock: Clock) -> None:
    ticket, late = sessions.ticket(), sessions.ticket()
    assert (await browser.post("/session", json={"ticket": ticket}, headers=OWN)).status == 200
    assert await signed_in(browser)
    await refused(await browser.post("/session", json={"ticket": ticket}, headers=OWN), 403)
    clock.now_s += TICKET_S
    await refused(await browser.post("/session", json={"ticket": late}, headers=OWN), 403)


async def test_a_session_ends_by_time_and_by_signing_out(browser: Browser, clock: Clock) -> None:
    await browser.post("/session", json={"token": TOKEN}, headers=OWN)
    clock.now_s += SESSION_S - 1
    assert await signed_in(browser)
    clock.now_s += 1
    assert not await signed_in(browser)
    await refused(await browser.get("/cache/stats"), 401)
    await browser.post("/session", json={"token": TOKEN}, headers=OWN)
    kept = {c.key: c.value for c in browser.session.cookie_jar}
    assert (await browser.delete("/session", headers=OWN)).status == 200
    assert not await signed_in(browser)
    await refused(await browser.get("/cache/stats", cookies=kept), 401)


async def test_a_change_by_cookie_must_say_that_our_page_sent_it(browser: Browser, operations: FakeOperations) -> None:
    await browser.post("/session", json={"token": TOKEN}, headers=OWN)
    changing = [route for route in ROUTES if route.method != "GET" and not route.is_open]
    assert changing
    for route in changing:
        for headers in ({}, {"Sec-Fetch-Site": "none"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "null"}):
            response = await browser.request(route.method, path_of(route), json={}, headers=headers)
            assert (await refused(response, 403))["code"] == "foreign_origin", route
    assert operations.asked == []
    own = {"Origin": f"http://127.0.0.1:{browser.port}"}
    for headers in (OWN, own):
        assert (await browser.post("/cache/reindex", json={}, headers=headers)).status == 200


async def test_a_cookie_does_not_help_a_wrong_token(browser: Browser) -> None:
    await browser.post("/session", json={"token": TOKEN}, headers=OWN)
    await refused(await browser.get("/cache/stats", headers={"Authorization": "Bearer wrong"}), 401)
    await refused(await browser.get("/cache/stats", headers={"Authorization": f"Bearer {CLIENT_KEY}"}), 403)


def test_the_oldest_session_gives_way_and_secrets_are_not_kept(sessions: Sessions) -> None:
    first, *others = [sessions.open(FIRST) for _ in range(MOST + 1)]
    assert sessions.owner(first) is None
    assert all(sessions.owner(secret) == FIRST for secret in others)
    assert others[0] not in repr(vars(sessions))


async def test_the_page_may_load_its_own_files_and_nothing_else(browser: Browser) -> None:
    page = await browser.get("/")
    policy = dict(part.split(" ", 1) for part in page.headers["Content-Security-Policy"].split("; "))
    assert policy == {
        "default-src": "'none'", "script-src": "'self'", "style-src": "'self'", "connect-src": "'self'",
        "img-src": "'self' data:", "frame-ancestors": "'none'", "base-uri": "'none'", "form-action": "'none'",
        "require-trusted-types-for": "'script'", "trusted-types": "'none'",
    }  # fmt: skip
    asked = Loaded()
    asked.feed(await page.text())
    assert asked.inline == []
    assert asked.addresses
    for address in asked.addresses:
        assert (await browser.get(address)).status == 200, address


class Loaded(HTMLParser):
    """What a page loads, and what it holds that a strict policy would block."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.inline += [name for name in given if name.startswith("on") or name == "style"]
        if tag == "style" or (tag == "script" and "src" not in given):
            self.inline.append(tag)
        for name in ("src", "href"):
            if (address := given.get(name)) and tag != "a":
                self.addresses.append(address)


async def test_every_file_is_served_under_its_name_and_type(browser: Browser) -> None:
    on_disk = {file.name for file in files("proxy.admin").joinpath("dashboard").iterdir()}
    assert on_disk == set(assets.served())
    for name in on_disk:
        response = await browser.get(f"/assets/{name}")
        assert response.status == 200
        assert response.content_type == assets.TYPES[name.rpartition(".")[2]]
    for name in ("auth.py", "none.js", "index.htm"):
        await refused(await browser.get(f"/assets/{name}"), 404)
    await refused(await browser.get("/assets/..%2fauth.py"), 400)


@pytest.mark.parametrize("name", sorted(name for name in assets.served() if name.endswith(".js")))
def test_no_script_makes_markup_or_asks_another_host(name: str) -> None:
    text = assets.served()[name].decode()
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "srcdoc"):
        assert way not in text
    for line in text.splitlines():
        assert "http://" not in line.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in line


async def test_a_session_may_what_its_token_may(operations: FakeOperations, sessions: Sessions) -> None:
    gate = Gate(TOKEN, sessions=sessions, others=(Token("anna", Role.AUDITOR, "a" * 40),))
    server = TestServer(build(operations, Telemetry(), gate))
    async with TestClient(server, cookie_jar=aiohttp.CookieJar(unsafe=True)) as browser:
        await answer(await browser.post("/session", json={"token": "a" * 40}, headers=OWN))
        assert (await answer(await browser.get("/session")))["role"] == "auditor"
        assert (await browser.get("/cache/entries")).status == 200
        flushed = await browser.post("/cache/flush", json={"confirm": "flush"}, headers=OWN)
        assert (await refused(flushed, 403))["code"] == "role_needed"
