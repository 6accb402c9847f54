"""The headers of a reply that say how it came about: from the verdict, and from the call or the entries that answer."""

from __future__ import annotations

from collections.abc import Sequence

from proxy.core import freshness
from proxy.core.dialects.dialect import JSON
from proxy.core.directives import stale_headers, verdict_headers
from proxy.core.model import Bypass, Entry, Hit, Tier
from proxy.core.query import Query
from proxy.lanes.failover import MOVED, STALE_IF_ERROR
from proxy.money.books import COLLAPSED
from proxy.records import Client, Fetch
from proxy.relay import Head
from proxy.request.settle import Request
from proxy.upstreams.sending import Sending


def hit_head(query: Query, client: Client, hit: Hit, entries: Sequence[Entry], saved_nusd: int, plan: str = "") -> Head:
    """Of a reply from one entry or several; as old as the oldest, and fresh as long as the first to expire."""
    draft, now_ms = entries[0].draft, client.ts_ms
    headers = verdict_headers(
        hit,
        upstream=query.upstream if draft.model == query.model else draft.upstream,
        age_s=max([freshness.age_s(entry.draft.created_ms, now_ms) for entry in entries]),
        ttl_s=min([freshness.remaining_s(e.draft.created_ms, e.draft.expires_ms, now_ms) for e in entries]),
        saved_nusd=saved_nusd,
        cost_nusd=0,
        plan=plan,
    )
    if len(entries) > 1:
        headers = [header for header in headers if header[0] != "x-cache-entry"]
    headers.append(_content_type(query))
    return Head(headers, query.dialect.id_header)


def shared_head(query: Query) -> Head:
    """Of a reply from the answer to another client's call."""
    told = verdict_headers(COLLAPSED, upstream=query.upstream, fwd_status=200, collapsed=True, plan=query.plan.text)
    return Head([*told, _content_type(query)], query.dialect.id_header)


def forward_headers(request: Request, fetch: Fetch, status: int, plan: str = "") -> list[tuple[str, str]]:
    """Of a reply that follows a call, or of what stands in for it."""
    query, client = request.query, request.client
    stale, attempt = fetch.lookup.stale, fetch.attempt
    if fetch.stand_in == STALE_IF_ERROR and stale is not None:
        draft = stale.row.entry.draft
        return stale_headers(
            stale.row.entry.id,
            upstream=query.upstream,
            request_id=client.request_id,
            age_s=freshness.age_s(draft.created_ms, client.ts_ms),
            ttl_s=freshness.remaining_s(draft.created_ms, draft.expires_ms, client.ts_ms),
            plan=plan,
        )
    sending = fetch.sending if attempt is None else attempt.sending
    return verdict_headers(
        request.verdict,
        request_id=client.request_id,
        upstream=sending.upstream,
        fwd_status=fetch.stand_in_for or status,
        collapsed=request.is_collapsed,
        shadow=query.controls.shadow,
        refresh=query.controls.refresh,
        server=_server_of(sending),
        plan=plan,
    )


def _server_of(sending: Sending) -> Tier | None:
    if not (sending.is_other and sending.is_foreign):
        return None
    return Tier.FAILOVER if MOVED in sending.shaped_by else Tier.EDGE


def passed_headers(verdict: Bypass, request_id: str, upstream: str, status: int) -> list[tuple[str, str]]:
    """Of a reply to what no dialect claims, or what could not be read."""
    return verdict_headers(verdict, request_id=request_id, upstream=upstream, fwd_status=status)


def _content_type(query: Query) -> tuple[str, str]:
    return ("Content-Type", f"{query.dialect.stream_type}; charset=utf-8" if query.stream else JSON)
