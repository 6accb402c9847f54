"""What becomes of a request whose upstream fails, as its policy says, and what must never happen then: a bill nobody
sees, a call repeated after its first byte, a key shown to another server, an answer kept as another's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from tests.flows.running import EXACT_ONLY, KEY_ENV, MODEL, UPSTREAM_KEY, Ibid, chat_body, running, until
from tests.flows.test_flow_lanes import balanced, billed, metered, steps
from tests.upstream import Chat, Json, Raw, Reply, ScriptedUpstream, Stream, event

OTHER = "other-model"
DOWN = Json(503, {"error": {"message": "down", "type": "server_error", "param": None, "code": None}})
CUT = Raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n", "rst")
LOST = Raw(b"", "rst")
SECRETS = {
    "Cookie": "session=secret", "x-my-key": "secret", "openai-organization": "org-secret", "x-api-key": "secret",
    "api-key": "secret", "proxy-authorization": "Basic secret", "traceparent": "00-1-2-01",
}  # fmt: skip
MESSAGES = {"model": "claude-x", "max_tokens": 9, "messages": [{"role": "user", "content": "Who wrote Faust?"}]}
VERSION = {"x-api-key": "sk-a", "anthropic-version": "2026-10-21"}


@pytest.fixture
async def backup() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as server:
        yield server


def moving(backup: ScriptedUpstream, *on_error: str, **sections: Any) -> dict[str, Any]:
    """An installation whose every request takes this way when its upstream fails. It never retries by chance: pauses
    are what the scripts tell."""
    own = {"base_url": backup.url, "key_env": KEY_ENV, "stands_in_for": [f"{MODEL}={OTHER}", "claude-*=*"]}
    return {
        "upstream.backup": own,
        f'prices.override."openai/{MODEL}"': {"input_usd_per_mtok": 1, "output_usd_per_mtok": 4},
        f'prices.override."backup/{OTHER}"': {"input_usd_per_mtok": 3, "output_usd_per_mtok": 9},
        "policy": [{"on_error": list(on_error)}],
        **EXACT_ONLY,
        **sections,
    }


def soon(reply: Json) -> Json:
    """The same, to be asked again at once."""
    return Json(reply.status, reply.body, {"retry-after-ms": "1"})


async def seen_in_books(ibid: Ibid, reply: Any) -> list[tuple[str, str, int, int]]:
    found = await ibid.sql(
        f"SELECT upstream, purpose, won, status FROM upstream_call WHERE request_id = '{reply.headers['x-request-id']}'"
        " ORDER BY won DESC"
    )
    return [(row["upstream"], row["purpose"], row["won"], row["status"]) for row in found]


# --- who stands in ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_another_upstream_answers_in_its_own_name_and_price_and_nothing_is_kept(data_dir, up, backup, stream):
    up.default = DOWN
    async with running(data_dir, up.url, moving(backup, "upstream:backup")) as ibid:
        reply = await ibid.ask("Who wrote Faust?", stream=stream, headers=SECRETS)
        assert (reply.status, reply.text) == (200, "answer #1 to: Who wrote Faust?")
        assert (reply.headers["x-upstream"], reply.tier, reply.cache) == ("backup", "failover", "MISS")
        assert "fwd-status=503" in reply.headers["Cache-Status"]
        (seen,) = backup.requests
        assert (seen.json["model"], seen.path) == (OTHER, "/v1/chat/completions")
        assert seen.header("authorization") == f"Bearer {UPSTREAM_KEY}"
        assert "secret" not in str(seen.headers)
        assert "sk-a" not in str(seen.headers)
        await ibid.settled()
        assert await ibid.entries() == [], "an answer of another model is not kept as one of this"
        (mechanism, saved), *rest = await steps(ibid, reply)
        assert (mechanism, rest) == ("hybrid.failover", [])
        (row,) = await ibid.sql("SELECT cost_nusd FROM upstream_call WHERE upstream = 'backup'")
        meter = backup.meter
        assert -saved == row["cost_nusd"] == meter.input_tokens * 3_000 + meter.output_tokens * 9_000
        assert metered(backup) == await billed(ibid, "backup")
        assert await seen_in_books(ibid, reply) == [("backup", "answer", 1, 200), ("openai", "answer", 0, 503)]
        assert (await ibid.row(reply))["lane"] == "hybrid.failover"
        assert await balanced(ibid)
        up.default = Chat()
        assert (await ibid.ask("Who wrote Faust?")).headers["x-upstream"] == "openai"


@pytest.mark.parametrize(
    ("words", "served"),
    [
        (("stale", "upstream:backup"), "stale"),
        (("upstream:backup", "stale"), "failover"),
        (("edge", "stale"), "edge"),
        (("upstream:broken", "edge", "upstream:backup"), "edge"),
        (("upstream:broken", "retry", "upstream:backup"), "failover"),
    ],
    ids=",".join,
)
async def test_whatever_stands_in_does_so_in_the_order_given(data_dir, up, backup, words, served):
    async with ScriptedUpstream(DOWN) as broken, ScriptedUpstream() as edge:
        sections = moving(
            backup, *words,
            **{"upstream.broken": {"base_url": broken.url}, "upstream.edge": {"base_url": edge.url},
               "lane.edge": {"upstream": "edge", "model": "edge-1b"}, "lane.stale": {"if_error_s": 600}},
        )  # fmt: skip
        async with running(data_dir, up.url, sections) as ibid:
            known = await ibid.ask("Who wrote Faust?", headers={"x-cache-ttl": "1"})
            await ibid.settled()
            up.default = DOWN

            async def tier() -> str | None:
                reply = await ibid.ask("Who wrote Faust?")
                return None if reply.tier == "exact" else reply.tier

            assert known.status == 200
            await until(tier)  # it has expired
            assert await tier() == served
            assert bool(broken.requests) is ("upstream:broken" in words)
            await ibid.settled()
            assert await balanced(ibid)


async def test_where_nobody_stands_in_the_first_failure_is_told_as_it_came(data_dir, up, backup):
    up.default = Json(529, {"error": {"message": "first"}}, {"Retry-After": "7"})
    backup.default = Json(400, {"error": {"message": "second"}})
    async with running(data_dir, up.url, moving(backup, "upstream:backup")) as ibid:
        reply = await ibid.ask("Who wrote Faust?")
        assert (reply.status, reply.json["error"]["message"]) == (529, "first")
        assert (reply.headers["Retry-After"], reply.headers["x-upstream"]) == ("7", "openai")
        await ibid.settled()
        assert await seen_in_books(ibid, reply) == [("openai", "answer", 1, 529), ("backup", "answer", 0, 400)]


async def test_an_upstream_of_another_dialect_is_asked_only_what_can_be_said_there(data_dir, up, backup):
    up.default = DOWN
    sections = moving(
        backup, "upstream:gemini", "upstream:backup", **{"upstream.gemini": {"base_url": backup.url + "/never"}}
    )
    async with running(data_dir, up.url, sections) as ibid:
        reply = await ibid.ask("Who wrote Faust?")
        assert (reply.headers["x-upstream"], len(backup.requests)) == ("backup", 1), "nobody translates into Gemini's"
        async with ibid.session.post(ibid.url + "/v1/messages", json=MESSAGES, headers=VERSION) as response:
            said = await response.json()
            assert (response.status, response.headers["x-upstream"]) == (200, "backup"), said
        assert said["content"] == [{"type": "text", "text": "answer #2 to: Who wrote Faust?"}]
        assert backup.requests[1].path == "/v1/chat/completions"
        assert backup.requests[1].header("anthropic-version") is None


async def test_an_upstream_of_the_same_dialect_is_told_its_version_and_no_key(data_dir, up, backup):
    up.default = DOWN
    said = [{"type": "text", "text": "Goethe."}]
    message = {"id": "m", "type": "message", "role": "assistant", "model": "claude-x", "content": said}
    backup.default = Json(200, {**message, "stop_reason": "end_turn", "usage": {"input_tokens": 9, "output_tokens": 2}})
    sections = moving(backup, "upstream:claude")
    sections["upstream.claude"] = {**sections.pop("upstream.backup"), "dialect": "anthropic"}
    async with running(data_dir, up.url, sections) as ibid:
        headers = {**VERSION, "anthropic-beta": "context-1m", "Cookie": "secret"}
        async with ibid.session.post(ibid.url + "/v1/messages", json=MESSAGES, headers=headers) as response:
            assert (response.status, (await response.json())["content"]) == (200, said)
        (seen,) = backup.requests
        assert (seen.path, seen.header("x-api-key")) == ("/v1/messages", UPSTREAM_KEY)
        assert (seen.header("anthropic-version"), seen.header("anthropic-beta")) == ("2026-10-21", "context-1m")
        assert "secret" not in str(seen.headers)


FILE = {"type": "file", "file": {"file_id": "file-abc"}}
HERE: dict[str, tuple[str, Mapping[str, Any]]] = {
    "a file kept there": ("/v1/chat/completions", chat_body([{"role": "user", "content": [FILE]}])),
    "a chat kept there": ("/v1/chat/completions", chat_body("Who wrote Faust?", store=True)),
    "a response kept there": ("/v1/responses", {"model": MODEL, "input": "Who wrote Faust?"}),
    "what was said there": ("/v1/responses", {"model": MODEL, "input": "And?", "store": False,
                                              "previous_response_id": "resp_1"}),
    "work behind the answer": ("/v1/responses", {"model": MODEL, "input": "And?", "store": False, "background": True}),
    "a tool that runs there": ("/v1/responses", {"model": MODEL, "input": "And?", "store": False,
                                                 "tools": [{"type": "mcp", "server_url": "https://x"}]}),
    "a key in the body": ("/v1/chat/completions", chat_body("Who wrote Faust?", api_key="sk-secret")),
    "vectors": ("/v1/embeddings", {"model": MODEL, "input": "Who wrote Faust?"}),
    "a model it does not stand in for": ("/v1/chat/completions", chat_body("Who?") | {"model": "gpt-9"}),
}  # fmt: skip


@pytest.mark.parametrize("what", HERE)
async def test_what_belongs_to_one_upstream_is_not_asked_of_another(data_dir, up, backup, what):
    up.default = up.vectors = DOWN
    path, body = HERE[what]
    async with running(data_dir, up.url, moving(backup, "upstream:backup")) as ibid:
        headers = {"Authorization": "Bearer sk-a"}
        async with ibid.session.post(ibid.url + path, json=body, headers=headers) as response:
            assert response.status == 503
        assert (len(up.requests), backup.requests) == (1, [])


# --- retries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_is_asked_again_and_the_client_never_knows(data_dir, up, backup, stream):
    up.script(soon(DOWN), soon(Json(429, DOWN.body)))
    async with running(data_dir, up.url, moving(backup, "retry", "upstream:backup")) as ibid:
        reply = await ibid.ask("Who wrote Faust?", stream=stream)
        assert (reply.status, reply.headers["x-upstream"], reply.tier) == (200, "openai", None)
        assert (len(up.requests), backup.requests) == (3, [])
        await ibid.settled()
        assert len(await ibid.entries()) == 1
        assert [call[3] for call in await seen_in_books(ibid, reply)] == [200, 503, 429]
        assert metered(up) == await billed(ibid, "openai")
        assert await balanced(ibid)


@pytest.mark.parametrize("told", [{"Retry-After": "60"}, {"Retry-After": "Fri, 31 Dec 2100 23:59:59 GMT"}])
async def test_an_upstream_that_wants_to_be_left_alone_is(data_dir, up, backup, told):
    up.default = Json(503, DOWN.body, told)
    async with running(data_dir, up.url, moving(backup, "retry", "upstream:backup")) as ibid:
        assert (await ibid.ask("Who wrote Faust?")).headers["x-upstream"] == "backup"
        assert len(up.requests) == 1


async def test_a_call_that_was_lost_on_the_way_is_in_the_books(data_dir, up, backup):
    up.script(LOST)
    async with running(data_dir, up.url, moving(backup, "retry")) as ibid:
        reply = await ibid.ask("Who wrote Faust?")
        assert (reply.status, len(up.requests)) == (200, 2)
        await ibid.settled()
        lost, won = await ibid.sql("SELECT won, status, usage_basis, in_tok, cost_nusd FROM upstream_call ORDER BY won")
        assert (lost["won"], lost["status"], lost["usage_basis"]) == (0, 0, "estimated")
        assert lost["in_tok"] == won["in_tok"]
        assert [name for name, _ in await steps(ibid, reply)] == ["spec.retry"]
        assert await balanced(ibid)


async def test_retries_of_a_storm_are_a_bounded_share(data_dir, up, backup):
    up.default = soon(Json(429, DOWN.body))  # a 5xx would open the circuit
    async with running(data_dir, up.url, moving(backup, "retry")) as ibid:
        for number in range(60):
            assert (await ibid.ask(f"Question {number}")).status == 429
        assert 60 < len(up.requests) <= 60 + 8 + 3


TOOL = {"model": MODEL, "input": "And?", "store": False, "tools": [{"type": "mcp", "server_url": "https://x"}]}


@pytest.mark.parametrize(
    ("reply", "calls"), [(DOWN, 2), (Json(500, DOWN.body), 1), (LOST, 1)], ids=["503", "500", "rst"]
)
async def test_what_the_provider_may_have_done_is_not_asked_for_twice(data_dir, up, backup, reply: Reply, calls):
    up.script(soon(reply) if isinstance(reply, Json) else reply)
    async with running(data_dir, up.url, moving(backup, "retry")) as ibid:
        headers = {"Authorization": "Bearer sk-a"}
        async with ibid.session.post(ibid.url + "/v1/responses", json=TOOL, headers=headers):
            assert len(up.requests) == calls


@pytest.mark.parametrize("path", ["/v1/files", "/v1/fine_tuning/jobs", "/v1/images/generations"])
async def test_what_passes_through_is_asked_once(data_dir, up, backup, path):
    up.default = soon(DOWN)
    sections = moving(backup, "retry", "upstream:backup", batch={"serve": False})
    async with running(data_dir, up.url, sections) as ibid:
        headers = {"Authorization": "Bearer sk-a"}
        async with ibid.session.post(ibid.url + path, json={"model": MODEL}, headers=headers) as response:
            assert response.status == 503
        assert (len(up.requests), backup.requests) == (1, [])


# --- the first byte -----------------------------------------------------------------------------------------------

BEFORE: dict[str, Reply] = {
    "cut before its first byte": CUT,
    "empty": Stream([]),
    "an error first": Stream([b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"}}\n\n']),
    "an error in the first chunk": Stream([event({"error": {"message": "no", "code": 502}})]),
}


@pytest.mark.parametrize("what", BEFORE)
async def test_a_stream_moves_until_its_first_byte(data_dir, up, backup, what):
    up.default = BEFORE[what]
    async with running(data_dir, up.url, moving(backup, "upstream:backup")) as ibid:
        reply = await ibid.ask("Who wrote Faust?", stream=True)
        assert (reply.text, reply.headers["x-upstream"]) == ("answer #1 to: Who wrote Faust?", "backup")
        await ibid.settled()
        assert await balanced(ibid)


async def test_an_error_that_no_other_call_would_change_is_told(data_dir, up, backup):
    up.default = Json(200, {"error": {"message": "no such model", "code": 404}})
    async with running(data_dir, up.url, moving(backup, "retry", "upstream:backup")) as ibid:
        assert (await ibid.ask("Who wrote Faust?")).json["error"]["code"] == 404
        assert (len(up.requests), backup.requests) == (1, [])


async def test_after_its_first_byte_nothing_moves(data_dir, up, backup):
    first = event({"id": "c", "model": MODEL, "choices": [{"index": 0, "delta": {"content": "Goe"}}]})
    up.default = Stream([first], cut="rst")
    async with running(data_dir, up.url, moving(backup, "retry", "upstream:backup")) as ibid:
        reply = await ibid.ask("Who wrote Faust?", stream=True)
        assert b"Goe" in reply.body
        assert b'"code":"upstream_' in reply.body
        assert (len(up.requests), backup.requests) == (1, [])


# --- an upstream's own 429, and one that is known to fail -------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_rate_limit", "moves"), [(None, True), ([], False), (["retry"], False), (["upstream:backup"], True)]
)
async def test_its_own_429_moves_only_what_the_policy_says(data_dir, up, backup, on_rate_limit, moves):
    up.default = Json(429, {"error": {"message": "slow down"}}, {"Retry-After": "3"})
    policy: dict[str, Any] = {"on_error": ["upstream:backup"]} | (
        {} if on_rate_limit is None else {"on_rate_limit": on_rate_limit}
    )
    sections = moving(backup, policy=[policy], **{"lane.failover": {"within_s": 0.5}})
    async with running(data_dir, up.url, sections) as ibid:
        limited = await ibid.ask("Who wrote Faust?")
        assert limited.headers["x-upstream"] == ("backup" if moves else "openai")
        assert (limited.status, limited.headers.get("Retry-After")) == ((200, None) if moves else (429, "3"))
        up.default = DOWN
        assert (await ibid.ask("Who wrote Emma?")).headers["x-upstream"] == "backup"


async def test_a_probe_has_a_deadline_of_its_own_where_something_stands_in(data_dir, up, backup):
    up.default = DOWN
    sections = moving(backup, "upstream:backup", **{"lane.failover": {"probe_timeout_s": 0.2}})
    async with running(data_dir, up.url, sections) as ibid:
        number = 0

        async def moved() -> None:
            nonlocal number
            number += 1
            assert (await ibid.ask(f"Question {number}")).headers["x-upstream"] == "backup"

        while not ibid.app.edges.upstreams.is_failing("openai"):
            await moved()
        hanging = Raw(b"", "stall")
        up.script(hanging)
        before = len(up.requests)
        while len(up.requests) == before:  # one in five seconds is a probe, and it is answered all the same
            await moved()
        assert not hanging.release.is_set()
        assert ibid.app.edges.upstreams.is_failing("openai")
        up.default = Chat()
        while ibid.app.edges.upstreams.is_failing("openai"):
            _ = await ibid.ask(f"Question {number}")
            number += 1
        assert (await ibid.ask("Who wrote Faust?")).headers["x-upstream"] == "openai"


async def test_a_probe_that_takes_its_time_is_waited_for_where_nothing_stands_in(data_dir, up, backup):
    up.default, backup.default = DOWN, Json(400, DOWN.body)
    sections = moving(backup, "upstream:backup", **{"lane.failover": {"probe_timeout_s": 0.05}})
    async with running(data_dir, up.url, sections) as ibid:
        gate, number = asyncio.Event(), 0
        while not ibid.app.edges.upstreams.is_failing("openai"):
            number += 1
            assert (await ibid.ask(f"Question {number}")).status == 503
        up.script(lambda _seen: _held(gate))
        before = len(up.requests)
        while len(up.requests) == before:
            asked, number = len(backup.requests), number + 1
            asking = asyncio.create_task(ibid.ask(f"Question {number}"))
            await until(lambda asking=asking: asking.done() or len(up.requests) > before)
        await until(lambda: len(backup.requests) > asked)  # its time was over, and somebody else was asked
        gate.set()
        reply = await asking
        assert (reply.status, reply.headers["x-upstream"]) == (200, "openai")


async def test_a_client_that_leaves_while_it_is_moved_leaves_no_call_behind(data_dir, up, backup):
    up.default, gate = DOWN, asyncio.Event()
    backup.default = lambda _seen: _held(gate)
    async with running(data_dir, up.url, moving(backup, "upstream:backup")) as ibid:
        asking = asyncio.ensure_future(ibid.ask("Who wrote Faust?"))
        await backup.arrived.wait()
        asking.cancel()
        await backup.left.wait()
        gate.set()
        await ibid.settled()
        await until(lambda: not ibid.app.pipeline.flights)
        rows = await ibid.sql("SELECT outcome FROM request")
        assert [row["outcome"] for row in rows] == ["cancelled"]
        calls = await ibid.sql("SELECT upstream, usage_basis FROM upstream_call ORDER BY upstream")
        bases = {call["upstream"]: call["usage_basis"] for call in calls}
        assert bases == {"backup": "estimated", "openai": "none"}
        assert await balanced(ibid)


async def _held(gate: asyncio.Event) -> Reply:
    await gate.wait()
    return Chat()
