"""The batch API's requests and responses: files, batches, message batches, and deferred calls.

What is not ours goes upstream untouched: files of other purposes, ids that are spelled otherwise, and lists go on with
the upstream's own. An id of ours is answered here, and is unknown to everybody but its owner.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Final
from urllib.parse import urlencode

import orjson
from aiohttp import web

from proxy.batch.deferred import RETRY_AFTER_S, DeferredCalls, requests_line
from proxy.batch.engine import Engine
from proxy.batch.files import FileWriter
from proxy.batch.providers import METADATA_NAME
from proxy.batch.workshop import new_name
from proxy.client.incoming import body_stream, read_body
from proxy.client.passing import Passing, PassThrough
from proxy.client.wire import SERVER
from proxy.core import jsontext
from proxy.core.batches import (
    ENDED,
    FILE_LIMIT_BYTES,
    REQUESTS_LIMIT,
    REQUESTS_LIMIT_BYTES,
    WINDOW_S,
    BatchFile,
    Deferred,
    Job,
    Place,
    batch_object,
    file_object,
    is_own,
    message_batch,
    read_create,
    read_requests_item,
)
from proxy.core.dialects.dialect import JSON
from proxy.core.dialects.routes import MESSAGES_PATH
from proxy.core.errors import BadRequest, CacheFault, UpstreamError
from proxy.core.jsonitems import Items
from proxy.core.model import Limits
from proxy.core.multipart import Form, boundary_of
from proxy.core.query import Query
from proxy.ports import Upstream
from proxy.records import Client
from proxy.relay import Replay

SPOOL_MEMORY_BYTES: Final = 1024 * 1024
FORM_LIMIT_BYTES: Final = 64 * 1024  # of a form, around its file
PIECE_BYTES: Final = 256 * 1024
MONTH_S: Final = 2_592_000
REPLY_LIMIT_BYTES: Final = 8 * 1024 * 1024
_HEAD_BYTES: Final = 64 * 1024

Handle = Callable[[web.BaseRequest, Passing, str], Awaitable[web.StreamResponse]]


class BatchApi:
    """Owns nothing it is given."""

    def __init__(
        self,
        *,
        engine: Engine,
        deferred: DeferredCalls,
        passing: PassThrough,
        upstream: Upstream,
        limits: Limits,
        keep_s: float,
    ) -> None:
        self.engine = engine
        self.deferred = deferred
        self._store = engine.shop.store
        self._passing = passing
        self._upstream = upstream
        self._limits = limits
        self._keep_ms = int(keep_s * 1000)
        self._table: dict[tuple[str, str, bool, str], Handle] = {
            ("files", "POST", False, ""): self._upload,
            ("files", "GET", False, ""): self._list_files,
            ("files", "GET", True, ""): self._show_file,
            ("files", "GET", True, "content"): self._send_file,
            ("files", "DELETE", True, ""): self._delete_file,
            ("batches", "POST", False, ""): self._create,
            ("batches", "GET", False, ""): self._list_batches,
            ("batches", "GET", True, ""): self._show_batch,
            ("batches", "POST", True, "cancel"): self._cancel_batch,
            ("messages/batches", "POST", False, ""): self._create_messages,
            ("messages/batches", "GET", False, ""): self._list_messages,
            ("messages/batches", "GET", True, ""): self._show_messages,
            ("messages/batches", "GET", True, "results"): self._send_results,
            ("messages/batches", "POST", True, "cancel"): self._cancel_messages,
            ("messages/batches", "DELETE", True, ""): self._delete_messages,
            ("deferred", "GET", True, ""): self._show_deferred,
        }

    async def answer(self, request: web.BaseRequest, place: Place, asked: Passing) -> web.StreamResponse:
        """Raises IbidError while nothing has been said to the client."""
        handle = self._table.get((place.area, request.method, bool(place.id), place.verb))
        is_theirs = place.area in ("files", "batches") and asked.family != "openai"
        is_far = place.id != "" and not is_own(place.id) and place.area != "deferred"
        if handle is None or is_theirs or is_far:
            return await self._passing.answer(request, asked)
        return await handle(request, asked, place.id)

    async def defer(self, query: Query, asked_path: str, headers: Sequence[tuple[bytes, bytes]]) -> web.Response:
        """Take a plain call to answer it later. Raises BadRequest, CacheFault."""
        return _told_later(await self.deferred.accept(query, asked_path, headers))

    async def wait(self, query: Query, client: Client) -> Replay:
        """Take a plain call and return its answer. Raises UpstreamError for one that is a refusal, CacheFault."""
        return await self.deferred.wait(query, client)

    # -- files ----------------------------------------------------------------------------------------------------

    async def _upload(self, request: web.BaseRequest, asked: Passing, _id: str) -> web.StreamResponse:
        """A file of ours if its purpose says so, which may come behind the file; else all of it goes upstream."""
        content_type = request.headers.get("Content-Type", "")
        body = body_stream(request, self._limits, asked.arrival)
        if not content_type.lower().startswith("multipart/form-data") or not body:
            return await self._passing.answer(request, asked._replace(body=body))
        boundary = boundary_of(content_type)
        rest = _once(body) if isinstance(body, bytes) else body
        with tempfile.SpooledTemporaryFile(SPOOL_MEMORY_BYTES) as spool:
            purpose = await _purpose(rest, spool, boundary)
            whole = _chain(spool, rest)
            if purpose != b"batch":
                return await self._passing.answer(request, asked._replace(body=whole))
            file = await self._receive(whole, boundary, asked)
        return _json(asked, file_object(file))

    async def _receive(self, whole: AsyncIterator[bytes], boundary: bytes, asked: Passing) -> BatchFile:
        form = Form(boundary)
        now_ms = self._now_ms()
        file = BatchFile(new_name("file-"), asked.tenant, "batch", "", 0, now_ms, now_ms + self._keep_ms)
        writer = FileWriter(self._store, file)
        await writer.begin()
        head = b""
        try:
            async for chunk in whole:
                for piece in form.feed(chunk):
                    if len(head) < _HEAD_BYTES:
                        head += piece[:_HEAD_BYTES]
                    if writer.size_bytes + len(piece) > FILE_LIMIT_BYTES:
                        message = f"The file is larger than {FILE_LIMIT_BYTES} bytes, the most a batch may have."
                        raise BadRequest(message, code="request_too_large", status=413, param="file")
                    await writer.write(piece)
            if not form.ended:
                raise BadRequest("The body ends before its form does.", code="invalid_multipart")
            if form.filename is None:
                raise BadRequest("Missing required parameter: 'file'.", code="missing_required_parameter", param="file")
            _check_head(head)
            keep_s = _keep_s(form)
            return await writer.end(form.filename[:512], None if keep_s is None else now_ms + keep_s * 1000)
        except BaseException:
            await writer.drop()
            raise

    async def _list_files(self, request: web.BaseRequest, asked: Passing, _id: str) -> web.StreamResponse:
        files = await self._store.files(asked.tenant)
        purpose, order = request.query.get("purpose"), request.query.get("order", "desc")
        own = [file_object(file) for file in files if purpose in (None, file.purpose)]
        if order == "asc":
            own.reverse()
        limit = _limit(request, 10_000, 10_000)

        async def hidden(listed: Sequence[dict[str, Any]]) -> set[str]:
            return {str(one.get("id")) for one in listed if _is_handed_in(str(one.get("filename")))}

        return await self._listed(request, asked, own, limit, hidden, "after")

    async def _show_file(self, _request: web.BaseRequest, asked: Passing, file_id: str) -> web.StreamResponse:
        return _json(asked, file_object(await self._file(asked, file_id)))

    async def _send_file(self, request: web.BaseRequest, asked: Passing, file_id: str) -> web.StreamResponse:
        file = await self._file(asked, file_id)
        if file.part == "input":
            pieces = self._store.chunks(file.id)
        else:
            pieces = self._store.results(file.job_id, file.part)
        return await _stream(request, asked, pieces, "application/octet-stream", file.size_bytes)

    async def _delete_file(self, _request: web.BaseRequest, asked: Passing, file_id: str) -> web.StreamResponse:
        file = await self._file(asked, file_id)
        if file.part == "input" and any(job.input_file_id == file.id for job in await self._open_jobs(asked)):
            message = "A batch is reading this file: cancel it first."
            raise BadRequest(message, code="file_in_use", status=409, param="file_id")
        await self._store.delete_file(file.id)
        return _json(asked, {"id": file_id, "object": "file", "deleted": True})

    async def _open_jobs(self, asked: Passing) -> list[Job]:
        return [job for job in await self._store.jobs(asked.tenant, "openai") if not job.is_ended]

    async def _file(self, asked: Passing, file_id: str) -> BatchFile:
        file = await self._store.file(file_id, asked.tenant)
        if file is None or file.purpose == "requests":
            raise BadRequest(f"No such File object: {file_id}", status=404, code="not_found", param="id")
        return file

    # -- OpenAI's batches -------------------------------------------------------------------------------------------

    async def _create(self, request: web.BaseRequest, asked: Passing, _id: str) -> web.StreamResponse:
        raw = await read_body(request, self._limits, asked.arrival)
        said = jsontext.parse(raw, self._limits.json_depth)
        file_id = said.get("input_file_id")
        if isinstance(file_id, str) and not is_own(file_id):
            return await self._passing.answer(request, asked._replace(body=raw))
        wanted = read_create(said)
        now_ms = self._now_ms()
        keep_ms = self._keep_ms if wanted.keep_s is None else wanted.keep_s * 1000
        job = Job(
            new_name("batch_"), asked.tenant, "openai", wanted.endpoint, "validating",
            wanted.input_file_id, now_ms, now_ms + WINDOW_S * 1000, now_ms + keep_ms, metadata=wanted.metadata,
            key_id=asked.key_id or "",
        )  # fmt: skip
        file = await self._store.file(wanted.input_file_id, asked.tenant)
        if file is None or file.purpose != "batch":
            message = f"Cannot find file {wanted.input_file_id}, or its owner is somebody else, or it is no input."
            job.errors = [{"code": "invalid_request", "line": None, "message": message, "param": "file_id"}]
            job.reach("failed", now_ms)
            await self._store.create_job(job, "", 0)
        else:
            await self.engine.begin(job, asked.headers)
        return _json(asked, batch_object(job))

    async def _list_batches(self, request: web.BaseRequest, asked: Passing, _id: str) -> web.StreamResponse:
        own = [batch_object(job) for job in await self._jobs(asked, "openai")]

        async def hidden(listed: Sequence[dict[str, Any]]) -> set[str]:
            return {str(one.get("id")) for one in listed if METADATA_NAME in (one.get("metadata") or {})}

        return await self._listed(request, asked, own, _limit(request, 20, 100), hidden, "after")

    async def _show_batch(self, _request: web.BaseRequest, asked: Passing, job_id: str) -> web.StreamResponse:
        return _json(asked, batch_object(await self._job(asked, job_id, "openai")))

    async def _cancel_batch(self, _request: web.BaseRequest, asked: Passing, job_id: str) -> web.StreamResponse:
        job = await self._job(asked, job_id, "openai")
        if job.status in ENDED - {"cancelled"}:
            message = f"Cannot cancel a batch with status '{job.status}'."
            raise BadRequest(message, status=409, code="batch_ended")
        if not job.is_ended and job.status != "cancelling":
            await self.engine.cancel(job)
        return _json(asked, batch_object(job))

    async def _jobs(self, asked: Passing, dialect: str) -> list[Job]:
        """Newest first, as they are at this moment. Whoever asks about a job brings what it may have been waiting
        for."""
        jobs = [self.engine.live(job.id) or job for job in await self._store.jobs(asked.tenant, dialect)]
        for job in jobs:
            await self.engine.resume(job, asked.headers)
        return jobs

    async def _job(self, asked: Passing, job_id: str, dialect: str) -> Job:
        live = self.engine.live(job_id)  # first: what was read before it ended would be stale
        job = await self._store.job(job_id, asked.tenant) if live is None else live
        if job is None or job.dialect != dialect or job.tenant != asked.tenant:
            shown = "batch" if dialect == "openai" else "message batch"
            raise BadRequest(f"No {shown} found with id '{job_id}'.", status=404, code="not_found", param="id")
        if live is None:
            await self.engine.resume(job, asked.headers)
        return job

    # -- Anthropic's message batches --------------------------------------------------------------------------------

    async def _create_messages(self, request: web.BaseRequest, asked: Passing, _id: str) -> web.StreamResponse:
        """The requests are looked at as they arrive and kept as lines of a file that nobody sees."""
        now_ms = self._now_ms()
        expires_ms = now_ms + self._keep_ms
        file = BatchFile(new_name("file-"), asked.tenant, "requests", "", 0, now_ms, expires_ms)
        writer = FileWriter(self._store, file)
        await writer.begin()
        try:
            total = await self._receive_requests(request, asked, writer)
            await writer.end()
        except BaseException:
            await writer.drop()
            raise
        job = Job(
            new_name("msgbatch_"), asked.tenant, "anthropic", MESSAGES_PATH, "in_progress", file.id,
            now_ms, now_ms + WINDOW_S * 1000, expires_ms, total=total, key_id=asked.key_id or "",
        )  # fmt: skip
        await self.engine.begin(job, asked.headers)
        return _json(asked, message_batch(job, _base(request)))

    async def _receive_requests(self, request: web.BaseRequest, asked: Passing, writer: FileWriter) -> int:
        items, known, size = Items(self.engine.shop.line_limit_bytes), set[str](), 0
        body = body_stream(request, self._limits, asked.arrival)
        if not body:
            raise BadRequest("requests: Field required", code="missing_required_parameter", param="requests")
        limit = min(REQUESTS_LIMIT, self.engine.shop.max_lines)
        async for piece in _once(body) if isinstance(body, bytes) else body:
            size += len(piece)
            if size > REQUESTS_LIMIT_BYTES:
                message = f"The batch is larger than {REQUESTS_LIMIT_BYTES} bytes."
                raise BadRequest(message, code="request_too_large", status=413, param="requests")
            for item in items.feed(piece):
                index = len(known)
                line = read_requests_item(item, index, orjson.loads)
                if line.custom_id in known:
                    message = f"requests.{index}.custom_id: '{line.custom_id}' is not unique in this batch"
                    raise BadRequest(message, code="duplicate_custom_id", param=f"requests.{index}.custom_id")
                known.add(line.custom_id)
                if len(known) > limit:
                    message = f"requests: List should have at most {limit} items"
                    raise BadRequest(message, code="too_many_requests", param="requests")
                await writer.write(requests_line(line.custom_id, line.body))
        items.close()
        if not known:
            message = "requests: List should have at least 1 item after validation, not 0"
            raise BadRequest(message, code="empty_batch", param="requests")
        return len(known)

    async def _list_messages(self, request: web.BaseRequest, asked: Passing, _id: str) -> web.StreamResponse:
        own = [message_batch(job, _base(request)) for job in await self._jobs(asked, "anthropic")]

        async def hidden(listed: Sequence[dict[str, Any]]) -> set[str]:
            return await self._store.known_parts([str(one.get("id")) for one in listed])

        return await self._listed(request, asked, own, _limit(request, 20, 1000), hidden, "after_id")

    async def _show_messages(self, request: web.BaseRequest, asked: Passing, job_id: str) -> web.StreamResponse:
        return _json(asked, message_batch(await self._job(asked, job_id, "anthropic"), _base(request)))

    async def _send_results(self, request: web.BaseRequest, asked: Passing, job_id: str) -> web.StreamResponse:
        job = await self._job(asked, job_id, "anthropic")
        if not job.is_ended:
            message = "The results of this message batch are not available before it has ended."
            raise BadRequest(message, status=404, code="not_found")
        size_bytes = job.output_bytes + job.error_bytes
        return await _stream(request, asked, self._store.results(job.id, ""), "application/x-jsonl", size_bytes)

    async def _cancel_messages(self, request: web.BaseRequest, asked: Passing, job_id: str) -> web.StreamResponse:
        job = await self._job(asked, job_id, "anthropic")
        if job.is_ended:
            raise BadRequest("A message batch that has ended cannot be canceled.", code="batch_ended")
        if job.status != "cancelling":
            await self.engine.cancel(job)
        return _json(asked, message_batch(job, _base(request)))

    async def _delete_messages(self, _request: web.BaseRequest, asked: Passing, job_id: str) -> web.StreamResponse:
        job = await self._job(asked, job_id, "anthropic")
        if not job.is_ended:
            raise BadRequest("A message batch must have ended before it is deleted: cancel it.", code="batch_open")
        await self._store.delete_job(job)
        return _json(asked, {"id": job_id, "type": "message_batch_deleted"})

    # -- deferred calls ---------------------------------------------------------------------------------------------

    async def _show_deferred(self, _request: web.BaseRequest, asked: Passing, call_id: str) -> web.StreamResponse:
        found = await self.deferred.reply(call_id, asked.tenant, asked.headers)
        if found is None:
            raise BadRequest(f"No deferred call with id '{call_id}'.", status=404, code="not_found", param="id")
        if isinstance(found, Deferred):
            return _told_later(found)
        status, headers, body = found
        return web.Response(status=status, headers=[*headers, ("Server", SERVER)], body=body)

    # -- lists --------------------------------------------------------------------------------------------------------

    async def _listed(
        self,
        request: web.BaseRequest,
        asked: Passing,
        own: list[dict[str, Any]],
        limit: int,
        hidden: Callable[[Sequence[dict[str, Any]]], Awaitable[set[str]]],
        cursor: str,
    ) -> web.StreamResponse:
        """A page of ours, and behind ours the upstream's own, without what we handed in there."""
        query = dict(request.query)
        after = query.pop(cursor, "")
        shown: list[dict[str, Any]] = []
        has_more = False
        if not after or is_own(after):
            names = [one["id"] for one in own]
            start = names.index(after) + 1 if after in names else 0
            if (before := query.get("before_id", "")) in names:
                own = own[: names.index(before)]
            shown = own[start : start + limit]
            has_more = len(own) > start + limit
        else:
            query[cursor] = after
        if len(shown) < limit and not is_own(query.get("before_id", "")):
            theirs, has_more = await self._theirs(asked, query | {"limit": str(limit - len(shown))})
            taken = await hidden(theirs)
            shown += [one for one in theirs if one.get("id") not in taken]
        ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
        kind = {} if cursor == "after_id" else {"object": "list"}
        return _json(asked, {**kind, "data": shown, **ends, "has_more": has_more})

    async def _theirs(self, asked: Passing, query: dict[str, str]) -> tuple[list[dict[str, Any]], bool]:
        """What the upstream lists; nothing when it has no such list, or cannot say."""
        headers = {"anthropic-version": ""} if asked.family == "anthropic" else {}
        upstream = self._upstream.route(asked.path, headers, None)
        try:
            response = await self._upstream.open(
                upstream, "GET", f"{asked.path}?{urlencode(query)}", asked.headers, None
            )
            raw = b""
            try:
                while piece := await response.read_some():
                    raw += piece
                    if len(raw) > REPLY_LIMIT_BYTES:
                        return [], False
            finally:
                response.abort() if len(raw) > REPLY_LIMIT_BYTES else response.release()
            said = orjson.loads(raw) if response.status == 200 else None
        except (UpstreamError, ValueError):
            return [], False
        if not isinstance(said, dict) or not isinstance(said.get("data"), list):
            return [], False
        return [one for one in said["data"] if isinstance(one, dict)], bool(said.get("has_more"))

    def _now_ms(self) -> int:
        return self.engine.shop.now_ms()


# -- bodies ------------------------------------------------------------------------------------------------------------


async def _purpose(rest: AsyncIterator[bytes], spool: Any, boundary: bytes) -> bytes | None:
    """Read until the form has said its purpose; what was read is in the spool, at its end."""
    form = Form(boundary)
    size = 0
    async for chunk in rest:
        size += len(chunk)
        spool.write(chunk)
        form.feed(chunk)
        if (purpose := form.fields.get("purpose")) is not None:
            return purpose
        if form.ended or size > FILE_LIMIT_BYTES + FORM_LIMIT_BYTES:
            return None
    return None


async def _chain(spool: Any, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    spool.seek(0)
    while piece := spool.read(PIECE_BYTES):
        yield piece
    async for piece in rest:
        yield piece


async def _once(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), PIECE_BYTES):
        yield body[start : start + PIECE_BYTES]


def _keep_s(form: Form) -> int | None:
    """How long a file is wanted at most, if that was said."""
    anchor, said = form.fields.get("expires_after[anchor]"), form.fields.get("expires_after[seconds]")
    if anchor is None and said is None:
        return None
    if anchor != b"created_at" or said is None or not said.isdigit() or not 3600 <= int(said) <= MONTH_S:
        message = f"Invalid 'expires_after': expected anchor 'created_at' and 3600 to {MONTH_S} seconds."
        raise BadRequest(message, code="invalid_value", param="expires_after")
    return int(said)


def _check_head(head: bytes) -> None:
    """What the provider looks at when a file arrives: something is there, and its first line is JSON."""
    first, end, _ = head.lstrip().partition(b"\n")
    try:
        if not first:
            raise ValueError
        if end or len(head) < _HEAD_BYTES:
            orjson.loads(first)
    except ValueError:
        message = "Invalid file format for Batch API. Must be .jsonl: one JSON object on each line."
        raise BadRequest(message, code="invalid_jsonl", param="file") from None


def _limit(request: web.BaseRequest, default: int, most: int) -> int:
    said = request.query.get("limit", str(default))
    if not said.isascii() or not said.isdigit() or not 1 <= int(said) <= most:
        message = f"Invalid 'limit': expected an integer from 1 to {most}."
        raise BadRequest(message, code="invalid_value", param="limit")
    return int(said)


def _is_handed_in(filename: str) -> bool:
    return filename.startswith("ibid-") and filename.endswith(".jsonl")


# -- responses ---------------------------------------------------------------------------------------------------------


def _headers(asked: Passing) -> dict[str, str]:
    named = {"request-id": asked.request_id} if asked.family == "anthropic" else {}
    return {"x-request-id": asked.request_id, **named, "Server": SERVER}


def _json(asked: Passing, said: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(said), headers={"Content-Type": JSON, **_headers(asked)})


def _told_later(call: Deferred) -> web.Response:
    said = {
        "id": call.id,
        "object": "deferred",
        "status": "in_progress",
        "created_at": call.created_ms // 1000,
        "deadline_at": None if call.deadline_ms is None else call.deadline_ms // 1000,
    }
    headers = {
        "Content-Type": JSON,
        "Location": f"/v1/deferred/{call.id}",
        "Retry-After": str(RETRY_AFTER_S),
        "Preference-Applied": "respond-async",
        "Server": SERVER,
    }
    return web.Response(status=202, body=orjson.dumps(said), headers=headers)


async def _stream(
    request: web.BaseRequest, asked: Passing, pieces: AsyncIterator[bytes], content_type: str, size_bytes: int
) -> web.StreamResponse:
    """A large body as it is read. A database that fails in the middle can only be told by cutting it."""
    first = await anext(pieces, b"")
    response = web.StreamResponse(headers={"Content-Type": content_type, **_headers(asked)})
    response.content_length = size_bytes
    await response.prepare(request)
    try:
        await response.write(first)
        async for piece in pieces:
            await response.write(piece)
        await response.write_eof()
    except CacheFault:
        response.force_close()
        if request.transport is not None:
            request.transport.abort()
    return response


def _base(request: web.BaseRequest) -> str:
    scheme = request.headers.get("X-Forwarded-Proto", request.scheme)
    return f"{scheme if scheme in ('http', 'https') else request.scheme}://{request.host}"
