"""What an operator can point at, as SQL conditions: a purge's selector, filters and pages for browsing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, or_, select, true

from proxy.core.errors import BadRequest
from proxy.core.purges import Selector
from proxy.store.schema import entry, entry_tag

PAGE_LIMIT = 1_000


@dataclass(frozen=True, slots=True)
class Filters:
    """Entries to list; None does not filter. `q` is a literal piece of the prompt, letter case ignored for ASCII."""

    namespace: str | None = None
    model: str | None = None
    tag: str | None = None
    q: str | None = None
    quarantined: bool | None = None
    ids: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Listed:
    """One line of a listing: no vectors; the prompt cut to 200 characters."""

    id: int
    namespace: str
    upstream: str
    operation: str
    model: str
    tenant: str
    prompt: str
    answer_bytes: int
    created_ms: int
    expires_ms: int
    used_ms: int
    tags: tuple[str, ...]
    embedder: str | None
    quarantined: bool


@dataclass(frozen=True, slots=True)
class Page:
    """Newest first. `cursor` continues after the last line; None at the end."""

    entries: tuple[Listed, ...]
    cursor: str | None


def purge_condition(selector: Selector) -> ColumnElement[bool] | None:
    """`core.purges.reaches` as SQL, over what is stored; None for a selector that selects nothing."""
    if selector.everything:
        return true()
    conditions: list[ColumnElement[bool]] = []
    if selector.ids:
        conditions.append(entry.c.id.in_(selector.ids))
    if selector.tags:
        conditions.append(_tagged(selector.tags))
    if selector.namespace is not None:
        conditions.append(entry.c.namespace == selector.namespace)
    if selector.model is not None:
        conditions.append(entry.c.model == selector.model)
    if selector.older_than_ms is not None:
        conditions.append(entry.c.created_ms - entry.c.total_ms < selector.older_than_ms)  # `purges.asked_ms`
    if selector.writer is not None:
        conditions.append(or_(entry.c.request_id == selector.writer, entry.c.tenant == selector.writer))
    return _all(conditions) if conditions else None


def filter_condition(filters: Filters, cursor: str | None) -> ColumnElement[bool]:
    """The SQL condition of a listing. Raises BadRequest for a cursor that is not one of ours."""
    conditions: list[ColumnElement[bool]] = [true()]
    if filters.namespace is not None:
        conditions.append(entry.c.namespace == filters.namespace)
    if filters.model is not None:
        conditions.append(entry.c.model == filters.model)
    if filters.tag is not None:
        conditions.append(_tagged((filters.tag,)))
    if filters.q:
        conditions.append(entry.c.prompt.icontains(filters.q, autoescape=True))
    if filters.ids is not None:
        conditions.append(entry.c.id.in_(filters.ids))
    if filters.quarantined is not None:
        conditions.append(entry.c.quarantined == int(filters.quarantined))
    if cursor is not None:
        if not (cursor.isascii() and cursor.isdigit() and len(cursor) < 19):
            raise BadRequest("cursor is not one this listing gave out", code="invalid_value", param="cursor")
        conditions.append(entry.c.id < int(cursor))
    return _all(conditions)


def page_limit(limit: int) -> int:
    """`limit` itself. Raises BadRequest outside 1…1,000."""
    if not 1 <= limit <= PAGE_LIMIT:
        raise BadRequest(f"limit must be 1 to {PAGE_LIMIT}", code="invalid_value", param="limit")
    return limit


def _tagged(tags: Sequence[str]) -> ColumnElement[bool]:
    return entry.c.id.in_(select(entry_tag.c.entry_id).where(entry_tag.c.tag.in_(tags)))


def _all(conditions: list[ColumnElement[bool]]) -> ColumnElement[bool]:
    first: Any = conditions[0]
    for condition in conditions[1:]:
        first = first & condition
    joined: ColumnElement[bool] = first
    return joined
