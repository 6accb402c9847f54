"""Outcomes that SQL does not hold yet, in files. What was appended outlives the process, however that ends.

An outcome is one line, handed to the kernel by one write(2) before the answer it belongs to is complete: a process that
is killed loses nothing. Nothing is synced here, so a machine that loses power loses what its kernel had not put on disk
by itself; `sync` is for lines that have to wait long for SQL.

The journal is a row of segments, `ledger-<number>.jsonl`, mode 0600. The last one is appended to, by one process, on
its event loop; a segment is removed, or emptied, when SQL has all of it. A process that starts leaves the segments of
the one before it as they are and begins a new one. A line is `[kind, …]`:

    ["fields", [name, …]]                        first: the fields of an outcome, so that another release can read them
    ["one", [value, …]]                          an outcome; its calls and their usage are objects in it
    ["like", n, [value, …]]                      what outcomes that recur have in common, number n in this segment
    ["again", n, request_id, ts_ms, total_ms]    one of them

No prompt, no answer: an outcome has none.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from proxy.core.model import Call, Outcome, Usage

log = logging.getLogger(__name__)

SEGMENT_BYTES = 1024 * 1024  # some 10,000 hits: what a start reads again at most without need
LIMIT_BYTES = 256 * 1024 * 1024  # all segments together; about 2,600,000 hits, or 400,000 forwards

_NAME = re.compile(r"ledger-(\d+)\.jsonl")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Recurred(NamedTuple):
    """As `model.again(...)`: an outcome of which only these differ from others."""

    recurring: tuple[Any, ...]
    request_id: str
    ts_ms: int
    total_ms: float


class _Segment(NamedTuple):
    path: Path
    end: int  # appended in all when it was sealed; 0 for one of an earlier process
    size_bytes: int


class Journal:
    """Lives on the event loop. `appended` counts the outcomes taken since the start, in their order."""

    def __init__(self, directory: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self._directory = directory
        self._limit_bytes = limit_bytes
        self._sealed: list[_Segment] = []
        self._path: Path | None = None
        self._descriptor = -1
        self._current_bytes = 0
        self._numbers: dict[int, tuple[int, tuple[Any, ...]]] = {}  # by identity; each keeps its key alive
        self._next = 1
        self._unsynced: list[Path] = []
        self.size_bytes = 0
        self.appended = 0
        self.state = "ok"  # or why outcomes are not taken: "journal_full", "journal_down"

    def find(self) -> None:
        """Take over the segments of earlier processes. Raises OSError."""
        found = sorted(
            (int(match[1]), path) for path in self._directory.iterdir() if (match := _NAME.fullmatch(path.name))
        )
        self._sealed = [_Segment(path, 0, path.stat().st_size) for _, path in found]
        self.size_bytes = sum(segment.size_bytes for segment in self._sealed)
        self._next = found[-1][0] + 1 if found else 1

    @property
    def sealed(self) -> Sequence[Path]:
        """Segments that are not appended to any more, oldest first."""
        return [segment.path for segment in self._sealed]

    @property
    def path(self) -> Path | None:
        """The segment that is appended to, if there is one."""
        return self._path

    # -- append -----------------------------------------------------------------------------------------------------

    def append(self, outcome: Outcome) -> bool:
        """Whether the outcome is on file. Never raises."""
        try:
            return self._write(_spell(("one", outcome[:])))
        except TypeError:  # a string or a number JSON has no form for, and no database takes
            return False

    def append_again(self, recurring: tuple[Any, ...], request_id: str, ts_ms: int, total_ms: float) -> bool:
        """As `append`, for an outcome that recurs: what it has in common with others is written once a segment."""
        known = self._numbers.get(id(recurring))
        number = len(self._numbers) if known is None else known[0]
        try:
            line = _spell(("again", number, request_id, ts_ms, total_ms))
            if known is not None:
                return self._write(line)
            line = _spell(("like", number, recurring)) + line
        except TypeError:
            return False
        if not self._write(line):
            return False
        if self._path is not None:  # else the segment is full, and the next one counts anew
            self._numbers[id(recurring)] = (number, recurring)
        return True

    def _write(self, line: bytes) -> bool:
        if not self._current_bytes:
            line = _FIELDS + line
        size_bytes = len(line)
        if self.size_bytes + size_bytes > self._limit_bytes:
            return self._refuse("journal_full", f"{self.size_bytes >> 20} MiB wait for the database")
        try:
            if self._path is None:
                self._begin()
            if (written := os.write(self._descriptor, line)) != size_bytes:  # the disk is full
                os.ftruncate(self._descriptor, self._current_bytes)
                return self._refuse("journal_full", f"{written} of {size_bytes} bytes were taken")
        except OSError as error:
            if error.errno in _FULL:
                return self._refuse("journal_full", os.strerror(error.errno))
            self._abandon()
            return self._refuse("journal_down", error.strerror or type(error).__name__)
        self._current_bytes += size_bytes
        self.size_bytes += size_bytes
        self.appended += 1
        if self.state != "ok":
            log.warning("the ledger's journal takes rows again")
            self.state = "ok"
        if self._current_bytes >= SEGMENT_BYTES:
            self.seal()
        return True

    def _begin(self) -> None:
        path = self._directory / f"ledger-{self._next:08d}.jsonl"
        self._next += 1
        self._descriptor = os.open(path, _FLAGS, 0o600)
        self._path = path
        self._unsynced.append(path)

    def _abandon(self) -> None:
        """Whatever is wrong with this file, the next attempt has another one."""
        path, is_empty = self._path, not self._current_bytes
        self.seal()
        if path is not None and is_empty:
            self.remove(path)

    def _refuse(self, state: str, why: str) -> bool:
        if self.state != state:
            log.error("the ledger's journal takes no rows (%s): %s; a kill would lose them", state, why)
        self.state = state
        return False

    # -- seal and forget --------------------------------------------------------------------------------------------

    def seal(self) -> None:
        """Append to another segment from now on."""
        self._numbers.clear()
        if self._path is None:
            return
        with suppress(OSError):  # nothing is owed to a descriptor: what was written, the kernel has
            os.close(self._descriptor)
        self._sealed.append(_Segment(self._path, self.appended, self._current_bytes))
        self._path, self._descriptor, self._current_bytes = None, -1, 0

    def forget(self, count: int) -> None:
        """The first `count` outcomes appended since the start are in SQL, and all that earlier processes left."""
        gone = [segment for segment in self._sealed if segment.end <= count]
        for segment in gone:
            self.remove(segment.path)
        if self._path is not None and self.appended == count and self._current_bytes:
            try:
                os.ftruncate(self._descriptor, 0)
            except OSError as error:
                log.warning("the ledger's journal cannot be emptied: %s", error.strerror)
                self.seal()
                return
            self.size_bytes -= self._current_bytes
            self._current_bytes = 0
            self._numbers.clear()

    def remove(self, path: Path) -> None:
        """SQL has all of this sealed segment. One that cannot be removed is read again at the next start."""
        for segment in [segment for segment in self._sealed if segment.path == path]:
            self._sealed.remove(segment)
            self.size_bytes -= segment.size_bytes
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.error("a segment of the ledger's journal cannot be removed: %s", error.strerror)

    def to_sync(self) -> list[Path]:
        """Segments that were appended to since this was asked last."""
        unsynced, self._unsynced = self._unsynced, [] if self._path is None else [self._path]
        return unsynced


# -- lines ------------------------------------------------------------------------------------------------------------


def sync(paths: Sequence[Path]) -> None:
    """Have the kernel put segments on disk. Blocks: call it in a thread. Raises OSError."""
    for path in paths:
        with suppress(FileNotFoundError):  # SQL has it by now
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def read(path: Path) -> Iterator[Outcome | Recurred | None]:
    """The outcomes of a segment in their order; None for each line that says none. Raises OSError.

    A line is torn when its process was killed, or the machine lost power, half way. Its neighbours are whole.
    """
    names: Sequence[str] = Outcome._fields
    known: dict[int, tuple[Any, ...]] = {}
    with path.open("rb") as lines:
        for line in lines:
            try:
                kind, *rest = orjson.loads(line)
                if kind == "again":
                    number, request_id, ts_ms, total_ms = rest
                    yield Recurred(known[number], request_id, ts_ms, total_ms)
                elif kind == "like":
                    number, values = rest
                    known[number] = _outcome(names, ["", 0, *values, None, 0.0]).recurring
                elif kind == "fields":
                    (names,) = rest
                else:
                    yield _outcome(names, *rest)
            except (ValueError, TypeError, LookupError, AttributeError):
                yield None


def _spell(values: tuple[Any, ...]) -> bytes:
    return orjson.dumps(values, None, orjson.OPT_APPEND_NEWLINE)


_FIELDS = _spell(("fields", Outcome._fields))


def _outcome(names: Sequence[str], values: Sequence[Any]) -> Outcome:
    told = dict(zip(names, values, strict=True))
    told |= {"usage": _usage(told["usage"]), "calls": tuple([_call(call) for call in told["calls"]])}
    return Outcome(**{name: told[name] for name in Outcome._fields if name in told})


def _call(values: Mapping[str, Any]) -> Call:
    told = {name: values[name] for name in Call.__slots__ if name in values}
    return Call(**{**told, "usage": _usage(values["usage"]), "shaped_by": tuple(values["shaped_by"])})


def _usage(values: Mapping[str, int] | None) -> Usage | None:
    return None if values is None else Usage(**{name: values[name] for name in Usage.__slots__ if name in values})
