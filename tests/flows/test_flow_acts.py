"""What administrators do is written down, whoever they are, and a role holds on every route."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.admin.routes import ROUTES, Route
from tests.flows.running import EXACT_ONLY, ROLE_TOKENS, ROLES, TOKEN, Ibid, running
from tests.flows.test_flow_keys import ibid_keys

TAGGED = {"cache": {"tags": ["doc:42"]}}
TOKENS = {**ROLE_TOKENS, "admin": TOKEN}
RANK = ["stats", "auditor", "admin"]
NUMBERS = {"/metrics", "/openapi.json", "/cache/ping", "/cache/stats", "/savings", "/savings/queries"}
READING_POSTS = {"/cache/explain", "/cache/simulate", "/savings/query"}
BODIES: dict[str, Any] = {
    "invalidate": {"tags": ["none"]}, "flush": {"confirm": "flush"}, "delete": {"keys": [9]},
    "feedback": {"entry_id": 9, "verdict": "right"}, "run_query": {"name": "total"}, "explain": {"messages": []},
    "create_key": {"project": "red"}, "amend_entry": {"ttl_s": 60},
}  # fmt: skip


@pytest.fixture(params=["sqlite", "postgresql"])
async def ruled(request: pytest.FixtureRequest, data_dir, up):
    """ibid with a token for each role, on each database."""
    database = request.getfixturevalue("pg_url") if request.param == "postgresql" else None
    async with running(data_dir, up.url, {**EXACT_ONLY, **ROLES}, database) as ibid:
        yield ibid


async def call(ibid: Ibid, method: str, path: str, body: Any = None, *, role: str = "admin") -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {TOKENS[role]}"}
    async with ibid.session.request(method, ibid.admin_url + path, json=body, headers=headers) as response:
        text = await response.text()
        return response.status, json.loads(text) if response.content_type == "application/json" else text


async def call_route(ibid: Ibid, route: Route, role: str = "admin") -> tuple[int, Any]:
    body = BODIES.get(route.name, {}) if route.method in ("POST", "PATCH") else None
    path = route.path.replace("{id}", "9").replace("{name}", "lanes")
    return await call(ibid, route.method, path, body, role=role)


async def test_who_purged_doc_42(ruled: Ibid):
    await ruled.fill("What does document 42 say?", **TAGGED)
    await call(ruled, "POST", "/cache/invalidate", {"tags": ["doc:42"]})
    await call(ruled, "POST", "/cache/invalidate", {"tags": ["doc:42"], "dry_run": False}, role="auditor")
    await call(ruled, "POST", "/cache/invalidate", {"tags": ["doc:42"], "dry_run": False})
    _, found = await call(ruled, "GET", "/cache/acts?about=doc:42", role="auditor")
    assert [(act["who"], act["role"], act["touched"], act["outcome"]) for act in found["acts"]] == [
        ("admin", "admin", 1, "done"),
        ("admin", "admin", 1, "dry run"),
    ]
    assert found["acts"][0]["parameters"] == {"tags": ["doc:42"], "dry_run": False}
    assert (await call(ruled, "GET", "/cache/acts?about=doc:4_"))[1]["acts"] == []  # literally
    refused = "SELECT who, role, route, touched FROM act WHERE outcome = 'role_needed'"
    assert await ruled.sql(refused) == [
        {"who": "auditor-of-anna", "role": "auditor", "route": "POST /cache/invalidate", "touched": None}
    ]
    asked = "SELECT who, touched FROM act WHERE parameters LIKE '%doc:42%' AND outcome = 'done'"
    assert await ruled.sql(asked) == [{"who": "admin", "touched": 1}]


async def test_every_act_is_written_down_and_no_reading_is(ruled: Ibid):
    for route in ROUTES:
        before = len(await ruled.sql("SELECT id FROM act"))
        status, _ = await call_route(ruled, route)
        rows = await ruled.sql("SELECT route, who, outcome FROM act ORDER BY id")
        reads = route.method == "GET" or route.path in READING_POSTS or route.path == "/session"
        is_reading = reads and route.path != "/cache/export"
        assert len(rows) - before == (0 if is_reading else 1), route
        if not is_reading:
            assert (rows[-1]["route"], rows[-1]["who"]) == (f"{route.method} {route.path}", "admin")
            assert (rows[-1]["outcome"] in ("done", "dry run")) == (status == 200), rows[-1]
            assert rows[-1]["outcome"] != "begun"


async def test_each_route_is_open_to_its_role_and_above_and_says_which_it_needs(ruled: Ibid):
    for route in [route for route in ROUTES if not route.is_open]:
        if route.path in NUMBERS:
            needed = "stats"
        elif route.method == "GET" or route.path in READING_POSTS or route.path == "/cache/feedback":
            needed = "auditor"
        else:
            needed = "admin"
        for role in RANK:
            status, answer = await call_route(ruled, route, role)
            if RANK.index(role) < RANK.index(needed):
                assert (status, answer["error"]["code"]) == (403, "role_needed"), (route, role)
                assert f"needs the role {needed}" in answer["error"]["message"]
            else:
                assert status not in (401, 403), (route, role, answer)


async def test_no_secret_and_no_question_is_written_down(ruled: Ibid):
    _, made = await call(ruled, "POST", "/cache/keys", {"project": "red", "name": "of the shop"})
    await call(ruled, "POST", f"/cache/keys/{made['id']}/rotate", {})
    await ruled.fill("What does the canary sing?", **TAGGED)
    await call(ruled, "POST", "/cache/flush", {"confirm": "flush"})
    told = json.dumps(await ruled.sql("SELECT * FROM act"))
    assert "of the shop" in told
    for secret in (made["secret"], made["secret"][5:], "canary", *TOKENS.values()):
        assert secret not in told


async def test_keys_made_without_a_running_ibid_are_written_down_too(data_dir, up):
    made = ibid_keys(data_dir, "create", "--project", "red")
    ibid_keys(data_dir, "revoke", made["id"])
    ibid_keys(data_dir, "list")
    async with running(data_dir, up.url, EXACT_ONLY) as ibid:
        rows = await ibid.sql("SELECT who, route, outcome FROM act ORDER BY id")
    assert [(row["who"], row["route"].partition("/key_")[0], row["outcome"]) for row in rows] == [
        ("command line", "POST /cache/keys", "done"),
        ("command line", f"POST /cache/keys/{made['id']}/revoke".partition("/key_")[0], "done"),
    ]


async def test_an_act_that_cannot_be_written_down_is_not_done(ruled: Ibid):
    await ruled.fill("What is kept?")
    await ruled.sql("SELECT 1")
    await ruled.app.store.writer.close()
    status, answer = await call(ruled, "POST", "/cache/flush", {"confirm": "flush"})
    assert (status, answer["error"]["code"]) == (503, "store_down")
    assert len(await ruled.entries()) == 1
