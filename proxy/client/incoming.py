"""What a client sent, made safe: the request's path, its body, and the response to an error.

Nothing here decides about caching. Rules and codes are those of the fault catalogue, rows 1-13.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import secrets
import zlib
from collections.abc import AsyncIterator
from functools import partial
from typing import NoReturn
from urllib.parse import unquote

from aiohttp import HttpVersion10, HttpVersion11, StreamReader, hdrs, web

from proxy.aiohttp_internals import (
    TOO_MANY_HEADERS,
    BadHttpMessage,
    LineTooLong,
    answer_as_http11,
    close_undrained,
    limit_of,
    take_small,
)
from proxy.core.arrival import Arrival
from proxy.core.dialects.dialect import Dialect
from proxy.core.dialects.openai_chat import OpenAIChat
from proxy.core.errors import BadRequest, IbidError
from proxy.core.model import Limits

_SEGMENTS = re.compile(r"(?:/[A-Za-z0-9._~!$&'()*+,=:@%-]+)*/?")
_HOST = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_KNOWN_WORDS = frozenset(
    "v1 v1beta openai api chat completions responses embeddings models files batches messages".split()
)
_NO_TUNNEL = frozenset({hdrs.METH_CONNECT, hdrs.METH_TRACE})
_CLOSES = frozenset(
    {"batch_storage_full", "request_too_large", "request_timeout", "bad_request", "headers_too_large", "uri_too_long"}
)
SMALL_BYTES = 16 * 1024
_UNTOLD = OpenAIChat()
"""In which errors are said to a client of whom nothing is known yet."""
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


# --- the head -------------------------------------------------------------------------------------------------------


def check_head(request: web.BaseRequest) -> None:
    """What must hold of every request, whatever is remembered of its path. Raises BadRequest: method_not_allowed (405),
    bad_request (400, Host or framing)."""
    if request.method in _NO_TUNNEL:
        raise BadRequest(f"{request.method} is not supported.", code="method_not_allowed", status=405)
    if _HOST.fullmatch(request.headers.get(hdrs.HOST, "")) is None:
        raise BadRequest("The Host header is not valid.")
    if request.version < HttpVersion11:
        _check_old_version(request)


def address_of(request: web.BaseRequest) -> str:
    """Whose connection it is: the peer's address, and of IPv6 the network that one subscriber has (RFC 6177)."""
    return network_of(request.remote or "")


def network_of(remote: str) -> str:
    """An address, and of IPv6 the network that one subscriber has."""
    if ":" not in remote:
        return remote
    return str(ipaddress.IPv6Network((remote.partition("%")[0], 64), strict=False))


def target_of(request: web.BaseRequest) -> str:
    """The path asked for, without its query: absolute, no empty or dot segment, escapes left as they were sent.

    An absolute-form target is reduced to its path and never opens a connection to the host it names (RFC 9112 §3.2.2).
    Raises BadRequest: unknown_url (404), method_not_allowed (405, the asterisk form).
    """
    return _safe_path(_origin_form(request.raw_path).partition("?")[0])


def _check_old_version(request: web.BaseRequest) -> None:
    if request.version < HttpVersion10:  # what the parser makes of a target with something odd before its version
        answer_as_http11(request)
        raise BadRequest("HTTP/0.9 is not supported.")
    if hdrs.TRANSFER_ENCODING in request.headers:
        raise BadRequest("Transfer-Encoding is not defined before HTTP/1.1 (RFC 9112 §6.1).")


def query_of(request: web.BaseRequest) -> str:
    """The query as it was sent, with its question mark; "" without one."""
    return "".join(_origin_form(request.raw_path).partition("?")[1:])


def _origin_form(target: str) -> str:
    if target.startswith("/"):
        return target
    if target == "*":
        raise BadRequest("The asterisk form is not supported.", code="method_not_allowed", status=405)
    scheme, mark, rest = target.partition("://")
    if not mark or scheme.lower() not in ("http", "https"):
        _refuse_path()
    cut = min((at for at in (rest.find("/"), rest.find("?")) if at >= 0), default=len(rest))
    path = rest[cut:]
    return path if path.startswith("/") else "/" + path


def _safe_path(path: str) -> str:
    """The path itself, once it is sure that no server reads another path from the same bytes. Raises unknown_url."""
    if _SEGMENTS.fullmatch(path) is None or not path:
        _refuse_path()
    plain = path
    if "%" in path:
        if _BROKEN_ESCAPE.search(path):
            _refuse_path()
        plain = unquote(path, errors="surrogateescape")
        # A decoded percent sign is an escape for whoever decodes twice.
        if any(character < " " or character in "%;\\?#\x7f" for character in plain) or "//" in plain:
            _refuse_path()
    segments = plain.split("/")
    if "." in segments or ".." in segments:
        _refuse_path()
    if any(s not in _KNOWN_WORDS and s.lower() in _KNOWN_WORDS for s in segments[1:4]):
        _refuse_path()
    return path


def _refuse_path() -> NoReturn:
    raise BadRequest("Unknown request URL.", code="unknown_url", status=404)


# --- the body -------------------------------------------------------------------------------------------------------


def body_at_hand(request: web.BaseRequest, limits: Limits) -> bytes | None:
    """A plain body that has arrived whole already, b"" included; None when its bytes are awaited or encoded."""
    payload = request.content
    if not payload.is_eof() or payload.total_bytes > limits.body_bytes or hdrs.CONTENT_ENCODING in request.headers:
        return None
    if not payload.total_bytes:
        return b""
    return take_small(payload) if payload.total_bytes <= SMALL_BYTES else payload.read_nowait()


async def read_body(request: web.BaseRequest, limits: Limits, arrival: Arrival | None = None) -> bytes:
    """The whole body, decoded. One that is at hand costs no timer and no wait; `arrival` is left once it is whole.

    Raises BadRequest: request_too_large (413, on the declared, received and decoded size), request_timeout (408),
    unsupported_encoding (415), invalid_encoding and bad_request (400); and Busy.
    """
    if (whole := body_at_hand(request, limits)) is not None:
        return whole
    codings = [c.strip().lower() for c in request.headers.get(hdrs.CONTENT_ENCODING, "").split(",")]
    codings = [c for c in codings if c not in ("", "identity")]
    if len(codings) > 1 or (codings and codings[0] not in ("gzip", "x-gzip", "deflate")):
        message = f"Content-Encoding {', '.join(codings)[:80]!r} is not supported; use gzip, deflate or none."
        raise Unread(message, code="unsupported_encoding", status=415)
    if (request.content_length or 0) > limits.body_bytes:
        raise _too_large(limits)
    body = await _collect(request, limits, arrival or Arrival(limits))
    return _decode(codings[0], body, limits) if codings else body


class Unread(BadRequest):
    """A body that is not read here, because of its size or its coding; `begun` is what was taken of it, as it came.
    An upstream may still read it."""

    begun = b""


def _too_large(limits: Limits, begun: bytes = b"") -> Unread:
    message = f"The request body is larger than {limits.body_bytes} bytes."
    error = Unread(message, code="request_too_large", status=413)
    error.begun = begun
    return error


async def resumed(
    request: web.BaseRequest, limits: Limits, arrival: Arrival | None, begun: bytes
) -> AsyncIterator[bytes]:
    """A body of which a part was taken already, as it was sent."""
    if begun:
        yield begun
    if not request.content.at_eof():
        async for piece in _stream(request, arrival or Arrival(limits)):
            yield piece


def body_stream(
    request: web.BaseRequest, limits: Limits, arrival: Arrival | None = None
) -> bytes | AsyncIterator[bytes] | None:
    """A body to pass through, encoded as it was sent: None without one, bytes when all of a plain one
    is here, else a stream, which leaves `arrival` at its end.

    The stream raises request_timeout (408) when its bytes do not keep up, see `Arrival`.
    """
    if not request.body_exists:
        return None
    if (whole := body_at_hand(request, limits)) is not None:  # the coding travels with a stream only
        return whole
    return _stream(request, arrival or Arrival(limits))


async def _stream(request: web.BaseRequest, arrival: Arrival) -> AsyncIterator[bytes]:
    _ask_to_continue(request, request.content)
    while chunk := await _next(request, arrival):
        yield chunk
    arrival.leave()


async def _collect(request: web.BaseRequest, limits: Limits, arrival: Arrival) -> bytes:
    loop = asyncio.get_running_loop()
    _ask_to_continue(request, request.content)
    pieces: list[bytes] = []
    size = 0
    while chunk := await _next(request, arrival):
        size += len(chunk)
        if size > limits.body_bytes:
            raise _too_large(limits, b"".join([*pieces, chunk]))
        arrival.hold(len(chunk), loop.time())
        pieces.append(chunk)
    arrival.leave()
    return b"".join(pieces)


async def _next(request: web.BaseRequest, arrival: Arrival) -> bytes:
    """The next bytes of a body; b"" at its end."""
    loop = asyncio.get_running_loop()
    chunk = b""
    began_s = loop.time()
    try:
        async with asyncio.timeout(arrival.waits(began_s)) as timeout:
            arrival.wake = partial(_end, timeout)
            chunk = await request.content.readany()
    except TimeoutError:
        close_undrained(request)
        message = "The request body did not arrive in time."
        raise BadRequest(message, code="request_timeout", status=408, should_retry=True) from None
    except web.RequestPayloadError as error:
        raise BadRequest("The request body is not framed as its headers say.") from error
    finally:
        arrival.wake = None
        arrival.came(len(chunk), loop.time())
    return chunk


def _ask_to_continue(request: web.BaseRequest, payload: StreamReader) -> None:
    """RFC 9110 §10.1.1: the interim answer is owed only while body bytes are missing."""
    expectation = request.headers.get(hdrs.EXPECT)
    if expectation is not None and expectation.lower() == "100-continue" and request.version >= HttpVersion11:
        transport = request.transport
        if transport is not None and not payload.is_eof() and not payload.total_bytes:
            transport.write(_CONTINUE)


def _decode(coding: str, body: bytes, limits: Limits) -> bytes:
    """One gzip or zlib member, never more than the limit in memory. Bytes after the member are refused."""
    raw_deflate = coding == "deflate" and (len(body) < 2 or body[0] & 0x0F != 8 or (body[0] << 8 | body[1]) % 31)
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS if raw_deflate else zlib.MAX_WBITS | 32)
    try:
        plain = unpacker.decompress(body, limits.body_bytes + 1)
    except zlib.error as error:
        raise BadRequest("The request body is not valid for its Content-Encoding.", code="invalid_encoding") from error
    if len(plain) > limits.body_bytes:
        raise _too_large(limits, body)
    if not unpacker.eof or unpacker.unused_data:
        raise BadRequest("The encoded request body is cut or has bytes after its end.", code="invalid_encoding")
    return plain


def _end(timeout: asyncio.Timeout) -> None:
    if not timeout.expired():
        timeout.reschedule(asyncio.get_running_loop().time())


# --- errors ---------------------------------------------------------------------------------------------------------


def parser_error(fault: BadHttpMessage, limits: Limits) -> BadRequest:
    """What the HTTP parser refused, in our codes: bad_request, headers_too_large (431), uri_too_long (414).

    The parser tells a long URL from a long header only by the limit it quotes; `ClientConnection` gives it two.
    """
    if isinstance(fault, LineTooLong):
        if limit_of(fault) == limits.header_line_bytes:
            return BadRequest("The request URL is too long.", code="uri_too_long", status=414)
        return BadRequest("A request header is too long.", code="headers_too_large", status=431)
    if fault.message == TOO_MANY_HEADERS:
        return BadRequest("The request has too many headers.", code="headers_too_large", status=431)
    return BadRequest("The request is not valid HTTP/1.1.")


def new_request_id() -> str:
    return "req_" + secrets.token_hex(16)


def error_headers(error: IbidError, request_id: str, id_header: str = "") -> dict[str, str]:
    """Headers of an error's response, content-type included."""
    headers = {"Content-Type": "application/json", "Server": "ibid", "x-request-id": request_id}
    if id_header:
        headers[id_header] = request_id
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.should_retry is not None:
        headers["x-should-retry"] = "true" if error.should_retry else "false"
    return headers


def error_response(error: IbidError, request_id: str, dialect: Dialect = _UNTOLD) -> web.Response:
    """The envelope this client understands. Closes the connection where the rest of the request is not wanted."""
    headers = error_headers(error, request_id, dialect.id_header)
    response = web.Response(body=dialect.error_body(error, request_id), status=error.status, headers=headers)
    if error.code in _CLOSES:
        response.force_close()
    return response


def raw_response(error: IbidError) -> bytes:
    """A whole HTTP/1.1 response for a connection that has no request yet."""
    body = _UNTOLD.error_body(error)
    reason = {408: "Request Timeout", 503: "Service Unavailable"}.get(error.status, "Error")
    headers = error_headers(error, new_request_id()) | {"Content-Length": str(len(body)), "Connection": "close"}
    lines = [f"HTTP/1.1 {error.status} {reason}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode("ascii") + body
