"""Files of lines: those of purpose batch are ours, all others the upstream's."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import orjson
from aiohttp import web

from proxy.batch.files import FileWriter
from proxy.batch.http.desk import Desk
from proxy.batch.http.listing import Listed, Listing, limit_of
from proxy.batch.http.pieces import PIECE_BYTES, once
from proxy.batch.http.replies import reply, stream
from proxy.batch.room import Place
from proxy.batch.workshop import new_name
from proxy.client.incoming import address_of, body_stream
from proxy.client.passing import Passing
from proxy.core.batches import FILE_LIMIT_BYTES, BatchFile, Job, file_object
from proxy.core.errors import BadRequest
from proxy.core.multipart import Form, boundary_of

SPOOL_MEMORY_BYTES: Final = 1024 * 1024
FORM_LIMIT_BYTES: Final = 64 * 1024  # of a form, around its file
MONTH_S: Final = 2_592_000
_HEAD_BYTES: Final = 64 * 1024


class Files:
    """`/files`: those of purpose batch, and what batches put out."""

    def __init__(self, desk: Desk, listing: Listing) -> None:
        self._desk = desk
        self._listing = listing

    async def upload(self, request: web.BaseRequest, asked: Passing, _id: str) -> web.StreamResponse:
        """A file of ours if its purpose says so, which may come behind the file; else all of it goes upstream."""
        content_type = request.headers.get("Content-Type", "")
        body = body_stream(request, self._desk.limits, asked.arrival)
        if not content_type.lower().startswith("multipart/form-data") or not body:
            return await self._desk.passing.answer(request, asked._replace(body=body))
        boundary = boundary_of(content_type)
        rest = once(body) if isinstance(body, bytes) else body
        with tempfile.SpooledTemporaryFile(SPOOL_MEMORY_BYTES) as spool, self._desk.room.waiting() as wait:
            purpose = await _purpose(rest, spool, boundary, wait)
            whole = _chain(spool, rest)
            if purpose != b"batch":
                return await self._desk.passing.answer(request, asked._replace(body=whole))
            expires_ms = self._desk.now_ms() + self._desk.keep_ms
            async with self._desk.room.place(asked.tenant, address_of(request), expires_ms) as place:
                file = await self._receive(whole, boundary, asked, place)
        return reply(asked, file_object(file))

    async def _receive(self, whole: AsyncIterator[bytes], boundary: bytes, asked: Passing, place: Place) -> BatchFile:
        form = Form(boundary)
        now_ms = self._desk.now_ms()
        file = BatchFile(new_name("file-"), asked.tenant, "batch", "", 0, now_ms, now_ms + self._desk.keep_ms)
        writer = FileWriter(self._desk.store, file, place)
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

    async def listed(self, request: web.BaseRequest, asked: Passing, _id: str) -> web.StreamResponse:
        files = await self._desk.store.files(asked.tenant)
        purpose, order = request.query.get("purpose"), request.query.get("order", "desc")
        own = [file_object(file) for file in files if purpose in (None, file.purpose)]
        if order == "asc":
            own.reverse()
        limit = limit_of(request, 10_000, 10_000)

        async def hidden(listed: Listed) -> set[str]:
            return {str(one.get("id")) for one in listed if _is_handed_in(str(one.get("filename")))}

        return await self._listing.page(request, asked, own, limit, hidden, "after")

    async def show(self, _request: web.BaseRequest, asked: Passing, file_id: str) -> web.StreamResponse:
        return reply(asked, file_object(await self._file(asked, file_id)))

    async def send(self, request: web.BaseRequest, asked: Passing, file_id: str) -> web.StreamResponse:
        file = await self._file(asked, file_id)
        if file.part == "input":
            pieces = self._desk.store.chunks(file.id)
        else:
            pieces = self._desk.store.results(file.job_id, file.part)
        return await stream(request, asked, pieces, "application/octet-stream", file.size_bytes)

    async def delete(self, _request: web.BaseRequest, asked: Passing, file_id: str) -> web.StreamResponse:
        file = await self._file(asked, file_id)
        if file.part == "input" and any(job.input_file_id == file.id for job in await self._open_jobs(asked)):
            message = "A batch is reading this file: cancel it first."
            raise BadRequest(message, code="file_in_use", status=409, param="file_id")
        await self._desk.store.delete_file(file.id)
        return reply(asked, {"id": file_id, "object": "file", "deleted": True})

    async def _open_jobs(self, asked: Passing) -> list[Job]:
        return [job for job in await self._desk.store.jobs(asked.tenant, "openai") if not job.is_ended]

    async def _file(self, asked: Passing, file_id: str) -> BatchFile:
        file = await self._desk.store.file(file_id, asked.tenant)
        if file is None or file.purpose == "requests":
            raise BadRequest(f"No such File object: {file_id}", status=404, code="not_found", param="id")
        return file


async def _purpose(
    rest: AsyncIterator[bytes], spool: Any, boundary: bytes, wait: Callable[[int], None]
) -> bytes | None:
    """Read until the form has said its purpose; what was read is in the spool, at its end. `wait` is told of it."""
    form = Form(boundary)
    size = 0
    async for chunk in rest:
        size += len(chunk)
        wait(len(chunk))
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


def _is_handed_in(filename: str) -> bool:
    return filename.startswith("ibid-") and filename.endswith(".jsonl")
