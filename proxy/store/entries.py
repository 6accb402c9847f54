"""Rows of answers: the truth that the index only hints at.

Every read verifies the row's checksum, so an edited or damaged row is absent rather than wrong. Writes go through the
one writer and return when they are durable. On SQLite, where this process is the only writer, it is known which
fingerprints may have a row (`known`), so that a lookup of something never stored costs no SQL.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import struct
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import BigInteger, ColumnElement, bindparam, delete, func, insert, literal_column, or_, select, update
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.asyncio import AsyncConnection

from proxy.core.errors import BadRequest, CacheFault
from proxy.core.model import Draft, Entry, Usage
from proxy.core.purges import Began, Purge, Purges, Selector, marks_of
from proxy.ports import Stored
from proxy.store.engine import Database
from proxy.store.known import Fingerprints, shortened
from proxy.store.purges import PurgeLog
from proxy.store.schema import audit, entry, entry_tag
from proxy.store.selection import Filters, Listed, Page, filter_condition, page_limit, purge_condition
from proxy.store.writer import Writer

log = logging.getLogger(__name__)

SWEEP_ROWS = 1_000  # rows a single transaction removes: the writer is never held long
WHOLE_ROWS = 16  # read at once with their answers, which may be megabytes each
USE_GRAIN_MS = 60_000  # a use is written down at most once a minute
PREVIEW_CHARACTERS = 200
KNOWN_SPARE = 65_536  # fingerprints known beyond twice the bound of entries: what a busy minute adds
KNOWN_PIECE = 20_000
CHECKED_A_TURN = 64  # rows whose checksum is verified before the loop gets its turn: about 1 ms

_COLUMNS = (
    "id", "scope", "fingerprint", "tenant", "namespace", "upstream", "operation", "model", "prompt", "answer",
    "in_tok", "out_tok", "cache_read_tok", "cache_write_tok", "created_ms", "expires_ms", "request_id", "total_ms",
    "tags", "embedding", "embedder", "signature", "checksum",
)  # fmt: skip


class _Put(NamedTuple):
    draft: Draft
    began: Began
    row: dict[str, Any]
    may_replace: bool  # False when its fingerprint was never stored


class VectorBlock(NamedTuple):
    """Rows of one embedder in id order, for rebuilding an index. All arrays are C-contiguous."""

    ids: NDArray[np.int64]  # (n,)
    scopes: NDArray[np.uint8]  # (n, 32)
    vectors: NDArray[np.float32]  # (n, d), unit length
    signatures: NDArray[np.uint64]  # (n, w)
    expires_ms: NDArray[np.int64]  # (n,)


class TenantUse(NamedTuple):
    tenant: str
    entries: int
    used_ms: int


class EntryStats(NamedTuple):
    entries: int
    bytes: int
    quarantined: int
    damaged: int  # rows refused by their checksum since the start
    oldest_ms: int | None
    newest_ms: int | None


def checksum_of(draft: Draft) -> bytes:
    """SHA-256 over every field that decides whether and what to serve, each with its length in front."""
    usage = draft.usage
    counters = b"-" if usage is None else struct.pack(
        "<4q", usage.input_tokens, usage.output_tokens, usage.cache_read_tokens, usage.cache_write_tokens
    )  # fmt: skip
    numbers = struct.pack("<qqd", draft.created_ms, draft.expires_ms, draft.total_ms)
    texts = (draft.tenant, draft.namespace, draft.upstream, draft.operation, draft.model, draft.prompt)
    digest = hashlib.sha256(b"ibid entry 1")
    for piece in (draft.scope, draft.fingerprint, *(text.encode() for text in texts), draft.answer, counters, numbers):
        digest.update(len(piece).to_bytes(8, "little") + piece)
    for optional in (draft.embedding, draft.signature, None if draft.embedder is None else draft.embedder.encode()):
        digest.update(b"-" if optional is None else b"+" + len(optional).to_bytes(8, "little") + optional)
    return digest.digest()


class Entries:
    """EntryStore over SQL. `limit_entries` and `limit_bytes` are kept by `housekeep`, least recently used first out."""

    def __init__(
        self,
        database: Database,
        writer: Writer,
        *,
        limit_entries: int = 100_000,
        limit_bytes: int = 1 << 30,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._writer = writer
        self._limit_entries = limit_entries
        self._limit_bytes = limit_bytes
        self._clock = clock
        self._purges = PurgeLog(database, writer)
        self._is_wiped = True  # nothing that was purged is left in SQLite's log
        self._known: Fingerprints | None = None  # None where other processes store too
        self._used: dict[int, int] = {}
        self._put_work = self._put_many  # one bound method, so that the writer sees equal work
        self.damaged = 0
        dialect = database.reader.dialect
        columns = [entry.c[name] for name in _COLUMNS]
        sound = entry.c.quarantined == literal_column("0")
        self._find_sql = _spell(select(*columns).where(entry.c.fingerprint == bindparam("fingerprint"), sound), dialect)
        self._get_sql = _spell(select(*columns).where(entry.c.id == bindparam("id"), sound), dialect)

    async def load(self) -> None:
        """Read what must be in memory before the first lookup. Raises CacheFault."""
        await self.follow()
        if self._database.dialect == "sqlite":
            self._known = Fingerprints(2 * self._limit_entries + KNOWN_SPARE)
            await self._read_known(self._known)

    async def _read_known(self, known: Fingerprints) -> None:
        statement = "SELECT substr(fingerprint, 1, 8) FROM entry WHERE fingerprint > ? ORDER BY fingerprint LIMIT ?"
        last = b""
        with known.reading() as found:
            await self._writer.settle()
            while rows := await self._database.rows(statement, (last, KNOWN_PIECE)):
                found.update(shortened(row[0]) for row in rows)
                last = rows[-1][0] + b"\xff" * 24
                if len(rows) < KNOWN_PIECE:
                    break

    @property
    def purges(self) -> Purges:
        """What was purged, as far as it is known here."""
        return self._purges.known

    async def follow(self) -> None:
        """Take up what other processes have purged. Raises CacheFault."""
        await self._purges.read()

    @property
    def fingerprints_known(self) -> int:
        """How many fingerprints are in memory; 0 on PostgreSQL, where other processes store too."""
        return 0 if self._known is None else len(self._known)

    async def find(self, fingerprint: bytes) -> Entry | None:
        """The entry of this exact identity, or None. Raises CacheFault."""
        if self._known is not None and not self._known.may_hold(fingerprint):
            return None
        return self._sound(await self._database.rows(self._find_sql, (fingerprint,)))

    async def find_many(self, fingerprints: Sequence[bytes]) -> Sequence[Entry]:
        """The entries of these exact identities that are there, in any order, by one query. Raises CacheFault."""
        known = self._known
        wanted = {f for f in fingerprints if known is None or known.may_hold(f)}
        if not wanted:
            return ()
        columns = [entry.c[name] for name in _COLUMNS]
        statement = select(*columns).where(entry.c.fingerprint.in_(sorted(wanted)), entry.c.quarantined == 0)
        entries: list[Entry] = []
        for number, row in enumerate(await self._database.rows(statement), start=1):
            if (found := self._sound([row])) is not None:
                entries.append(found)
            if not number % CHECKED_A_TURN:
                await asyncio.sleep(0)
        return entries

    async def get(self, entry_id: int) -> Entry | None:
        """The entry of this id, or None. Raises CacheFault."""
        if not 0 < entry_id < 1 << 63:
            return None
        return self._sound(await self._database.rows(self._get_sql, (entry_id,)))

    def _sound(self, rows: Sequence[Any]) -> Entry | None:
        if not rows:
            return None
        try:
            found = _entry(rows[0])
            intact = checksum_of(found.draft) == found.checksum
        except (ValueError, TypeError, AttributeError, struct.error):  # a row edited into another type
            intact, found = False, None
        if intact:
            return found
        self.damaged += 1
        log.error("entry does not match its checksum; treated as absent", extra={"entry": rows[0][0]})
        return None

    async def put(self, draft: Draft, began: Began) -> Stored | None:
        """Commit, replacing an entry of the same fingerprint under a new id; None when a purge that was made since
        `began` reaches it, and then nothing is stored or replaced.

        Raises CacheFault: store_busy at once when the queue is full, store_full, store_down, or store_refused for text
        that no database keeps (NUL, lone surrogates) and counters beyond 64 bits.
        """
        try:
            row = _row(draft)
        except (UnicodeError, struct.error, OverflowError) as error:
            raise CacheFault(f"entry cannot be kept: {type(error).__name__}", code="store_refused") from error
        if "\x00" in draft.prompt or any("\x00" in value for value in (draft.model, draft.namespace, *draft.tags)):
            raise CacheFault("entry cannot be kept: NUL in its text", code="store_refused")
        may_replace = self._known is None or self._known.add(draft.fingerprint)
        stored = await self._writer.submit(self._put_work, _Put(draft, began, row, may_replace))
        if stored is None:
            return None
        entry_id, replaced = stored
        return Stored(Entry(entry_id, draft, row["checksum"]), replaced)

    async def _put_many(self, connection: AsyncConnection, puts: Sequence[_Put]) -> Sequence[Any]:
        """Insert what no purge has overtaken, in rounds of distinct fingerprints, in fingerprint order so that replicas
        never deadlock. Decided here, because no purge is made while this transaction lasts."""
        await self._purges.catch_up(connection)
        rows = [put.row for put in puts]
        results: list[Any] = [None] * len(rows)
        may = [i for i, put in enumerate(puts) if not self.purges.overtook(marks_of(put.draft), put.began)]
        left = sorted(may, key=lambda index: (rows[index]["fingerprint"], index))
        while left:
            seen: set[bytes] = set()
            now: list[int] = []
            later: list[int] = []
            for index in left:
                (later if rows[index]["fingerprint"] in seen else now).append(index)
                seen.add(rows[index]["fingerprint"])
            await self._put_round(connection, puts, now, results)
            left = later
        return results

    async def _put_round(
        self, connection: AsyncConnection, puts: Sequence[_Put], chosen: list[int], results: list[Any]
    ) -> None:
        rows = [put.row for put in puts]
        replaced: dict[bytes, int] = {}
        if known := [rows[index]["fingerprint"] for index in chosen if puts[index].may_replace]:
            gone = delete(entry).where(entry.c.fingerprint.in_(known)).returning(entry.c.fingerprint, entry.c.id)
            for fingerprint, entry_id in await connection.execute(gone):
                replaced[fingerprint] = entry_id
        made = insert(entry).returning(entry.c.fingerprint, entry.c.id)
        ids: dict[bytes, int] = {}
        for fingerprint, entry_id in await connection.execute(made, [rows[index] for index in chosen]):
            ids[fingerprint] = entry_id
        tagged: list[dict[str, Any]] = []
        for index in chosen:
            fingerprint = rows[index]["fingerprint"]
            old = replaced.get(fingerprint)
            results[index] = (ids[fingerprint], () if old is None else (old,))
            tags = json.loads(rows[index]["tags"])
            tagged.extend({"tag": tag, "entry_id": ids[fingerprint]} for tag in dict.fromkeys(tags))
        if tagged:
            await connection.execute(insert(entry_tag), tagged)

    async def touch(self, entry_id: int, expires_ms: int) -> None:
        """Give an entry another end of freshness, its checksum with it. Raises CacheFault."""

        await self._change(entry_id, expires_ms=expires_ms)

    async def amend(
        self, entry_id: int, *, expires_ms: int | None = None, tags: Sequence[str] | None = None
    ) -> Entry | None:
        """The entry with another end of freshness, other tags or both, its checksum with them; None when there is none.

        Other processes hold what it was before: to them it counts as purged, and they read it anew. The caller does
        the same with its own index and hot rows. Raises CacheFault.
        """
        fields: dict[str, Any] = {} if expires_ms is None else {"expires_ms": expires_ms}
        if tags is not None:
            fields["tags"] = tuple(dict.fromkeys(tags))

        async def act(connection: AsyncConnection) -> tuple[Entry, Purge] | None:
            await self._purges.catch_up(connection, alone=True)
            changed = await self._changed(connection, entry_id, **fields)
            if changed is None:
                return None
            if tags is not None:
                await connection.execute(delete(entry_tag).where(entry_tag.c.entry_id == entry_id))
                if rows := [{"tag": tag, "entry_id": entry_id} for tag in fields["tags"]]:
                    await connection.execute(insert(entry_tag), rows)
            return changed, await self._record(connection, Selector(ids=(entry_id,)), [changed.draft.fingerprint])

        amended = await self._writer.run(act)
        if amended is None:
            return None
        self.purges.learn([amended[1]])
        return amended[0]

    async def lacking(self, embedder: str, after_id: int, limit: int) -> list[tuple[int, str]]:
        """(id, prompt) of entries whose question this embedder has not seen, in id order. Raises CacheFault."""
        chosen = select(entry.c.id, entry.c.prompt).where(*_lacks(embedder, after_id))
        rows = await self._database.rows(chosen.order_by(entry.c.id).limit(limit))
        return [(row[0], row[1]) for row in rows]

    async def count_lacking(self, embedder: str, after_id: int = 0) -> int:
        """How many there are. Raises CacheFault."""
        statement = select(func.count()).select_from(entry).where(*_lacks(embedder, after_id))
        ((count,),) = await self._database.rows(statement)
        return int(count)

    async def revector(
        self, entry_id: int, embedding: bytes | None, signature: bytes | None, embedder: str
    ) -> Entry | None:
        """The entry as this embedder sees it, checksum included; None when it is gone. Raises CacheFault.

        Without a vector: the embedder cannot take its text.
        """
        return await self._change(entry_id, embedding=embedding, signature=signature, embedder=embedder)

    async def _change(self, entry_id: int, **fields: Any) -> Entry | None:
        async def act(connection: AsyncConnection) -> Entry | None:
            return await self._changed(connection, entry_id, **fields)

        return await self._writer.run(act)

    async def _changed(self, connection: AsyncConnection, entry_id: int, **fields: Any) -> Entry | None:
        columns = [entry.c[name] for name in _COLUMNS]
        found = self._sound((await connection.execute(select(*columns).where(entry.c.id == entry_id))).all())
        if found is None:
            return None
        draft = replace(found.draft, **fields)
        row = _row(draft)
        values = {name: row[name] for name in (*fields, "checksum")}
        await connection.execute(update(entry).where(entry.c.id == entry_id).values(values))
        return Entry(entry_id, draft, row["checksum"])

    def mark_used(self, entry_id: int, now_ms: int) -> None:
        """Remember that an entry answered; written by the next `housekeep`."""
        if now_ms > self._used.get(entry_id, 0):
            self._used[entry_id] = now_ms

    async def quarantine(self, entry_id: int, on: bool = True) -> bool:
        """Keep an entry from every lookup, or undo it; False when there is none. Raises CacheFault.

        Kept from lookups, it counts as purged for what is under way. The caller takes the id out of the index and the
        hot rows, or puts it back.
        """
        change = update(entry).where(entry.c.id == entry_id).values(quarantined=int(on)).returning(entry.c.fingerprint)

        async def act(connection: AsyncConnection) -> list[Purge] | None:
            await self._purges.catch_up(connection, alone=on)
            changed = list(await connection.scalars(change))
            if not changed:
                return None
            return [await self._record(connection, Selector(ids=(entry_id,)), changed)] if on else []

        made = await self._writer.run(act)
        self.purges.learn(made or ())
        return made is not None

    async def purge(self, selector: Selector, *, dry_run: bool = True) -> tuple[int, ...]:
        """Ids selected, and unless `dry_run` removed, with what was learned from them, and with the text gone from
        SQLite's log as soon as nobody reads it. What began before it and would be selected is not stored after it.

        Raises CacheFault, and then nothing is removed.
        """
        condition = purge_condition(selector)
        if condition is None:
            return ()
        if dry_run:
            rows = await self._database.rows(select(entry.c.id).where(condition).order_by(entry.c.id))
            return tuple(row[0] for row in rows)

        async def act(connection: AsyncConnection) -> tuple[list[int], list[Purge]]:
            await self._purges.catch_up(connection, alone=True)
            learned = delete(audit).where(audit.c.entry_id.in_(select(entry.c.id).where(condition)))
            await connection.execute(learned)
            gone = delete(entry).where(condition).returning(entry.c.id, entry.c.fingerprint)
            removed = (await connection.execute(gone)).all()
            names_nothing = selector.ids and not removed
            made = [] if names_nothing else [await self._record(connection, selector, [row[1] for row in removed])]
            return sorted(row[0] for row in removed), made

        removed, made = await self._writer.run(act)
        self.purges.learn(made)
        if removed:
            await self._wipe()
        return tuple(removed)

    async def _record(self, connection: AsyncConnection, selector: Selector, fingerprints: Sequence[bytes]) -> Purge:
        everywhere = () if selector.everything else fingerprints  # which reaches them all by itself
        return await self._purges.record(connection, selector, everywhere, int(self._clock() * 1000))

    async def _wipe(self) -> None:
        """Empty SQLite's log of deleted text, or leave it to the next `housekeep`: the rows are gone all the same."""
        try:
            self._is_wiped = await self._writer.checkpoint()
        except CacheFault as fault:
            self._is_wiped = False
            log.warning("deleted text is still in the database's log", extra={"reason": fault.code})

    async def housekeep(self, now_ms: int, *, stale_for_ms: int = 0) -> tuple[int, ...]:
        """Write down uses, expire, evict to the bounds; the ids removed. Call every few seconds. Raises CacheFault.

        `stale_for_ms`: how long an expired row is kept for stale serving.
        """
        await self._purges.housekeep(now_ms)
        if not self._is_wiped:
            await self._wipe()
        used, self._used = self._used, {}
        if used:
            await self._writer.run(lambda connection: _write_uses(connection, used))
        removed: list[int] = []
        while True:
            expired = select(entry.c.id).where(entry.c.expires_ms <= now_ms - stale_for_ms).limit(SWEEP_ROWS)
            swept = await self._remove(entry.c.id.in_(expired))
            removed.extend(swept)
            if len(swept) < SWEEP_ROWS:
                break
        while batch := await self._surplus():
            swept = await self._remove(entry.c.id.in_(batch))
            removed.extend(swept)
            if not swept:
                break
        await self._trim_known()
        return tuple(removed)

    async def _trim_known(self) -> None:
        """Forget the fingerprints of rows that are gone, once they are many."""
        known = self._known
        if known is None:
            return
        ((rows,),) = await self._database.rows(select(func.count()).select_from(entry))
        if known.is_loose(rows):
            await self._read_known(known)

    async def _remove(self, condition: ColumnElement[bool]) -> list[int]:
        async def act(connection: AsyncConnection) -> list[int]:
            return list(await connection.scalars(delete(entry).where(condition).returning(entry.c.id)))

        return await self._writer.run(act)

    async def _surplus(self) -> list[int]:
        """Least recently used ids whose removal brings the store towards its bounds; at most SWEEP_ROWS."""
        totals = select(func.count(), func.coalesce(func.sum(entry.c.size_bytes), 0)).select_from(entry)
        ((count, size),) = await self._database.rows(totals)
        over_rows, over_bytes = count - self._limit_entries, int(size) - self._limit_bytes
        if over_rows <= 0 and over_bytes <= 0:
            return []
        oldest = select(entry.c.id, entry.c.size_bytes).order_by(entry.c.used_ms, entry.c.size_bytes, entry.c.id)
        chosen: list[int] = []
        for entry_id, row_bytes in await self._database.rows(oldest.limit(SWEEP_ROWS)):
            if over_rows <= 0 and over_bytes <= 0:
                break
            chosen.append(entry_id)
            over_rows -= 1
            over_bytes -= row_bytes
        return chosen

    async def search(self, filters: Filters, *, limit: int = 50, cursor: str | None = None) -> Page:
        """A page of entries, newest first. Raises BadRequest for a bad limit or cursor, CacheFault."""
        condition = filter_condition(filters, cursor)
        size = page_limit(limit)
        c = entry.c
        statement = (
            select(c.id, c.namespace, c.upstream, c.operation, c.model, c.tenant,
                   func.substr(c.prompt, 1, PREVIEW_CHARACTERS), func.length(c.answer), c.created_ms, c.expires_ms,
                   c.used_ms, c.tags, c.embedder, c.quarantined)
            .where(condition).order_by(c.id.desc()).limit(size + 1)
        )  # fmt: skip
        rows = await self._database.rows(statement)
        shown = tuple(_listed(row) for row in rows[:size])
        return Page(shown, str(shown[-1].id) if len(rows) > size else None)

    async def there(self, fingerprints: Sequence[bytes]) -> set[bytes]:
        """Those of these that have a row, quarantined ones too. Raises CacheFault."""
        if not fingerprints:
            return set()
        chosen = select(entry.c.fingerprint).where(entry.c.fingerprint.in_(sorted(set(fingerprints))))
        return {bytes(row[0]) for row in await self._database.rows(chosen)}

    async def whole(
        self, after_id: int = 0, namespace: str | None = None, chunk: int = WHOLE_ROWS
    ) -> AsyncIterator[Entry]:
        """Every sound entry with an id above `after_id`, in id order, a few rows in memory. Raises CacheFault."""
        chosen = select(*[entry.c[name] for name in _COLUMNS]).where(entry.c.quarantined == 0)
        if namespace is not None:
            chosen = chosen.where(entry.c.namespace == namespace)
        chosen = chosen.order_by(entry.c.id).limit(chunk)
        while rows := await self._database.rows(chosen.where(entry.c.id > after_id)):
            for row in rows:
                if (found := self._sound([row])) is not None:
                    yield found
            after_id = rows[-1][0]

    async def vectors(self, embedder: str, after_id: int = 0, chunk: int = 1_024) -> AsyncIterator[VectorBlock]:
        """Every sound vector of one embedder with an id above `after_id`, in id order. Raises CacheFault.

        A row whose vector or signature has another length than its block's first is left out and counted as damaged.
        """
        c = entry.c
        sound = (c.quarantined == literal_column("0"), c.embedding.is_not(None), c.signature.is_not(None))
        chosen = select(c.id, c.scope, c.embedding, c.signature, c.expires_ms).where(
            c.id > bindparam("after_id"), c.embedder == bindparam("embedder"), *sound
        )
        statement = _spell(chosen.order_by(c.id), self._database.reader.dialect) + f" LIMIT {int(chunk)}"
        while rows := await self._database.rows(statement, (after_id, embedder)):
            after_id = rows[-1][0]
            shape = (32, len(rows[0][2]), len(rows[0][3]))
            whole = [row for row in rows if (len(row[1]), len(row[2]), len(row[3])) == shape]
            self.damaged += len(rows) - len(whole)
            yield _block(whole)
            if len(rows) < chunk:
                return

    async def alike(self, embedder: str, vector: NDArray[np.float32], least: float, most: int) -> dict[int, float]:
        """id → similarity of the sound entries of any scope whose question is at least so similar to this unit vector,
        the most similar first. Reads every vector; more than `most` are BadRequest. Raises CacheFault."""
        found: list[tuple[float, int]] = []
        async for block in self.vectors(embedder):
            if block.vectors.shape[1:] != vector.shape:
                continue
            similarities = block.vectors @ vector
            chosen = similarities >= least
            found += zip(similarities[chosen].tolist(), block.ids[chosen].tolist(), strict=True)
            if len(found) > most:
                raise BadRequest(f"more than {most:,} entries are that similar: ask for more", code="too_many")
        return {entry_id: similarity for similarity, entry_id in sorted(found, reverse=True)}

    async def questions(
        self, embedder: str, newest: int, chunk: int = 1_024, *, after_id: int = 0
    ) -> AsyncIterator[Sequence[tuple[int, bytes, str]]]:
        """Id, scope and question of the `newest` sound rows with a vector of this embedder and a larger id, in id
        order, in pieces. Raises CacheFault."""
        c = entry.c
        sound = (c.id > after_id, c.embedder == embedder, c.embedding.is_not(None), c.quarantined == 0, c.prompt != "")
        oldest = select(c.id).where(*sound).order_by(c.id.desc()).offset(newest).limit(1)
        found = await self._database.rows(oldest)
        after_id = found[0][0] if found else after_id
        chosen = select(c.id, c.scope, c.prompt).where(*sound).order_by(c.id).limit(chunk)
        while rows := await self._database.rows(chosen.where(c.id > after_id)):
            yield [(row[0], bytes(row[1]), row[2]) for row in rows]
            after_id = rows[-1][0]

    async def ids(self, embedder: str | None = None) -> NDArray[np.int64]:
        """Ids of all sound rows with a vector of this embedder (of any entry when None), ascending. (n,) int64."""
        statement = select(entry.c.id).where(entry.c.quarantined == 0).order_by(entry.c.id)
        if embedder is not None:
            statement = statement.where(entry.c.embedder == embedder, entry.c.embedding.is_not(None))
        return np.fromiter((row[0] for row in await self._database.rows(statement)), np.int64)

    async def tenants(self, limit: int) -> tuple[TenantUse, ...]:
        """At most `limit` tenants that have entries, those that used them last first. Raises CacheFault."""
        last = func.max(entry.c.used_ms)
        statement = (
            select(entry.c.tenant, func.count(), last).group_by(entry.c.tenant).order_by(last.desc()).limit(limit)
        )
        return tuple(TenantUse(*row) for row in await self._database.rows(statement))

    async def stats(self) -> EntryStats:
        """Counts for the operator. Raises CacheFault."""
        c = entry.c
        totals = select(
            func.count(), func.coalesce(func.sum(c.size_bytes), 0), func.min(c.created_ms), func.max(c.created_ms)
        )
        (row,) = await self._database.rows(totals)
        ((held,),) = await self._database.rows(select(func.count()).where(c.quarantined == 1))
        return EntryStats(row[0], int(row[1]), held, self.damaged, row[2], row[3])


def _lacks(embedder: str, after_id: int) -> tuple[ColumnElement[bool], ...]:
    other = or_(entry.c.embedder.is_(None), entry.c.embedder != embedder)
    return entry.c.id > after_id, other, entry.c.quarantined == 0, entry.c.prompt != ""


async def _write_uses(connection: AsyncConnection, used: dict[int, int]) -> None:
    change = (
        update(entry)
        .where(entry.c.id == bindparam("entry_id"), entry.c.used_ms + USE_GRAIN_MS < bindparam("at", type_=BigInteger))
        .values(used_ms=bindparam("at", type_=BigInteger))
    )
    await connection.execute(change, [{"entry_id": entry_id, "at": at} for entry_id, at in sorted(used.items())])


def _spell(statement: Any, dialect: Dialect) -> str:
    """A statement in the driver's own words, compiled once; its parameters are positional in order of appearance."""
    return str(statement.compile(dialect=dialect))


def _row(draft: Draft) -> dict[str, Any]:
    usage = draft.usage
    size = len(draft.answer) + len(draft.prompt.encode()) + len(draft.embedding or b"") + len(draft.signature or b"")
    return {
        "scope": draft.scope, "fingerprint": draft.fingerprint, "tenant": draft.tenant, "namespace": draft.namespace,
        "upstream": draft.upstream, "operation": draft.operation, "model": draft.model, "prompt": draft.prompt,
        "answer": draft.answer, "in_tok": None if usage is None else usage.input_tokens,
        "out_tok": None if usage is None else usage.output_tokens,
        "cache_read_tok": None if usage is None else usage.cache_read_tokens,
        "cache_write_tok": None if usage is None else usage.cache_write_tokens,
        "created_ms": draft.created_ms, "expires_ms": draft.expires_ms, "used_ms": draft.created_ms,
        "request_id": draft.request_id, "total_ms": draft.total_ms, "tags": json.dumps(draft.tags),
        "embedding": draft.embedding, "embedder": draft.embedder, "signature": draft.signature,
        "size_bytes": size + 512, "quarantined": 0, "checksum": checksum_of(draft),
    }  # fmt: skip


def _entry(row: Any) -> Entry:
    """The entry of a row in `_COLUMNS`' order."""
    usage = None if row[10] is None else Usage(row[10], row[11], row[12], row[13])
    draft = Draft(
        scope=row[1], fingerprint=row[2], tenant=row[3], namespace=row[4], upstream=row[5], operation=row[6],
        model=row[7], prompt=row[8], answer=row[9], usage=usage, created_ms=row[14], expires_ms=row[15],
        request_id=row[16], total_ms=row[17], tags=tuple(json.loads(row[18])), embedding=row[19], embedder=row[20],
        signature=row[21],
    )  # fmt: skip
    return Entry(row[0], draft, row[22])


def _listed(row: Any) -> Listed:
    fields: tuple[Any, ...] = (*row[:-3], tuple(json.loads(row[-3])), row[-2], bool(row[-1]))
    return Listed(*fields)


def _block(rows: Sequence[Any]) -> VectorBlock:
    count = len(rows)
    return VectorBlock(
        np.fromiter((row[0] for row in rows), np.int64, count),
        np.frombuffer(b"".join(row[1] for row in rows), np.uint8).reshape(count, 32),
        np.frombuffer(b"".join(row[2] for row in rows), "<f4").reshape(count, -1),
        np.frombuffer(b"".join(row[3] for row in rows), "<u8").reshape(count, -1),
        np.fromiter((row[4] for row in rows), np.int64, count),
    )
