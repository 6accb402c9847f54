"""OpenAI's batches."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

import orjson

from proxy.batch.providers.provider import METADATA_NAME, Handed, Progress, RawHeaders, Result
from proxy.batch.providers.wire import Wire, checked, number_of, packed
from proxy.core.batches import Part

_BOUNDARY: Final = b"ibid-7d9f1c52a4e84b0e"


@dataclass(frozen=True, slots=True)
class OpenAIBatches:
    """Upload a file, create a batch, poll it, read its output and error files."""

    wire: Wire
    limit: int = 50_000
    is_per_model: bool = True

    def overhead(self, tag: str, path: str, number: int) -> int:
        return len(_line_of(tag, path, number, b""))

    async def is_there(self, upstream: str, headers: RawHeaders) -> bool:
        return await self.wire.listed(upstream, "/v1/batches?limit=1", headers) is not None

    async def upload(self, upstream: str, headers: RawHeaders, handed: Handed) -> str:
        before, after = _form_around(f"{handed.tag}.jsonl")

        async def body() -> AsyncIterator[bytes]:
            yield before
            async for piece in packed(handed, lambda n, raw: _line_of(handed.tag, handed.path, n, raw)):
                yield piece
            yield after

        length = len(before) + handed.size_bytes + len(after)
        also = [
            (b"Content-Type", b"multipart/form-data; boundary=" + _BOUNDARY),
            (b"Content-Length", str(length).encode()),
        ]
        said = checked(*await self.wire.call(upstream, "POST", "/v1/files", headers, body(), also), "object", "file")
        return str(said.get("id"))

    async def create(self, upstream: str, headers: RawHeaders, handed: Handed, file_id: str) -> str:
        asked = {
            "input_file_id": file_id,
            "endpoint": handed.path,
            "completion_window": "24h",
            "metadata": {METADATA_NAME: handed.tag},
        }
        also = [(b"Content-Type", b"application/json")]
        called = await self.wire.call(upstream, "POST", "/v1/batches", headers, orjson.dumps(asked), also)
        return str(checked(*called, "object", "batch").get("id"))

    async def find(self, part: Part, headers: RawHeaders, tag: str) -> str:
        listed = await self.wire.listed(part.upstream, "/v1/batches?limit=100", headers) or []
        for batch in listed:
            if isinstance(batch, dict) and (batch.get("metadata") or {}).get(METADATA_NAME) == tag:
                return str(batch.get("id"))
        return ""

    async def progress(self, part: Part, headers: RawHeaders) -> Progress:
        called = await self.wire.call(part.upstream, "GET", f"/v1/batches/{part.provider_id}", headers)
        said = checked(*called, "object", "batch")
        status = said.get("status")
        if status not in ("completed", "failed", "expired", "cancelled"):
            return Progress(False)
        files = [said.get("output_file_id"), said.get("error_file_id")]
        errors = (said.get("errors") or {}).get("data") or [None]
        lost = {"expired": "expired", "cancelled": "cancelled"}.get(status, "error")
        return Progress(True, lost, errors[0], tuple(f"/v1/files/{file}/content" for file in files if file))

    def results(self, part: Part, headers: RawHeaders, progress: Progress) -> AsyncIterator[Result]:
        return self.wire.results(part.upstream, progress.places, headers, _result_of)

    async def cancel(self, part: Part, headers: RawHeaders) -> None:
        await self.wire.call(part.upstream, "POST", f"/v1/batches/{part.provider_id}/cancel", headers, b"")

    async def clean(self, part: Part, headers: RawHeaders, progress: Progress) -> None:
        outputs = [place.removesuffix("/content") for place in progress.places]
        for path in [f"/v1/files/{part.input_file_id}", *outputs]:
            await self.wire.call(part.upstream, "DELETE", path, headers)


def _line_of(tag: str, path: str, number: int, body: bytes) -> bytes:
    named = f'{{"custom_id":"{tag}-{number}","method":"POST","url":"{path}","body":'.encode()
    return named + body + b"}\n"


def _result_of(line: bytes) -> Result | None:
    try:
        said = orjson.loads(line)
        number = number_of(said["custom_id"])
        response, error = said.get("response"), said.get("error")
        if not isinstance(response, dict):
            known = error if isinstance(error, dict) else {"code": "batch_error", "message": "No response."}
            lost = {"batch_expired": "expired", "batch_cancelled": "cancelled"}.get(str(known.get("code")), "error")
            return Result(number, lost=lost, error=known)
        return Result(number, int(response["status_code"]), orjson.dumps(response["body"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _form_around(filename: str) -> tuple[bytes, bytes]:
    before = (
        b'--%b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--%b\r\nContent-Disposition: '
        b'form-data; name="file"; filename="%b"\r\nContent-Type: application/jsonl\r\n\r\n'
        % (_BOUNDARY, _BOUNDARY, filename.encode())
    )
    return before, b"\r\n--%b--\r\n" % _BOUNDARY
