"""`ibid savings` and `ibid sql`: read from the database itself, whether a server runs or not."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TypeVar

from proxy.admin.schema import read_time
from proxy.commands import printing
from proxy.commands.codes import ACT, FINE
from proxy.core import invoice, reconcile
from proxy.core.errors import ConfigError
from proxy.money.prices import configured
from proxy.settings.config import Settings
from proxy.store.named_queries import NAMED
from proxy.store.queries import Queries, Result
from proxy.store.reading import open_reading
from proxy.store.views import DESCRIBED

Found = TypeVar("Found")


def savings(settings: Settings, chosen: argparse.Namespace) -> int:
    now_ms = int(time.time() * 1000)
    if chosen.name == "reconcile":
        return _reconcile(settings, chosen, now_ms)
    if chosen.file or chosen.billed_by:
        raise ConfigError("INVOICE and --upstream go with `ibid savings reconcile`")
    since = _day("since", chosen.since or "30d", now_ms)
    until = _day("until", chosen.until, now_ms) if chosen.until else "9999"
    described = _described(chosen.name.lower()) if chosen.name else None
    if described is not None:
        sys.stdout.write(printing.described(chosen.format, described))
        return FINE
    return _show(settings, chosen, chosen.name, None, since, until)


def sql(settings: Settings, chosen: argparse.Namespace) -> int:
    return _show(settings, chosen, None, chosen.statement)


def _reconcile(settings: Settings, chosen: argparse.Namespace, now_ms: int) -> int:
    """An export against the ledger. Exit code 2 unless every line is equal: somebody must ask why."""
    if not chosen.file:
        raise ConfigError("name the file: ibid savings reconcile INVOICE.csv")
    since, until = (
        _day(name, when, now_ms) if (when := getattr(chosen, name)) else None for name in ("since", "until")
    )
    try:
        with open(chosen.file, encoding="utf-8-sig", newline="") as file:
            told = invoice.read(file, chosen.file).within(since, until)
    except OSError as error:
        raise ConfigError(f"{chosen.file}: {error.strerror}") from error
    days = [key.day for key in told.lines] or [since or until or "1970-01-01"]
    if chosen.billed_by and chosen.billed_by not in settings.upstreams:
        raise ConfigError(f"--upstream: no upstream named {chosen.billed_by} is configured")
    upstreams: Sequence[str] | None = (chosen.billed_by,) if chosen.billed_by else None
    if upstreams is None and told.shape.provider is not None:
        served = settings.upstreams.items()
        upstreams = [name for name, one in served if (one.prices_as or name) == told.shape.provider]

    async def read(queries: Queries) -> Sequence[reconcile.Billed]:
        return await queries.billed(since or min(days), until or max(days), upstreams, told.shape.operations)

    found = reconcile.reconcile(told, _with_queries(settings, read))
    columns, rows = found.brief() if chosen.format == "table" else (found.columns, found.rows())
    sys.stdout.write(printing.render(chosen.format, columns, rows))
    if unequal := found.unequal():
        what = ", ".join(f"{count} {status}" for status, count in sorted(unequal.items()))
        print(f"ibid: {sum(unequal.values())} of {len(found.lines)} lines are not equal: {what}", file=sys.stderr)
    return ACT if unequal else FINE


def _described(name: str) -> list[tuple[str, str, Mapping[str, str]]] | None:
    """Name, question and columns of the named queries ("list") or of the views ("views"); None for another name."""
    if name == "list":
        return [(query.name, query.title, query.columns) for query in NAMED.values()]
    if name == "views":
        return [(view_name, view.title, view.columns) for view_name, view in DESCRIBED.items()]
    return None


def _day(name: str, text: str, now_ms: int) -> str:
    return datetime.fromtimestamp(read_time(name, text, now_ms) / 1000, UTC).date().isoformat()


def _show(
    settings: Settings,
    chosen: argparse.Namespace,
    name: str | None,
    sql: str | None,
    since: str = "",
    until: str = "9999",
) -> int:
    async def read(queries: Queries) -> Result:
        if sql is not None:
            return await queries.run_readonly(sql, row_limit=chosen.limit)
        if name is not None:
            return await queries.named(name, since_day=since, until_day=until, row_limit=chosen.limit)
        groups = tuple(part.strip() for part in chosen.group_by.split(","))
        return await queries.savings(groups, since_day=since, until_day=until, row_limit=chosen.limit)

    result = _with_queries(settings, read)
    sys.stdout.write(printing.render(chosen.format, result.columns, result.rows))
    if result.truncated:
        print("ibid: more rows exist; raise --limit", file=sys.stderr)
    return FINE


def _with_queries(settings: Settings, read: Callable[[Queries], Awaitable[Found]]) -> Found:
    """What `read` finds in the database, opened to be read only."""

    async def run() -> Found:
        database = open_reading(settings.store.database_url or None, settings.data_dir)
        try:
            return await read(Queries(database, configured(settings).rates))
        finally:
            await database.close()

    return asyncio.run(run())
