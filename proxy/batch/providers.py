"""The batch APIs of model servers: whether there is one, hand in lines, ask how far it is, read what came of them.

A line travels under a name of ours, `TAG-NUMBER`: what comes back in any order is matched by it. OpenAI's batches carry
our tag in their metadata; Anthropic's carry nothing, so one whose id was lost in a crash is found by its age and size.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import orjson

from proxy.batch.lines import one_line
from proxy.core.batches import Part
from proxy.core.dialects.dialect import rfc3339
from proxy.core.errors import UpstreamError
from proxy.ports import Upstream

NO_SUCH_API: Final = frozenset({404, 405, 501})
PART_LIMIT_BYTES: Final = 190 * 1024 * 1024
REPLY_LIMIT_BYTES: Final = 4 * 1024 * 1024
RESULT_LIMIT_BYTES: Final = 64 * 1024 * 1024
METADATA_NAME: Final = "ibid"
_BOUNDARY: Final = b"ibid-7d9f1c52a4e84b0e"
_UNSENT: Final = frozenset(
    {b"accept", b"content-length", b"content-type", b"content-encoding", b"idempotency-key", b"prefer"}
)
_NUMBER = re.compile(r"-(\d{1,9})\Z")

RawHeaders = Sequence[tuple[bytes, bytes]]


class NoBatchApi(Exception):
    """This upstream answers, but not to this."""


class Refused(Exception):
    """It has a batch API and does not take this batch."""

    def __init__(self, status: int, said: Any) -> None:
        super().__init__(f"the upstream answered {status}")
        self.status = status
        self.said = said


class Progress(NamedTuple):
    """How far a provider is. `lost` is the state of lines that it did not answer: "expired", "cancelled", "error"."""

    has_ended: bool
    lost: str = "error"
    error: Mapping[str, Any] | None = None  # why all of it failed
    places: tuple[str, ...] = ()  # paths of its results


class Result(NamedTuple):
    """What came of one line: a response, or a loss with its error."""

    number: int
    status: int = 0
    body: bytes = b""
    lost: str = ""  # "expired" | "cancelled" | "error"
    error: Mapping[str, Any] | None = None


class Handed(NamedTuple):
    """Lines to hand in: each a name and a body, and the bytes of all of them together as `wrapped` makes them."""

    tag: str
    path: str
    lines: AsyncIterator[tuple[int, bytes]]
    size_bytes: int


class Provider(Protocol):
    """One dialect's batch API."""

    @property
    def limit(self) -> int:
        """Lines in one batch."""
        ...

    @property
    def is_per_model(self) -> bool:
        """Whether all lines of a batch name one model."""
        ...

    def overhead(self, tag: str, path: str, number: int) -> int:
        """Bytes around a body in what is handed in."""
        ...

    async def is_there(self, upstream: str, headers: RawHeaders) -> bool:
        """Raises UpstreamError, and Refused where nothing follows from what it said."""
        ...

    async def upload(self, upstream: str, headers: RawHeaders, handed: Handed) -> str:
        """What comes before `create`: the id of a file, or "" where there is no such step."""
        ...

    async def create(self, upstream: str, headers: RawHeaders, handed: Handed, file_id: str) -> str:
        """The provider's id of the batch. Raises NoBatchApi, Refused, UpstreamError."""
        ...

    async def find(self, part: Part, headers: RawHeaders, tag: str) -> str:
        """The id of a batch that was created, though nobody was told; or ""."""
        ...

    async def progress(self, part: Part, headers: RawHeaders) -> Progress: ...

    def results(self, part: Part, headers: RawHeaders, progress: Progress) -> AsyncIterator[Result]: ...

    async def cancel(self, part: Part, headers: RawHeaders) -> None: ...

    async def clean(self, part: Part, headers: RawHeaders, progress: Progress) -> None:
        """Take away what only we can want."""
        ...


@dataclass(frozen=True, slots=True)
class _Wire:
    upstream: Upstream

    async def call(
        self,
        name: str,
        method: str,
        path: str,
        headers: RawHeaders,
        body: bytes | AsyncIterator[bytes] | None = None,
        also: RawHeaders = (),
    ) -> tuple[int, Any]:
        """Status, and what the body says as JSON: None when it is none. Raises UpstreamError."""
        response = await self.upstream.open(name, method, path, [*_sendable(headers), *also], body)
        raw = b""
        try:
            while piece := await response.read_some():
                raw += piece
                if len(raw) > REPLY_LIMIT_BYTES:
                    raise UpstreamError("The upstream's answer about a batch is too long.", code="upstream_too_large")
        except BaseException:
            response.abort()
            raise
        response.release()
        try:
            return response.status, orjson.loads(raw)
        except ValueError:
            return response.status, None

    async def lines(self, name: str, path: str, headers: RawHeaders) -> AsyncIterator[bytes]:
        """Lines of a file. Raises UpstreamError."""
        response = await self.upstream.open(name, "GET", path, _sendable(headers), None)
        rest = b""
        try:
            if response.status != 200:
                raise UpstreamError(f"The upstream answered {response.status} for the results of a batch.")
            while piece := await response.read_some():
                rest += piece
                if b"\n" in piece:
                    *whole, rest = rest.split(b"\n")
                    for line in whole:
                        if line.strip():
                            yield line
                elif len(rest) > RESULT_LIMIT_BYTES:
                    raise UpstreamError("A result of a batch is too long.", code="upstream_too_large")
        except BaseException:
            response.abort()
            raise
        response.release()
        if rest.strip():
            yield rest


def _sendable(headers: RawHeaders) -> list[tuple[bytes, bytes]]:
    return [line for line in headers if line[0].lower() not in _UNSENT]


def _checked(status: int, said: Any, kind: str, word: str) -> dict[str, Any]:
    """The object that was asked for."""
    if status in NO_SUCH_API or (status < 300 and (not isinstance(said, dict) or said.get(kind) != word)):
        raise NoBatchApi
    if status >= 300:
        raise Refused(status, said)
    assert isinstance(said, dict)
    return said


def _is_list(status: int, said: Any) -> bool:
    if status in NO_SUCH_API or (status == 200 and not (isinstance(said, dict) and isinstance(said.get("data"), list))):
        return False
    if status != 200:
        raise Refused(status, said)
    return True


def _number_of(custom_id: Any) -> int:
    """The line a name of ours stands for; -1 for another's."""
    found = _NUMBER.search(custom_id) if isinstance(custom_id, str) else None
    return -1 if found is None else int(found[1])


@dataclass(frozen=True, slots=True)
class OpenAIBatches:
    """Upload a file, create a batch, poll it, read its output and error files."""

    wire: _Wire
    limit: int = 50_000
    is_per_model: bool = True

    def overhead(self, tag: str, path: str, number: int) -> int:
        return len(_openai_line(tag, path, number, b""))

    async def is_there(self, upstream: str, headers: RawHeaders) -> bool:
        return _is_list(*await self.wire.call(upstream, "GET", "/v1/batches?limit=1", headers))

    async def upload(self, upstream: str, headers: RawHeaders, handed: Handed) -> str:
        before, after = _form_around(f"{handed.tag}.jsonl")

        async def body() -> AsyncIterator[bytes]:
            yield before
            async for piece in _packed(handed, lambda n, raw: _openai_line(handed.tag, handed.path, n, raw)):
                yield piece
            yield after

        length = len(before) + handed.size_bytes + len(after)
        also = [
            (b"Content-Type", b"multipart/form-data; boundary=" + _BOUNDARY),
            (b"Content-Length", str(length).encode()),
        ]
        said = _checked(*await self.wire.call(upstream, "POST", "/v1/files", headers, body(), also), "object", "file")
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
        return str(_checked(*called, "object", "batch").get("id"))

    async def find(self, part: Part, headers: RawHeaders, tag: str) -> str:
        status, said = await self.wire.call(part.upstream, "GET", "/v1/batches?limit=100", headers)
        if not _is_list(status, said):
            return ""
        for batch in said["data"]:
            if isinstance(batch, dict) and (batch.get("metadata") or {}).get(METADATA_NAME) == tag:
                return str(batch.get("id"))
        return ""

    async def progress(self, part: Part, headers: RawHeaders) -> Progress:
        called = await self.wire.call(part.upstream, "GET", f"/v1/batches/{part.provider_id}", headers)
        said = _checked(*called, "object", "batch")
        status = said.get("status")
        if status not in ("completed", "failed", "expired", "cancelled"):
            return Progress(False)
        files = [said.get("output_file_id"), said.get("error_file_id")]
        errors = (said.get("errors") or {}).get("data") or [None]
        lost = {"expired": "expired", "cancelled": "cancelled"}.get(status, "error")
        return Progress(True, lost, errors[0], tuple(f"/v1/files/{file}/content" for file in files if file))

    async def results(self, part: Part, headers: RawHeaders, progress: Progress) -> AsyncIterator[Result]:
        for place in progress.places:
            async for line in self.wire.lines(part.upstream, place, headers):
                if (result := _openai_result(line)) is not None:
                    yield result

    async def cancel(self, part: Part, headers: RawHeaders) -> None:
        await self.wire.call(part.upstream, "POST", f"/v1/batches/{part.provider_id}/cancel", headers, b"")

    async def clean(self, part: Part, headers: RawHeaders, progress: Progress) -> None:
        outputs = [place.removesuffix("/content") for place in progress.places]
        for path in [f"/v1/files/{part.input_file_id}", *outputs]:
            await self.wire.call(part.upstream, "DELETE", path, headers)


def _openai_line(tag: str, path: str, number: int, body: bytes) -> bytes:
    named = f'{{"custom_id":"{tag}-{number}","method":"POST","url":"{path}","body":'.encode()
    return named + body + b"}\n"


def _openai_result(line: bytes) -> Result | None:
    try:
        said = orjson.loads(line)
        number = _number_of(said["custom_id"])
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


@dataclass(frozen=True, slots=True)
class AnthropicBatches:
    """Create a batch of requests, poll it, read its results."""

    wire: _Wire
    limit: int = 100_000
    is_per_model: bool = False

    def overhead(self, tag: str, path: str, number: int) -> int:
        return len(_anthropic_item(tag, number, b"")) + 1

    async def is_there(self, upstream: str, headers: RawHeaders) -> bool:
        return _is_list(*await self.wire.call(upstream, "GET", "/v1/messages/batches?limit=1", headers))

    async def upload(self, upstream: str, headers: RawHeaders, handed: Handed) -> str:
        return ""

    async def create(self, upstream: str, headers: RawHeaders, handed: Handed, file_id: str) -> str:
        async def body() -> AsyncIterator[bytes]:
            yield b'{"requests":['
            first = True
            async for piece in _packed(handed, lambda n, raw: b"," + _anthropic_item(handed.tag, n, raw)):
                yield piece[1:] if first else piece
                first = False
            yield b"]}"

        length = len(b'{"requests":[') + handed.size_bytes - 1 + len(b"]}")
        also = [(b"Content-Type", b"application/json"), (b"Content-Length", str(length).encode())]
        called = await self.wire.call(upstream, "POST", "/v1/messages/batches", headers, body(), also)
        return str(_checked(*called, "type", "message_batch").get("id"))

    async def find(self, part: Part, headers: RawHeaders, tag: str) -> str:
        status, said = await self.wire.call(part.upstream, "GET", "/v1/messages/batches?limit=100", headers)
        if not _is_list(status, said):
            return ""
        alike = [
            str(batch["id"])
            for batch in said["data"]
            if sum((batch.get("request_counts") or {}).values()) == part.lines
            and str(batch.get("created_at"))[:19] >= _second(part.created_ms)
        ]
        return alike[-1] if alike else ""  # the oldest since then

    async def progress(self, part: Part, headers: RawHeaders) -> Progress:
        path = f"/v1/messages/batches/{part.provider_id}"
        said = _checked(*await self.wire.call(part.upstream, "GET", path, headers), "type", "message_batch")
        if said.get("processing_status") != "ended":
            return Progress(False)
        return Progress(True, "error", None, (f"{path}/results",))

    async def results(self, part: Part, headers: RawHeaders, progress: Progress) -> AsyncIterator[Result]:
        for place in progress.places:
            async for line in self.wire.lines(part.upstream, place, headers):
                if (result := _anthropic_result(line)) is not None:
                    yield result

    async def cancel(self, part: Part, headers: RawHeaders) -> None:
        await self.wire.call(part.upstream, "POST", f"/v1/messages/batches/{part.provider_id}/cancel", headers, b"")

    async def clean(self, part: Part, headers: RawHeaders, progress: Progress) -> None:
        await self.wire.call(part.upstream, "DELETE", f"/v1/messages/batches/{part.provider_id}", headers)


def _anthropic_item(tag: str, number: int, body: bytes) -> bytes:
    return f'{{"custom_id":"{tag}-{number}","params":'.encode() + body + b"}"


_STATUSES: Final = {
    "invalid_request_error": 400, "authentication_error": 401, "billing_error": 402, "permission_error": 403,
    "not_found_error": 404, "request_too_large": 413, "rate_limit_error": 429, "api_error": 500,
    "timeout_error": 504, "overloaded_error": 529,
}  # fmt: skip


def _anthropic_result(line: bytes) -> Result | None:
    try:
        said = orjson.loads(line)
        number, result = _number_of(said["custom_id"]), said["result"]
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


async def _packed(handed: Handed, wrapped: Any, piece_bytes: int = 256 * 1024) -> AsyncIterator[bytes]:
    """Lines joined into pieces worth a write."""
    held: list[bytes] = []
    size = 0
    async for number, body in handed.lines:
        held.append(wrapped(number, body))
        size += len(held[-1])
        if size >= piece_bytes:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


def providers_of(upstream: Upstream) -> dict[str, Provider]:
    """By the dialect of a job."""
    wire = _Wire(upstream)
    return {"openai": OpenAIBatches(wire), "anthropic": AnthropicBatches(wire)}
