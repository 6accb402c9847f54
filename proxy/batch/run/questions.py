"""The lines of one batch as they were handed in: read once, to find what is wrong and what repeats; later by number.

Lines of one fingerprint are one question. The first of them is its leader: it alone is looked up and sent, the others
get its answer with ids of their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import orjson

from proxy.batch.files import LineFile
from proxy.batch.lines import Answered, new_id, refusal
from proxy.batch.run.course import Course
from proxy.core.batches import (
    EMPTY,
    ERRORS_SHOWN,
    Line,
    LineFault,
    duplicate_of,
    read_openai_line,
    read_requests_item,
    too_many,
)
from proxy.core.errors import BadRequest, CacheFault
from proxy.core.query import Query

QUERIES_BYTES = 32 * 1024 * 1024  # of bodies whose reading is remembered between the two passes

Key = tuple[bytes, int | None, bool]


class Questions:
    """`read` once, then ask for lines by number."""

    def __init__(self, course: Course) -> None:
        self.names: list[bytes] = []  # custom ids, as JSON
        self.leaders: list[int] = []
        self.refused: dict[int, Answered] = {}  # that cannot be asked, with why
        self._course = course
        self._shop = course.shop
        self._file = LineFile(course.shop.store, course.job.input_file_id, course.shop.line_limit_bytes)
        self._followers: dict[int, list[int]] = {}
        self._queries: dict[int, Query] = {}
        self._queries_bytes = 0

    # -- the first pass -------------------------------------------------------------------------------------------

    async def read(self) -> list[dict[str, object]]:
        """Read every line, find repeats; what is wrong with the file."""
        faults: list[dict[str, object]] = []
        known: set[str] = set()
        leaders: dict[Key, int] = {}
        limit = self._shop.max_lines
        number = 0
        async for raw in self._file.scan():
            if number == limit:
                return [too_many(limit).shown(None)]
            line = self._read_line(raw)
            if isinstance(line, Line) and line.custom_id in known:
                line = duplicate_of(line.custom_id)
            if isinstance(line, LineFault):
                faults.append(line.shown(self._file.line))
                if len(faults) == ERRORS_SHOWN:
                    return faults
                name = b""
            else:
                known.add(line.custom_id)
                name = orjson.dumps(line.custom_id)
                if not faults:
                    self._enter(number, line, leaders)
            self.names.append(name)
            number += 1
        if not number:
            return [EMPTY.shown(None)]
        self._course.job.total = number
        self._course.ended = bytearray(number)
        return faults

    def _read_line(self, raw: bytes | None) -> Line | LineFault:
        if raw is None:
            message = f"This line is larger than {self._shop.line_limit_bytes} bytes."
            return LineFault("request_too_large", message)
        if self._course.job.dialect == "openai":
            return read_openai_line(raw, self._course.job.path, orjson.loads)
        return read_requests_item(raw, 0, orjson.loads)  # it was looked at when it arrived

    def _enter(self, number: int, line: Line, leaders: dict[Key, int]) -> None:
        try:
            query = self._query_of(line)
        except BadRequest as error:
            self.refused[number] = refusal(self._shop.dialect_of(self._course.job.path), new_id(), error)
            self.leaders.append(number)
            return
        key = _key_of(query)
        leader = number if key is None else leaders.setdefault(key, number)
        if leader != number:
            self._followers.setdefault(leader, []).append(number)
            return
        self.leaders.append(number)
        if self._queries_bytes < QUERIES_BYTES:
            self._queries[number] = query
            self._queries_bytes += 2 * len(query.body) + 512

    def _query_of(self, line: Line) -> Query:
        job = self._course.job
        return self._shop.read(job.path, job.tenant, self._course.headers, line.body, job.key_id)

    # -- afterwards -----------------------------------------------------------------------------------------------

    async def query(self, number: int) -> Query:
        query = self._queries.get(number)
        if query is None:
            line = self._read_line(await self._read_surely(number))
            assert isinstance(line, Line)
            query = self._query_of(line)
        return query

    def forget(self, number: int) -> None:
        self._queries.pop(number, None)

    async def _read_surely(self, number: int) -> bytes:
        """A line again, when the database can give it: what is under way is not thrown away for a moment's fault."""
        while True:
            try:
                return await self._file.read(number)
            except CacheFault:
                if self._course.stopping:
                    raise
                await asyncio.sleep(1.0)

    def repeats(self, leader: int) -> Iterator[int]:
        """Lines that ask what this one asks, without those that have ended when it is their turn."""
        for number in self._followers.get(leader, ()):
            if not self._course.ended[number]:
                yield number

    def alike(self, leader: int) -> Iterator[int]:
        """This line, unless it has ended, and those that repeat it."""
        if not self._course.ended[leader]:
            yield leader
        yield from self.repeats(leader)

    def left(self, sent: set[int]) -> Iterator[int]:
        """Lines to begin with: leaders, and followers whose leader ended in an earlier run."""
        for leader in self.leaders:
            if not self._course.ended[leader]:
                if leader not in sent:
                    yield leader
            else:
                yield from [number for number in self.repeats(leader) if number not in sent]


def _key_of(query: Query) -> Key | None:
    """What lines have in common that get one answer; None for a line that nothing repeats."""
    if query.batch is not None:
        if not query.batch.fingerprints:
            return None
        return b"".join([query.batch.encoding_format.encode(), *query.batch.fingerprints]), None, False
    if not query.fingerprint or not query.controls.read:
        return None
    return query.fingerprint, query.output_limit, query.keeps_id
