"""Anthropic's message batches."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

import orjson

from proxy.batch.lines import one_line
from proxy.batch.providers.provider import Handed, Progress, RawHeaders, Result
from proxy.batch.providers.wire import Wire, checked, number_of, packed
from proxy.core.batches import Part
from proxy.core.dialects.dialect import rfc3339


@dataclass(frozen=True, slots=True)
class AnthropicBatches:
    """Create a batch of requests, poll it, read its results."""

    wire: Wire
    limit: int = 100_000
    is_per_model: bool = False

    def overhead(self, tag: str, path: str, number: int) -> int:
        return len(_item_of(tag, number, b"")) + 1

    async def is_there(self, upstream: str, headers: RawHeaders) -> bool:
        return await self.wire.listed(upstream, "/v1/messages/batches?limit=1", headers) is not None

    async def upload(self, upstream: str, headers: RawHeaders, handed: Handed) -> str:
        return ""

    async def create(self, upstream: str, headers: RawHeaders, handed: Handed, file_id: str) -> str:
        async def body() -> AsyncIterator[bytes]:
            yield b'{"requests":['
            first = True
            async for piece in packed(handed, lambda n, raw: b"," + _item_of(handed.tag, n, raw)):
                yield piece[1:] if first else piece
                first = False
            yield b"]}"

        length = len(b'{"requests":[') + handed.size_bytes - 1 + len(b"]}")
        also = [(b"Content-Type", b"application/json"), (b"Content-Length", str(length).encode())]
        called = await self.wire.call(upstream, "POST", "/v1/messages/batches", headers, body(), also)
        return str(checked(*called, "type", "message_batch").get("id"))

    async def find(self, part: Part, headers: RawHeaders, tag: str) -> str:
        listed = await self.wire.listed(part.upstream, "/v1/messages/batches?limit=100", headers) or []
        alike = [
            str(batch["id"])
            for batch in listed
            if sum((batch.get("request_counts") or {}).values()) == part.lines
            and str(batch.get("created_at"))[:19] >= _second(part.created_ms)
        ]
        return alike[-1] if alike else ""  # the oldest since then

    async def progress(self, part: Part, headers: RawHeaders) -> Progress:
        path = f"/v1/messages/batches/{part.provider_id}"
        said = checked(*await self.wire.call(part.upstream, "GET", path, headers), "type", "message_batch")
        if said.get("processing_status") != "ended":
            return Progress(False)
        return Progress(True, "error", None, (f"{path}/results",))

    def results(self, part: Part, headers: RawHeaders, progress: Progress) -> AsyncIterator[Result]:
        return self.wire.results(part.upstream, progress.places, headers, _result_of)

    async def cancel(self, part: Part, headers: RawHeaders) -> None:
        await self.wire.call(part.upstream, "POST", f"/v1/messages/batches/{part.provider_id}/cancel", headers, b"")

    async def clean(self, part: Part, headers: RawHeaders, progress: Progress) -> None:
        await self.wire.call(part.upstream, "DELETE", f"/v1/messages/batches/{part.provider_id}", headers)


def _item_of(tag: str, number: int, body: bytes) -> bytes:
    return f'{{"custom_id":"{tag}-{number}","params":'.encode() + body + b"}"


_STATUSES: Final = {
    "invalid_request_error": 400, "authentication_error": 401, "billing_error": 402, "permission_error": 403,
    "not_found_error": 404, "request_too_large": 413, "rate_limit_error": 429, "api_error": 500,
    "timeout_error": 504, "overloaded_error": 529,
}  # fmt: skip


def _result_of(line: bytes) -> Result | None:
    try:
        said = orjson.loads(line)
        number, result = number_of(said["custom_id"]), said["result"]
        match result["type"]:
            case "succeeded":
                return Result(number, 200, orjson.dumps(result["message"]))
            case "errored":
                error = result["error"]
                kind = (error.get("error") or {}).get("type", "")
                return Result(number, _STATUSES.get(kind, 500), one_line(orjson.dumps(error)))
            case "expired":
                return Result(number, lost="expired")
            case _:
                return Result(number, lost="cancelled")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _second(ms: int) -> str:
    return rfc3339(ms // 1000 - 5)[:19]
