"""OpenAI's batches."""

from __future__ import annotations

from aiohttp import web

from proxy.batch.http.desk import Desk
from proxy.batch.http.listing import Listed, Listing, limit_of
from proxy.batch.http.replies import reply
from proxy.batch.providers.provider import METADATA_NAME
from proxy.batch.workshop import new_name
from proxy.client.incoming import read_body
from proxy.client.passing import Passing
from proxy.core import jsontext
from proxy.core.batches import ENDED, WINDOW_S, Job, batch_object, is_own, read_create
from proxy.core.errors import BadRequest


class Batches:
    """`/batches`: each reads a file of ours."""

    def __init__(self, desk: Desk, listing: Listing) -> None:
        self._desk = desk
        self._listing = listing

    async def create(self, request: web.BaseRequest, asked: Passing, _id: str) -> web.StreamResponse:
        raw = await read_body(request, self._desk.limits, asked.arrival)
        said = jsontext.parse(raw, self._desk.limits.json_depth)
        file_id = said.get("input_file_id")
        if isinstance(file_id, str) and not is_own(file_id):
            return await self._desk.passing.answer(request, asked._replace(body=raw))
        wanted = read_create(said)
        now_ms = self._desk.now_ms()
        keep_ms = self._desk.keep_ms if wanted.keep_s is None else wanted.keep_s * 1000
        job = Job(
            new_name("batch_"), asked.tenant, "openai", wanted.endpoint, "validating",
            wanted.input_file_id, now_ms, now_ms + WINDOW_S * 1000, now_ms + keep_ms, metadata=wanted.metadata,
            key_id=asked.key_id or "",
        )  # fmt: skip
        file = await self._desk.store.file(wanted.input_file_id, asked.tenant)
        if file is None or file.purpose != "batch":
            message = f"Cannot find file {wanted.input_file_id}, or its owner is somebody else, or it is no input."
            job.errors = [{"code": "invalid_request", "line": None, "message": message, "param": "file_id"}]
            job.reach("failed", now_ms)
            await self._desk.store.create_job(job, "", 0)
        else:
            await self._desk.engine.begin(job, asked.headers)
        return reply(asked, batch_object(job))

    async def listed(self, request: web.BaseRequest, asked: Passing, _id: str) -> web.StreamResponse:
        own = [batch_object(job) for job in await self._desk.jobs(asked, "openai")]

        async def hidden(listed: Listed) -> set[str]:
            return {str(one.get("id")) for one in listed if METADATA_NAME in (one.get("metadata") or {})}

        return await self._listing.page(request, asked, own, limit_of(request, 20, 100), hidden, "after")

    async def show(self, _request: web.BaseRequest, asked: Passing, job_id: str) -> web.StreamResponse:
        return reply(asked, batch_object(await self._desk.job(asked, job_id, "openai")))

    async def cancel(self, _request: web.BaseRequest, asked: Passing, job_id: str) -> web.StreamResponse:
        job = await self._desk.job(asked, job_id, "openai")
        if job.status in ENDED - {"cancelled"}:
            message = f"Cannot cancel a batch with status '{job.status}'."
            raise BadRequest(message, status=409, code="batch_ended")
        if not job.is_ended and job.status != "cancelling":
            await self._desk.engine.cancel(job)
        return reply(asked, batch_object(job))
