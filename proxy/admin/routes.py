"""The admin routes as data: what each takes and what it is for, and the OpenAPI page written from that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxy.admin.schema import Param
from proxy.core.keys import Kind

GROUPS = ("day", "model", "tenant", "team", "upstream", "namespace", "strategy")
VERDICTS = ("right", "wrong")
NAME = r"[A-Za-z0-9_.-]+"
PROJECT = r"[A-Za-z0-9][A-Za-z0-9 ._@/-]*"

_LIMIT = Param("limit", "integer", "how many rows at most", default=50)
_CURSOR = Param("cursor", "id", "the next_cursor of the page before")
_SINCE = Param("since", "time", "from then on")
_UNTIL = Param("until", "time", "up to then, its day included")
_NAMESPACE = Param("namespace", "text", "entries of this namespace")
_MODEL = Param("model", "text", "entries of this model")
_ENTRY = Param("id", "id", "entry id", required=True)
_KEY = Param("id", "text", "key id", required=True, pattern=NAME)


@dataclass(frozen=True, slots=True)
class Route:
    """`name` is the handler's name in `Admin`; `body` None means the handler reads a free JSON object itself."""

    method: str
    path: str
    name: str
    about: str
    query: tuple[Param, ...] = ()
    body: tuple[Param, ...] | None = ()
    places: tuple[Param, ...] = ()
    is_open: bool = False


ROUTES: tuple[Route, ...] = (
    Route("GET", "/", "page", "where things are", is_open=True),
    Route("GET", "/healthz", "healthz", "the process runs; touches nothing", is_open=True),
    Route("GET", "/readyz", "readyz", "200 while traffic can be forwarded; names degraded parts", is_open=True),
    Route("GET", "/metrics", "metrics", "Prometheus text format"),
    Route("GET", "/openapi.json", "openapi", "this page"),
    Route("GET", "/cache/ping", "ping", "a round trip to the database"),
    Route("GET", "/cache/stats", "stats", "entries, hit rate, memory, queues"),
    Route(
        "GET", "/cache/entries", "entries", "entries, newest first",
        query=(
            _NAMESPACE, _MODEL,
            Param("tag", "text", "entries that carry this tag"),
            Param("q", "text", "text to find literally in the prompt", length=1000),
            _LIMIT, _CURSOR,
        ),
    ),
    Route("GET", "/cache/entries/{id}", "entry", "one entry with its prompt and answer", places=(_ENTRY,)),
    Route("DELETE", "/cache/entries/{id}", "delete_entry", "purge one entry", places=(_ENTRY,)),
    Route(
        "POST", "/cache/invalidate", "invalidate", "purge entries that match every field given; a dry run by default",
        body=(
            Param("ids", "ids", "these entries"),
            Param("tags", "texts", "entries that carry at least one of these tags"),
            _NAMESPACE, _MODEL,
            Param("older_than", "time", "entries asked for before this"),
            Param("writer", "text", "entries caused by this request id", pattern=NAME),
            Param("dry_run", "boolean", "only say which", default=True),
        ),
    ),
    Route(
        "POST", "/cache/flush", "flush", "purge everything",
        body=(Param("confirm", "text", "must be the word flush", required=True, choices=("flush",)),),
    ),
    Route(
        "POST", "/cache/delete", "delete", "purge entries, as LiteLLM spells it",
        body=(Param("keys", "ids", "entry ids, as x-cache-entry gives them", required=True),),
    ),
    Route("POST", "/cache/flushall", "flushall", "purge everything, as LiteLLM spells it"),
    Route(
        "POST", "/cache/explain", "explain", "how a request would be answered; nothing is served or stored",
        query=(
            Param("tenant", "text", "look as this tenant", pattern="[0-9a-f]{64}"),
            Param("path", "text", "where it would be sent, which names its dialect", default="/v1/chat/completions",
                  pattern="/[!-~]*"),
        ), body=None,
    ),
    Route(
        "POST", "/cache/feedback", "feedback", "wrong takes an entry out of service, right puts it back",
        body=(
            Param("request_id", "text", "the request it was served to", pattern=NAME),
            Param("entry_id", "id", "the entry"),
            Param("verdict", "text", "what it was", required=True, choices=VERDICTS),
        ),
    ),
    Route("GET", "/cache/near-misses", "near_misses", "what was forwarded, and compared with what was nearly served",
          query=(_LIMIT, _CURSOR)),
    Route("GET", "/cache/audit", "audit", "hits that were asked again upstream, and what came of it",
          query=(_LIMIT, _CURSOR)),
    Route("GET", "/cache/policy", "policy", "the rules that hold, and the evidence the judge has"),
    Route("POST", "/cache/reindex", "reindex", "embed anew, in the background, what another model embedded"),
    Route(
        "POST", "/cache/simulate", "simulate", "stored questions once more under other rules",
        body=(
            Param("max_error", "share", "the budget"),
            Param("without", "texts", "guards to leave out"),
            _NAMESPACE,
            Param("limit", "integer", "newest questions at most", default=5000, high=100_000),
        ),
    ),
    Route("GET", "/cache/keys", "keys", "virtual keys, newest first"),
    Route(
        "POST", "/cache/keys", "create_key", "a new virtual key; its secret is told this once",
        body=(
            Param("project", "text", "whose entries it reads and writes", required=True, length=100, pattern=PROJECT),
            Param("name", "text", "what it is for", length=100),
            *(Param(f"limit_{kind.value}", "texts", f"at most so many {kind.value} in each window, as in 10/day")
              for kind in Kind),
            Param("models", "texts", "patterns of the models it may ask, with * and ?"),
            Param("plan", "text", "lanes of its requests, as in x-plan"),
            Param("expires", "text", "when it ends: after an age such as 90d, or at an ISO 8601 time"),
        ),
    ),
    Route("GET", "/cache/keys/{id}", "key", "one virtual key: what is spent and what remains", places=(_KEY,)),
    Route("POST", "/cache/keys/{id}/revoke", "revoke_key", "close a virtual key for good", places=(_KEY,)),
    Route("POST", "/cache/keys/{id}/rotate", "rotate_key", "a new secret for a virtual key; the old one is void",
          places=(_KEY,)),
    Route(
        "GET", "/savings", "savings", "what was saved, by whole days in UTC",
        query=(Param("group_by", "choices", "columns", default=("day",), choices=GROUPS), _SINCE, _UNTIL),
    ),
    Route("GET", "/savings/queries", "queries", "the named queries and the views, with their columns and units"),
    Route(
        "POST", "/savings/query", "run_query", "a named query, or one read-only SELECT, time- and row-limited",
        body=(
            Param("name", "text", "a named query", pattern=NAME),
            Param("sql", "text", "one SELECT", length=20_000),
            Param("limit", "integer", "how many rows at most", default=1000),
        ),
    ),
    Route(
        "GET", "/requests", "requests", "ledger rows, newest first",
        query=(_LIMIT, _SINCE, _UNTIL, Param("model", "text", "requests for this model"),
               Param("cache_status", "text", "requests of this status",
                     choices=("HIT", "MISS", "BYPASS", "REFRESH", "STALE", "SHADOW", "AUDIT"))),
    ),
    Route(
        "GET", "/requests/{id}", "request", "one request with its upstream calls and savings steps",
        places=(Param("id", "text", "request id", required=True, pattern=NAME),),
    ),
)  # fmt: skip

BY_NAME: Mapping[str, Route] = {route.name: route for route in ROUTES}


def describe(version: str) -> dict[str, Any]:
    """The routes as OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    error = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "ibid admin", "version": version},
        "paths": paths,
        "components": {
            "schemas": {"Error": error},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"token": []}],
    }


def _operation(route: Route) -> dict[str, Any]:
    places = [(param, "path") for param in route.places] + [(param, "query") for param in route.query]
    problem = {
        "description": "Error",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    kind = {"metrics": "text/plain", "page": "text/html"}.get(route.name, "application/json")
    out: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.about,
        "parameters": [
            {"name": p.name, "in": place, "required": place == "path" or p.required, "schema": p.schema()}
            for p, place in places
        ],
        "responses": {"200": {"description": "Done", "content": {kind: {}}}, "default": problem},
    }
    if route.is_open:
        out["security"] = []
    if route.method == "POST" and route.body != ():
        schema: dict[str, Any] = {"type": "object"}
        if route.body is not None:
            schema |= {
                "additionalProperties": False,
                "properties": {p.name: p.schema() for p in route.body},
                "required": [p.name for p in route.body if p.required],
            }
        out["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return out
