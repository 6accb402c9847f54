"""Whatever way an answer takes, its ledger row is on file before the client has the last byte of it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from aiohttp.http_writer import StreamWriter

from proxy.client.delivery import WHOLE_LIMIT_BYTES
from proxy.client.wire import WireResponse
from proxy.store.journal import Journal
from tests.flows.running import CHAT, EMBEDDINGS, chat_body
from tests.upstream import Body, Chat, Json, Stream

ASKED = "How do I repair a leaking garden hose?"
JSON = {"Authorization": "Bearer sk-a", "Content-Type": "application/json"}
LARGE = json.dumps({"padding": "x" * WHOLE_LIMIT_BYTES}).encode()
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":null}]}\n\n'


@pytest.fixture
def seen(exact, monkeypatch) -> list[str]:
    """What happened, in order: "row", a line of the journal; "bytes", something went to the client's socket."""
    happened: list[str] = []
    append, write, write_lines = Journal._write, StreamWriter._write, StreamWriter._writelines
    prepare = WireResponse.prepare

    def note(transport: Any) -> None:
        if transport is not None and transport.get_extra_info("sockname")[1] == exact.app.port:
            happened.append("bytes")

    def on_append(journal: Journal, line: bytes) -> bool:
        happened.append("row")
        return append(journal, line)

    def on_write(writer: StreamWriter, chunk: Any) -> None:
        note(writer.transport)
        write(writer, chunk)

    def on_write_lines(writer: StreamWriter, chunks: Any) -> None:
        note(writer.transport)
        write_lines(writer, chunks)

    async def on_prepare(response: WireResponse, request: web.BaseRequest) -> Any:
        note(request.transport)
        return await prepare(response, request)

    monkeypatch.setattr(Journal, "_write", on_append)
    monkeypatch.setattr(StreamWriter, "_write", on_write)
    monkeypatch.setattr(StreamWriter, "_writelines", on_write_lines)
    monkeypatch.setattr(WireResponse, "prepare", on_prepare)
    return happened


def check(happened: list[str]) -> None:
    assert happened.count("row") == 1, happened
    assert happened[-1] == "bytes", happened
    happened.clear()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_forward_and_its_hits(exact, seen, stream):
    assert (await exact.ask(ASKED, stream=stream)).cache == "MISS"
    check(seen)
    await exact.settled()
    for is_stream in (False, True):
        assert (await exact.ask(ASKED, stream=is_stream)).cache == "HIT"
        check(seen)
    paced = await exact.ask(ASKED, stream=True, headers={"x-cache-pace": "1000/s"})
    assert paced.cache == "HIT"
    check(seen)


@pytest.mark.parametrize(
    ("said", "stream"),
    [
        (Json(500, {"error": {"message": "no"}}), False),
        (Body(body=LARGE), False),
        (Stream([LARGE[:1000], LARGE[1000:]], content_type="application/json"), False),
        (Stream([EVENT, EVENT]), True),  # no end: an error event takes its place
        (Stream([EVENT], cut="rst"), True),
        (Chat(pieces=1), True),
    ],
    ids=["error", "long", "long_chunked", "endless", "reset", "one_piece"],
)
async def test_what_an_upstream_says(exact, up, seen, said, stream):
    up.script(said)
    async with exact.open(chat_body(ASKED, stream=stream)) as response:
        await response.read()
    check(seen)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("POST", Body(body=b'{"model":"m"}')),
        ("POST", Body(body=LARGE)),
        ("POST", Body(body=b"")),
        ("POST", Body(status=204)),
        ("HEAD", Body(body=b"twelve bytes")),
        ("POST", Stream([b"one", b"two"], content_type="text/plain")),
    ],
    ids=["short", "long", "empty", "no_content", "head", "chunked"],
)
async def test_what_passes_through(exact, up, seen, method, said):
    up.script(said)
    async with exact.session.request(method, exact.url + "/v1/audio/speech", headers=JSON, data=b"{}") as response:
        await response.read()
    check(seen)


async def test_vectors_and_what_is_refused(exact, seen):
    for asked in (["one", "two"], ["one", "two"], ["two", "three"]):
        async with exact.session.post(
            exact.url + EMBEDDINGS, headers=JSON, json={"model": "text-embedding-3-small", "input": asked}
        ) as response:
            assert response.status == 200
            await response.read()
        check(seen)
        await exact.settled()
    async with exact.session.post(
        exact.url + CHAT, headers={**JSON, "Cache-Control": "only-if-cached"}, json=chat_body("Nobody asked.")
    ) as response:
        assert response.status == 504
        await response.read()
    check(seen)


async def test_the_end_of_an_answer_waits_only_so_long_for_the_end_of_its_call(exact, up):
    """An upstream that says [DONE] and keeps the stream open: the client is not kept."""
    last = EVENT.replace(b"null", b'"stop"') + b"data: [DONE]\n\n"
    gate = asyncio.Event()
    up.script(Stream([EVENT, last, b": later\n\n"], gates={2: gate}))
    got = b""
    async with exact.open(chat_body(ASKED, stream=True)) as response:
        while b"[DONE]" not in got:
            got += await response.content.readany()
        gate.set()
        assert (got + await response.read()).endswith(last + b": later\n\n")
