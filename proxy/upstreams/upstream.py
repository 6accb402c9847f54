"""Forwards to the configured model servers over one aiohttp session, and to nowhere else.

No request arms a timer either: what is waiting for a response head, or for the next byte of a body, is listed with the
loop time since when, and one sweep every `tick_s` ends what waits too long. (aiohttp's own read timeout re-arms a timer
for every chunk.) Rules: catalogue rows 28-30, 36-43, 72, 73.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import hdrs
from yarl import URL

from proxy.aiohttp_internals import CLOSING, IDEMPOTENT_METHODS, HttpProcessingError, serialize_headers
from proxy.core.dialects.routes import family_of
from proxy.core.errors import BadRequest, ConfigError, UpstreamError
from proxy.core.failover import named_there
from proxy.core.identity import BUILT_IN, HeaderRules, forwardable
from proxy.core.memo import Memo, size_of
from proxy.core.patterns import is_one_of
from proxy.upstreams.address import DEFAULTS, MEMO_BYTES, Address, UpstreamAddress
from proxy.upstreams.breaker import Breaker
from proxy.upstreams.response import OpenResponse, broken

RETRY_PAUSE_S = 0.05
WRITTEN_AT_ONCE_BYTES = 1 << 20  # above it aiohttp warns of a stalled loop
ROUTES_KEPT = 1024
PATTERN_BYTES = 8192
"""Of a pattern, but for the texts in it."""
HEAD_LINE_BYTES = 64 * 1024
HEAD_LINES = 256
"""Of what an upstream answers: content security policies and ids of rate limits run long, and curl takes more."""
NAME_CHARS = 200  # of a model; where a longer one leads is not remembered

_IDENTITY = ("Accept-Encoding", "identity")
_OF_A_STREAM = {b"content-length": "Content-Length", b"content-encoding": "Content-Encoding"}


@dataclass(frozen=True, slots=True)
class UpstreamLimits:
    connect_s: float = 5.0
    first_byte_s: float = 600.0
    idle_s: float = 120.0  # between two pieces of a body
    keep_alive_s: float = 15.0
    memo_bytes: int = MEMO_BYTES  # of each memo


class _Pattern:
    """The head of like requests, up to the length of their bodies, and what the connector asks of a request."""

    __slots__ = ("head", "request")

    def __init__(
        self,
        session: aiohttp.ClientSession,
        method: str,
        url: URL,
        received: Sequence[tuple[bytes, bytes]],
        is_bodiless: bool,
        rules: HeaderRules,
    ) -> None:
        headers = [*forwardable(received, rules), _IDENTITY]
        data = None if is_bodiless else b""
        self.request = request = aiohttp.ClientRequest(
            method, url, headers=headers, data=data, session=session, loop=asyncio.get_running_loop()
        )
        if method in request.POST_METHODS:
            request.headers.setdefault(hdrs.CONTENT_TYPE, "application/octet-stream")
        if not is_bodiless:
            del request.headers[hdrs.CONTENT_LENGTH]
        head = serialize_headers(f"{method} {url.raw_path_qs} HTTP/1.1", request.headers)
        self.head = head if is_bodiless else head[:-2] + b"Content-Length: "


class _Waiting:
    """One wait of one task, which the sweep may end."""

    __slots__ = ("expired", "since", "task")

    def __init__(self, task: asyncio.Task[Any], since: float) -> None:
        self.task = task
        self.since = since
        self.expired = False


class Upstreams:
    """The port `Upstream`. Made inside a running loop; owns its session: `start`, then `close`."""

    def __init__(
        self,
        addresses: Sequence[UpstreamAddress] = DEFAULTS,
        limits: UpstreamLimits | None = None,
        *,
        header_rules: HeaderRules = BUILT_IN,
        tick_s: float = 0.5,
        now: Callable[[], float] | None = None,
    ) -> None:
        """`now`: monotonic seconds for the breakers; the loop's when None."""
        self.loop = asyncio.get_running_loop()
        self._limits = limits or UpstreamLimits()
        self._header_rules = header_rules
        self._tick_s = tick_s
        self._addresses: dict[str, Address] = {}
        self._by_dialect: dict[str, list[UpstreamAddress]] = {}
        self._routes: dict[tuple[str, str | None], str] = {}
        for configured in addresses:
            if configured.name in self._addresses:
                raise ConfigError(f"upstream {configured.name!r} is configured twice")
            breaker = Breaker(configured.name, now or self.loop.time)
            self._addresses[configured.name] = Address(configured, breaker, self._limits.memo_bytes)
            self._by_dialect.setdefault(configured.dialect, []).append(configured)
        if not self._addresses:
            raise ConfigError("no upstream is configured")
        self._timeout = aiohttp.ClientTimeout(total=None, connect=self._limits.connect_s)
        self._session: aiohttp.ClientSession | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._patterns: Memo[tuple[str, URL, tuple[tuple[bytes, bytes], ...], bool], _Pattern] = Memo(
            self._limits.memo_bytes
        )
        self._opening: set[_Waiting] = set()
        self._reading: set[OpenResponse] = set()

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=self._limits.keep_alive_s, ttl_dns_cache=30),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=self._timeout,
            auto_decompress=False,
            trust_env=False,
            max_line_size=HEAD_LINE_BYTES,
            max_field_size=HEAD_LINE_BYTES,
            max_headers=HEAD_LINES,
        )
        self._timer = self.loop.call_later(self._tick_s, self._tick)

    async def close(self) -> None:
        """Cut what is open and close the session."""
        if self._timer is not None:
            self._timer.cancel()
        for response in tuple(self._reading):
            response.abort()
        if self._session is not None:
            await self._session.close()

    def route(self, path: str, headers: Mapping[str, str], model: str | None) -> str:
        """See `ports.Upstream.route`: `anthropic-version` decides where dialects share paths."""
        family = family_of(path, headers)
        found = self._routes.get((family, model))
        if found is None:
            found = self._serving(family, model)
            if len(self._routes) >= ROUTES_KEPT:
                self._routes.clear()
            if model is None or len(model) <= NAME_CHARS:
                self._routes[family, model] = found
        return found

    def _serving(self, family: str, model: str | None) -> str:
        speaking = self._by_dialect.get(family)
        if speaking is None:
            raise BadRequest("No upstream speaks the dialect of this path.", status=404, code="dialect_not_served")
        taking = (one for one in speaking if not one.models)
        if model is None:
            return next(taking, speaking[0]).name
        naming = (one for one in speaking if is_one_of(model, one.models))
        if (found := next(naming, None) or next(taking, None)) is not None:
            return found.name
        asked = f"The model {model[:100]!r} is not served here." if model else "Name a model that is served here."
        raise BadRequest(asked, status=404, code="model_not_served", param="model")

    def is_divided(self, path: str, headers: Mapping[str, str]) -> bool:
        """See `ports.Upstream.is_divided`."""
        return any(one.models for one in self._by_dialect.get(family_of(path, headers), ()))

    def serves(self, upstream: str, model: str) -> bool:
        """See `ports.Upstream.serves`."""
        models = self._addresses[upstream].models
        return not models or is_one_of(model, models)

    def dialect(self, upstream: str) -> str:
        return self._addresses[upstream].dialect

    def named_there(self, upstream: str, model: str) -> str | None:
        """See `ports.Upstream.named_there`."""
        own = named_there(model, self._addresses[upstream].stands_in_for)
        return own if own is not None and self.serves(upstream, own) else None

    def is_failing(self, upstream: str) -> bool:
        return self._addresses[upstream].breaker.is_open

    def place(self, upstream: str) -> str:
        """Its address, without version and credentials: upstreams of one place are one model server."""
        return self._addresses[upstream].place

    def breaker(self, upstream: str) -> Breaker:
        return self._addresses[upstream].breaker

    async def open(
        self,
        upstream: str,
        method: str,
        path_qs: str,
        headers: Sequence[tuple[bytes, bytes]],
        body: bytes | AsyncIterable[bytes] | None,
        on_sent: Callable[[], None] | None = None,
    ) -> OpenResponse:
        """Send and wait for the head. See `ports.Upstream.open`; also raises BadRequest for a path that is none."""
        address = self._addresses[upstream]
        if address.key is not None and method != hdrs.METH_OPTIONS:  # a preflight has no credential
            headers, path_qs = address.with_key(headers, path_qs)
        url = address.url_of(path_qs)
        breaker = address.breaker
        is_probe = breaker.admit()
        task = asyncio.current_task(self.loop)
        assert task is not None
        waiting = _Waiting(task, self.loop.time())
        self._opening.add(waiting)
        try:
            opened = await self._send(method, url, headers, body, on_sent, address.proxy)
        except UpstreamError:
            breaker.failed(is_probe)
            raise
        except asyncio.CancelledError:
            if waiting.expired and task.uncancel() <= 0:
                breaker.failed(is_probe)
                message = "The upstream did not begin its answer in time."
                raise UpstreamError(message, code="upstream_timeout", status=504) from None
            raise
        finally:
            self._opening.discard(waiting)
        if opened.status < 400:
            address.remember(path_qs, url)
        if opened.status >= 500:
            breaker.failed(is_probe)
        else:
            breaker.succeeded(is_probe)
        if 300 <= opened.status < 400 and opened.status != 304 and opened.header(hdrs.LOCATION) is not None:
            opened.abort()
            message = "The upstream answered with a redirect, which is never followed."
            raise UpstreamError(message, code="upstream_redirect", should_retry=False)
        self._reading.add(opened)
        return opened

    async def connect(
        self, upstream: str, path_qs: str, headers: Sequence[tuple[bytes, bytes]], protocols: Sequence[str]
    ) -> aiohttp.ClientWebSocketResponse:
        """A WebSocket to the upstream. See `ports.Upstream.connect`."""
        assert self._session is not None
        address = self._addresses[upstream]
        if address.key is not None:
            headers, path_qs = address.with_key(headers, path_qs)
        sent = [line for line in forwardable(headers, self._header_rules) if line[0].lower() != "content-type"]
        try:
            async with asyncio.timeout(self._limits.connect_s + self._limits.idle_s):
                return await self._session.ws_connect(
                    address.url_of(path_qs), headers=sent, protocols=protocols, autoping=False, autoclose=False,
                    max_msg_size=16 << 20, proxy=address.proxy,
                )  # fmt: skip
        except aiohttp.WSServerHandshakeError as error:
            message = "The upstream refused the WebSocket."
            status = error.status if 400 <= error.status < 600 else 502
            raise UpstreamError(message, code="upstream_refused", status=status) from error
        except (aiohttp.ClientError, OSError) as error:
            raise _fault(error) from error

    async def _send(
        self,
        method: str,
        url: URL,
        headers: Sequence[tuple[bytes, bytes]],
        body: bytes | AsyncIterable[bytes] | None,
        on_sent: Callable[[], None] | None,
        proxy: URL | None,
    ) -> OpenResponse:
        """One request, tried a second time only when not one byte of it was sent, or when it may be repeated and its
        connection, kept alive, had ended (RFC 9112 §9.3.1)."""
        whole, source = (body, None) if body is None or isinstance(body, bytes) else (None, _Upload(body))
        for is_last in (False, True):
            try:
                is_long = whole is not None and len(whole) > WRITTEN_AT_ONCE_BYTES
                if source is None and not is_long and proxy is None:
                    return await self._exchange(method, url, headers, whole, on_sent)
                if on_sent is not None:
                    on_sent()
                data = source or (None if whole is None else io.BytesIO(whole))
                return await self._upload(method, url, headers, data, proxy)
            except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
                if source is not None and source.error is not None:
                    raise source.error from None
                fault = _fault(error)
                if is_last or not _may_repeat(error, method) or (source is not None and source.has_begun):
                    raise fault from error
            await asyncio.sleep(RETRY_PAUSE_S)
        raise AssertionError("unreachable")

    async def _exchange(
        self,
        method: str,
        url: URL,
        headers: Sequence[tuple[bytes, bytes]],
        body: bytes | None,
        on_sent: Callable[[], None] | None,
    ) -> OpenResponse:
        """Send what is whole in one write and wait for the head: `ClientSession.request` without its objects, which
        cost 60 µs of a forward's 290."""
        assert self._session is not None
        assert self._session.connector is not None
        key = (method, url, tuple(headers), body is None)
        pattern = self._patterns.get(key)
        if pattern is None:
            pattern = _Pattern(self._session, *key, self._header_rules)
        try:
            connection = await self._session.connector.connect(pattern.request, [], self._timeout)
        except TimeoutError as error:
            raise aiohttp.ConnectionTimeoutError(str(url.origin())) from error
        try:
            protocol = connection.protocol
            assert protocol is not None
            transport = protocol.transport
            if transport is None or transport.is_closing():
                raise aiohttp.ClientConnectionResetError(CLOSING)
            protocol.set_response_params(
                skip_payload=method == hdrs.METH_HEAD, read_until_eof=True, auto_decompress=False,
                max_line_size=HEAD_LINE_BYTES, max_field_size=HEAD_LINE_BYTES, max_headers=HEAD_LINES,
            )  # fmt: skip
            transport.write(pattern.head if body is None else b"%b%d\r\n\r\n%b" % (pattern.head, len(body), body))
            if on_sent is not None:
                on_sent()
            message, content = await protocol.read()
            while 100 <= message.code < 200 and message.code != 101:
                message, content = await protocol.read()
            if message.code < 400 and self._patterns.get(key) is None:
                self._patterns.put(key, pattern, size_of(key[2]) + 6 * len(pattern.head) + PATTERN_BYTES)
            return OpenResponse(self, message.code, message, content, connection, connection)
        except BaseException:
            connection.close()
            raise

    async def _upload(
        self,
        method: str,
        url: URL,
        received: Sequence[tuple[bytes, bytes]],
        body: _Upload | io.BytesIO | None,
        proxy: URL | None = None,
    ) -> OpenResponse:
        """Send piece by piece, or through a proxy. A stream is passed on as it came, with what the client said of its
        length and coding."""
        assert self._session is not None
        headers = [*forwardable(received, self._header_rules), _IDENTITY]
        if isinstance(body, _Upload):
            for name, value in received:
                if (described := _OF_A_STREAM.get(name.lower())) is not None:
                    headers.append((described, value.decode("ascii", "replace")))
        response = await self._session.request(
            method, url, headers=headers, data=body, allow_redirects=False, proxy=proxy
        )
        return OpenResponse(self, response.status, response, response.content, response.connection, response)

    def forget(self, response: OpenResponse) -> None:
        self._reading.discard(response)

    def _tick(self) -> None:
        self._timer = self.loop.call_later(self._tick_s, self._tick)
        now = self.loop.time()
        for waiting in self._opening:
            if not waiting.expired and now - waiting.since >= self._limits.first_byte_s:
                waiting.expired = True
                waiting.task.cancel()
        for response in tuple(self._reading):
            response.inspect(now, self._limits.idle_s)


class _Upload:
    """A client's body on its way; keeps the fault of the client apart from those of the upstream."""

    def __init__(self, body: AsyncIterable[bytes]) -> None:
        self._body = body
        self.has_begun = False
        self.error: BadRequest | None = None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.has_begun = True
        try:
            async for piece in self._body:
                yield piece
        except BadRequest as error:
            self.error = error
            raise


def _may_repeat(error: Exception, method: str) -> bool:
    """No connection was made, or the pooled one was closing before the first write (aiohttp says so in words only:
    the same class with other words means that the connection was lost while writing), or repeating does no harm."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
        return False
    if isinstance(error, aiohttp.ClientConnectorError):
        return True
    reset = error if isinstance(error, aiohttp.ClientConnectionResetError) else error.__cause__
    if isinstance(reset, aiohttp.ClientConnectionResetError) and str(reset) == CLOSING:
        return True
    return method in IDEMPOTENT_METHODS and isinstance(error, aiohttp.ClientOSError | aiohttp.ServerDisconnectedError)


def _fault(error: Exception) -> UpstreamError:
    if isinstance(error, aiohttp.ConnectionTimeoutError | aiohttp.ClientConnectorError | aiohttp.ClientHttpProxyError):
        return UpstreamError("The upstream cannot be reached.", code="upstream_unreachable")
    if isinstance(error, aiohttp.ClientResponseError | HttpProcessingError):
        return UpstreamError("The upstream answered outside HTTP.", code="upstream_incomplete")
    if isinstance(error, aiohttp.ClientPayloadError):
        return broken(False)
    return UpstreamError("The upstream closed the connection before it answered.", code="upstream_reset")
