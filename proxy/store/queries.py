"""Questions finance and operators ask of the ledger: named queries, a grouped summary, and any read-only SQL.

Every text here means the same on SQLite and PostgreSQL; a test runs all of them on both and compares the rows.
Free SQL is held by the database itself, not by reading the text: SQLite opens the file read-only with an authorizer
that allows nothing but reading, PostgreSQL runs it in a read-only transaction; both under a time, row and byte limit.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

from sqlalchemy import and_, case, func, not_, or_, select, text
from sqlalchemy.exc import DBAPIError

from proxy.core.errors import BadRequest, CacheFault
from proxy.core.rates import Rating
from proxy.core.reconcile import Billed
from proxy.core.saving import day_of
from proxy.core.units import DAY_MS, LAST_MS
from proxy.store.engine import DATABASE_ERRORS, Database, fault_of
from proxy.store.named_queries import GROUPS, NAMED, PRICED_CALLS, NamedQuery, Rated, grouped, with_rates
from proxy.store.schema import request, upstream_call

ROW_LIMIT = 10_000
BYTE_LIMIT = 16 * 1024 * 1024
VALUE_LIMIT = 1024 * 1024
RATED_LIMIT = 2_000  # models priced in one query, the dearest first; others count as unpriced
AFTER_LAST_MS = LAST_MS + 1000  # the year 10000
PROGRESS_STEPS = 10_000  # SQLite instructions between two looks at the clock

_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_FORBIDDEN_FUNCTIONS = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"}


@dataclass(frozen=True, slots=True)
class Result:
    """A table of plain values. `truncated`: more rows or bytes existed than the limit allowed."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    truncated: bool


class Queries:
    """Reads for people. Raises BadRequest for a bad query, CacheFault for a database that does not answer.

    `rating`: `Prices(...).rates`, for the queries that price tokens; without it they price none.
    """

    def __init__(self, database: Database, rating: Rating | None = None) -> None:
        self._database = database
        self._rating = rating

    def list(self) -> tuple[NamedQuery, ...]:
        """The named queries with their titles, columns and units."""
        return tuple(NAMED.values())

    async def named(
        self, name: str, *, since_day: str = "", until_day: str = "9999", row_limit: int = 1_000, timeout_s: float = 10
    ) -> Result:
        """A named query over the days since_day ≤ day ≤ until_day, "2026-11-22"."""
        query = NAMED.get(name)
        if query is None:
            raise BadRequest(f"no query named {name[:64]!r}", code="unknown_query", param="name")
        days: dict[str, Any] = {"since": since_day, "until": until_day, **_milliseconds(since_day, until_day)}
        if not query.priced:
            return await self._run(query.sql, days, row_limit, timeout_s)
        sql, names = with_rates(query.sql, await self._rated(days, timeout_s))
        return await self._run(sql, {**days, **names}, row_limit, timeout_s)

    async def _rated(self, days: Mapping[str, Any], timeout_s: float) -> Sequence[Rated]:
        """The rates of every model called in these days, in the tiers it was called in and in a batch."""
        if self._rating is None:
            return ()
        called = (await self._run(PRICED_CALLS, days, RATED_LIMIT, timeout_s)).rows
        wanted = {(upstream, model, at): ts_ms for upstream, model, tier, ts_ms in called for at in (tier, "batch")}
        found = [(key, self._rating(*key, ts_ms)) for key, ts_ms in wanted.items()]
        return [Rated(*key, rates) for key, rates in found if rates is not None]

    async def savings(
        self,
        group_by: Sequence[str] = ("day",),
        *,
        since_day: str = "",
        until_day: str = "9999",
        row_limit: int = 1_000,
        timeout_s: float = 10,
    ) -> Result:
        """Requests and money by any of day, hour (as its first epoch ms), model, tenant, team, upstream, namespace,
        strategy.

        With "strategy" the rows are waterfall steps: `requests` counts those with such a step, and the money is what
        the step saved (`before_usd`, `after_usd`, `saved_usd`).
        """
        unknown = [name for name in group_by if name not in GROUPS and name != "strategy"]
        if unknown or not group_by or len(set(group_by)) != len(group_by):
            raise BadRequest("group_by must be of " + ", ".join([*GROUPS, "strategy"]), code="invalid_value",
                             param="group_by")  # fmt: skip
        return await self._run(grouped(group_by), {"since": since_day, "until": until_day}, row_limit, timeout_s)

    async def request(self, request_id: str) -> dict[str, Any] | None:
        """One request with its calls, its waterfall, and `lookup`: how it was looked up, None where that is not kept.

        None when the ledger does not know it.
        """
        parts = {}
        for name, table, column in (("request", "request", "id"), ("calls", "upstream_call", "request_id"),
                                    ("savings", "saving", "request_id"),
                                    ("lookup", "lookup", "request_id")):  # fmt: skip
            order = {"request": "id", "calls": "ts, id", "savings": "step", "lookup": "request_id"}[name]
            found = await self._run(f"SELECT * FROM {table} WHERE {column} = :id ORDER BY {order}",
                                    {"id": request_id}, ROW_LIMIT, 5.0)  # fmt: skip
            parts[name] = [dict(zip(found.columns, row, strict=True)) for row in found.rows]
        if not parts["request"]:
            return None
        looked = json.loads(parts["lookup"][0]["record"]) if parts["lookup"] else None
        return {**parts["request"][0], "calls": parts["calls"], "savings": parts["savings"], "lookup": looked}

    async def billed(
        self, since_day: str, until_day: str, upstreams: Sequence[str] | None, operations: str = "all"
    ) -> Sequence[Billed]:
        """Calls a provider may bill, summed by UTC day of the call, model and tier; both days inclusive.

        `upstreams`: None for every one. `operations`: "embeddings", "others" than those, or "all". A call that failed
        and told no usage is not billed.
        """
        c, times = upstream_call.c, _milliseconds(since_day, until_day)
        day, estimated = c.ts // DAY_MS, case((c.usage_basis == "measured", 0), else_=1)
        unpriced = case((c.cost_basis == "unpriced", 1), else_=0)
        told = [c.in_tok, c.cache_read_tok, c.cache_write_tok, c.out_tok, c.cost_nusd, estimated, unpriced]
        wanted = (
            select(day, c.model, c.tier, func.count(), *(func.coalesce(func.sum(one), 0) for one in told))
            .where(c.ts >= times["since_ms"], c.ts < times["until_ms"], or_(c.status < 400, c.in_tok.is_not(None)))
            .group_by(day, c.model, c.tier)
        )
        if upstreams is not None:
            wanted = wanted.where(c.upstream.in_(upstreams))
        if operations != "all":
            embeds = request.c.endpoint.endswith("embeddings", autoescape=True)
            wanted = wanted.join(request, request.c.id == c.request_id)
            wanted = wanted.where(embeds if operations == "embeddings" else not_(embeds))
        rows = await self._database.rows(wanted)
        return [Billed(day_of(row[0] * DAY_MS), row[1], row[2], *map(int, row[3:])) for row in rows]

    async def requests(
        self,
        *,
        limit: int = 50,
        cursor: str | None = None,
        since: int | None = None,
        until: int | None = None,
        model: str | None = None,
        **wanted_of: Any,
    ) -> tuple[dict[str, Any], ...]:
        """Ledger rows, newest first; `since` (inclusive) and `until` (exclusive) in epoch milliseconds.

        `cursor`: "ts:id" of the last row of the page before. `wanted_of`: columns and the value that each must have;
        None does not filter.
        """
        c = request.c
        wanted = select(request).order_by(c.day.desc(), c.ts.desc(), c.id.desc()).limit(_row_limit(limit))
        if since is not None:
            wanted = wanted.where(c.day >= day_of(since), c.ts >= since)
        if until is not None:
            wanted = wanted.where(c.day <= day_of(until), c.ts < until)
        if cursor is not None:
            ts, _, last_id = cursor.partition(":")
            last = min(int(ts), LAST_MS)
            wanted = wanted.where(c.day <= day_of(last), or_(c.ts < last, and_(c.ts == last, c.id < last_id)))
        for name, value in {"model_requested": model, **wanted_of}.items():
            if value is not None:
                wanted = wanted.where(c[name] == value)
        names = request.c.keys()
        return tuple(dict(zip(names, row, strict=True)) for row in await self._database.rows(wanted))

    async def run_readonly(self, sql: str, *, row_limit: int = 1_000, timeout_s: float = 10) -> Result:
        """The operator's own SELECT, one statement. Raises BadRequest (invalid_sql, query_timeout), CacheFault."""
        if not sql.strip() or "\x00" in sql or len(sql) > 100_000:
            raise BadRequest("sql must be one SELECT", code="invalid_sql", param="sql")
        if self._database.path is not None:
            return await asyncio.to_thread(_run_sqlite, self._database.path, sql, {}, row_limit, timeout_s)
        return await self._run_postgres(sql, None, row_limit, timeout_s)

    async def _run(self, sql: str, parameters: Mapping[str, Any], row_limit: int, timeout_s: float) -> Result:
        if self._database.path is not None:
            return await asyncio.to_thread(_run_sqlite, self._database.path, sql, parameters, row_limit, timeout_s)
        return await self._run_postgres(sql, parameters, row_limit, timeout_s)

    async def _run_postgres(
        self, sql: str, parameters: Mapping[str, Any] | None, row_limit: int, timeout_s: float
    ) -> Result:
        limit = _row_limit(row_limit)
        first = sql.lstrip(" \t\r\n(").split(None, 1)
        if not first or first[0].lower() not in {"select", "with", "values", "table", "explain"}:
            raise BadRequest("sql must be one SELECT", code="invalid_sql", param="sql")
        try:
            async with self._database.reader.connect() as connection:
                await connection.exec_driver_sql("SET TRANSACTION READ ONLY")
                await connection.exec_driver_sql(f"SET LOCAL statement_timeout = {max(int(timeout_s * 1000), 1)}")
                if parameters is None:
                    raw: Any = (await connection.get_raw_connection()).driver_connection
                    prepared = await raw.prepare(sql, timeout=timeout_s)
                    columns = [attribute.name for attribute in prepared.get_attributes()]
                    cursor = await prepared.cursor()
                    rows: Sequence[Any] = await cursor.fetch(limit + 1, timeout=timeout_s)
                else:
                    found = await connection.execute(text(sql), dict(parameters))
                    columns, rows = list(found.keys()), found.fetchmany(limit + 1)
        except DATABASE_ERRORS as error:
            raise _sql_error(error) from error
        return _result(columns, [tuple(_plain(value) for value in row) for row in rows], limit)


def _run_sqlite(path: Path, sql: str, parameters: Mapping[str, Any], row_limit: int, timeout_s: float) -> Result:
    """Runs in a thread, on a connection of its own that can only read."""
    limit = _row_limit(row_limit)
    deadline = time.monotonic() + timeout_s
    try:
        connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=1.0, isolation_level=None)
    except sqlite3.Error as error:
        raise fault_of(error) from error
    try:
        connection.execute("PRAGMA query_only=ON")
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, VALUE_LIMIT)
        connection.set_authorizer(_authorize)
        connection.set_progress_handler(lambda: int(time.monotonic() > deadline), PROGRESS_STEPS)
        cursor = connection.execute(sql, dict(parameters))
        columns = [column[0] for column in cursor.description or ()]
        rows: list[tuple[Any, ...]] = []
        size = 0
        for row in cursor:
            rows.append(tuple(_plain(value) for value in row))
            size += sum(len(value) for value in row if isinstance(value, str | bytes))
            if len(rows) > limit or size > BYTE_LIMIT:
                break
        return _result(columns, rows, limit, size > BYTE_LIMIT)
    except (sqlite3.Error, sqlite3.Warning) as error:
        raise _sql_error(error) from error
    finally:
        connection.close()


def _authorize(action: int, first: str | None, second: str | None, _db: str | None, _trigger: str | None) -> int:
    if action not in _ALLOWED:
        return sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _FORBIDDEN_FUNCTIONS:
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def _milliseconds(since_day: str, until_day: str) -> dict[str, int]:
    """The same days as times: from the first's begin to the last's end. "" and "9999" are open ends."""
    first = _begin_ms(since_day, "since") if since_day else 0
    last = AFTER_LAST_MS if until_day == "9999" else _begin_ms(until_day, "until") + DAY_MS
    return {"since_ms": first, "until_ms": last}


def _begin_ms(day: str, name: str) -> int:
    try:
        return (date.fromisoformat(day) - date(1970, 1, 1)).days * DAY_MS
    except ValueError as error:
        raise BadRequest(f"{name} must be a day, 2026-11-22", code="invalid_value", param=name) from error


def _row_limit(row_limit: int) -> int:
    if not 1 <= row_limit <= ROW_LIMIT:
        raise BadRequest(f"limit must be 1 to {ROW_LIMIT}", code="invalid_value", param="limit")
    return row_limit


def _result(columns: Sequence[str], rows: list[tuple[Any, ...]], limit: int, cut: bool = False) -> Result:
    if not columns:
        raise BadRequest("sql must be one SELECT", code="invalid_sql", param="sql")
    return Result(tuple(columns), tuple(rows[:limit]), cut or len(rows) > limit)


def _plain(value: Any) -> Any:
    """A value JSON has a form for: bytes as hex, PostgreSQL's numeric as int or float."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _sql_error(error: BaseException) -> BadRequest | CacheFault:
    """Whose fault a failed query is: the text's (BadRequest), or the database's (CacheFault)."""
    original = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    name = str(getattr(original, "sqlite_errorname", None) or getattr(original, "sqlstate", None) or "")
    if name in {"SQLITE_INTERRUPT", "57014"} or isinstance(original, TimeoutError):
        return BadRequest("the query took too long and was stopped", code="query_timeout", param="sql")
    if name in {"SQLITE_ERROR", "SQLITE_AUTH", "SQLITE_TOOBIG", "SQLITE_READONLY", "SQLITE_SCHEMA"}:
        return BadRequest(f"sql: {str(original)[:300]}", code="invalid_sql", param="sql")
    if isinstance(original, sqlite3.Warning | sqlite3.ProgrammingError) or name[:2] in {"42", "22", "25", "0A"}:
        return BadRequest(f"sql: {str(original)[:300]}", code="invalid_sql", param="sql")
    return fault_of(error)
