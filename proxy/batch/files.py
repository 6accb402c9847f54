"""Files of lines: written as they arrive, read line by line, and found again by number."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

from proxy.batch.ports import BatchStore
from proxy.batch.room import Place
from proxy.core.batches import CHUNK_BYTES, BatchFile

CHUNKS_KEPT = 4
SLICE = 8  # lines after which the loop gets its turn


class FileWriter:
    """Takes bytes in any cut and keeps them in chunks. `begin`, then `write`, then `end` or `drop`."""

    def __init__(self, store: BatchStore, file: BatchFile, place: Place | None = None) -> None:
        self.file = file
        self._place = place
        self.size_bytes = 0
        self._store = store
        self._held = bytearray()
        self._number = 0

    async def begin(self) -> None:
        await self._store.begin_file(self.file)

    async def write(self, data: bytes) -> None:
        if self._place is not None:
            self._place.take(len(data))
        self._held += data
        self.size_bytes += len(data)
        while len(self._held) >= CHUNK_BYTES:
            await self._put(bytes(self._held[:CHUNK_BYTES]))
            del self._held[:CHUNK_BYTES]

    async def end(self, filename: str = "", expires_ms: int | None = None) -> BatchFile:
        """The file, for everybody to see."""
        if self._held:
            await self._put(bytes(self._held))
            self._held.clear()
        expires_ms = min(expires_ms or self.file.expires_ms, self.file.expires_ms)
        self.file = replace(
            self.file, size_bytes=self.size_bytes, filename=filename or self.file.filename, expires_ms=expires_ms
        )
        await self._store.end_file(self.file)
        return self.file

    async def drop(self) -> None:
        await self._store.delete_file(self.file.id)

    async def _put(self, data: bytes) -> None:
        await self._store.add_chunk(self.file.id, self._number, data)
        self._number += 1


class LineFile:
    """Lines of a file by number, blank ones left out. `scan` once before `read`."""

    def __init__(self, store: BatchStore, file_id: str, line_limit_bytes: int) -> None:
        self._store = store
        self._file_id = file_id
        self._limit = line_limit_bytes
        self.line = 0  # of the text, blank ones counted, from 1: of what `scan` gave last
        self._places: list[tuple[int, int]] = []  # offset, length
        self._chunks: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._places)

    async def scan(self) -> AsyncIterator[bytes | None]:
        """Every line; None for one that is longer than may be read. The loop gets its turn between slices."""
        self._places.clear()
        self.line = 0
        rest, at, skipped = b"", 0, 0
        async for chunk in self._store.chunks(self._file_id):
            *whole, last = chunk.split(b"\n")
            for piece in whole:
                self.line += 1
                line = rest + piece
                length = skipped + len(line)
                if skipped or line.strip():
                    self._places.append((at, length))
                    yield line if length <= self._limit else None
                    if len(self._places) % SLICE == 0:
                        await asyncio.sleep(0)
                at, rest, skipped = at + length + 1, b"", 0
            rest += last
            if len(rest) > self._limit:
                rest, skipped = b"", skipped + len(rest)
        if skipped or rest.strip():
            self.line += 1
            self._places.append((at, skipped + len(rest)))
            yield rest if skipped + len(rest) <= self._limit else None

    async def read(self, number: int) -> bytes:
        at, length = self._places[number]
        first, last = at // CHUNK_BYTES, (at + length) // CHUNK_BYTES
        data = b"".join([await self._chunk(n) for n in range(first, last + 1)])
        start = at - first * CHUNK_BYTES
        return data[start : start + length]

    async def _chunk(self, number: int) -> bytes:
        found = self._chunks.pop(number, None)
        if found is None:
            found = await self._store.chunk(self._file_id, number)
        self._chunks[number] = found
        if len(self._chunks) > CHUNKS_KEPT:
            del self._chunks[next(iter(self._chunks))]
        return found
