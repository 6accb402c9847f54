"""The batch API's requests and responses: files, batches, message batches, and deferred calls.

What is not ours goes upstream untouched: files of other purposes, ids that are spelled otherwise, and lists go on with
the upstream's own. An id of ours is answered here, and is unknown to everybody but its owner.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web

from proxy.batch.deferred import DeferredCalls
from proxy.batch.engine import Engine
from proxy.batch.http.batches import Batches
from proxy.batch.http.desk import Desk
from proxy.batch.http.files import Files
from proxy.batch.http.listing import Listing
from proxy.batch.http.messages import MessageBatches
from proxy.batch.http.replies import told_later
from proxy.batch.room import FileRoom
from proxy.client.passing import Passing, PassThrough
from proxy.client.wire import SERVER
from proxy.core.batches import Deferred, Place, is_own
from proxy.core.errors import BadRequest
from proxy.core.model import Limits
from proxy.core.query import Query
from proxy.ports import Upstream
from proxy.records import Client
from proxy.relay import Replay

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
        files_bytes: int,
    ) -> None:
        self.engine = engine
        self.deferred = deferred
        self._passing = passing
        room = FileRoom(engine.shop.store, files_bytes, engine.shop.now_ms)
        desk, listing = Desk(engine, passing, limits, int(keep_s * 1000), room), Listing(upstream)
        files, batches, messages = Files(desk, listing), Batches(desk, listing), MessageBatches(desk, listing)
        self._table: dict[tuple[str, str, bool, str], Handle] = {
            ("files", "POST", False, ""): files.upload,
            ("files", "GET", False, ""): files.listed,
            ("files", "GET", True, ""): files.show,
            ("files", "GET", True, "content"): files.send,
            ("files", "DELETE", True, ""): files.delete,
            ("batches", "POST", False, ""): batches.create,
            ("batches", "GET", False, ""): batches.listed,
            ("batches", "GET", True, ""): batches.show,
            ("batches", "POST", True, "cancel"): batches.cancel,
            ("messages/batches", "POST", False, ""): messages.create,
            ("messages/batches", "GET", False, ""): messages.listed,
            ("messages/batches", "GET", True, ""): messages.show,
            ("messages/batches", "GET", True, "results"): messages.send,
            ("messages/batches", "POST", True, "cancel"): messages.cancel,
            ("messages/batches", "DELETE", True, ""): messages.delete,
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
        return told_later(await self.deferred.accept(query, asked_path, headers))

    async def wait(self, query: Query, client: Client) -> Replay:
        """Take a plain call and return its answer. Raises UpstreamError for one that is a refusal, CacheFault."""
        return await self.deferred.wait(query, client)

    async def _show_deferred(self, _request: web.BaseRequest, asked: Passing, call_id: str) -> web.StreamResponse:
        found = await self.deferred.reply(call_id, asked.tenant, asked.headers)
        if found is None:
            raise BadRequest(f"No deferred call with id '{call_id}'.", status=404, code="not_found", param="id")
        if isinstance(found, Deferred):
            return told_later(found)
        status, headers, body = found
        return web.Response(status=status, headers=[*headers, ("Server", SERVER)], body=body)
