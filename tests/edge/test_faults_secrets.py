"""Fault catalogue, what crosses a border: headers, hosts, log lines and secrets."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import logging
import sqlite3
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from proxy.watch import logs
from tests.edge.faults_app import (
    ADMIN_TOKEN,
    BEARER,
    EXACT_ONLY,
    KEY,
    PATIENCE_S,
    Running,
    assert_silent,
    ibid,
    question,
    request,
    send,
    serving,
    up,
)
from tests.edge.rawclient import RawClient
from tests.upstream import Chat, Json, Raw, ScriptedUpstream, Stream, event

__all__ = ["ibid", "up"]  # fixtures

CANARIES = {
    "authorization": KEY,
    "x-api-key": "canary-x-api-0123456789",
    "api-key": "canary-azure-0123456789",
    "x-goog-api-key": "AIzaCanary0123456789abcdefghijklmnop",
}


@pytest.fixture
def log_stream() -> Iterator[tuple[logs.LogWriter, io.StringIO]]:
    """The real log at DEBUG into memory; the test runner's own handlers come back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in ("aiosqlite", "asyncio", "sqlalchemy.engine")}
    stream = io.StringIO()
    writer = logs.set_up("DEBUG", stream=stream, secrets=[ADMIN_TOKEN])
    yield writer, stream
    logs.tear_down(writer)
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, old in levels.items():
        logging.getLogger(name).setLevel(old)


@pytest.fixture
async def logged(
    tmp_path: Path, up: ScriptedUpstream, log_stream: tuple[logs.LogWriter, io.StringIO]
) -> AsyncIterator[Running]:
    toml = EXACT_ONLY + "[log]\nlevel = 'DEBUG'\n"
    async with serving(tmp_path, up, toml, log_writer=log_stream[0]) as running:
        yield running


# --- hosts and headers ----------------------------------------------------------------------------------------------


async def test_nothing_a_client_sends_chooses_another_upstream(ibid: Running) -> None:
    async with ScriptedUpstream() as evil:
        address = f"127.0.0.1:{evil.port}"
        for header in (
            f"Host: {address}", f"X-Forwarded-Host: {address}", f"Forwarded: host={address}", f"X-Host: {address}",
            f"X-Original-URL: {evil.url}/v1/models", f"X-Rewrite-URL: {evil.url}", f"x-portkey-custom-host: {evil.url}",
            f"x-custom-host: {evil.url}", f"x-litellm-api-base: {evil.url}", f"Helicone-Target-Url: {evil.url}",
            f"x-upstream: {evil.url}", f"x-stainless-base-url: {evil.url}",
        ):  # fmt: skip
            raw = request(question(f"Does {header.partition(':')[0]} choose the host?"), header)
            if header.startswith("Host"):
                raw = raw.replace(b"Host: localhost\r\n", b"", 1)
            assert (await ibid.send(raw)).status == 200, header
        for field in ("api_base", "base_url", "host", "endpoint", "proxy", "upstream", "custom_llm_provider"):
            body = question("Does a field choose the host?", **{field: evil.url})
            before = ibid.asked
            reply = await ibid.ask(body)
            if reply.status == 200:
                assert ibid.up.requests[-1].body == body
            else:
                assert (reply.status, reply.code, ibid.asked) == (400, "forbidden_field", before)
        assert (await ibid.ask(question(model=f"{evil.url}/v1"))).status == 200
        image = {"type": "image_url", "image_url": {"url": f"{evil.url}/x.png"}}
        await ibid.ask(json.dumps({"model": "m", "messages": [{"role": "user", "content": [image]}]}).encode())
        assert evil.requests == []
    own = f"127.0.0.1:{ibid.up.port}"
    assert {seen.header("host") for seen in ibid.up.requests} == {own}
    names = {name.lower() for seen in ibid.up.requests for name, _ in seen.headers}
    assert not any(name.startswith(("x-forwarded", "forwarded", "x-host", "x-portkey", "helicone")) for name in names)


STAYING = {
    "cookie", "te", "proxy-authorization", "proxy-connection", "keep-alive", "forwarded", "x-forwarded-host",
    "x-cache-mode", "cf-aig-skip-cache", "cache-control", "prefer", "expect",
}  # fmt: skip


@pytest.mark.parametrize("target", ["/v1/chat/completions", "/v1/moderations"], ids=["chat", "passed through"])
async def test_nothing_of_one_hop_or_of_ibid_goes_upstream_and_all_else_does(ibid: Running, target: str) -> None:
    raw = request(
        question(), "Accept: application/json", "User-Agent: tests/1", "OpenAI-Organization: org", "OpenAI-Beta: b",
        "X-Stainless-Lang: python", "Idempotency-Key: i", "traceparent: 00-1-2-01", "Cookie: session=1", "TE: trailers",
        "Proxy-Authorization: Basic abc", "Proxy-Connection: keep-alive", "Keep-Alive: 5", "X-Forwarded-For: 1.2.3.4",
        "Forwarded: for=1.2.3.4", "X-Forwarded-Host: evil", "Via: 1.1 x", "Referer: http://x", "Origin: http://x",
        "X-Team: 1", "x-cache-mode: exact", "cf-aig-skip-cache: false", "Range: bytes=0-1",
        "Cache-Control: max-age=9", target=target,
    )  # fmt: skip
    await ibid.send(raw)
    names = {name.lower() for name, _ in ibid.up.requests[0].headers}
    assert names.isdisjoint(STAYING)
    assert {"authorization", "openai-organization", "idempotency-key", "x-team", "range", "referer", "via"} <= names
    assert ibid.up.requests[0].header("authorization") == f"Bearer {KEY}"


async def test_a_header_nobody_knows_keeps_requests_apart_and_a_session_does_not(ibid: Running) -> None:
    await ibid.ask(None, "X-Team: 1", "session_id: a", "User-Agent: one")
    await ibid.settled()
    assert (await ibid.ask(None, "X-Team: 1", "session_id: b", "User-Agent: two", "Referer: http://y")).is_hit
    assert not (await ibid.ask(None, "X-Team: 2", "session_id: a", "User-Agent: one")).is_hit
    assert not (await ibid.ask(None, "session_id: a", "User-Agent: one")).is_hit


async def test_a_header_named_in_connection_does_not_travel(ibid: Running) -> None:
    for number, named in enumerate(("openai-organization", "OpenAI-Organization, x-stainless-lang")):
        raw = request(question(f"Question number {number}?"), "OpenAI-Organization: org-1", "X-Stainless-Lang: python")
        raw = raw.replace(b"Connection: close", f"Connection: close, {named}".encode())
        assert (await ibid.send(raw)).status == 200
        assert ibid.up.requests[-1].header("openai-organization") is None


async def test_a_credential_named_in_connection_gives_nobody_anything(ibid: Running) -> None:
    raw = request(question()).replace(b"Connection: close", b"Connection: close, authorization, x-api-key")
    ibid.up.script(Json(401, {"error": {"message": "no key", "type": "t", "param": None, "code": "c"}}))
    reply = await ibid.send(raw)
    assert reply.status == 401
    assert await ibid.stored() == 0


async def test_another_credential_never_gets_what_the_first_one_stored(ibid: Running) -> None:
    await ibid.ask()
    await ibid.settled()
    for line in (f"{BEARER}x", BEARER[:-1], f"x-api-key: y{KEY}", f"{BEARER}\r\nx-api-key: other"):
        before = ibid.asked
        assert not (await ibid.ask(credential=line)).is_hit, line
        assert ibid.asked == before + 1
    assert (await ibid.ask(credential=BEARER.replace("Bearer ", "bearer  "))).is_hit, "the same key, spelled freely"
    assert (await ibid.ask(credential=f"x-api-key: {KEY}")).is_hit, "the same key, where another dialect puts it"


# --- admin ----------------------------------------------------------------------------------------------------------


async def test_the_admin_port_of_a_running_ibid_opens_to_its_token_only(ibid: Running) -> None:
    await ibid.ask()
    await ibid.settled()
    targets = ("/cache/stats", "/cache/entries", "/metrics", "/savings", "/requests", "/cache/entries/1")
    for target in targets:
        for credential in (
            None, BEARER, f"Authorization: Bearer {ADMIN_TOKEN.swapcase()}", f"Authorization: Basic {ADMIN_TOKEN}",
            f"x-api-key: {ADMIN_TOKEN}", f"Authorization: Bearer {ADMIN_TOKEN[:-1]}", f"Cookie: token={ADMIN_TOKEN}",
        ):  # fmt: skip
            raw = request(b"", method="GET", target=target, credential=credential)
            reply = await send(ibid.app.admin_port, raw)
            assert reply.status in (401, 403), (target, credential)
            assert_silent([ADMIN_TOKEN, KEY, "tallest tower"], reply.raw)
        in_query = request(b"", method="GET", target=f"{target}?token={ADMIN_TOKEN}", credential=None)
        assert (await send(ibid.app.admin_port, in_query)).status == 401
        assert (await ibid.admin(target)).status == 200
        rebound = request(b"", method="GET", target=target, credential=f"Authorization: Bearer {ADMIN_TOKEN}")
        rebound = rebound.replace(b"Host: localhost", b"Host: evil.example")
        assert (await send(ibid.app.admin_port, rebound)).status in (400, 403, 421)


# --- logs -----------------------------------------------------------------------------------------------------------

FORGED = [
    'm\r\n{"level":"info","event":"forged"}',
    "m\nWARNING forged",
    "m\x1b[2J\x1b[31mred",
    "m\u2028forged\u2029\u0085",
    "m\x00\x07\x7f",
    "\u202emodel\u2066\ufeff",
    'm","level":"critical","x":"',
    "m\\",
    "m" * 1_000_000,
]


async def test_no_field_of_a_request_forges_or_bloats_a_log_line(
    logged: Running, log_stream: tuple[logs.LogWriter, io.StringIO]
) -> None:
    sent = answered = 0
    for name in FORGED:
        body = question(f"A question with an odd model, number {sent}?", model=name, user=name[:1000])
        reply = await logged.ask(
            body, "User-Agent: " + name[:7000].encode("ascii", "ignore").decode().translate(BLANKS)
        )
        assert reply.status in (200, 400)
        answered += reply.status == 200
        sent += 1
        await logged.ask(b"", method="GET", target="/v1/files/%0a%0dforged%1b%5b2J", content_type=None)
        await logged.ask(b"{", f"X-{sent}: 1")
    await logged.settled()
    writer, stream = log_stream
    await asyncio.to_thread(writer.flush)
    lines = stream.getvalue().split("\n")
    assert lines[-1] == ""
    lookups = 0
    for line in lines[:-1]:
        fields = json.loads(line)
        assert line.isprintable()
        assert fields["level"] != "critical"
        assert fields["event"] != "forged"
        assert all(len(str(value).encode()) <= 1010 for value in fields.values())
        lookups += fields["event"] == "lookup"
    assert lookups >= answered == sent - 1, "all but the name of a million characters"


BLANKS = {code: " " for code in (*range(32), 127)}


async def test_no_secret_shows_in_log_database_metrics_admin_or_errors(
    tmp_path: Path, logged: Running, log_stream: tuple[logs.LogWriter, io.StringIO]
) -> None:
    up, outputs = logged.up, []
    broken = event({"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]})
    scripts = {
        "hit and miss": None,
        "refused by the upstream": Json(
            401, {"error": {"message": "bad key", "type": "t", "param": None, "code": "c"}}
        ),
        "server error": Json(500, {"error": {"message": "oops", "type": "t", "param": None, "code": "c"}}),
        "reset": Raw(b"", "rst"),
        "garbage": Raw(b"nonsense\r\n\r\n"),
        "cut stream": Stream([broken], cut="fin"),
        "length": Chat(finish_reason="length"),
    }
    for header, canary in CANARIES.items():
        line = f"Authorization: Bearer {canary}" if header == "authorization" else f"{header}: {canary}"
        for name, script in scripts.items():
            for stream in (False, True):
                if script is not None:
                    up.script(script)
                body = question(f"What happens on {name}?", stream=stream)
                outputs.append((await logged.ask(body, credential=line)).raw)
        for body, headers in ((b"{", ()), (question(n=0), ()), (question(), ("Content-Encoding: br",))):
            outputs.append((await logged.ask(body, *headers, credential=line)).raw)
        outputs.append((await logged.ask(credential=f"{line}\r\n{line}")).raw)
        outputs.append((await logged.ask(credential=f"{line}'; DROP TABLE entry;--")).raw)
        for _ in range(4):  # so many that the circuit stays closed
            outputs.append((await logged.ask(b"", method="GET", target="/v1/models", credential=line)).raw)
        up.script(Raw(b"", "rst"))
        outputs.append((await logged.ask(b"", method="GET", target="/v1/models", credential=line)).raw)
        outputs.append((await logged.ask(b"", method="TRACE", target="/v1/models", credential=line)).raw)
        client = await RawClient.connect(logged.port)
        up.script(Raw(b"", "stall"))
        up.arrived.clear()
        await client.send(request(question("And when the client leaves?"), credential=line))
        async with asyncio.timeout(PATIENCE_S):
            await up.arrived.wait()
        client.reset()
    await logged.settled()
    for target in ("/metrics", "/cache/stats", "/cache/entries", "/requests", "/savings", "/readyz", "/openapi.json"):
        reply = await logged.admin(target)
        assert reply.status == 200, target
        outputs.append(reply.raw)
    explained = await logged.admin("/cache/explain", method="POST", body=question())
    outputs += [explained.raw, (await logged.admin("/cache/entries", token="wrong-" * 8)).raw]
    assert_silent([*CANARIES.values(), ADMIN_TOKEN], *outputs)

    writer, stream = log_stream
    await asyncio.to_thread(writer.flush)
    assert '"event":"lookup"' in stream.getvalue()
    assert_silent([*CANARIES.values(), ADMIN_TOKEN, "What happens on"], stream.getvalue())

    secrets = [*CANARIES.values(), ADMIN_TOKEN]
    files = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert {"ibid.db", "ibid.db-wal", "installation-secret"} <= {path.name for path in files}
    for path in files:
        if path.name != "admin-token":
            assert_silent(secrets, path.read_bytes())
        assert path.stat().st_mode & 0o077 == 0, f"{path.name} is private"
    assert_silent(secrets, "\0".join(sys.argv))


async def test_a_tenant_in_the_database_is_not_its_credential_by_any_plain_digest(
    tmp_path: Path, ibid: Running
) -> None:
    await ibid.ask()
    await ibid.settled()
    rows = await ibid.app.store.database.rows("SELECT tenant, scope, fingerprint FROM entry")
    plain = {digest(text.encode()).hexdigest() for digest in (hashlib.sha256, hashlib.md5, hashlib.sha1)
             for text in (KEY, f"Bearer {KEY}", f"authorization:{KEY}")}  # fmt: skip
    assert rows[0][0] not in plain
    with sqlite3.connect(tmp_path / "data" / "ibid.db", timeout=PATIENCE_S) as connection:
        dump = "\n".join(connection.iterdump())
    connection.close()
    assert_silent([KEY], dump)
