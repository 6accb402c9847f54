"""A scripted model server ("M"): real sockets, deterministic answers, its own meter.

    async with ScriptedUpstream() as up:
        up.script(Json(429, {"error": ...}, headers={"Retry-After": "3"}))   # for the next request only
        ... up.url, up.requests, up.meter

Without a script it is an OpenAI-compatible chat server whose answers carry a counter, so a test can tell a stored
answer from a new one, and an embeddings server whose vectors anyone can recompute. `python -m tests.upstream --port 0`
prints its address and runs until stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gzip
import hashlib
import json
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiohttp import web

MODELS = ("gpt-4o-mini", "gpt-4o")
EMBEDDING_PATHS = ("/embeddings", "/embed", ":embedContent", ":batchEmbedContents")


@dataclass(frozen=True)
class Seen:
    """One request as it arrived."""

    method: str
    path: str  # with its query
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Meter:
    """What this server would bill: reconciles the ledger."""

    calls: int = 0
    completed: int = 0
    cancelled: int = 0  # the proxy left before the end
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass
class Chat:
    """The default answer, bent: other text, pieces, fields; gates hold a stream before the piece of that number."""

    text: str | None = None
    pieces: int = 4
    gates: Mapping[int, asyncio.Event] = field(default_factory=dict)
    delay_s: float = 0.0  # before the head
    bills_at_once: bool = False  # the input, before the delay, so that a call left meanwhile is billed for it
    message: Mapping[str, Any] = field(default_factory=dict)
    finish_reason: str = "stop"
    model: str | None = None
    usage: bool = True
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Vectors:
    """A vector for each input that anyone can recompute, see `vector_for`; in the words of the path's dialect."""

    dimension: int = 8
    model: str | None = None
    usage: bool = True
    base64: bool = True  # False: floats, whatever the format asked for
    bend: Callable[[dict[str, Any]], Any] = lambda body: body  # the last word on the body
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Json:
    status: int
    body: Any
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Body:
    """Any bytes with a correct length; `gzipped` compresses them and says so."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    gzipped: bool = False


@dataclass
class Stream:
    """Chunks of an event stream as they are. It ends cleanly, or with `cut`: "fin" inside a chunked body, or "rst"."""

    chunks: Sequence[bytes]
    gates: Mapping[int, asyncio.Event] = field(default_factory=dict)
    cut: str | None = None
    content_type: str = "text/event-stream"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Raw:
    """Bytes straight onto the socket, status line included; then "fin", "rst" or "stall" (held until `release`)."""

    data: bytes
    then: str = "fin"
    release: asyncio.Event = field(default_factory=asyncio.Event)


Reply = Chat | Vectors | Json | Body | Stream | Raw
Script = Reply | Callable[[Seen], Reply | Awaitable[Reply]]


class ScriptedUpstream:
    """Owns its listener; `async with` opens and closes it. `default` answers when nothing is scripted."""

    def __init__(self, default: Script | None = None, host: str = "127.0.0.1", port: int = 0) -> None:
        self.default = default or Chat()
        self.vectors: Script = Vectors()  # answers `/embeddings` when nothing is scripted
        self.requests: list[Seen] = []
        self.meter = Meter()
        self.nonce = 0
        self.arrived = asyncio.Event()  # set by every request; clear it to wait for the next
        self.left = asyncio.Event()  # set when a client leaves before the end
        self.stopping = asyncio.Event()
        self._scripts: deque[Script] = deque()
        self._host, self._port = host, port
        self._runner: web.ServerRunner | None = None

    async def __aenter__(self) -> ScriptedUpstream:
        self._runner = web.ServerRunner(
            web.Server(self._handle, access_log=None, handler_cancellation=True, auto_decompress=False),
            shutdown_timeout=1.0,
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stopping.set()
        assert self._runner is not None
        await self._runner.cleanup()

    @property
    def port(self) -> int:
        return self._port

    @property
    def url(self) -> str:
        """Without `/v1`."""
        return f"http://{self._host}:{self._port}"

    def script(self, *replies: Script) -> None:
        """One reply for each of the next requests, in order of arrival."""
        self._scripts.extend(replies)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/__meter":
            return web.json_response(self.meter.__dict__)
        try:
            body = await request.content.read()  # `request.read` has a limit
        except (ConnectionError, asyncio.CancelledError):
            self._leave()
            raise
        raw_headers = tuple((k.decode("latin-1"), v.decode("latin-1")) for k, v in request.raw_headers)
        seen = Seen(request.method, request.path_qs, raw_headers, body)
        self.requests.append(seen)
        self.arrived.set()
        try:
            return await self._answer(request, seen)
        except (ConnectionError, asyncio.CancelledError):
            self._leave()
            raise

    def _leave(self) -> None:
        self.meter.cancelled += 1
        self.left.set()

    async def _answer(self, request: web.BaseRequest, seen: Seen) -> web.StreamResponse:
        if not self._scripts and request.path.endswith("/models"):
            models = [{"id": m, "object": "model", "created": 1, "owned_by": "tests"} for m in MODELS]
            return web.json_response({"object": "list", "data": models})
        default = self.vectors if request.path.endswith(EMBEDDING_PATHS) else self.default
        reply = self._scripts.popleft() if self._scripts else default
        if callable(reply):
            made = reply(seen)
            reply = await made if isinstance(made, Awaitable) else made
        match reply:
            case Chat():
                return await self._chat(request, seen, reply)
            case Vectors():
                return self._embed(seen, reply)
            case Json():
                return web.json_response(reply.body, status=reply.status, headers=reply.headers)
            case Body():
                headers = {**reply.headers, "Content-Type": reply.content_type}
                if reply.gzipped:
                    headers["Content-Encoding"] = "gzip"
                data = gzip.compress(reply.body) if reply.gzipped else reply.body
                return web.Response(status=reply.status, body=data, headers=headers)
            case Stream():
                return await self._stream(request, reply)
            case Raw():
                return await self._raw(request, reply)

    async def _chat(self, request: web.BaseRequest, seen: Seen, chat: Chat) -> web.StreamResponse:
        try:
            body = seen.json
            prompt = _text_of(body["messages"][-1])
        except (ValueError, KeyError, TypeError, IndexError):
            message = f"M has no route {seen.method} {seen.path} for this body"
            return web.json_response({"error": {"message": message, "type": "invalid_request_error"}}, status=404)
        self.nonce += 1
        self.meter.calls += 1
        nonce = self.nonce
        text = f"answer #{nonce} to: {prompt}" if chat.text is None else chat.text
        usage = usage_of(body["messages"], text)
        if chat.bills_at_once:
            self.meter.input_tokens += usage["prompt_tokens"]
        if chat.delay_s:
            await asyncio.sleep(chat.delay_s)
        if not chat.bills_at_once:
            self.meter.input_tokens += usage["prompt_tokens"]
        self.meter.output_tokens += usage["completion_tokens"]
        head = {"id": f"chatcmpl-m{nonce}", "created": 1_700_000_000 + nonce, "model": chat.model or body.get("model")}
        if body.get("stream"):
            options = body.get("stream_options") or {}
            wanted = usage if chat.usage and options.get("include_usage") else None
            chunks = chat_chunks(head, text, chat, wanted)
            response = await self._stream(request, Stream(chunks, chat.gates, headers=chat.headers))
        else:
            message = {"role": "assistant", "content": text, "refusal": None, **chat.message}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": chat.finish_reason}
            whole = {**head, "object": "chat.completion", "choices": [choice], "system_fingerprint": "fp_m"}
            if chat.usage:
                whole["usage"] = usage
            response = web.json_response(whole, headers=chat.headers)
        self.meter.completed += 1
        return response

    def _embed(self, seen: Seen, vectors: Vectors) -> web.Response:
        body = seen.json
        inputs = inputs_in(body)
        self.nonce += 1
        self.meter.calls += 1
        tokens = sum(tokens_in(one) for one in inputs)
        self.meter.input_tokens += tokens
        self.meter.completed += 1
        if not seen.path.partition("?")[0].endswith("/embeddings"):
            return web.json_response(vectors.bend(_vectors_in(seen.path, body, inputs, vectors, tokens)))
        rows = []
        for index, one in enumerate(inputs):
            packed = vector_for(one, body.get("dimensions") or vectors.dimension)
            spelled: Any = base64.b64encode(packed).decode()
            if body.get("encoding_format") != "base64" or not vectors.base64:
                spelled = [float(str(x)) for x in np.frombuffer(packed, "<f4")]  # the shortest decimals
            rows.append({"object": "embedding", "index": index, "embedding": spelled})
        whole: dict[str, Any] = {"object": "list", "data": rows, "model": vectors.model or body.get("model")}
        if vectors.usage:
            whole["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
        return web.json_response(vectors.bend(whole), headers=vectors.headers)

    async def _stream(self, request: web.BaseRequest, stream: Stream) -> web.StreamResponse:
        response = web.StreamResponse(headers={**stream.headers, "Content-Type": stream.content_type})
        response.enable_chunked_encoding()
        await response.prepare(request)
        for number, chunk in enumerate(stream.chunks):
            if number in stream.gates:
                await stream.gates[number].wait()
            await response.write(chunk)
        if len(stream.chunks) in stream.gates:
            await stream.gates[len(stream.chunks)].wait()
        if stream.cut is not None:
            _end(request, stream.cut)
            return _Sent()
        await response.write_eof()
        return response

    async def _raw(self, request: web.BaseRequest, raw: Raw) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        transport.write(raw.data)
        if raw.then == "stall":
            waits = [asyncio.ensure_future(event.wait()) for event in (raw.release, self.stopping)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        _end(request, "rst" if raw.then == "rst" else "fin")
        return _Sent()


def inputs_in(body: Mapping[str, Any]) -> list[Any]:
    """What an embedding request of any dialect asks for."""
    if "input" in body:
        asked = body["input"]
        return [asked] if isinstance(asked, str) or (asked and isinstance(asked[0], int)) else list(asked)
    return [one["content"]["parts"][0]["text"] for one in body.get("requests", [body])]


def _vectors_in(path: str, body: Mapping[str, Any], inputs: list[Any], vectors: Vectors, tokens: int) -> dict[str, Any]:
    """The body of Ollama's or Gemini's answer."""
    sizes = [one.get("outputDimensionality") for one in body.get("requests", [body])]
    size = body.get("dimensions") or sizes[0] or vectors.dimension
    lists = [[float(str(x)) for x in np.frombuffer(vector_for(one, size), "<f4")] for one in inputs]
    if "/api/" in path:
        head = {"model": vectors.model or body["model"], "total_duration": 5_000, "load_duration": 1_000}
        return {**head, "embeddings": lists, **({"prompt_eval_count": tokens} if vectors.usage else {})}
    told = [{"values": one} for one in lists]
    return {"embeddings": told} if "requests" in body else {"embedding": told[0]}


class _Sent(web.Response):
    """The bytes are already on the socket: nothing more is written."""

    async def prepare(self, request: web.BaseRequest) -> None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


def _end(request: web.BaseRequest, how: str) -> None:
    transport = request.transport
    if transport is None:
        return
    if how == "rst":
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
    else:
        transport.close()


def _text_of(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def usage_of(messages: Sequence[Mapping[str, Any]], text: str) -> dict[str, Any]:
    """Counters anyone can recompute: words and four tokens a message in, words out."""
    prompt = sum(len(_text_of(message).split()) + 4 for message in messages)
    completion = len(text.split())
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def tokens_in(asked: str | Sequence[int]) -> int:
    """Words of a text, or the tokens themselves."""
    return len(asked.split()) if isinstance(asked, str) else len(asked)


def vector_for(asked: str | Sequence[int], dimension: int = 8) -> bytes:
    """The vector of an input as little-endian float32: finite, and another one for every input and length."""
    noise = hashlib.shake_256(json.dumps([asked, dimension]).encode()).digest(4 * dimension)
    return (np.frombuffer(noise, "<u4") / 2.0**31 - 1).astype("<f4").tobytes()


def event(data: Mapping[str, Any] | str) -> bytes:
    """One event of a stream."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return b"data: " + text.encode() + b"\n\n"


def chat_chunks(head: Mapping[str, Any], text: str, chat: Chat, usage: Mapping[str, Any] | None) -> list[bytes]:
    """Role, pieces, finish, usage when given, `[DONE]`: piece i is chunk i + 1."""
    base = {**head, "object": "chat.completion.chunk", "system_fingerprint": "fp_m"}
    tail = {} if usage is None else {"usage": None}

    def chunk(delta: Mapping[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event({**base, "choices": [choice], **tail})

    width = max(1, -(-len(text) // max(1, chat.pieces)))
    pieces = [text[start : start + width] for start in range(0, len(text), width)]
    chunks = [chunk({"role": "assistant", "content": "", "refusal": None})]
    if chat.message:
        chunks[0] = chunk({"role": "assistant", "content": "", "refusal": None, **chat.message})
    chunks += [chunk({"content": piece}) for piece in pieces]
    chunks.append(chunk({}, chat.finish_reason))
    if usage is not None:
        chunks.append(event({**base, "choices": [], "usage": usage}))
    return [*chunks, event("[DONE]")]


async def _serve(host: str, port: int, pieces: int, delay_s: float) -> None:
    async with ScriptedUpstream(Chat(pieces=pieces, delay_s=delay_s), host, port) as up:
        print(up.url, flush=True)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--pieces", type=int, default=4)
    parser.add_argument("--delay-s", type=float, default=0.0)
    options = parser.parse_args()
    try:
        asyncio.run(_serve(options.host, options.port, options.pieces, options.delay_s))
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main()
