"""A whole ibid between a raw client and a scripted upstream, for the tests of the fault catalogue (FAULTS.md)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import tempfile
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from proxy import parts
from proxy.app import App, open_app
from proxy.client.handlers import ClientHandler
from proxy.request.pipeline import Pipeline
from proxy.settings.config import Flags, load
from proxy.settings.sections import Settings
from proxy.store.store import migrate_store
from tests.edge.rawclient import RawClient
from tests.upstream import ScriptedUpstream
from tests.waiting import PATIENCE_S, until

KEY = "sk-canary-Zq81vLp0Xw"
BEARER = f"Authorization: Bearer {KEY}"
EXACT_ONLY = "[cache]\nsemantic = false\n"
UNHURRIED = f"[embedding]\ndeadline_ms = {PATIENCE_S * 1000:.0f}\n"  # a busy machine makes a vector late, not a miss
ADMIN_TOKEN = "admin-canary-" + "7Gk2" * 8


class Reply(NamedTuple):
    """What one request got, read until the server closed."""

    status: int
    headers: dict[str, str]  # lower-case names; the last one wins
    lines: list[str]  # header lines as they came
    body: bytes  # without its chunk frame
    whole: bool  # the framing came to its end
    raw: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The envelope, its contract checked: four keys, the right type, an id of its own, and the retry hints."""
        assert self.headers["content-type"] == "application/json", self
        envelope = json.loads(self.body)
        assert set(envelope) == {"error"}
        error: dict[str, Any] = envelope["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == ("invalid_request_error" if self.status < 500 else "server_error")
        assert error["code"] != "internal_error"
        assert "Traceback" not in error["message"]
        assert len(self.headers["x-request-id"]) >= 16
        if self.status in (429, 503):
            assert int(self.headers["retry-after"]) >= 1
        if self.status < 500 and self.status not in (408, 429):
            assert self.headers["x-should-retry"] == "false", "a permanent error says so"
        return error

    @property
    def code(self) -> str:
        return str(self.error["code"])

    @property
    def events(self) -> list[str]:
        """Data of the events of a stream."""
        blocks = self.body.decode().replace("\r\n", "\n").split("\n\n")
        return [block.partition("data:")[2].strip() for block in blocks if "data:" in block]

    @property
    def stream_error(self) -> str:
        """Code of the error event that ends a broken stream, after which neither `[DONE]` nor the frame's end comes."""
        assert "[DONE]" not in self.events
        error = json.loads(self.events[-1])["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return str(error["code"])

    @property
    def text(self) -> str:
        """What the model said, streamed or whole."""
        if not self.headers["content-type"].startswith("text/event-stream"):
            return str(json.loads(self.body)["choices"][0]["message"]["content"])
        chunks = [json.loads(data) for data in self.events if data != "[DONE]"]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        return "".join(delta.get("content") or "" for delta in deltas)

    @property
    def is_hit(self) -> bool:
        return "; hit" in self.headers["cache-status"]


def question(text: str = "How tall is the tallest tower in Paris?", **fields: Any) -> bytes:
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": text}], **fields}
    return json.dumps(body, ensure_ascii=False).encode()


def request(
    body: bytes,
    *headers: str,
    method: str = "POST",
    target: str = "/v1/chat/completions",
    credential: str | None = BEARER,
    content_type: str | None = "application/json",
    close: bool = True,
) -> bytes:
    """A whole request; it asks the server to close after its answer."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost"]
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    if credential is not None:
        lines.append(credential)
    if content_type is not None:
        lines.append(f"Content-Type: {content_type}")
    if close:
        lines.append("Connection: close")
    return "\r\n".join([*lines, *headers, "", ""]).encode("utf-8") + body


async def read_all(reader: asyncio.StreamReader) -> bytes:
    """Everything until the server closes or resets."""
    pieces = []
    async with asyncio.timeout(PATIENCE_S):
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(1 << 16):
                pieces.append(piece)
    return b"".join(pieces)


def parse(raw: bytes, *, has_body: bool = True) -> Reply:
    head, _, rest = raw.partition(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 1"):
        head, _, rest = rest.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    assert first.startswith("HTTP/1.1 "), raw[:200]
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body, whole = rest, True
    if "chunked" in headers.get("transfer-encoding", ""):
        body, whole = dechunk(rest)
    elif "content-length" in headers and has_body:
        whole = len(rest) == int(headers["content-length"])
    return Reply(int(first.split(" ")[1]), headers, lines, body, whole, raw)


def dechunk(raw: bytes) -> tuple[bytes, bool]:
    pieces = []
    while raw:
        size_line, mark, raw = raw.partition(b"\r\n")
        size = int(size_line, 16) if mark else -1
        if size <= 0:
            return b"".join(pieces), size == 0
        pieces.append(raw[:size])
        raw = raw[size + 2 :]
    return b"".join(pieces), False


async def send(port: int, raw: bytes) -> Reply:
    """Exact bytes on a connection of their own."""
    client = await RawClient.connect(port)
    try:
        with contextlib.suppress(ConnectionError):
            await client.send(raw)
        return parse(await read_all(client.reader), has_body=not raw.startswith(b"HEAD "))
    finally:
        client.close()


@dataclass
class Running:
    """A serving ibid and what is around it."""

    app: App
    up: ScriptedUpstream
    handlers: list[ClientHandler] = field(default_factory=list)

    @property
    def port(self) -> int:
        return self.app.port

    @property
    def pipeline(self) -> Pipeline:
        return self.app.pipeline

    @property
    def asked(self) -> int:
        """Requests that reached the upstream."""
        return len(self.up.requests)

    async def send(self, raw: bytes) -> Reply:
        return await send(self.port, raw)

    async def ask(self, body: bytes | None = None, *headers: str, **how: Any) -> Reply:
        return await send(self.port, request(question() if body is None else body, *headers, **how))

    async def admin(self, target: str, *, method: str = "GET", body: bytes = b"", token: str | None = None) -> Reply:
        credential = f"Authorization: Bearer {self.app.admin_token if token is None else token}"
        raw = request(body, method=method, target=target, credential=credential)
        return await send(self.app.admin_port, raw)

    async def settled(self) -> None:
        """What runs behind the answers (stores, ledger) has come to its end."""
        async with asyncio.timeout(PATIENCE_S):
            while running := set(self.pipeline.tasks._running):
                await asyncio.gather(*running, return_exceptions=True)
            await self.app.store.ledger.flush()

    async def stored(self) -> int:
        """Entries that SQL holds."""
        await self.settled()
        ((count,),) = await self.app.store.database.rows("SELECT count(*) FROM entry")
        return int(count)

    async def until_hit(self, body: bytes) -> None:
        """Ask until the answer comes from the cache."""

        async def is_hit() -> bool:
            return (await self.ask(body)).is_hit

        await until(is_hit)

    async def nothing_kept(self, body: bytes | None = None, **how: Any) -> None:
        """Neither SQL nor memory has an answer: the same question reaches the upstream again."""
        assert await self.stored() == 0
        before = self.asked
        again = await self.ask(body, **how)
        assert self.asked == before + 1
        assert not again.is_hit

    def faults(self) -> dict[str, int]:
        """Cache faults counted so far, by reason."""
        return {reason: count for (_room, reason), count in self.app.telemetry._faults.items()}


def settings_of(folder: Path, up_url: str, toml: str = EXACT_ONLY) -> Settings:
    """Settings as an operator writes them."""
    file = folder / "config.toml"
    file.write_text(toml if "[embedding]" in toml else toml + UNHURRIED)
    flags = Flags(
        config=str(file), listen="127.0.0.1:0", admin="127.0.0.1:0", upstream=up_url, data_dir=str(folder / "data")
    )
    return load(flags, {"IBID_ADMIN_TOKEN": ADMIN_TOKEN})


_fresh: list[bytes] = []


async def put_database(data: Path) -> None:
    """The file that a first start makes: migrating costs 0.1 s, which hundreds of tests need not spend each."""
    if not _fresh:
        with tempfile.TemporaryDirectory() as made:
            await migrate_store(None, Path(made))
            _fresh.append((Path(made) / "ibid.db").read_bytes())
    await asyncio.to_thread(_copy, data)


def _copy(data: Path) -> None:
    data.mkdir(mode=0o700)
    (data / "ibid.db").write_bytes(_fresh[0])
    (data / "ibid.db").chmod(0o600)


@contextlib.asynccontextmanager
async def serving(
    folder: Path, up: ScriptedUpstream, toml: str = EXACT_ONLY, *, url: str | None = None, log_writer: Any = None
) -> AsyncIterator[Running]:
    """`url` puts something between ibid and the upstream."""
    settings = settings_of(folder, url or up.url, toml)
    if not settings.data_dir.exists():
        await put_database(settings.data_dir)
    handlers: list[ClientHandler] = []
    made = parts.ClientHandler

    def remember(**lent: Any) -> ClientHandler:
        handlers.append(made(**lent))
        return handlers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "ClientHandler", remember)
        async with open_app(settings, log_writer=log_writer) as app:
            await app.settled()
            yield Running(app, up, handlers)


@pytest.fixture
async def up() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as upstream:
        yield upstream


@pytest.fixture
async def ibid(tmp_path: Path, up: ScriptedUpstream) -> AsyncIterator[Running]:
    """Exact hits only."""
    async with serving(tmp_path, up) as running:
        yield running


def assert_silent(canaries: Iterable[str], *outputs: str | bytes) -> None:
    """None of these secrets is in any of these outputs."""
    for canary in canaries:
        for output in outputs:
            text = output.decode("latin-1") if isinstance(output, bytes) else output
            assert canary not in text, f"{canary[:6]}… shows in {text[:80]!r}…"


def log_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(
        record.getMessage() + repr(vars(record)) + (logging.Formatter().format(record) if record.exc_info else "")
        for record in caplog.records
    )
