"""The floors: what a bare program does at the same work. `python -m tests.bench.floors NAME --port N …`

const        aiohttp Application + uvloop, POST handler that returns a constant JSON body
const-low    the same on aiohttp's low-level web.Server
proxy        aiohttp Application + one ClientSession: bare reverse proxy, streams relayed chunk by chunk
mock         raw uvloop protocol that plays the model server: constant JSON, or an SSE stream of N chunks
"""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import cast

import uvloop
from aiohttp import ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, web

HOP = {"host", "content-length", "transfer-encoding", "connection", "accept-encoding"}


async def start_const(port: int, size: int, low: bool) -> None:
    body = b'{"text":"' + b"x" * (size - 11) + b'"}'

    async def handle(request: web.BaseRequest) -> web.Response:
        await request.read()
        return web.Response(body=body, content_type="application/json")

    if low:
        runner: web.BaseRunner = web.ServerRunner(web.Server(handle, access_log=None))
    else:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", handle)
        runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()


async def start_proxy(port: int, upstream: str) -> None:
    session = ClientSession(
        connector=TCPConnector(limit=0), auto_decompress=False, cookie_jar=DummyCookieJar(), timeout=ClientTimeout(600)
    )

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP}
        async with session.post(upstream + request.path_qs, data=body, headers=headers) as answer:
            if answer.content_type != "text/event-stream":
                return web.Response(body=await answer.read(), status=answer.status, content_type=answer.content_type)
            response = web.StreamResponse(status=answer.status, headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()


WORDS = ("The cache answered the question it had seen before, word for word, without asking again. " * 9).split(" ")[
    :120
]


def chat_json() -> bytes:
    text = " ".join(WORDS)
    return (
        '{"id":"chatcmpl-mock","object":"chat.completion","created":1700000000,"model":"gpt-4o-mini","choices":[{"index":0,'
        f'"message":{{"role":"assistant","content":"{text}"}},"finish_reason":"stop"}}],'
        '"usage":{"prompt_tokens":16,"completion_tokens":150,"total_tokens":166}}'
    ).encode()


def chat_events() -> list[bytes]:
    """123 events: role, 120 words, finish, usage; then [DONE]."""
    head = (
        '{"id":"chatcmpl-mock","object":"chat.completion.chunk","created":1700000000,"model":"gpt-4o-mini","choices":['
    )
    deltas = ['{"role":"assistant","content":""}'] + [f'{{"content":"{word} "}}' for word in WORDS]
    events = [f'data: {head}{{"index":0,"delta":{delta},"finish_reason":null}}]}}\n\n' for delta in deltas]
    events.append(f'data: {head}{{"index":0,"delta":{{}},"finish_reason":"stop"}}]}}\n\n')
    events.append(f'data: {head}],"usage":{{"prompt_tokens":16,"completion_tokens":150,"total_tokens":166}}}}\n\n')
    return [event.encode() for event in [*events, "data: [DONE]\n\n"]]


class Mock(asyncio.Protocol):
    """Reads one request at a time; answers JSON, or one TCP write per event when the body asks for a stream."""

    whole = chat_json()
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(whole) + whole
    stream_head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    events = tuple(b"%x\r\n%s\r\n" % (len(event), event) for event in chat_events())
    calls = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.buffer[:end].lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(self.buffer) < end + 4 + length:
            return
        body = self.buffer[end + 4 : end + 4 + length]
        self.buffer = self.buffer[end + 4 + length :]
        if head.startswith(b"get /__calls"):
            count = b"%d" % Mock.calls
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(count) + count)
            return
        Mock.calls += 1
        if b'"stream":true' in body:
            self.transport.write(self.stream_head)
            for event in self.events:
                self.transport.write(event)
            self.transport.write(b"0\r\n\r\n")
        else:
            self.transport.write(self.answer)


async def start_mock(port: int) -> None:
    await asyncio.get_running_loop().create_server(Mock, "127.0.0.1", port, backlog=1024)


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=["const", "const-low", "proxy", "mock"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--upstream", default="")
    parser.add_argument("--cpu", type=int)
    options = parser.parse_args()
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})
    if options.name == "proxy":
        await start_proxy(options.port, options.upstream)
    elif options.name == "mock":
        await start_mock(options.port)
    else:
        await start_const(options.port, options.size, options.name == "const-low")
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
