"""How a log line looks and how it leaves the process: one event is one line, and no line carries a secret.

Lines are formatted and written by one thread that looks at its bounded queue every 50 ms (a warning wakes it at once),
so the event loop pays for an append only. A thread that blocks on a queue would be woken, and take the interpreter
lock, once per request; looking at intervals costs one wake-up for all requests of the interval. Lines are formatted
a few at a time: the write between two batches hands the interpreter lock back to the loop. When the queue is full,
lines are dropped and the next line says how many.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
import time
import traceback
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, TextIO

import orjson

FIELD_LIMIT_BYTES = 1000
CLEAN_LIMIT = 16 * FIELD_LIMIT_BYTES  # characters looked at; keeps the patterns' worst case under 20 ms
QUEUE_LIMIT = 20_000
BATCH = 64
INTERVAL_S = 0.05
MEMO_LIMIT = 4096
SHORTEST_SECRET = 6  # shorter ones would blot out ordinary words
HIDDEN = "[hidden]"

Pairs = list[tuple[str, str]]
"""Field names with values already encoded by `Redactor.encode`, in the order they are printed."""

_MARKERS = (
    "bearer",
    "basic",
    "key",
    "://",
    "token",
    "password",
    "secret",
    "aiza",
    "eyj",
    "ibid-",
    "xai",
    "r8",
    "hf_",
    "authorization",
    "k_",
    "k-",
)
_PATTERN = re.compile(
    r"(?P<scheme>\b(?:bearer|basic)\s+)[\w.~+/=:-]{6,}"
    r"|(?P<field>\b(?:[\w-]{0,40}api[-_]?key|authorization|[\w-]{0,40}(?:token|password|secret))[\"']?\s?[:=]\s?[\"']?)"
    r"(?:(?:bearer|basic)\s+)?(?!/)[^\s\"',;&]{6,}"
    r"|(?P<url>[a-z][\w+.-]{0,30}://)[^\s/@]{1,200}@"
    r"|\b(?:sk|pk|rk|gsk|xai|hf|r8)[-_][\w-]{8,}"
    r"|\bAIza[\w-]{20,}"
    r"|\bibid-[0-9a-f]{16,}"
    r"|\beyJ[\w-]{8,}[\w.-]*",
    re.IGNORECASE,
)
_PLAIN_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}").fullmatch
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

logger = logging.getLogger(__name__)


class Redactor:
    """Hides secrets: those known exactly, registered as they are learnt, and whatever looks like one."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets: tuple[str, ...] = ()
        self._memo: dict[str, str] = {}
        self.generation = 0  # what was encoded under another generation may show a secret learnt since
        self.register(*secrets)

    def register(self, *secrets: str) -> None:
        """Hide these from now on, in the spellings of JSON and URLs too. Shorter than 6 characters is ignored."""
        known = set(self._secrets)
        for secret in secrets:
            if len(secret) >= SHORTEST_SECRET:
                known.update(
                    (
                        secret,
                        orjson.dumps(secret).decode()[1:-1],
                        urllib.parse.quote(secret, safe=""),
                        repr(secret)[1:-1],
                    )
                )
        self._secrets = tuple(sorted(known, key=len, reverse=True))
        self._memo = {}
        self.generation += 1

    def redact(self, text: str) -> str:
        """The text without secrets."""
        for secret in self._secrets:
            if secret in text:
                text = text.replace(secret, HIDDEN)
        lowered = text.lower()
        if any(marker in lowered for marker in _MARKERS):
            text = _PATTERN.sub(_hide, text)
        return text

    def clean(self, text: str) -> str:
        """Redacted, every character that is not printable escaped, at most FIELD_LIMIT_BYTES of UTF-8."""
        if len(text) > CLEAN_LIMIT:  # what is cut off last may be the first half of a secret
            longest = len(self._secrets[0]) if self._secrets else 0
            text = self.redact(text[:CLEAN_LIMIT])[: CLEAN_LIMIT // 2 - longest]
        else:
            text = self.redact(text)
        if not text.isprintable():
            text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
        if len(text) * 4 > FIELD_LIMIT_BYTES and len(encoded := text.encode()) > FIELD_LIMIT_BYTES:
            text = encoded[: FIELD_LIMIT_BYTES - 3].decode("utf-8", "ignore") + "…"
        return text

    def encode(self, value: object) -> str:
        """A value as JSON on one line; strings cleaned. Repeated short strings cost one dictionary look-up."""
        if isinstance(value, str):
            known = self._memo.get(value)
            if known is None:
                known = orjson.dumps(self.clean(value)).decode()
                if len(value) <= 64:
                    if len(self._memo) >= MEMO_LIMIT:
                        self._memo = {}
                    self._memo[value] = known
            return known
        if value is None:
            return "null"
        if value is True or value is False:
            return "true" if value else "false"
        if isinstance(value, int):
            return str(value)
        if isinstance(value, float):
            return f"{value:.6g}" if value == value and abs(value) != float("inf") else "null"
        return self.encode(str(value))


def _hide(match: re.Match[str]) -> str:
    kept = match["scheme"] or match["field"] or match["url"] or ""
    return f"{kept}{HIDDEN}{'@' if match['url'] else ''}"


class LineFormat:
    """Turns records into lines, as JSON or as `key=value` text."""

    def __init__(self, redactor: Redactor, *, as_json: bool) -> None:
        self.redactor = redactor
        self._as_json = as_json
        self.tail = "}" if as_json else ""
        self._second = -1
        self._second_text = ""

    def line(self, ts_ms: int, level: str, name: str, event: str, fields: Pairs) -> str:
        """One line without its end. `event` is cleaned here; the values in `fields` are already encoded."""
        return f"{self.head(ts_ms, level, name, event)}{self.join(fields)}{self.tail}"

    def head(self, ts_ms: int, level: str, name: str, event: str) -> str:
        """How a line begins: time, level, logger and event."""
        second, ms = divmod(ts_ms, 1000)
        if second != self._second:
            self._second, self._second_text = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        if self._as_json:
            encode = self.redactor.encode
            start = f'{{"ts":"{self._second_text}.{ms:03d}Z","level":"{level}"'
            return f'{start},"logger":{encode(name)},"event":{encode(event)}'
        return f"{self._second_text}.{ms:03d}Z {level.upper():<8} {name}: {self.redactor.clean(event)}"

    def key(self, name: str) -> str:
        """What stands before a field's encoded value."""
        return f',"{name}":' if self._as_json else f" {name}="

    def join(self, fields: Pairs) -> str:
        """Fields as they follow the head; text leaves out the quotes a plain word does not need."""
        if self._as_json:
            return "".join([f',"{key}":{value}' for key, value in fields])
        return "".join([f" {key}={value[1:-1] if _PLAIN_ID(value[1:-1]) else value}" for key, value in fields])

    def record(self, record: logging.LogRecord) -> str:
        """One line of a standard record: its message, its `extra` fields, and the exception as three short fields."""
        encode = self.redactor.encode
        try:
            event = record.getMessage()
        except (TypeError, ValueError) as error:  # the call's arguments do not fit its format
            event = f"{record.msg} [arguments not shown: {error}]"
        fields: Pairs = []
        for key, value in record.__dict__.items():
            if key not in _STANDARD:
                fields.append((key if _PLAIN_ID(key) else "field", encode(value)))
        if record.exc_info and record.exc_info[1] is not None:
            fields += [(key, encode(value)) for key, value in _exception_fields(record.exc_info[1])]
        if record.stack_info:
            fields.append(("stack", encode(record.stack_info)))
        return self.line(int(record.created * 1000), record.levelname.lower(), record.name, event, fields)


def _exception_fields(error: BaseException) -> Iterator[tuple[str, str]]:
    """Type and text, innermost frames first without source text, and the cause."""
    yield "error", f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__, limit=-12)
    yield "where", " < ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno} {f.name}" for f in reversed(frames))
    cause = error.__cause__ or error.__context__
    if cause is not None:
        yield "cause", f"{type(cause).__name__}: {cause}"


class LogWriter(logging.Handler):
    """The root handler: queues what is logged, one thread formats and writes it. Owner of that thread.

    `post` takes a closure that yields a line when the thread gets to it; the lookup line uses it, because building a
    `logging.LogRecord` alone costs more than the budget of a request.
    """

    def __init__(self, stream: TextIO, form: LineFormat) -> None:
        super().__init__()
        self.form = form
        self.dropped = 0
        self._reported = 0
        self._stream = stream
        self._queue: deque[tuple[Callable[..., str], tuple[Any, ...]]] = deque()
        self._wake = threading.Event()  # something is queued
        self._urgent = threading.Event()  # and should not wait for more
        self._rests = False  # the thread waits for `_wake`, or is about to
        self._stopping = False
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="ibid-log", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record. Its arguments are bound now, before their owner changes them."""
        if record.args:
            with contextlib.suppress(TypeError, ValueError):
                record.msg, record.args = record.getMessage(), None
        self.post(self.form.record, record)
        if record.levelno >= logging.WARNING:
            self._urgent.set()

    def post(self, render: Callable[..., str], *args: Any) -> None:
        """Queue `render(*args)`, to be called in the writer's thread. Never blocks, never raises."""
        if len(self._queue) < QUEUE_LIMIT:
            self._queue.append((render, args))
            if self._rests:
                self._wake.set()
        else:
            self.dropped += 1

    def flush(self) -> None:
        """Write all that is queued, from whichever thread calls."""
        with self._writing:
            while self._queue:
                self._write_some()

    def close(self) -> None:
        """Write what is queued and end the thread; safe to call twice."""
        self._stopping = True
        self._wake.set()
        self._urgent.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        self.flush()
        super().close()

    def _run(self) -> None:
        """Sleeps while nothing is queued; then lines of the next moment are written with the first."""
        while not self._stopping:
            self._rests = True  # whoever queues from here on wakes the thread
            if not self._queue:
                self._wake.wait()
            self._rests = False
            self._wake.clear()
            self._urgent.wait(INTERVAL_S)
            self._urgent.clear()
            self.flush()

    def _write_some(self) -> None:
        lines = []
        for _ in range(min(BATCH, len(self._queue))):
            render, args = self._queue.popleft()
            try:
                lines.append(render(*args))
            except (
                AttributeError,
                TypeError,
                ValueError,
                RecursionError,
            ) as error:  # an odd field must not end the log
                lines.append(self._own_line(f"a log line could not be formatted: {type(error).__name__}"))
        if self.dropped > self._reported:
            lines.append(self._own_line(f"{self.dropped - self._reported} log lines dropped: the writer is too slow"))
            self._reported = self.dropped
        with contextlib.suppress(OSError, ValueError):  # a closed pipe or a full disk is no reason to stop serving
            self._stream.write("\n".join(lines) + "\n")
            self._stream.flush()

    def _own_line(self, event: str) -> str:
        return self.form.line(int(time.time() * 1000), "warning", __name__, event, [])


def set_up(
    level: str = "INFO",
    *,
    as_json: bool = True,
    stream: TextIO | None = None,
    secrets: Iterable[str] = (),
) -> LogWriter:
    """Route all logging, warnings and uncaught exceptions of the process through one started LogWriter.

    The caller owns it and ends it with `tear_down`. `level` is a name of the logging module; raises ValueError else.
    """
    root = logging.getLogger()
    root.setLevel(level.upper())
    writer = LogWriter(stream or sys.stderr, LineFormat(Redactor(secrets), as_json=as_json))
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    root.addHandler(writer)
    for noisy in ("aiohttp.access", "alembic", "sqlalchemy.engine", "aiosqlite", "asyncio", "numba", "alembic"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)
    sys.excepthook = _report_uncaught
    threading.excepthook = _report_thread
    writer.start()
    return writer


def tear_down(writer: LogWriter) -> None:
    """Write what is queued, end the thread, and give the interpreter's own hooks back."""
    logging.getLogger().removeHandler(writer)
    logging.captureWarnings(False)
    sys.excepthook = sys.__excepthook__
    threading.excepthook = threading.__excepthook__
    writer.close()


def _report_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    logger.critical("uncaught exception", exc_info=(kind, error, trace))


def _report_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
        name = args.thread.name if args.thread else "?"
        logger.critical(
            "uncaught exception in a thread",
            exc_info=(args.exc_type, args.exc_value, args.exc_traceback),
            extra={"thread_name": name},
        )
