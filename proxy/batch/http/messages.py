"""Anthropic's message batches."""

from __future__ import annotations

import orjson
from aiohttp import web

from proxy.batch.deferred import requests_line
from proxy.batch.files import FileWriter
from proxy.batch.http.desk import Desk
from proxy.batch.http.listing import Listed, Listing, limit_of
from proxy.batch.http.pieces import once
from proxy.batch.http.replies import base_of, reply, stream
from proxy.batch.workshop import new_name
from proxy.client.incoming import address_of, body_stream
from proxy.client.passing import Passing
from proxy.core.batches import (
    REQUESTS_LIMIT,
    REQUESTS_LIMIT_BYTES,
    WINDOW_S,
    BatchFile,
    Job,
    message_batch,
    read_requests_item,
)
from proxy.core.dialects.routes import MESSAGES_PATH
from proxy.core.errors import BadRequest
from proxy.core.jsonitems import Items


class MessageBatches:
    """`/messages/batches`: each brings its requests along."""

    def __init__(self, desk: Desk, listing: Listing) -> None:
        self._desk = desk
        self._listing = listing

    async def create(self, request: web.BaseRequest, asked: Passing, _id: str) -> web.StreamResponse:
        """The requests are looked at as they arrive and kept as lines of a file that nobody sees."""
        now_ms = self._desk.now_ms()
        expires_ms = now_ms + self._desk.keep_ms
        file = BatchFile(new_name("file-"), asked.tenant, "requests", "", 0, now_ms, expires_ms)
        async with self._desk.room.place(asked.tenant, address_of(request), expires_ms) as place:
            writer = FileWriter(self._desk.store, file, place)
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
        await self._desk.engine.begin(job, asked.headers)
        return reply(asked, message_batch(job, base_of(request)))

    async def _receive_requests(self, request: web.BaseRequest, asked: Passing, writer: FileWriter) -> int:
        items, known, size = Items(self._desk.engine.shop.line_limit_bytes), set[str](), 0
        body = body_stream(request, self._desk.limits, asked.arrival)
        if not body:
            raise BadRequest("requests: Field required", code="missing_required_parameter", param="requests")
        limit = min(REQUESTS_LIMIT, self._desk.engine.shop.max_lines)
        async for piece in once(body) if isinstance(body, bytes) else body:
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

    async def listed(self, request: web.BaseRequest, asked: Passing, _id: str) -> web.StreamResponse:
        own = [message_batch(job, base_of(request)) for job in await self._desk.jobs(asked, "anthropic")]

        async def hidden(listed: Listed) -> set[str]:
            return await self._desk.store.known_parts([str(one.get("id")) for one in listed])

        return await self._listing.page(request, asked, own, limit_of(request, 20, 1000), hidden, "after_id")

    async def show(self, request: web.BaseRequest, asked: Passing, job_id: str) -> web.StreamResponse:
        return reply(asked, message_batch(await self._desk.job(asked, job_id, "anthropic"), base_of(request)))

    async def send(self, request: web.BaseRequest, asked: Passing, job_id: str) -> web.StreamResponse:
        job = await self._desk.job(asked, job_id, "anthropic")
        if not job.is_ended:
            message = "The results of this message batch are not available before it has ended."
            raise BadRequest(message, status=404, code="not_found")
        size_bytes = job.output_bytes + job.error_bytes
        return await stream(request, asked, self._desk.store.results(job.id, ""), "application/x-jsonl", size_bytes)

    async def cancel(self, request: web.BaseRequest, asked: Passing, job_id: str) -> web.StreamResponse:
        job = await self._desk.job(asked, job_id, "anthropic")
        if job.is_ended:
            raise BadRequest("A message batch that has ended cannot be canceled.", code="batch_ended")
        if job.status != "cancelling":
            await self._desk.engine.cancel(job)
        return reply(asked, message_batch(job, base_of(request)))

    async def delete(self, _request: web.BaseRequest, asked: Passing, job_id: str) -> web.StreamResponse:
        job = await self._desk.job(asked, job_id, "anthropic")
        if not job.is_ended:
            raise BadRequest("A message batch must have ended before it is deleted: cancel it.", code="batch_open")
        await self._desk.store.delete_job(job)
        return reply(asked, {"id": job_id, "type": "message_batch_deleted"})
