"""The admin listener: what an operator sees and may change. Nothing here is reachable from the client listener.

A route is one line of ROUTES: method, path, parameters and what it is for. Requests are checked against that line,
`/openapi.json` is written from it, and the test sweep walks it. The work behind a route is `Operations`, which the
composition root implements over the pipeline and the store.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple, Protocol, TypeVar

import orjson
from aiohttp import web

from proxy import ports
from proxy.admin import assets, manual
from proxy.admin.auth import (
    GATE,
    Gate,
    admit,
    check_origin,
    guarded,
    refuse_unguarded,
    sign_in,
    sign_out,
    signed_in,
    unguarded,
)
from proxy.admin.routes import BY_NAME, JSON_LINES, ROUTES, WITH_BODY, describe
from proxy.admin.schema import BODY_LIMIT_BYTES, Values, invalid, read_body, read_bytes, read_query, read_values
from proxy.admin.trail import BROKEN, OUTCOME, Trail, begin, recorder, touched
from proxy.client.incoming import error_response, new_request_id
from proxy.core.errors import BadRequest, CacheFault, IbidError
from proxy.core.purges import Selector
from proxy.watch.telemetry import CONTENT_TYPE, Telemetry

log = logging.getLogger(__name__)

SHOWN_IDS = 1000
ALIKE = 0.9  # similarity from which a purge by meaning selects, unless told
_OWN_HEADERS = frozenset({"authorization", "cookie", "host", "x-api-key", "api-key", "x-goog-api-key"})
DATA_POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Server": "ibid",
}
T = TypeVar("T")


class EntryFilter(NamedTuple):
    """Which entries to list. `q` is looked for literally in the prompt; `cursor` is the last id of the page before."""

    namespace: str | None
    model: str | None
    tag: str | None
    q: str | None
    limit: int
    cursor: int | None
    ids: Sequence[int] | None = None


class Table(NamedTuple):
    """Rows of a query. `truncated`: the row limit cut it."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    truncated: bool = False


class Similar(NamedTuple):
    """Entries by how similar their questions are, the most similar first; `lacking` have no vector to compare."""

    similarities: Mapping[int, float]
    lacking: int


class Operations(Trail, Protocol):
    """What the routes ask of the program. Every method may raise CacheFault (503) and BadRequest (4xx)."""

    def readiness(self) -> Mapping[str, Any]:
        """{"ready": everything is loaded, "degraded": {part: reason}} and, while it is not, "loading": the step under
        way; touches nothing slow, shows no secret."""
        ...

    async def ping(self) -> Mapping[str, Any]:
        """A round trip to the database; {"status": "healthy"} and what it took."""
        ...

    async def stats(self) -> Mapping[str, Any]: ...

    async def entries(self, wanted: EntryFilter) -> Sequence[Mapping[str, Any]]:
        """At most `limit` entries as JSON objects with "id", newest first, ids below `cursor`."""
        ...

    async def entry(self, entry_id: int) -> Mapping[str, Any] | None:
        """One entry with its prompt and answer."""
        ...

    async def amend(self, entry_id: int, ttl_s: int | None, tags: Sequence[str] | None) -> Mapping[str, Any] | None:
        """The entry as `entry` shows it, now fresh for `ttl_s` seconds, with these tags; None leaves one as it is."""
        ...

    async def purge(self, selector: Selector, *, dry_run: bool) -> Sequence[int]:
        """Ids selected, and unless `dry_run` gone from SQL, index and memory before this returns."""
        ...

    async def similar(self, text: str, above: float) -> Similar:
        """Entries of any scope whose question means about this."""
        ...

    async def explain(
        self, path: str, body: bytes, headers: Mapping[str, str], tenant: str | None
    ) -> Mapping[str, Any]:
        """How a request would be answered: candidates, features, guards, verdict, key diff. Serves and stores nothing.

        `path` is where it would be sent, which names the dialect; `headers` are the caller's without its credential;
        `tenant` the digest to look under, else the only tenant.
        """
        ...

    async def feedback(self, request_id: str | None, entry_id: int | None, verdict: str) -> Mapping[str, Any] | None:
        """Record "right" or "wrong" on an entry, or on the one a request was served or nearly served; wrong quarantines
        what was served, right restores it. None when there is no such entry or request."""
        ...

    async def compare(self, comparison_id: int, verdict: str) -> Mapping[str, Any] | None:
        """Record of a near-miss that its answers are the same ("right") or not; None when there is no such one."""
        ...

    async def comparisons(self, limit: int, cursor: int | None, *, near_misses: bool) -> Sequence[Mapping[str, Any]]:
        """Answers that were compared, newest first: after near-misses, or after hits that were audited."""
        ...

    def export(self, after_id: int, namespace: str | None) -> AsyncIterator[tuple[str, bytes]]:
        """(kind, line) as `admin.transfer` has them."""
        ...

    async def take_in(self, pieces: AsyncIterator[bytes], *, dry_run: bool, with_purged: bool) -> Mapping[str, Any]:
        """What became of the lines of an export, as counts."""
        ...

    def policy(self) -> Mapping[str, Any]:
        """The rules that hold, and the evidence the judge has."""
        ...

    def reindex(self) -> Mapping[str, Any]:
        """Start embedding anew what another model embedded, unless it runs; its progress."""
        ...

    async def simulate(self, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        """Stored questions once more under other rules; `wanted` has max_error, model, without, namespace, limit."""
        ...

    def keys(self) -> Sequence[Mapping[str, Any]]:
        """Virtual keys, the newest first, without what they spent."""
        ...

    def key(self, key_id: str) -> Mapping[str, Any] | None:
        """One virtual key with what is spent and what remains of each limit."""
        ...

    async def create_key(self, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
        """A new virtual key with its "secret", which is told this once; `wanted` has the route's values."""
        ...

    async def revoke_key(self, key_id: str) -> Mapping[str, Any] | None: ...

    async def rotate_key(self, key_id: str) -> Mapping[str, Any] | None:
        """The key with its new "secret"; the old one is void."""
        ...

    async def savings(self, group_by: Sequence[str], since_ms: int | None, until_ms: int | None) -> Table: ...

    def queries(self) -> Sequence[Mapping[str, Any]]:
        """Named queries: "name", "about", and "columns" with their units."""
        ...

    def views(self) -> Sequence[Mapping[str, Any]]:
        """The same of the views, for one's own SELECT."""
        ...

    async def named(self, name: str, limit: int, since_ms: int | None, until_ms: int | None) -> Table:
        """A named query over whole days, time- and row-limited. Raises BadRequest for an unknown one."""
        ...

    async def query(self, sql: str, limit: int) -> Table:
        """One read-only statement, time- and row-limited. Raises BadRequest on its fault."""
        ...

    async def requests(self, wanted: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Ledger rows, newest first; `wanted` has the route's values."""
        ...

    async def request(self, request_id: str) -> Mapping[str, Any] | None:
        """One ledger row, its upstream calls and steps of money, how it was looked up, and its story in sentences."""
        ...

    async def batches(self, limit: int, cursor: str | None) -> Sequence[Mapping[str, Any]]:
        """Batches of all tenants, newest first."""
        ...


class Admin:
    """The handlers. One per process; owns nothing."""

    def __init__(self, operations: Operations, telemetry: Telemetry, clock_ms: Callable[[], int] | None = None) -> None:
        self._do = operations
        self._telemetry = telemetry
        self._now_ms = clock_ms or (lambda: int(time.time() * 1000))

    async def _read(self, request: web.Request) -> Values:
        """Path, query and body values of this route, checked. Raises BadRequest naming the parameter.

        What it is asked for is written down, if it is an act, before this returns."""
        route = BY_NAME[str(request.match_info.route.name)]
        now_ms = self._now_ms()
        values = read_values(dict(request.match_info), route.places, now_ms, from_text=True)
        values |= read_query(request, route.query, now_ms)
        if route.body is not None and request.method in WITH_BODY:
            values |= await read_body(request, route.body, now_ms)
        await begin(self._do, request, route, values)
        return values

    @unguarded
    async def page(self, request: web.Request) -> web.Response:
        return assets.response(assets.PAGE)

    @unguarded
    async def asset(self, request: web.Request) -> web.Response:
        values = await self._read(request)
        return assets.response(_found(values["name"] if values["name"] in assets.served() else None, "asset"))

    @unguarded
    async def session(self, request: web.Request) -> web.Response:
        await self._read(request)
        who = signed_in(request)
        return reply({"signed_in": who is not None, "role": None if who is None else str(who.role)})

    @unguarded
    async def sign_in(self, request: web.Request) -> web.Response:
        check_origin(request)
        values = await self._read(request)
        if (values["token"] is None) == (values["ticket"] is None):
            raise invalid("token", "name either token or ticket")
        response = reply({"signed_in": True})
        sign_in(request, response, **values)
        return response

    @unguarded
    async def sign_out(self, request: web.Request) -> web.Response:
        check_origin(request)
        await self._read(request)
        response = reply({"signed_in": False})
        sign_out(request, response)
        return response

    @unguarded
    async def healthz(self, request: web.Request) -> web.Response:
        return reply({"status": "ok"})

    @unguarded
    async def readyz(self, request: web.Request) -> web.Response:
        state = self._do.readiness()
        return reply(state, status=200 if state["ready"] else 503)

    @guarded
    async def metrics(self, request: web.Request) -> web.Response:
        await self._read(request)
        return web.Response(body=self._telemetry.exposition(), headers={"Content-Type": CONTENT_TYPE})

    @guarded
    async def openapi(self, request: web.Request) -> web.Response:
        await self._read(request)
        return reply(describe(importlib.metadata.version("ibid-proxy")))

    @guarded
    async def ping(self, request: web.Request) -> web.Response:
        await self._read(request)
        return reply(await self._do.ping())

    @guarded
    async def stats(self, request: web.Request) -> web.Response:
        await self._read(request)
        return reply(await self._do.stats())

    @guarded
    async def entries(self, request: web.Request) -> web.Response:
        wanted = EntryFilter(**await self._read(request))
        rows = await self._do.entries(wanted)
        more = rows[-1]["id"] if len(rows) == wanted.limit else None
        return reply({"entries": rows, "next_cursor": more})

    @guarded
    async def entry(self, request: web.Request) -> web.Response:
        values = await self._read(request)
        return reply(_found(await self._do.entry(values["id"]), "entry"))

    @guarded
    async def amend_entry(self, request: web.Request) -> web.Response:
        values = await self._read(request)
        if values["ttl_s"] is None and values["tags"] is None:
            raise BadRequest("name ttl_s, tags or both", code="missing_parameter", param="ttl_s")
        amended = _found(await self._do.amend(values["id"], values["ttl_s"], values["tags"]), "entry")
        touched(request, 1)
        return reply(amended)

    @guarded
    async def delete_entry(self, request: web.Request) -> web.Response:
        values = await self._read(request)
        ids = await self._do.purge(Selector(ids=(values["id"],)), dry_run=False)
        touched(request, len(ids))
        return reply(_purged(_found(ids or None, "entry"), dry_run=False))

    @guarded
    async def invalidate(self, request: web.Request) -> web.Response:
        values = await self._read(request)
        dry_run = values.pop("dry_run")
        selector = Selector(
            ids=values["ids"] or (),
            tags=values["tags"] or (),
            namespace=values["namespace"],
            model=values["model"],
            older_than_ms=values["older_than"],
            writer=values["writer"],
        )
        found: Similar | None = None
        if values["similar_to"] is not None:
            found = await self._do.similar(values["similar_to"], values["above"] or ALIKE)
            chosen = set(found.similarities).intersection(selector.ids or found.similarities)
            selector = dataclasses.replace(selector, ids=tuple(sorted(chosen)))
        elif selector == Selector():
            named = ", ".join(name for name in values if name != "above")
            raise BadRequest(f"name at least one of {named}", code="missing_parameter", param="ids")
        nothing_alike = found is not None and not selector.ids
        ids = () if nothing_alike else await self._do.purge(selector, dry_run=dry_run)
        touched(request, len(ids), dry_run=dry_run)
        log.info("purge", extra={"entries": len(ids), "dry_run": dry_run})
        told = _purged(ids, dry_run=dry_run)
        return reply(told if found is None else told | _alike(found, ids))

    @guarded
    async def flush(self, request: web.Request) -> web.Response:
        await self._read(request)
        return reply(_purged(await self._flush(request), dry_run=False))

    @guarded
    async def delete(self, request: web.Request) -> web.Response:
        values = await self._read(request)
        ids = await self._do.purge(Selector(ids=values["keys"]), dry_run=False)
        touched(request, len(ids))
        return reply({"status": "success", "deleted": len(ids)})

    @guarded
    async def flushall(self, request: web.Request) -> web.Response:
        await self._read(request)
        return reply({"status": "success", "deleted": len(await self._flush(request))})

    async def _flush(self, request: web.Request) -> Sequence[int]:
        ids = await self._do.purge(Selector(everything=True), dry_run=False)
        touched(request, len(ids))
        log.warning("flush", extra={"entries": len(ids)})
        return ids

    @guarded
    async def explain(self, request: web.Request) -> web.Response:
        values = await self._read(request)
        body = await read_bytes(request)
        if not body:
            raise BadRequest("send a request as the body", code="missing_body", param="messages")
        headers = {name.lower(): value for name, value in request.headers.items() if name.lower() not in _OWN_HEADERS}
        return reply(await self._do.explain(values["path"], body, headers, values["tenant"]))

    @guarded
    async def feedback(self, request: web.Request) -> web.Response:
        values = await self._read(request)
        named = [name for name in ("entry_id", "request_id", "comparison_id") if values[name] is not None]
        if len(named) != 1:
            raise invalid("entry_id", "name one of entry_id, request_id and comparison_id")
        if named == ["comparison_id"]:
            compared = _found(await self._do.compare(values["comparison_id"], values["verdict"]), "comparison")
            touched(request, 1)
            return reply(compared)
        done = await self._do.feedback(values["request_id"], values["entry_id"], values["verdict"])
        found = _found(done, "entry")
        touched(request, 1)
        return reply(found)

    @guarded
    async def near_misses(self, request: web.Request) -> web.Response:
        return await self._comparisons(request, near_misses=True)

    @guarded
    async def audit(self, request: web.Request) -> web.Response:
        return await self._comparisons(request, near_misses=False)

    async def _comparisons(self, request: web.Request, *, near_misses: bool) -> web.Response:
        values = await self._read(request)
        rows = await self._do.comparisons(values["limit"], values["cursor"], near_misses=near_misses)
        more = rows[-1]["id"] if len(rows) == values["limit"] else None
        return reply({"comparisons": rows, "next_cursor": more})

    # -- taking entries out and in -----------------------------------------------------------------------------------

    @guarded
    async def export(self, request: web.Request) -> web.StreamResponse:
        values = await self._read(request)
        response = web.StreamResponse(headers={"Content-Type": JSON_LINES})
        await response.prepare(request)
        count, kind = 0, ""
        try:
            async for kind, line in self._do.export(values["after"] or 0, values["namespace"]):
                await response.write(line)
                count += kind == "entry"
        except ConnectionResetError:  # whoever read it has gone
            kind = "broken"
        touched(request, count)
        if kind == "broken":
            request[OUTCOME] = BROKEN
        return response  # aiohttp ends it, once the outcome of this act is written down

    @guarded
    async def take_in(self, request: web.Request) -> web.Response:
        if request.content_type not in (JSON_LINES, "application/jsonl", "application/json"):
            raise BadRequest(f"send {JSON_LINES}", code="unsupported_media_type", status=415)
        values = await self._read(request)
        report = await self._do.take_in(
            request.content.iter_any(), dry_run=values["dry_run"], with_purged=values["purged"]
        )
        touched(request, report["stored"], dry_run=values["dry_run"])
        return reply(report)

    # -- the audit trail ---------------------------------------------------------------------------------------------

    @guarded
    async def acts(self, request: web.Request) -> web.Response:
        values = await self._read(request)
        rows = await self._do.acts(values)
        more = rows[-1]["id"] if len(rows) == values["limit"] else None
        return reply({"acts": rows, "next_cursor": more})

    # -- the judge ---------------------------------------------------------------------------------------------------

    @guarded
    async def policy(self, request: web.Request) -> web.Response:
        await self._read(request)
        return reply(self._do.policy())

    @guarded
    async def reindex(self, request: web.Request) -> web.Response:
        await self._read(request)
        return reply(self._do.reindex())

    @guarded
    async def simulate(self, request: web.Request) -> web.Response:
        values = await self._read(request)
        if values["max_error"] is not None and values["max_errors"] is not None:
            raise invalid("max_errors", "name either max_error or max_errors")
        return reply(await self._do.simulate(values))

    @guarded
    async def keys(self, request: web.Request) -> web.Response:
        await self._read(request)
        return reply({"keys": self._do.keys()})

    @guarded
    async def key(self, request: web.Request) -> web.Response:
        values = await self._read(request)
        return reply(_found(self._do.key(values["id"]), "key"))

    @guarded
    async def create_key(self, request: web.Request) -> web.Response:
        made = await self._do.create_key(await self._read(request))
        touched(request, 1)
        log.info("key created", extra={"virtual": made["id"], "project": made["project"]})
        return reply(made)

    @guarded
    async def revoke_key(self, request: web.Request) -> web.Response:
        values = await self._read(request)
        revoked = _found(await self._do.revoke_key(values["id"]), "key")
        touched(request, 1)
        log.info("key revoked", extra={"virtual": values["id"]})
        return reply(revoked)

    @guarded
    async def rotate_key(self, request: web.Request) -> web.Response:
        values = await self._read(request)
        rotated = _found(await self._do.rotate_key(values["id"]), "key")
        touched(request, 1)
        log.info("key rotated", extra={"virtual": values["id"]})
        return reply(rotated)

    @guarded
    async def savings(self, request: web.Request) -> web.Response:
        values = await self._read(request)
        return reply(_shown(await self._do.savings(values["group_by"], values["since"], values["until"])))

    @guarded
    async def queries(self, request: web.Request) -> web.Response:
        await self._read(request)
        return reply({"queries": self._do.queries(), "views": self._do.views()})

    @guarded
    async def run_query(self, request: web.Request) -> web.Response:
        values = await self._read(request)
        if (values["name"] is None) == (values["sql"] is None):
            raise invalid("name", "name either name or sql")
        name, limit, since, until = values["name"], values["limit"], values["since"], values["until"]
        if name is not None:
            return reply(_shown(await self._do.named(name, limit, since, until)))
        if since is not None or until is not None:
            raise invalid("since", "goes with a named query; write it into your own SQL")
        return reply(_shown(await self._do.query(values["sql"], limit)))

    @guarded
    async def requests(self, request: web.Request) -> web.Response:
        values = await self._read(request)
        rows = await self._do.requests(values)
        more = f"{rows[-1]['ts']}:{rows[-1]['id']}" if len(rows) == values["limit"] else None
        return reply({"requests": rows, "next_cursor": more})

    @guarded
    async def request(self, request: web.Request) -> web.Response:
        values = await self._read(request)
        return reply(_found(await self._do.request(values["id"]), "request"))

    @guarded
    async def batches(self, request: web.Request) -> web.Response:
        values = await self._read(request)
        rows = await self._do.batches(values["limit"], values["cursor"])
        more = f"{rows[-1]['created_ms']}:{rows[-1]['id']}" if len(rows) == values["limit"] else None
        return reply({"batches": rows, "next_cursor": more})

    @guarded
    async def manual(self, request: web.Request) -> web.Response:
        await self._read(request)
        return reply({"pages": [manual.LIST, *manual.names()]})

    @guarded
    async def manual_page(self, request: web.Request) -> web.Response:
        values = await self._read(request)
        return reply({"name": values["name"], "markdown": _found(manual.markdown(values["name"]), "page")})


def build(operations: Operations, telemetry: Telemetry, gate: Gate) -> web.Application:
    """The admin application, ready for a runner. Raises ConfigError when a route does not check who asks."""
    app = web.Application(middlewares=[edge, recorder(operations)], client_max_size=BODY_LIMIT_BYTES)
    app[GATE] = gate
    app.on_response_prepare.append(_secure)
    admin = Admin(operations, telemetry)
    for route in ROUTES:
        app.router.add_route(route.method, route.path, getattr(admin, route.name), name=route.name)
    refuse_unguarded(app)
    return app


@web.middleware
async def edge(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """This listener's outer edge: the only place that makes an error's response, and its last resort."""
    try:
        try:
            return await handler(request)
        except web.HTTPException as error:  # the router's own 404 and 405: strangers do not learn which
            admit(request)
            allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
            response = error_response(
                BadRequest(error.reason, code=error.reason.lower().replace(" ", "_"), status=error.status),
                new_request_id(),
            )
            response.headers.update(allow)
            return response
    except CacheFault as fault:
        return error_response(CacheFault(fault.message, code=fault.code, status=503), new_request_id())
    except IbidError as error:
        response = error_response(error, new_request_id())
        if error.status == 401:
            response.headers["WWW-Authenticate"] = 'Bearer realm="ibid admin"'
        return response
    except ports.CACHE_FAULTS as fault:
        code = getattr(fault, "reason", "timeout")
        return error_response(CacheFault("the cache cannot answer now", code=code, status=503), new_request_id())
    except Exception:  # a bug of ours: logged here, and nothing of it shown
        log.exception("an admin route failed", extra={"route": request.match_info.route.name})
        return error_response(IbidError("internal error"), new_request_id())


async def _secure(request: web.Request, response: web.StreamResponse) -> None:
    for name, value in SECURITY_HEADERS.items():
        response.headers[name] = value
    response.headers.setdefault("Content-Security-Policy", DATA_POLICY)


def reply(value: object, *, status: int = 200) -> web.Response:
    """A JSON response."""
    body = orjson.dumps(value, default=_plain, option=orjson.OPT_NON_STR_KEYS)
    return web.Response(body=body, status=status, content_type="application/json")


def _plain(value: object) -> object:
    """What databases return and JSON does not know."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes | memoryview):
        return bytes(value).hex()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(type(value).__name__)


def _found(value: T | None, what: str) -> T:
    if value is None:
        raise BadRequest(f"no such {what}", code="not_found", status=404, param="id")
    return value


def _purged(ids: Sequence[int], *, dry_run: bool) -> dict[str, Any]:
    return {"dry_run": dry_run, "count": len(ids), "ids": list(ids[:SHOWN_IDS])}


def _alike(found: Similar, ids: Sequence[int]) -> dict[str, Any]:
    """The similarity of what was selected, the most similar first, and how many entries could not be compared."""
    selected = set(ids)
    nearest = [(entry_id, likeness) for entry_id, likeness in found.similarities.items() if entry_id in selected]
    shown = [{"id": entry_id, "similarity": round(likeness, 4)} for entry_id, likeness in nearest[:SHOWN_IDS]]
    return {"nearest": shown, "not_compared": found.lacking}


def _shown(table: Table) -> dict[str, Any]:
    return {"columns": list(table.columns), "rows": [list(row) for row in table.rows], "truncated": table.truncated}
