"""The admin routes as data: what each takes and what it is for, and the OpenAPI page written from that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxy.admin.roles import Role
from proxy.admin.schema import Param
from proxy.core.directives import TAG, TAGS_MAX
from proxy.core.keys import Kind

GROUPS = ("day", "hour", "model", "tenant", "team", "upstream", "namespace", "strategy")
JSON_LINES = "application/x-ndjson"
WITH_BODY = ("POST", "PATCH")
VERDICTS = ("right", "wrong")
NAME = r"[A-Za-z0-9_.-]+"
TICKET = r"[A-Za-z0-9_-]+"
PROJECT = r"[A-Za-z0-9][A-Za-z0-9 ._@/-]*"

CURSOR = r"[0-9]{1,15}:[A-Za-z0-9_.-]+"
TTL_MAX_S = 10 * 365 * 86_400

_LIMIT = Param("limit", "integer", "how many rows at most", default=50)
_CURSOR = Param("cursor", "id", "the next_cursor of the page before")
_PLACE = Param("cursor", "text", "the next_cursor of the page before", pattern=CURSOR)
_SINCE = Param("since", "time", "from then on")
_UNTIL = Param("until", "time", "up to then, its day included")
_NAMESPACE = Param("namespace", "text", "entries of this namespace")
_MODEL = Param("model", "text", "entries of this model")
_ENTRY = Param("id", "id", "entry id", required=True)
_KEY = Param("id", "text", "key id", required=True, pattern=NAME)


@dataclass(frozen=True, slots=True)
class Route:
    """`name` is the handler's name in `Admin`; `body` None means the handler reads a free JSON object itself.

    `role` None: an auditor may GET, and only an admin anything else. `acts` None: what is no GET is written down.
    """

    method: str
    path: str
    name: str
    about: str
    query: tuple[Param, ...] = ()
    body: tuple[Param, ...] | None = ()
    places: tuple[Param, ...] = ()
    is_open: bool = False
    role: Role | None = None
    acts: bool | None = None

    @property
    def needs(self) -> Role:
        """The least role that may ask this."""
        return self.role or (Role.AUDITOR if self.method == "GET" else Role.ADMIN)

    @property
    def is_act(self) -> bool:
        """Whether each call is written down in the table `act`."""
        return not self.is_open and (self.method != "GET" if self.acts is None else self.acts)


ROUTES: tuple[Route, ...] = (
    Route("GET", "/", "page", "the dashboard", is_open=True),
    Route("GET", "/assets/{name}", "asset", "its scripts and styles", is_open=True,
          places=(Param("name", "text", "file name", required=True, pattern=NAME),)),
    Route("GET", "/session", "session", "whether this browser is signed in", is_open=True),
    Route(
        "POST", "/session", "sign_in", "sign this browser in: a cookie for twelve hours", is_open=True,
        body=(
            Param("token", "text", "the admin token", length=4096),
            Param("ticket", "text", "of the one-time link that a terminal shows at the start", pattern=TICKET),
        ),
    ),
    Route("DELETE", "/session", "sign_out", "sign this browser out", is_open=True),
    Route("GET", "/healthz", "healthz", "the process runs; touches nothing", is_open=True),
    Route("GET", "/readyz", "readyz", "200 while traffic can be forwarded; names degraded parts", is_open=True),
    Route("GET", "/metrics", "metrics", "Prometheus text format", role=Role.STATS),
    Route("GET", "/openapi.json", "openapi", "this page", role=Role.STATS),
    Route("GET", "/cache/ping", "ping", "a round trip to the database", role=Role.STATS),
    Route("GET", "/cache/stats", "stats", "entries, hit rate, memory, queues", role=Role.STATS),
    Route(
        "GET", "/cache/entries", "entries", "entries, newest first",
        query=(
            _NAMESPACE, _MODEL,
            Param("tag", "text", "entries that carry this tag"),
            Param("q", "text", "text to find literally in the prompt", length=1000),
            Param("ids", "ids", "these entries"),
            _LIMIT, _CURSOR,
        ),
    ),
    Route("GET", "/cache/entries/{id}", "entry", "one entry with its prompt and answer", places=(_ENTRY,)),
    Route(
        "PATCH", "/cache/entries/{id}", "amend_entry", "another life or other tags for one entry", places=(_ENTRY,),
        body=(
            Param("ttl_s", "integer", "seconds from now that it stays fresh", high=TTL_MAX_S),
            Param("tags", "texts", "its tags from now on; [] for none", pattern=TAG, low=0, high=TAGS_MAX),
        ),
    ),
    Route("DELETE", "/cache/entries/{id}", "delete_entry", "purge one entry", places=(_ENTRY,)),
    Route(
        "POST", "/cache/invalidate", "invalidate", "purge entries that match every field given; a dry run by default",
        body=(
            Param("ids", "ids", "these entries"),
            Param("tags", "texts", "entries that carry at least one of these tags"),
            _NAMESPACE, _MODEL,
            Param("older_than", "time", "entries asked for before this"),
            Param("writer", "text", "entries caused by this request id, or of this tenant", pattern=NAME),
            Param("similar_to", "text", "entries whose question means about this", length=2000, is_private=True),
            Param("above", "share", "how similar those are at least, 0.9 unless told"),
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
        ), body=None, role=Role.AUDITOR, acts=False,
    ),
    Route(
        "POST", "/cache/feedback", "feedback", "wrong takes an entry out of service, right puts it back",
        body=(
            Param("request_id", "text", "the request it was served to", pattern=NAME),
            Param("entry_id", "id", "the entry"),
            Param("comparison_id", "id", "a near-miss: whether its two answers are the same; no entry is touched"),
            Param("verdict", "text", "what it was", required=True, choices=VERDICTS),
        ),
        role=Role.AUDITOR,
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
            Param("max_errors", "shares", "or several budgets, one row for each", high=12),
            Param("without", "texts", "guards to leave out"),
            _NAMESPACE,
            Param("limit", "integer", "newest questions at most", default=5000, high=100_000),
        ),
        role=Role.AUDITOR, acts=False,
    ),
    Route(
        "GET", "/cache/export", "export", "stored answers with their questions as lines of JSON, in id order",
        query=(Param("after", "id", "go on after this entry"), _NAMESPACE), acts=True,
    ),
    Route(
        "POST", "/cache/import", "take_in", "store the lines of an export; what is there already stays",
        query=(
            Param("dry_run", "boolean", "only say what would become of them", default=False),
            Param("purged", "boolean", "store again what a purge removed since", default=False),
        ), body=None,
    ),
    Route(
        "GET", "/cache/acts", "acts", "what administrators did or tried, newest first",
        query=(
            Param("about", "text", "text to find literally in the route or the parameters, as doc:42"),
            _LIMIT, _CURSOR,
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
        role=Role.STATS,
    ),
    Route("GET", "/savings/queries", "queries", "the named queries and the views, with their columns and units",
          role=Role.STATS),
    Route(
        "POST", "/savings/query", "run_query", "a named query, or one read-only SELECT, time- and row-limited",
        body=(
            Param("name", "text", "a named query", pattern=NAME),
            Param("sql", "text", "one SELECT", length=20_000),
            _SINCE, _UNTIL,
            Param("limit", "integer", "how many rows at most", default=1000),
        ),
        role=Role.AUDITOR, acts=False,
    ),
    Route(
        "GET", "/requests", "requests", "ledger rows, newest first",
        query=(
            _LIMIT, _PLACE, _SINCE, _UNTIL,
            Param("model", "text", "requests for this model"),
            Param("cache_status", "text", "requests of this status",
                  choices=("HIT", "MISS", "BYPASS", "REFRESH", "STALE", "SHADOW", "AUDIT")),
            Param("lane", "text", "answered by this lane"),
            Param("reason", "text", "with this reason"),
            Param("team", "text", "of this project's keys"),
            Param("namespace", "text", "of this namespace"),
            Param("entry_id", "id", "served, or nearly served, from this entry"),
            Param("outcome", "text", "that ended so", choices=("ok", "error", "cancelled")),
        ),
    ),
    Route(
        "GET", "/requests/{id}", "request", "one request: what became of it and why, its calls and its steps of money",
        places=(Param("id", "text", "request id", required=True, pattern=NAME),),
    ),
    Route("GET", "/batches", "batches", "batches of every tenant, newest first", query=(_LIMIT, _PLACE)),
    Route("GET", "/docs", "manual", "the manual's pages by name"),
    Route("GET", "/docs/{name}", "manual_page", "one page of the manual, as Markdown",
          places=(Param("name", "text", "its name", required=True, pattern=NAME),)),
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
    kinds = {"metrics": "text/plain", "page": "text/html", "asset": "text/*", "export": JSON_LINES}
    kind = kinds.get(route.name, "application/json")
    out: dict[str, Any] = {
        "operationId": route.name,
        "summary": route.about,
        "parameters": [
            {"name": p.name, "in": place, "required": place == "path" or p.required, "schema": p.schema()}
            for p, place in places
        ],
        "responses": {"200": {"description": "Done", "content": {kind: {}}}, "default": problem},
    }
    out["x-role"] = str(route.needs)
    if route.is_open:
        out["security"] = []
        del out["x-role"]
    if route.method in WITH_BODY and route.body != ():
        schema: dict[str, Any] = {"type": "object"}
        if route.body is not None:
            schema |= {
                "additionalProperties": False,
                "properties": {p.name: p.schema() for p in route.body},
                "required": [p.name for p in route.body if p.required],
            }
        sent = JSON_LINES if route.name == "take_in" else "application/json"
        out["requestBody"] = {"required": True, "content": {sent: {"schema": schema}}}
    return out
