"""Lists: ours, and behind ours the upstream's own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final
from urllib.parse import urlencode

import orjson
from aiohttp import web

from proxy.batch.http.replies import reply
from proxy.client.passing import Passing
from proxy.core.batches import is_own
from proxy.core.errors import BadRequest, UpstreamError
from proxy.ports import Upstream

REPLY_LIMIT_BYTES: Final = 8 * 1024 * 1024

Listed = Sequence[dict[str, Any]]


class Listing:
    """Pages of lists."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def page(
        self,
        request: web.BaseRequest,
        asked: Passing,
        own: list[dict[str, Any]],
        limit: int,
        hidden: Callable[[Listed], Awaitable[set[str]]],
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
        return reply(asked, {**kind, "data": shown, **ends, "has_more": has_more})

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


def limit_of(request: web.BaseRequest, default: int, most: int) -> int:
    said = request.query.get("limit", str(default))
    if not said.isascii() or not said.isdigit() or not 1 <= int(said) <= most:
        message = f"Invalid 'limit': expected an integer from 1 to {most}."
        raise BadRequest(message, code="invalid_value", param="limit")
    return int(said)
