"""Responses as the batch API's areas give them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import orjson
from aiohttp import web

from proxy.batch.deferred import RETRY_AFTER_S
from proxy.client.passing import Passing
from proxy.client.wire import SERVER
from proxy.core.batches import Deferred
from proxy.core.dialects.dialect import JSON
from proxy.core.errors import CacheFault


def reply(asked: Passing, said: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(said), headers={"Content-Type": JSON, **_headers(asked)})


def told_later(call: Deferred) -> web.Response:
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


async def stream(
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


def _headers(asked: Passing) -> dict[str, str]:
    named = {"request-id": asked.request_id} if asked.family == "anthropic" else {}
    return {"x-request-id": asked.request_id, **named, "Server": SERVER}


def base_of(request: web.BaseRequest) -> str:
    scheme = request.headers.get("X-Forwarded-Proto", request.scheme)
    return f"{scheme if scheme in ('http', 'https') else request.scheme}://{request.host}"
