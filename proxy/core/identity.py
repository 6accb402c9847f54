"""Who asks, and which of a request's headers travel on.

The proxy stores nothing about a credential but its digest. A header that travels and may change the answer is part of
the scope, one that nobody here knows too; a header that never leaves cannot change anything.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from proxy.core.directives import OWN_HEADERS
from proxy.core.errors import BadRequest

CREDENTIALS = frozenset({b"authorization", b"x-api-key", b"api-key", b"x-goog-api-key", b"ocp-apim-subscription-key"})
"""The last is Azure API Management's, in front of whatever it fronts."""

NEVER_FORWARDED = frozenset(
    {
        b"accept-encoding",  # of this connection; a body is asked for as it is
        b"connection",
        b"content-encoding",  # bodies are decoded here; one that passes takes it along
        b"content-length",  # reckoned anew
        b"cookie",  # another origin's
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

DROPPED_HEADERS = OWN_HEADERS | {
    b"pragma",  # to a cache
    b"prefer",  # when the answer is wanted: ibid sees to it
    b"x-forwarded-host",  # what follows would lead another server elsewhere than its address does
    b"x-forwarded-port",
    b"x-forwarded-prefix",
    b"x-forwarded-proto",
    b"x-forwarded-scheme",
    b"x-forwarded-server",
    b"x-forwarded-uri",
    b"x-http-method-override",
    b"x-original-host",
    b"x-original-url",
    b"x-rewrite-url",
}
"""Addressed to ibid, or of its own address. Every other header travels, as it would without ibid, but for these:"""

_LEADS_ELSEWHERE = re.compile(rb"x-(?:host|upstream)|.*[-_](?:custom-host|target-url|api-base|base-url|proxy-url)")
"""Names by which gateways are told to which host they shall go, with whatever key they were sent."""

DELIVERY_HEADERS = frozenset(
    {
        # how the answer travels
        b"accept",  # stream or not is said in the body
        b"accept-charset",
        b"accept-language",  # Node's fetch says "*"; a model answers in the language it is asked in
        b"anthropic-version",  # the form of request and answer
        b"content-type",  # read as JSON, whatever it is called
        b"idempotency-key",  # names the attempt
        b"priority",
        # which program asks, on behalf of what page or application
        b"anthropic-dangerous-direct-browser-access",
        b"dnt",
        b"editor-plugin-version",
        b"editor-version",
        b"http-referer",  # OpenRouter's spelling
        b"origin",
        b"originator",
        b"referer",
        b"save-data",
        b"upgrade-insecure-requests",
        b"user-agent",
        b"version",  # Codex's own
        b"x-app",
        b"x-client-name",
        b"x-client-version",
        b"x-goog-api-client",
        b"x-initiator",
        b"x-ms-useragent",
        b"x-openrouter-title",
        b"x-requested-with",
        b"x-title",
        # in which session, turn or trace
        b"b3",
        b"baggage",
        b"elastic-apm-traceparent",
        b"newrelic",
        b"sentry-trace",
        b"traceparent",
        b"tracestate",
        b"x-amz-cf-id",
        b"x-cloud-trace-context",
        b"x-codex-turn-metadata",
        b"x-codex-turn-state",
        b"x-irid",  # inspect-ai's id of one request
        b"x-openai-subagent",
        b"x-ot-span-context",
        b"x-session-affinity",
        # when, and how often
        b"date",
        b"x-request-start",
        b"x-request-time",
        b"x-retry-count",
        b"x-retry-attempt",
        b"retry-count",
        b"amz-sdk-request",
        # from which address, by which way
        b"cdn-loop",
        b"true-client-ip",
        b"via",
        b"x-azure-clientip",
        b"x-client-ip",
        b"x-cluster-client-ip",
        b"x-forwarded-for",
        b"x-original-forwarded-for",
        b"x-real-ip",
    }
)
"""Forwarded, yet not part of the scope: each only tells who asks, when, by what and from where, not what."""

DELIVERY_PREFIXES = (
    b"access-control-request-",
    b"cf-connecting-",
    b"cf-ip",
    b"cf-ray",
    b"cf-visitor",
    b"fastly-client-",
    b"helicone-session-",
    b"sec-",  # of browsers: what kind of fetch this is
    b"x-b3-",
    b"x-datadog-",
    b"x-envoy-",
    b"x-stainless-",  # telemetry of the SDK
)
_NAMES_A_MOMENT = re.compile(
    rb"(?:.*[-_])?(?:request|(?:parent)?span|trace|session|turn|correlation|conversation|thread|window|invocation"
    rb"|interaction|installation)[-_]?ids?"
)
"""Ids that name an occasion: `x-client-request-id`, `session_id`, `x-claude-code-session-id`, `x-amzn-trace-id`."""

_HEX64 = 64
# RFC 9110 token characters, the rest of token68 and what providers put into keys; no blank, quote or control
_SECRET = re.compile(rb"[A-Za-z0-9!#$%&*+\-./:=?@^_{|}~]+")
_SCHEME = re.compile(rb"([A-Za-z][A-Za-z0-9-]*) +([A-Za-z0-9!#$%&*+\-./:=?@^_{|}~]+)")
_SCHEMES = frozenset({b"basic", b"bearer", b"digest", b"dpop", b"negotiate", b"token"})
"""Words that are no key when they stand alone."""


@dataclass(frozen=True, slots=True)
class HeaderRules:
    """What an operator says of headers, names in lower case: those that travel though they are dropped by default, that
    are no part of the scope, and that do not travel. The last beats the first."""

    kept: frozenset[bytes] = frozenset()
    delivery: frozenset[bytes] = frozenset()
    dropped: frozenset[bytes] = frozenset()

    def travels(self, name: bytes) -> bool:
        if name in NEVER_FORWARDED or name in self.dropped or name.startswith(NEVER_FORWARDED_PREFIXES):
            return False
        if name in self.kept:
            return True
        return name not in DROPPED_HEADERS and _LEADS_ELSEWHERE.fullmatch(name) is None

    def is_delivery(self, name: bytes) -> bool:
        """Whether a header that travels says nothing of what is asked."""
        if name in DELIVERY_HEADERS or name in self.delivery or name.startswith(DELIVERY_PREFIXES):
            return True
        return _NAMES_A_MOMENT.fullmatch(name) is not None


BUILT_IN = HeaderRules()


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

    Authorization is a scheme and a token, or a token; that of a Bearer counts alone, any other's (Basic) with its
    scheme. All that a request carries count together, for nobody but the upstream knows which of them it will look at.
    Raises BadRequest (401, `invalid_api_key`) when none is there, a header is there twice, or one is empty or holds
    what no key holds; the message never quotes it. With `anonymous`, none at all gives ANONYMOUS.
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
            found[name] = _authorization(value)
        else:
            found[name] = _checked(value, f"header {shown}")
    secrets = [*found.items(), *[(b"key", _checked(value, "parameter key")) for value in {*queried}]]
    if not secrets and not anonymous:
        raise _refuse("No API key: send 'Authorization: Bearer ...' or 'x-api-key'.")
    return Credential(tuple(sorted(secrets)))


def _authorization(value: bytes) -> bytes:
    """The secret of `Authorization`: what follows Bearer, or stands there without any scheme, is a key like others."""
    if _SECRET.fullmatch(value) is not None and value.lower() not in _SCHEMES:
        return value
    match = _SCHEME.fullmatch(value)
    if match is None:
        raise _refuse("The header authorization is not 'Bearer', or another scheme, and a key.")
    scheme = match[1].lower()
    return match[2] if scheme == b"bearer" else scheme + b" " + match[2]


def _checked(secret: bytes, carrier: str) -> bytes:
    if _SECRET.fullmatch(secret) is None:
        raise _refuse(f"The {carrier} is not a key.")
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


def forwardable(headers: Iterable[tuple[bytes, bytes]], rules: HeaderRules = BUILT_IN) -> list[tuple[str, str]]:
    """The headers that go upstream, in order, spelled as they came: all but what belongs to one hop, to ibid, or is
    named by a `Connection` header (RFC 9110 §7.6.1). A value that is not UTF-8 stays behind."""
    received = [(name, name.lower(), value) for name, value in headers]
    named: set[bytes] = set()
    for _, name, value in received:
        if name == b"connection":
            named.update(option.strip().lower() for option in value.split(b","))
    kept: list[tuple[str, str]] = []
    for spelled, name, value in received:
        if name in named or not rules.travels(name):
            continue
        try:
            kept.append((spelled.decode("ascii"), value.decode("utf-8")))
        except UnicodeDecodeError:
            continue
    return kept


def scope_headers(headers: Iterable[tuple[bytes, bytes]], rules: HeaderRules = BUILT_IN) -> tuple[tuple[str, str], ...]:
    """What goes upstream and may change the answer: (lower-case name, value), by name, lines of one name in order.

    Credentials are not in it: they are the tenant. What does not go upstream is not in it either.
    """
    kept: list[tuple[str, str]] = []
    for spelled, value in forwardable(headers, rules):
        name = spelled.lower()
        as_bytes = name.encode("ascii")
        if as_bytes not in CREDENTIALS and not rules.is_delivery(as_bytes):
            kept.append((name, value.strip()))
    kept.sort(key=lambda header: header[0])
    return tuple(kept)
