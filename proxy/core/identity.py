"""Who asks, and which of a request's headers travel on.

The proxy stores nothing about a credential but its digest. A header that may change the answer is part of the scope;
a header that is not on the allow-list never leaves, so it cannot change anything.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from proxy.core.errors import BadRequest

CREDENTIALS = frozenset({b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key"})
CREDENTIAL_LIMIT_BYTES = 4096

FORWARDED = CREDENTIALS | {
    b"accept",
    b"content-type",
    b"user-agent",
    b"idempotency-key",
    b"traceparent",
    b"tracestate",
}
"""Names that go upstream. Absent by intent: accept-encoding and content-encoding (bodies are decoded here),
content-length (reckoned anew), host, cookie, forwarded and x-forwarded-*, everything hop-by-hop."""

FORWARDED_PREFIXES = (b"openai-", b"anthropic-", b"x-stainless-", b"x-goog-", b"x-ms-")

NEVER_FORWARDED = frozenset(
    {
        b"connection",
        b"content-encoding",
        b"content-length",
        b"cookie",
        b"expect",
        b"forwarded",
        b"host",
        b"http2-settings",
        b"keep-alive",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
NEVER_FORWARDED_PREFIXES = (b"proxy-", b"sec-websocket-")
"""Hop-by-hop (RFC 9110 §7.6.1), addressing and framing: not even configuration can add these."""

DELIVERY_HEADERS = frozenset(
    {
        b"accept",  # stream or not is said in the body
        b"content-type",  # always JSON here
        b"user-agent",  # which program asks, not what
        b"idempotency-key",  # names the attempt
        b"traceparent",  # name the trace
        b"tracestate",
        b"anthropic-version",  # the form of request and answer
        b"anthropic-dangerous-direct-browser-access",  # says where the program runs
        b"x-goog-api-client",  # library versions
        b"x-ms-client-request-id",  # names the attempt
        b"x-ms-useragent",
    }
)
"""Forwarded, yet not part of the scope: each only says how or by what the request travels."""

DELIVERY_PREFIXES = (b"x-stainless-",)  # telemetry of the SDK

_HEX64 = 64
# RFC 9110 token characters, the rest of token68 and what providers put into keys; no blank, quote or control
_SECRET = re.compile(rb"[A-Za-z0-9!#$%&*+\-./:=?@^_{|}~]+")
_BEARER = re.compile(rb"[Bb][Ee][Aa][Rr][Ee][Rr] +([A-Za-z0-9!#$%&*+\-./:=?@^_{|}~]+)")


@dataclass(frozen=True, slots=True)
class Credential:
    """Every credential of one request, (lower-case name of its carrier, secret), in order. Never printed."""

    secrets: tuple[tuple[bytes, bytes], ...] = field(repr=False)


ANONYMOUS = Credential(())


def _refuse(message: str) -> BadRequest:
    return BadRequest(message, status=401, code="invalid_api_key", should_retry=False)


def credential(
    headers: Iterable[tuple[bytes, bytes]], queried: Collection[bytes] = (), *, anonymous: bool = False
) -> Credential:
    """The credential the client brings, for an upstream that will check it. `queried`: those in the query.

    Authorization must be a Bearer. All that a request carries count together, for nobody but the upstream knows which
    of them it will look at. Raises BadRequest (401, `invalid_api_key`) when none is there, a header is there twice,
    or one is empty, over 4 KiB, or holds what no key holds; the message never quotes it. With `anonymous`, none at all
    gives ANONYMOUS.
    """
    found: dict[bytes, bytes] = {}
    for raw_name, value in headers:
        name = raw_name.lower()
        if name not in CREDENTIALS:
            continue
        shown = name.decode("ascii")
        if name in found:
            raise _refuse(f"The header {shown} was sent twice.")
        if name == b"authorization":
            match = _BEARER.fullmatch(value) if len(value) <= CREDENTIAL_LIMIT_BYTES else None
            if match is None:
                raise _refuse(
                    f"The header authorization is not 'Bearer' and a key of {CREDENTIAL_LIMIT_BYTES} bytes at most."
                )
            found[name] = match[1]
        else:
            found[name] = _checked(value, f"header {shown}")
    secrets = [*found.items(), *[(b"key", _checked(value, "parameter key")) for value in {*queried}]]
    if not secrets and not anonymous:
        raise _refuse("No API key: send 'Authorization: Bearer ...' or 'x-api-key'.")
    return Credential(tuple(sorted(secrets)))


def _checked(secret: bytes, carrier: str) -> bytes:
    if len(secret) > CREDENTIAL_LIMIT_BYTES or _SECRET.fullmatch(secret) is None:
        raise _refuse(f"The {carrier} is not a key, or longer than any.")
    return secret


def tenant_of(secret: bytes, who: Credential) -> str:
    """HMAC-SHA-256 over the whole credential, 64 hex digits. `secret` is the installation's own, never empty.

    One key in `Authorization` and in `x-api-key` is one tenant: which header carries it is the dialect's habit.
    """
    if not secret:
        raise ValueError("the installation's secret is empty")
    mac = hmac.new(secret, b"tenant\x00", hashlib.sha256)
    for value in sorted({value for _, value in who.secrets}):
        mac.update(b"%d:%b" % (len(value), value))
    return mac.hexdigest()


def is_tenant(text: str) -> bool:
    """Whether this is spelled like a tenant: 64 lower-case hex digits."""
    return len(text) == _HEX64 and not text.strip("0123456789abcdef")


def without_credentials(headers: Iterable[tuple[bytes, bytes]]) -> tuple[tuple[bytes, bytes], ...]:
    """Raw header lines less the credentials: what a virtual key's request carries on, so that the key goes nowhere."""
    return tuple([line for line in headers if line[0].lower() not in CREDENTIALS])


def forwardable(headers: Iterable[tuple[bytes, bytes]], extra: Collection[str] = ()) -> list[tuple[str, str]]:
    """The headers that go upstream, in order, spelled as they came.

    The allow-list and `extra` (names, lower case), less everything hop-by-hop and everything a `Connection` header
    names (RFC 9110 §7.6.1). A value that is not UTF-8 stays behind.
    """
    received = [(name, name.lower(), value) for name, value in headers]
    named: set[bytes] = set()
    for _, name, value in received:
        if name == b"connection":
            named.update(option.strip().lower() for option in value.split(b","))
    wanted = {name.lower().encode("latin-1") for name in extra} if extra else ()
    kept: list[tuple[str, str]] = []
    for spelled, name, value in received:
        if not (name in FORWARDED or name.startswith(FORWARDED_PREFIXES) or name in wanted):
            continue
        if name in NEVER_FORWARDED or name in named or name.startswith(NEVER_FORWARDED_PREFIXES):
            continue
        try:
            kept.append((spelled.decode("ascii"), value.decode("utf-8")))
        except UnicodeDecodeError:
            continue
    return kept


def scope_headers(headers: Iterable[tuple[bytes, bytes]], extra: Collection[str] = ()) -> tuple[tuple[str, str], ...]:
    """What goes upstream and may change the answer: (lower-case name, value), by name, lines of one name in order.

    Credentials are not in it: they are the tenant. What does not go upstream is not in it either.
    """
    kept: list[tuple[str, str]] = []
    for spelled, value in forwardable(headers, extra):
        name = spelled.lower()
        as_bytes = name.encode("ascii")
        if as_bytes in CREDENTIALS or as_bytes in DELIVERY_HEADERS or as_bytes.startswith(DELIVERY_PREFIXES):
            continue
        kept.append((name, value.strip()))
    kept.sort(key=lambda header: header[0])
    return tuple(kept)
