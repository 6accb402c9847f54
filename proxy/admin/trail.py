"""Every act goes into SQL: begun before anything changes, ended with what came of it. No act without its row: where the
row cannot be written the act is refused."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from aiohttp import web

from proxy.admin.auth import WHO, Refused
from proxy.admin.roles import Who
from proxy.admin.routes import BY_NAME, Route
from proxy.admin.schema import Values
from proxy.core.errors import CacheFault, IbidError

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

ACT = web.RequestKey("act", int)
TOUCHED = web.RequestKey("touched", int)
OUTCOME = web.RequestKey("outcome", str)
DONE: Final = "done"
DRY_RUN: Final = "dry run"
BROKEN: Final = "broken off"


class Recorder(Protocol):
    """A middleware."""

    def __call__(self, request: web.Request, handler: Handler) -> Awaitable[web.StreamResponse]: ...


class Trail(Protocol):
    """Where acts are written down. Every method may raise CacheFault."""

    async def begin_act(self, who: Who, route: str, parameters: Mapping[str, Any]) -> int:
        """Id of a new row."""
        ...

    async def end_act(self, act_id: int, outcome: str, touched: int | None) -> None: ...

    async def acts(self, wanted: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Newest first; `wanted` has limit, cursor, about."""
        ...


async def begin(trail: Trail, request: web.Request, route: Route, values: Values) -> None:
    """Call it once the parameters are known and before anything is changed. Raises CacheFault."""
    if route.is_act:
        request[ACT] = await trail.begin_act(request[WHO], f"{route.method} {route.path}", told(route, values))


def touched(request: web.Request, count: int, *, dry_run: bool = False) -> None:
    """Say how many rows the act of this request reached."""
    request[TOUCHED] = count
    request[OUTCOME] = DRY_RUN if dry_run else DONE


def told(route: Route, values: Values) -> dict[str, Any]:
    """The parameters as they are written down: of a private text its length alone."""
    private = {param.name for param in (*route.query, *(route.body or ())) if param.is_private}
    return {
        name: f"{len(value)} characters" if name in private else value
        for name, value in values.items()
        if value is not None
    }


def recorder(trail: Trail) -> Recorder:
    """A middleware that ends what `begin` began, and writes down acts that a token's role did not allow."""

    @web.middleware
    async def recorded(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response = await handler(request)
        except Refused as refusal:
            if refusal.code == "role_needed":
                await _note_refused(trail, request, refusal.code)
            raise
        except IbidError as error:
            await _end(trail, request, error.code)
            raise
        except Exception:
            await _end(trail, request, "internal_error")
            raise
        await _end(trail, request, request.get(OUTCOME, DONE))
        return response

    return recorded


async def _note_refused(trail: Trail, request: web.Request, outcome: str) -> None:
    route = BY_NAME[str(request.match_info.route.name)]
    if not route.is_act:
        return
    try:
        request[ACT] = await trail.begin_act(request[WHO], f"{route.method} {route.path}", dict(request.match_info))
    except CacheFault as fault:
        log.warning("a refused act was not written down", extra={"route": route.name, "reason": fault.code})
    await _end(trail, request, outcome)


async def _end(trail: Trail, request: web.Request, outcome: str) -> None:
    """The act is over either way: where its end cannot be written, its row goes on saying "begun"."""
    if (act_id := request.get(ACT)) is None:
        return
    try:
        await trail.end_act(act_id, outcome, request.get(TOUCHED))
    except CacheFault as fault:
        log.error("the outcome of an act was not written down", extra={"act": act_id, "reason": fault.code})
