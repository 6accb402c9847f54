"""Stored answers as lines of JSON, and back: what `/cache/export` writes and `/cache/import` reads.

The first line names the format and the installation; one line for each entry; the last says that it is whole, or after
which entry it broke off. Vectors stay behind: whoever imports makes them anew with the model at hand. A line carries
the checksum of what it says, so that one that was cut or edited is refused.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import math
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from proxy.core.answer import decode_answer
from proxy.core.errors import BadRequest, CacheFault
from proxy.core.model import Draft, Entry, Usage
from proxy.core.purges import Began, Purges, asked_ms, marks_of, reaches
from proxy.core.units import DAY_MS, LAST_MS
from proxy.store.entries import Entries, checksum_of

FORMAT: Final = 1
LINE_BYTES: Final = 64 * 1024 * 1024
PIECE_LINES: Final = 64
PIECE_BYTES: Final = 8 * 1024 * 1024
TOLD_LINES: Final = 20  # refused ones that the report names

_TEXTS = ("tenant", "namespace", "upstream", "operation", "model", "prompt", "request_id")
_COUNTERS = ("input_tokens", "output_tokens", "cache_read_tokens", "cache_write_tokens")


# -- out -------------------------------------------------------------------------------------------------------------


async def written(
    entries: Entries, installation: str, after_id: int, namespace: str | None
) -> AsyncIterator[tuple[str, bytes]]:
    """(kind, line) for the entries above an id, in id order. Never raises CacheFault: the last line
    says it."""
    yield "export", _line({"ibid": "export", "format": FORMAT, "installation": installation})
    last, count = after_id, 0
    try:
        async for entry in entries.whole(after_id, namespace):
            yield "entry", line_of(entry)
            last, count = entry.id, count + 1
    except CacheFault as fault:
        yield "broken", _line({"ibid": "broken", "reason": fault.code, "after": last, "entries": count})
    else:
        yield "end", _line({"ibid": "end", "after": last, "entries": count})


def line_of(entry: Entry) -> bytes:
    """One entry without its vector, and the checksum of that."""
    draft = _bare(entry.draft)
    usage = draft.usage
    said: dict[str, Any] = {
        "ibid": "entry",
        "id": entry.id,
        "scope": draft.scope.hex(),
        "fingerprint": draft.fingerprint.hex(),
        **{name: getattr(draft, name) for name in _TEXTS},
        "usage": None if usage is None else {name: getattr(usage, name) for name in _COUNTERS},
        "created_ms": draft.created_ms,
        "expires_ms": draft.expires_ms,
        "total_ms": draft.total_ms,
        "tags": list(draft.tags),
        "checksum": checksum_of(draft).hex(),
    }
    try:
        said["answer"] = draft.answer.decode()
    except UnicodeDecodeError:
        said["answer_base64"] = base64.b64encode(draft.answer).decode()
    return _line(said)


def _bare(draft: Draft) -> Draft:
    return dataclasses.replace(draft, embedding=None, embedder=None, signature=None)


def _line(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)


# -- in --------------------------------------------------------------------------------------------------------------


def draft_of(line: dict[str, Any], now_ms: int) -> Draft:
    """What an entry's line says. Raises ValueError that says what is wrong with it."""
    texts = {name: _text(line, name) for name in _TEXTS}
    tags = line.get("tags")
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError("tags must be a list of strings")
    created_ms, expires_ms = (_whole(line, name, LAST_MS) for name in ("created_ms", "expires_ms"))
    if created_ms > now_ms + DAY_MS or expires_ms < created_ms:
        raise ValueError("its times are not in order")
    total_ms = line.get("total_ms")
    if isinstance(total_ms, bool) or not isinstance(total_ms, int | float) or not 0 <= total_ms < math.inf:
        raise ValueError("total_ms must be a number from 0")
    draft = Draft(
        scope=_digest(line, "scope"),
        fingerprint=_digest(line, "fingerprint"),
        tenant=texts["tenant"],
        namespace=texts["namespace"],
        upstream=texts["upstream"],
        operation=texts["operation"],
        model=texts["model"],
        prompt=texts["prompt"],
        request_id=texts["request_id"],
        answer=_answer(line),
        usage=_usage(line.get("usage")),
        created_ms=created_ms,
        expires_ms=expires_ms,
        total_ms=float(total_ms),
        tags=tuple(tags),
    )
    if checksum_of(draft) != _digest(line, "checksum"):
        raise ValueError("its checksum does not fit: it was cut or edited")
    if draft.operation != "embedding":
        decode_answer(draft.answer)
    return draft


def _text(line: dict[str, Any], name: str) -> str:
    if not isinstance(value := line.get(name), str):
        raise ValueError(f"{name} must be a string")
    return value


def _digest(line: dict[str, Any], name: str) -> bytes:
    value = line.get(name)
    if not isinstance(value, str) or len(value) != 64:
        raise ValueError(f"{name} must be 64 hex digits")
    return bytes.fromhex(value)


def _whole(line: dict[str, Any], name: str, most: int) -> int:
    value = line.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{name} must be a whole number from 0 to {most}")
    return value


def _answer(line: dict[str, Any]) -> bytes:
    if isinstance(text := line.get("answer"), str):
        return text.encode()
    if isinstance(coded := line.get("answer_base64"), str):
        return base64.b64decode(coded, validate=True)
    raise ValueError("answer must be a string")


def _usage(value: object) -> Usage | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("usage must be an object or null")
    return Usage(*(_whole(value, name, 2**63 - 1) for name in _COUNTERS))


@dataclass
class Report:
    """How many lines there were, and what became of them."""

    read: int = 0
    stored: int = 0
    there: int = 0  # already; quarantined ones too
    expired: int = 0
    purged: int = 0  # a purge made since they were asked for reaches them
    refused: int = 0
    refused_lines: list[dict[str, Any]] = field(default_factory=list)  # the first of them: "line", "error"
    is_foreign: bool = False  # of another installation
    is_whole: bool = False  # the last line was there and says so

    def refuse(self, number: int, error: str) -> None:
        self.refused += 1
        if len(self.refused_lines) < TOLD_LINES:
            self.refused_lines.append({"line": number, "error": error[:200]})


class Importer:
    """Takes up one export. `on_stored` is told of each entry that was stored."""

    def __init__(
        self,
        entries: Entries,
        installation: str,
        now_ms: int,
        on_stored: Callable[[Entry], None],
        *,
        dry_run: bool,
        with_purged: bool,
    ) -> None:
        self.report = Report()
        self._entries = entries
        self._installation = installation
        self._now_ms = now_ms
        self._on_stored = on_stored
        self._dry_run = dry_run
        self._with_purged = with_purged

    async def take(self, pieces: AsyncIterator[bytes]) -> Report:
        """Read to the end. Raises BadRequest for what is no export, CacheFault; what was stored until then stays."""
        await self._entries.follow()
        number, size = 0, 0
        drafts: list[tuple[int, Draft]] = []
        async for line in lines(pieces):
            number += 1
            size += len(line)
            if (draft := self._read(number, line)) is not None:
                drafts.append((number, draft))
            if len(drafts) >= PIECE_LINES or size >= PIECE_BYTES:
                await self._store(drafts)
                drafts, size = [], 0
                await asyncio.sleep(0)
        await self._store(drafts)
        return self.report

    def _read(self, number: int, line: bytes) -> Draft | None:
        try:
            said = orjson.loads(line)
            kind = said.get("ibid") if isinstance(said, dict) else None
            if number == 1:
                self._begin(said, kind)
                return None
            if kind in ("end", "broken", "export"):  # several exports in one file are one
                self.report.is_whole = kind == "end"
                return None
            self.report.read += 1
            if kind != "entry":
                raise ValueError("is no entry of an export")
            draft = draft_of(said, self._now_ms)
        except ValueError as error:  # a JSON, UTF-8 or base64 fault is one as well
            if number == 1:
                raise _no_export() from error
            self.report.refuse(number, str(error))
            return None
        if draft.expires_ms <= self._now_ms:
            self.report.expired += 1
            return None
        if not self._with_purged and was_purged(self._entries.purges, draft):
            self.report.purged += 1
            return None
        return draft

    def _begin(self, said: Any, kind: object) -> None:
        if kind != "export" or said.get("format") != FORMAT:
            raise _no_export()
        self.report.is_foreign = said.get("installation") != self._installation

    async def _store(self, drafts: Sequence[tuple[int, Draft]]) -> None:
        there = await self._entries.there([draft.fingerprint for _, draft in drafts])
        new = {draft.fingerprint: (number, draft) for number, draft in drafts if draft.fingerprint not in there}
        self.report.there += len(drafts) - len(new)
        if self._dry_run:
            self.report.stored += len(new)
            return
        await asyncio.gather(*(self._put(number, draft) for number, draft in new.values()))

    async def _put(self, number: int, draft: Draft) -> None:
        try:
            stored = await self._entries.put(draft, Began(self._entries.purges.newest, self._now_ms))
        except CacheFault as fault:
            if fault.code != "store_refused":
                raise
            self.report.refuse(number, fault.message)
            return
        if stored is None:
            self.report.purged += 1
            return
        self.report.stored += 1
        self._on_stored(stored.entry)


def was_purged(purges: Purges, draft: Draft) -> bool:
    """Whether a purge that is still known and was made after this was asked for reaches it."""
    asked, marks = asked_ms(draft), marks_of(draft)
    return any(purge.ts_ms >= asked and reaches(purge, marks, asked) for purge in purges)


async def lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Lines that are not empty, without their ends. Raises BadRequest (413) for one that is longer than LINE_BYTES."""
    rest = bytearray()
    async for piece in pieces:
        if b"\n" not in piece:
            rest += piece
        else:
            first, *between, last = piece.split(b"\n")
            for line in _stripped((bytes(rest) + first, *between)):
                yield line
            rest = bytearray(last)
        if len(rest) > LINE_BYTES:
            raise BadRequest(f"a line is longer than {LINE_BYTES} bytes", code="body_too_large", status=413)
    for line in _stripped((bytes(rest),)):
        yield line


def _stripped(found: Iterable[bytes]) -> Iterable[bytes]:
    return (line for line in map(bytes.strip, found) if line)


def _no_export() -> BadRequest:
    return BadRequest(
        f"the first line must be that of an export: {json.dumps({'ibid': 'export', 'format': FORMAT})}",
        code="invalid_export",
    )
