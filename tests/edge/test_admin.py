"""The admin listener over real sockets: who gets in, what a parameter may be, what each route asks of the program."""

from __future__ import annotations

import asyncio
import io
import json
import os
import stat
from collections.abc import AsyncIterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.admin.auth import GATE, LOOPBACK_NAMES, Gate, find_token, guarded, load_token, read_token, refuse_unguarded
from proxy.admin.roles import Who
from proxy.admin.routes import ROUTES, WITH_BODY, Route
from proxy.admin.schema import LAST_MS, MAX_LIMIT, Param, read_time, read_values
from proxy.admin.server import EntryFilter, Selector, Table, build
from proxy.admin.sessions import Sessions
from proxy.core.errors import BadRequest, CacheFault, ConfigError
from proxy.watch.logs import set_up, tear_down
from proxy.watch.telemetry import Telemetry
from tests.flows.running import TOKEN as FLOW_TOKEN
from tests.flows.running import running
from tests.waiting import PATIENCE_S

TOKEN = "correct-horse-battery-staple-0123456789"
CANARY = "canary-prompt-text"
CLIENT_KEY = "sk-proj-canaryclient0123456789"
AUTH = {"Authorization": f"Bearer {TOKEN}"}
VERBS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
NOW_MS = 1_790_000_000_000


class FakeOperations:
    """Records what it was asked and answers with a canary that no refused request may see."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.ready = True
        self.fault: BaseException | None = None

    def _note(self, *what: Any) -> None:
        if self.fault is not None:
            raise self.fault
        self.asked.append(what)

    def readiness(self) -> Mapping[str, Any]:
        return {"ready": self.ready, "degraded": {"index": "index_rebuilding"}}

    async def ping(self) -> Mapping[str, Any]:
        self._note("ping")
        return {"status": "healthy", "note": CANARY}

    async def stats(self) -> Mapping[str, Any]:
        self._note("stats")
        return {"entries": 3, "note": CANARY}

    async def entries(self, wanted: EntryFilter) -> Sequence[Mapping[str, Any]]:
        self._note("entries", wanted)
        return [{"id": 9, "prompt": CANARY}, {"id": 8, "prompt": CANARY}]

    async def entry(self, entry_id: int) -> Mapping[str, Any] | None:
        self._note("entry", entry_id)
        return {"id": 9, "prompt": CANARY} if entry_id == 9 else None

    async def amend(self, entry_id: int, ttl_s: int | None, tags: Sequence[str] | None) -> Mapping[str, Any] | None:
        self._note("amend", entry_id, ttl_s, tags)
        return {"id": 9, "prompt": CANARY} if entry_id == 9 else None

    async def batches(self, limit: int, cursor: str | None) -> Sequence[Mapping[str, Any]]:
        self._note("batches", limit, cursor)
        return [{"id": "batch_1", "created_ms": 5, "note": CANARY}]

    async def purge(self, selector: Selector, *, dry_run: bool) -> Sequence[int]:
        self._note("purge", selector, dry_run)
        return [i for i in selector.ids if i == 9] if selector.ids else list(range(1, 1503))

    async def explain(
        self, path: str, body: bytes, headers: Mapping[str, str], tenant: str | None
    ) -> Mapping[str, Any]:
        self._note("explain", path, body, dict(headers), tenant)
        return {"verdict": "miss", "note": CANARY}

    async def feedback(self, request_id: str | None, entry_id: int | None, verdict: str) -> Mapping[str, Any] | None:
        self._note("feedback", request_id, entry_id, verdict)
        return {"entry_id": 9, "quarantined": verdict == "wrong"} if entry_id == 9 or request_id else None

    async def compare(self, comparison_id: int, verdict: str) -> Mapping[str, Any] | None:
        self._note("compare", comparison_id, verdict)
        return {"comparison_id": 5, "verdict": verdict, "note": CANARY} if comparison_id == 5 else None

    async def comparisons(self, limit: int, cursor: int | None, *, near_misses: bool) -> Sequence[Mapping[str, Any]]:
        self._note("comparisons", limit, cursor, near_misses)
        return [{"id": 5, "prompt": CANARY}]

    def policy(self) -> Mapping[str, Any]:
        self._note("policy")
        return {"rules": {}, "note": CANARY}

    def reindex(self) -> Mapping[str, Any]:
        self._note("reindex")
        return {"running": True, "done": 0, "total": 3, "note": CANARY}

    async def simulate(self, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        self._note("simulate", dict(wanted))
        return {"budgets": [], "note": CANARY}

    def keys(self) -> Sequence[Mapping[str, Any]]:
        self._note("keys")
        return [{"id": "key_9", "name": CANARY}]

    def key(self, key_id: str) -> Mapping[str, Any] | None:
        self._note("key", key_id)
        return {"id": "key_9", "name": CANARY} if key_id in ("key_9", "r-1") else None

    async def create_key(self, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        self._note("create_key", dict(wanted))
        return {"id": "key_9", "project": wanted["project"], "secret": CANARY}

    async def revoke_key(self, key_id: str) -> Mapping[str, Any] | None:
        self._note("revoke_key", key_id)
        return {"id": "key_9", "name": CANARY} if key_id in ("key_9", "r-1") else None

    async def rotate_key(self, key_id: str) -> Mapping[str, Any] | None:
        self._note("rotate_key", key_id)
        return {"id": "key_9", "secret": CANARY} if key_id in ("key_9", "r-1") else None

    async def savings(self, group_by: Sequence[str], since_ms: int | None, until_ms: int | None) -> Table:
        self._note("savings", group_by, since_ms, until_ms)
        return Table(("day", "saved_nusd", "note"), [("2026-11-22", Decimal(1500), CANARY)])

    def queries(self) -> Sequence[Mapping[str, Any]]:
        self._note("queries")
        return [{"name": "total", "about": CANARY, "columns": {"requests": "count"}}]

    def views(self) -> Sequence[Mapping[str, Any]]:
        self._note("views")
        return [{"name": "savings_daily", "about": "What was saved?", "columns": {"day": "UTC"}}]

    async def named(self, name: str, limit: int, since_ms: int | None, until_ms: int | None) -> Table:
        self._note("named", name, limit, since_ms, until_ms)
        return Table(("a", "b"), [(b"\x01", Decimal("1.5")), (CANARY, None)], truncated=True)

    async def query(self, sql: str, limit: int) -> Table:
        self._note("query", sql, limit)
        return Table(("a", "b"), [(b"\x01", Decimal("1.5")), (CANARY, None)], truncated=True)

    async def export(self, after_id: int, namespace: str | None) -> AsyncIterator[tuple[str, bytes]]:
        self._note("export", after_id, namespace)
        yield "entry", b'{"note":"canary"}\n'

    async def take_in(self, pieces: AsyncIterator[bytes], *, dry_run: bool, with_purged: bool) -> Mapping[str, Any]:
        self._note("take_in", b"".join([piece async for piece in pieces]), dry_run, with_purged)
        return {"stored": 0, "note": CANARY}

    async def begin_act(self, who: Who, route: str, parameters: Mapping[str, Any]) -> int:
        return 1

    async def end_act(self, act_id: int, outcome: str, touched: int | None) -> None:
        return None

    async def acts(self, wanted: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        self._note("acts", dict(wanted))
        return [{"id": 5, "who": CANARY}]

    async def requests(self, wanted: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        self._note("requests", dict(wanted))
        return [{"id": "r-1", "ts": 7, "note": CANARY}]

    async def request(self, request_id: str) -> Mapping[str, Any] | None:
        self._note("request", request_id)
        return {"id": "r-1", "note": CANARY} if request_id == "r-1" else None


@pytest.fixture
def operations() -> FakeOperations:
    return FakeOperations()


@pytest.fixture
async def client(operations: FakeOperations) -> AsyncIterator[TestClient[web.Request, web.Application]]:
    gate = Gate(
        TOKEN, LOOPBACK_NAMES | {"ibid.internal"}, is_client_key=lambda key: key == "known-client", sessions=Sessions()
    )
    telemetry = Telemetry()
    async with TestClient(
        TestServer(build(operations, telemetry, gate)), cookie_jar=aiohttp.DummyCookieJar()
    ) as client:
        yield client


def path_of(route: Route) -> str:
    return route.path.replace("{id}", "9" if "entries" in route.path else "r-1").replace(
        "{name}", "index" if "docs" in route.path else "style.css"
    )


async def refused(response: aiohttp.ClientResponse, status: int, method: str = "GET") -> dict[str, Any]:
    """The envelope of a refusal, checked to show no data."""
    body = await response.read()
    assert response.status == status, body
    assert b"canary" not in body
    assert response.headers["Cache-Control"] == "no-store"
    if method == "HEAD":
        return {}
    error = orjson.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


WRONG: dict[str, tuple[dict[str, str], int]] = {
    "nothing": ({}, 401),
    "wrong token": ({"Authorization": f"Bearer {TOKEN[:-1]}X"}, 401),
    "token in upper case": ({"Authorization": f"Bearer {TOKEN.upper()}"}, 401),
    "half the token": ({"Authorization": f"Bearer {TOKEN[:20]}"}, 401),
    "token and more": ({"Authorization": f"Bearer {TOKEN}x"}, 401),
    "other scheme": ({"Authorization": f"Basic {TOKEN}"}, 401),
    "no scheme": ({"Authorization": TOKEN}, 401),
    "empty": ({"Authorization": "Bearer "}, 401),
    "cookie": ({"Cookie": f"token={TOKEN}; Authorization=Bearer {TOKEN}"}, 401),
    "other header": ({"X-Admin-Token": TOKEN, "X-Original-URL": "/healthz", "X-Rewrite-URL": "/healthz"}, 401),
    "override": ({"X-HTTP-Method-Override": "GET"}, 401),
    "not ascii": ({"Authorization": "Bearer \u00e9\u2028"}, 401),
    "client key": ({"Authorization": f"Bearer {CLIENT_KEY}"}, 403),
    "known client key": ({"Authorization": "Bearer known-client"}, 403),
    "client key header": ({"x-api-key": CLIENT_KEY}, 403),
    "google key header": ({"x-goog-api-key": TOKEN}, 403),
}


@pytest.mark.parametrize("name", WRONG)
async def test_no_route_by_any_verb_answers_without_the_token(
    client: TestClient[web.Request, web.Application], operations: FakeOperations, name: str
) -> None:
    headers, status = WRONG[name]
    paths = {path_of(r) for r in ROUTES if not r.is_open} | {"/nowhere", "/cache", "/cache/entries/9/x", "/metrics/"}
    for path in sorted(paths):
        for verb in VERBS:
            response = await client.request(verb, path, headers=headers, params={"token": TOKEN, "access_token": TOKEN})
            error = await refused(response, status, verb)
            assert verb == "HEAD" or error["code"] == ("client_key" if status == 403 else "invalid_admin_token")
            assert status == 403 or response.headers["WWW-Authenticate"].startswith("Bearer")
    assert operations.asked == []


async def test_two_authorization_headers_are_none(client: TestClient[web.Request, web.Application]) -> None:
    headers = [("Authorization", f"Bearer {TOKEN}"), ("Authorization", f"Bearer {TOKEN}")]
    await refused(await client.get("/cache/stats", headers=headers), 401)


async def test_paths_spelled_otherwise_do_not_get_around_the_token(
    client: TestClient[web.Request, web.Application], operations: FakeOperations
) -> None:
    for target in (
        "//cache/stats", "/healthz/../cache/stats", "/cache/./stats", "/cache/stats/", "/CACHE/stats",
        "/cache%2fstats", "/%63ache/stats", "/cache/stats;x=/healthz", "/cache/stats?/healthz",
        "/healthz%2f..%2fcache/stats", "http://evil/cache/stats", "http://127.0.0.1/cache/stats",
    ):  # fmt: skip
        status, _ = await raw(client, f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert status in (401, 403), target
    assert operations.asked == []


async def raw(client: TestClient[web.Request, web.Application], request: bytes) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
    writer.write(request)
    answer = await asyncio.wait_for(reader.read(), PATIENCE_S)
    writer.close()
    await writer.wait_closed()
    return int(answer.split(b" ", 2)[1]), answer


@pytest.mark.parametrize("route", ROUTES, ids=lambda r: f"{r.method} {r.path}")
async def test_every_route_answers_its_own_verb_with_the_token_and_405_to_others(
    client: TestClient[web.Request, web.Application], route: Route
) -> None:
    bodies: dict[str, Any] = {
        "invalidate": {"ids": [9]}, "flush": {"confirm": "flush"}, "delete": {"keys": ["9"]}, "flushall": {},
        "explain": {"messages": []}, "feedback": {"entry_id": 9, "verdict": "wrong"}, "run_query": {"name": "total"},
        "reindex": {}, "simulate": {"max_error": 0.02}, "create_key": {"project": "red"}, "revoke_key": {},
        "rotate_key": {}, "sign_in": {"token": TOKEN}, "amend_entry": {"ttl_s": 60}, "take_in": {},
    }  # fmt: skip
    body = bodies[route.name] if route.method in WITH_BODY else None
    response = await client.request(route.method, path_of(route), headers=AUTH, json=body)
    assert response.status == 200, await response.text()
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["Server"] == "ibid"
    assert not any(name.lower().startswith("access-control") for name in response.headers)
    assert ("Set-Cookie" in response.headers) == (route.name in ("sign_in", "sign_out"))
    own = {r.method for r in ROUTES if r.path == route.path}
    for verb in set(VERBS) - own:
        other = await client.request(verb, path_of(route), headers=AUTH, json=body)
        await refused(other, 405, verb)
        assert set(other.headers["Allow"].split(",")) == own


async def test_open_routes_show_no_data_version_or_secret(
    client: TestClient[web.Request, web.Application], operations: FakeOperations
) -> None:
    for path in ("/healthz", "/readyz", "/"):
        response = await client.get(path)
        body = await response.text()
        assert response.status == 200
        assert "canary" not in body
        assert TOKEN not in body
        assert "aiohttp" not in body + str(response.headers)
    assert orjson.loads(await (await client.get("/readyz")).read())["degraded"] == {"index": "index_rebuilding"}
    operations.ready = False
    assert (await client.get("/readyz")).status == 503
    assert (await client.get("/healthz")).status == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "localhost:x",
                                  "localhost@evil", "10.0.0.1", "[::2]", "",
                                  "localhost,evil", "127.0.0.1:80:80"])  # fmt: skip
async def test_a_host_that_is_not_ours_is_refused_even_with_the_token(
    client: TestClient[web.Request, web.Application], operations: FakeOperations, host: str
) -> None:
    for path in ("/cache/stats", "/healthz", "/", "/nowhere"):
        head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {TOKEN}\r\nConnection: close\r\n\r\n"
        status, answer = await raw(client, head.encode())
        assert status in (400, 403)  # 400: aiohttp's own parser refuses some spellings
        assert b"canary" not in answer
    assert operations.asked == []


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:4142", "127.0.0.1:1", "[::1]:4142", "ibid.internal:4142"])
async def test_our_own_names_are_served_with_any_port(
    client: TestClient[web.Request, web.Application], host: str
) -> None:
    assert (await client.get("/cache/stats", headers=AUTH | {"Host": host})).status == 200


@pytest.mark.parametrize("headers", [
    {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "x"},
    {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:1"},
], ids=str)  # fmt: skip
async def test_requests_of_foreign_pages_are_refused(
    client: TestClient[web.Request, web.Application], operations: FakeOperations, headers: dict[str, str]
) -> None:
    error = await refused(await client.post("/cache/flushall", headers=AUTH | headers, json={}), 403)
    assert error["code"] == "foreign_origin"
    assert operations.asked == []


async def test_our_own_page_may_ask(client: TestClient[web.Request, web.Application]) -> None:
    own = {"Sec-Fetch-Site": "same-origin", "Origin": f"http://127.0.0.1:{client.port}"}
    assert (await client.get("/cache/stats", headers=AUTH | own)).status == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "text/json"]
)
async def test_a_post_that_is_not_json_is_415(
    client: TestClient[web.Request, web.Application], operations: FakeOperations, kind: str
) -> None:
    for route in ROUTES:
        if route.method == "POST":
            response = await client.post(
                path_of(route), headers=AUTH | {"Content-Type": kind}, data=b'{"confirm":"flush"}'
            )
            assert (await refused(response, 415))["code"] == "unsupported_media_type"
    assert operations.asked == []


SQL = ["' OR '1'='1", "1; DROP TABLE entry;--", "1 UNION SELECT sql FROM sqlite_master", "%", "_", "\\", "*", "9'--",
       "1 OR 1=1", "\x00", "a\r\nb", "\u2028", "-1", "0", "1e3", "1.5", "0x10", " 1", "+1", "\u0661", "9" * 30, "NaN",
       "true", "null", "[]", "x" * 5000, "\U0001f600", "$where", "../../etc/passwd", "{{7*7}}", "2026-13-40",
       "30y"]  # fmt: skip
QUERIES = [(route, param) for route in ROUTES for param in route.query]


@pytest.mark.parametrize(("route", "param"), QUERIES, ids=lambda v: getattr(v, "name", v))
async def test_hostile_text_in_a_query_parameter_is_refused_by_name_or_passed_on_literally(
    client: TestClient[web.Request, web.Application], operations: FakeOperations, route: Route, param: Param
) -> None:
    for text in SQL:
        operations.asked.clear()
        body = {"messages": []} if route.method == "POST" else None
        response = await client.request(
            route.method, path_of(route), headers=AUTH, params={param.name: text}, json=body
        )
        if response.status == 200:
            assert param.kind == "text" or (param.kind, text) == ("boolean", "true")
            assert (
                text in str(operations.asked).lower()
                or text in str(operations.asked)
                or text in repr(operations.asked).encode().decode("unicode_escape")
            )
        else:
            error = await refused(response, 400)
            assert (error["param"], error["code"]) == (param.name, "invalid_value")
            assert operations.asked == []


BODY_PARAMS = [(route, param) for route in ROUTES if route.method == "POST" for param in route.body or ()]
ODD = [
    None,
    True,
    0,
    -1,
    1.5,
    2**63,
    2**70,
    "",
    "x\x00",
    "\ud83d",
    [],
    [[]],
    [None],
    [True],
    [1] * 2000,
    {},
    {"a": 1},
    "x" * 30_000,
]


@pytest.mark.parametrize(("route", "param"), BODY_PARAMS, ids=lambda v: getattr(v, "name", v))
async def test_odd_values_in_a_body_field_are_refused_by_name(
    client: TestClient[web.Request, web.Application], operations: FakeOperations, route: Route, param: Param
) -> None:
    required: dict[str, Any] = {
        "flush": {"confirm": "flush"}, "feedback": {"verdict": "right"}, "create_key": {"project": "red"},
    }.get(route.name, {})  # fmt: skip
    for value in ODD:
        if value is None or (param.kind == "boolean" and value is True):
            continue
        try:
            data = orjson.dumps({**required, param.name: value})
        except (TypeError, orjson.JSONEncodeError):
            data = json.dumps({**required, param.name: 99999999999999999999999}).encode()
        response = await client.post(path_of(route), headers=AUTH | {"Content-Type": "application/json"}, data=data)
        error = await refused(response, 400)
        assert error["code"] in ("invalid_value", "invalid_json")
        assert error["code"] == "invalid_json" or error["param"] == param.name
    assert operations.asked == []


async def test_unknown_and_repeated_parameters_are_refused_by_name(
    client: TestClient[web.Request, web.Application], operations: FakeOperations
) -> None:
    for route in ROUTES:
        if not route.is_open:
            body = {"messages": []} if route.method == "POST" and route.body is None else None
            response = await client.request(route.method, path_of(route) + "?sort=id", headers=AUTH, json=body)
            error = await refused(response, 400)
            assert (error["param"], error["code"]) == ("sort", "unknown_parameter")
    error = await refused(await client.get("/cache/entries?limit=5&limit=1000000", headers=AUTH), 400)
    assert error["param"] == "limit"
    error = await refused(await client.post("/cache/invalidate", headers=AUTH, json={"tag": ["x"]}), 400)
    assert error["param"] == "tag"
    assert operations.asked == []


@pytest.mark.parametrize("data", [b"[]", b"1", b'"x"', b"{", b"{'a':1}", b"\xff", b'{"a":NaN}', b"null"])
async def test_a_body_that_is_not_an_object_is_400(
    client: TestClient[web.Request, web.Application], data: bytes
) -> None:
    headers = AUTH | {"Content-Type": "application/json"}
    for path in ("/cache/invalidate", "/cache/flush", "/cache/feedback", "/savings/query", "/cache/delete"):
        await refused(await client.post(path, headers=headers, data=data), 400)
    too_large = await client.post("/cache/invalidate", headers=headers, data=io.BytesIO(b" " * (4 * 1024 * 1024 + 1)))
    await refused(too_large, 413)


async def test_bad_ids_in_paths_are_400_and_missing_ones_404(client: TestClient[web.Request, web.Application]) -> None:
    for bad in ("x", "0", "-1", "9" * 30, "%00", "1%20OR%201=1", "1.0", "%D9%A1"):
        error = await refused(await client.get(f"/cache/entries/{bad}", headers=AUTH), 400)
        assert error["param"] == "id"
    await refused(await client.get("/cache/entries/10", headers=AUTH), 404)
    await refused(await client.delete("/cache/entries/10", headers=AUTH), 404)
    await refused(await client.get("/requests/r-2", headers=AUTH), 404)
    await refused(await client.get("/requests/x'--", headers=AUTH), 400)
    await refused(await client.get("/nowhere", headers=AUTH), 404)


async def answer(response: aiohttp.ClientResponse) -> dict[str, Any]:
    assert response.status == 200, await response.text()
    return dict(await response.json())


async def test_entries_are_filtered_and_paged(
    client: TestClient[web.Request, web.Application], operations: FakeOperations
) -> None:
    got = await answer(await client.get("/cache/entries?q=100%25&tag=doc:42&limit=2&cursor=77", headers=AUTH))
    assert operations.asked == [("entries", EntryFilter(None, None, "doc:42", "100%", 2, 77))]
    assert got["next_cursor"] == 8
    assert (await answer(await client.get("/cache/entries", headers=AUTH)))["next_cursor"] is None


async def test_invalidate_is_a_dry_run_unless_told_and_never_without_a_selector(
    client: TestClient[web.Request, web.Application], operations: FakeOperations
) -> None:
    await refused(await client.post("/cache/invalidate", headers=AUTH, json={}), 400)
    await refused(await client.post("/cache/invalidate", headers=AUTH, json={"dry_run": False}), 400)
    assert operations.asked == []
    got = await answer(await client.post("/cache/invalidate", headers=AUTH, json={"tags": ["a"], "model": "m"}))
    assert got["dry_run"] is True
    assert got["count"] == 1502
    assert len(got["ids"]) == 1000
    body = {"older_than": "2026-11-01", "writer": "r-9", "dry_run": False}
    await answer(await client.post("/cache/invalidate", headers=AUTH, json=body))
    assert operations.asked == [
        ("purge", Selector(tags=("a",), model="m"), True),
        ("purge", Selector(older_than_ms=1_793_491_200_000, writer="r-9"), False),
    ]


async def test_flush_wants_the_word_and_flushall_is_as_litellm_spells_it(
    client: TestClient[web.Request, web.Application], operations: FakeOperations
) -> None:
    for body in ({}, {"confirm": "yes"}, {"confirm": True}):
        await refused(await client.post("/cache/flush", headers=AUTH, json=body), 400)
    assert operations.asked == []
    await answer(await client.post("/cache/flush", headers=AUTH, json={"confirm": "flush"}))
    assert (await answer(await client.post("/cache/flushall", headers=AUTH)))["status"] == "success"
    got = await answer(await client.post("/cache/delete", headers=AUTH, json={"keys": ["9", 10]}))
    assert got == {"status": "success", "deleted": 1}
    everything = ("purge", Selector(everything=True), False)
    assert operations.asked == [everything, everything, ("purge", Selector(ids=(9, 10)), False)]


async def test_explain_passes_the_body_as_received_and_no_credential(
    client: TestClient[web.Request, web.Application], operations: FakeOperations
) -> None:
    body = b'{"messages": [{"role":"user","content":"hi"}],  "model":"m"}'
    headers = AUTH | {"Content-Type": "application/json", "x-cache-mode": "exact", "x-api-key": CLIENT_KEY}
    where = f"tenant={'a' * 64}&path=/v1/messages"
    await answer(await client.post(f"/cache/explain?{where}", headers=headers, data=body))
    ((_, path, seen, seen_headers, tenant),) = operations.asked
    assert path == "/v1/messages"
    assert seen == body
    assert tenant == "a" * 64
    assert seen_headers["x-cache-mode"] == "exact"
    assert TOKEN not in str(seen_headers)
    assert CLIENT_KEY not in str(seen_headers)
    await refused(await client.post("/cache/explain", headers=AUTH), 400)


async def test_feedback_names_exactly_one_thing(
    client: TestClient[web.Request, web.Application], operations: FakeOperations
) -> None:
    for body in ({"verdict": "wrong"}, {"verdict": "wrong", "entry_id": 9, "request_id": "r-1"}, {"entry_id": 9}):
        await refused(await client.post("/cache/feedback", headers=AUTH, json=body), 400)
    assert operations.asked == []
    got = await answer(await client.post("/cache/feedback", headers=AUTH, json={"verdict": "wrong", "entry_id": 9}))
    assert got["quarantined"] is True
    await refused(await client.post("/cache/feedback", headers=AUTH, json={"verdict": "right", "entry_id": 10}), 404)


async def test_savings_and_queries_give_columns_and_rows(
    client: TestClient[web.Request, web.Application], operations: FakeOperations
) -> None:
    got = await answer(await client.get("/savings?group_by=day,model&since=2026-11-01T00:00:00%2B01:00", headers=AUTH))
    assert got["rows"] == [["2026-11-22", 1500, CANARY]]
    assert operations.asked[0] == ("savings", ("day", "model"), 1_793_487_600_000, None)
    for group_by in ("day,day", "week", "day,", "day;model"):
        error = await refused(await client.get("/savings", params={"group_by": group_by}, headers=AUTH), 400)
        assert error["param"] == "group_by"
    got = await answer(await client.get("/savings/queries", headers=AUTH))
    assert [query["columns"] for query in got["queries"]] == [{"requests": "count"}]
    assert got["views"] == [{"name": "savings_daily", "about": "What was saved?", "columns": {"day": "UTC"}}]
    got = await answer(await client.post("/savings/query", headers=AUTH, json={"sql": "SELECT 1"}))
    assert got == {"columns": ["a", "b"], "rows": [["01", 1.5], [CANARY, None]], "truncated": True}
    await refused(await client.post("/savings/query", headers=AUTH, json={"sql": "SELECT 1", "name": "total"}), 400)


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (CacheFault("database is away", code="store_down"), 503, "store_down"),
        (TimeoutError(), 503, "timeout"),
        (BadRequest("only SELECT", code="not_read_only", param="sql"), 400, "not_read_only"),
        (RuntimeError(f"bug with {CLIENT_KEY}"), 500, "internal_error"),
    ],
)
async def test_faults_become_envelopes_and_show_nothing_of_themselves(
    client: TestClient[web.Request, web.Application],
    operations: FakeOperations,
    fault: Exception,
    status: int,
    code: str,
) -> None:
    operations.fault = fault
    error = await refused(await client.get("/cache/stats", headers=AUTH), status)
    assert error["code"] == code
    assert (await client.get("/healthz")).status == 200


async def test_openapi_describes_every_route_and_each_parameter(
    client: TestClient[web.Request, web.Application],
) -> None:
    page = await answer(await client.get("/openapi.json", headers=AUTH))
    described = {(verb.upper(), path) for path, verbs in page["paths"].items() for verb in verbs}
    assert described == {(r.method, r.path) for r in ROUTES}
    limit = [p for p in page["paths"]["/cache/entries"]["get"]["parameters"] if p["name"] == "limit"]
    assert limit[0]["schema"]["maximum"] == MAX_LIMIT
    assert page["paths"]["/healthz"]["get"]["security"] == []


async def test_metrics_are_prometheus_text(client: TestClient[web.Request, web.Application]) -> None:
    response = await client.get("/metrics", headers=AUTH)
    assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert "ibid_requests" in await response.text()


async def test_a_route_without_access_check_stops_the_start() -> None:
    async def bare(request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app[GATE] = Gate(TOKEN)
    app.router.add_get("/bare", bare)
    with pytest.raises(ConfigError, match="/bare"):
        refuse_unguarded(app)
    assert getattr(guarded(bare), "access") == "token"  # type: ignore[arg-type]  # noqa: B009


def test_a_token_is_made_once_private_and_long(tmp_path: Path) -> None:
    token, path = load_token(None, tmp_path)
    assert path == tmp_path / "admin-token"
    assert len(token) >= 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_token(None, tmp_path) == (token, path)
    assert load_token("x" * 32, tmp_path) == ("x" * 32, None)
    assert find_token(None, tmp_path) == (token, path)
    with pytest.raises(ConfigError, match="cannot be read"):
        find_token(None, tmp_path / "absent")


@pytest.mark.parametrize("token", ["", "short", "x" * 31, "x" * 20 + " " + "x" * 20, "\u00e9" * 40, "x" * 40 + "\n"])
def test_a_weak_token_is_refused(tmp_path: Path, token: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_token(token, tmp_path)
    assert not token or token not in str(caught.value)


def test_a_token_file_that_others_can_read_or_a_link_is_refused(tmp_path: Path) -> None:
    _, path = load_token(None, tmp_path)
    assert path is not None
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_token(None, tmp_path)
    path.unlink()
    os.symlink(tmp_path / "elsewhere", path)
    with pytest.raises(ConfigError):
        load_token(None, tmp_path)
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises((OSError, ConfigError)):
        read_token(path)
    with pytest.raises(ConfigError, match="cannot be kept"):
        load_token(None, tmp_path / "absent")


def test_times_are_ages_or_iso_in_utc() -> None:
    assert read_time("since", "30d", NOW_MS) == NOW_MS - 30 * 86_400_000
    assert read_time("since", "999999w", NOW_MS) == read_time("since", "0001-01-01", NOW_MS) == 0
    assert read_time("since", "9999-12-31T23:59:59-23:59", NOW_MS) == LAST_MS
    assert read_time("since", "1970-01-02", NOW_MS) == 86_400_000
    assert read_time("since", "1970-01-01T01:00:00+01:00", NOW_MS) == 0


_leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_values = _leaves | st.lists(_leaves, max_size=3) | st.dictionaries(st.text(max_size=3), _leaves, max_size=2)
_names = st.text(max_size=8) | st.sampled_from([param.name for _, param in BODY_PARAMS])


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # slow only when the machine is busy
@given(raw=st.dictionaries(_names, _values, max_size=4), route=st.sampled_from([r for r in ROUTES if r.body]))
def test_any_json_object_is_read_or_refused_by_name(raw: dict[str, Any], route: Route) -> None:
    params = route.body or ()
    error: BadRequest | None = None
    values: dict[str, Any] = {}
    try:
        values = read_values(raw, params, NOW_MS, from_text=False)
    except BadRequest as caught:
        error = caught
    if error is not None:
        assert error.status == 400
        assert error.param is not None
    else:
        assert set(values) == {p.name for p in params}
        assert set(raw) <= set(values)


async def test_no_canary_reaches_the_log_at_debug_whatever_is_refused_or_breaks(
    client: TestClient[web.Request, web.Application], operations: FakeOperations
) -> None:
    stream = io.StringIO()
    writer = set_up("DEBUG", stream=stream, secrets=[TOKEN])
    try:
        for headers, _ in WRONG.values():
            await client.get(f"/cache/stats?token={TOKEN}", headers=headers)
        await client.post("/cache/flushall", headers=AUTH)
        operations.fault = RuntimeError(f"token {TOKEN} and Bearer {CLIENT_KEY} to postgresql://u:canary-pw@db/x")
        await refused(await client.get("/cache/stats", headers=AUTH), 500)
    finally:
        tear_down(writer)
    text = stream.getvalue()
    assert "an admin route failed" in text
    assert TOKEN not in text
    assert "canary" not in text


async def test_every_parameter_may_be_at_its_longest(tmp_path: Path) -> None:
    """Four bytes a character, each percent-encoded, in every text parameter at once."""
    async with running(tmp_path / "data", "http://127.0.0.1:9", {"cache": {"semantic": False}}) as ibid:
        longest = "\U0001f5fc" * 200
        query = {name: longest for name in ("namespace", "model", "tag", "q")}
        headers = {"Authorization": f"Bearer {FLOW_TOKEN}"}
        async with ibid.session.get(ibid.admin_url + "/cache/entries", params=query, headers=headers) as response:
            assert (response.status, response.content_type) in ((200, "application/json"), (400, "application/json"))


async def test_an_entry_is_amended_within_what_a_client_could_have_asked(
    client: TestClient[web.Request, web.Application], operations: FakeOperations
) -> None:
    for body, param in (
        ({}, "ttl_s"), ({"ttl_s": 0}, "ttl_s"), ({"ttl_s": 10**12}, "ttl_s"), ({"ttl_s": "60"}, "ttl_s"),
        ({"tags": ["<b>"]}, "tags"), ({"tags": "a"}, "tags"), ({"tags": ["a"] * 17}, "tags"),
        ({"prompt": "x"}, "prompt"),
    ):  # fmt: skip
        error = await refused(await client.patch("/cache/entries/9", headers=AUTH, json=body), 400)
        assert error["param"] == param, body
    await refused(await client.patch("/cache/entries/8", headers=AUTH, json={"tags": []}), 404)
    await answer(await client.patch("/cache/entries/9", headers=AUTH, json={"ttl_s": 60, "tags": ["doc:42"]}))
    assert operations.asked == [("amend", 8, None, ()), ("amend", 9, 60, ("doc:42",))]


async def test_pages_of_requests_and_batches_go_on_from_the_last_row(
    client: TestClient[web.Request, web.Application], operations: FakeOperations
) -> None:
    for path, cursor in (("/requests", "7:r-1"), ("/batches", "5:batch_1")):
        page = await answer(await client.get(f"{path}?limit=1", headers=AUTH))
        assert page["next_cursor"] == cursor
        assert (await answer(await client.get(f"{path}?limit=2&cursor={cursor}", headers=AUTH)))["next_cursor"] is None
        for wrong in ("7", "x:r-1", "7:", "7:r/1", "1" * 16 + ":r"):
            await refused(await client.get(path, params={"cursor": wrong}, headers=AUTH), 400)


async def test_a_named_query_has_days_and_free_sql_has_its_own(
    client: TestClient[web.Request, web.Application], operations: FakeOperations
) -> None:
    named = {"name": "total", "since": "2026-11-22", "limit": 5}
    await answer(await client.post("/savings/query", headers=AUTH, json=named))
    assert operations.asked == [("named", "total", 5, 1_795_305_600_000, None)]
    error = await refused(
        await client.post("/savings/query", headers=AUTH, json={"sql": "SELECT 1", "since": "1d"}), 400
    )
    assert error["param"] == "since"


async def test_the_manual_is_told_as_it_was_written(client: TestClient[web.Request, web.Application]) -> None:
    pages = (await answer(await client.get("/docs", headers=AUTH)))["pages"]
    assert {"index", "dashboard", "admin"} <= set(pages)
    page = await answer(await client.get("/docs/dashboard", headers=AUTH))
    assert page["markdown"].startswith("# The dashboard\n")
    await refused(await client.get("/docs/nowhere", headers=AUTH), 404)
    await refused(await client.get("/docs/..%2Fadmin", headers=AUTH), 400)


async def test_a_rehearsal_takes_one_budget_or_several(
    client: TestClient[web.Request, web.Application], operations: FakeOperations
) -> None:
    await answer(await client.post("/cache/simulate", headers=AUTH, json={"max_errors": [0.01, 0.02]}))
    assert operations.asked[0][1]["max_errors"] == (0.01, 0.02)
    for body in ({"max_errors": []}, {"max_errors": [0.0]}, {"max_errors": [0.1] * 13}, {"max_errors": [True]},
                 {"max_error": 0.1, "max_errors": [0.1]}):  # fmt: skip
        await refused(await client.post("/cache/simulate", headers=AUTH, json=body), 400)
