"""Who asks, and what travels on."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.errors import BadRequest
from proxy.core.identity import ANONYMOUS, HeaderRules, credential, forwardable, is_tenant, scope_headers, tenant_of

SECRET = bytes(range(32))
CANARY = b"sk-canary-123456"
KEYS = st.text("abcdefghijklmnopqrstuvwxyzABC0123456789-_.", min_size=1, max_size=40).map(str.encode)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"Authorization", b"")],
        [(b"Authorization", b"Bearer")],
        [(b"Authorization", b"Bearer ")],
        [(b"Authorization", b"bAsIc")],
        [(b"Authorization", b"'" + CANARY + b"'")],
        [(b"Authorization", b"Basic " + CANARY + b", realm")],
        [(b"Authorization", b"Ba/sic " + CANARY)],
        [(b"Authorization", b"Bearer " + CANARY), (b"authorization", b"Bearer " + CANARY)],
        [(b"x-api-key", CANARY), (b"X-API-Key", b"other")],
        [(b"Authorization", b"Bearer " + CANARY + b"\r\nx-evil: 1")],
        [(b"Authorization", b"Bearer " + CANARY + b"\n")],
        [(b"x-api-key", CANARY + b"\x00")],
        [(b"x-api-key", b"' OR 1=1--" + CANARY)],
        [(b"Authorization", b"Bearer ' OR 1=1--" + CANARY)],
        [(b"Authorization", b"Bearer '" + CANARY + b"'")],
        [(b"Authorization", b"Bearer " + CANARY), (b"x-api-key", b"")],
        [(b"x-api-key", b"\xff" + CANARY)],
        [(b"x-api-key", b" " + CANARY)],
        [(b"cookie", b"Authorization=Bearer " + CANARY)],
    ],
)
def test_what_is_not_one_credential_is_refused_without_quoting_it(headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(BadRequest) as caught:
        credential(headers)
    error = caught.value
    assert (error.status, error.code, error.should_retry) == (401, "invalid_api_key", False)
    assert "canary" not in error.message
    assert "OR 1" not in error.message


@pytest.mark.parametrize(
    "name", [b"Authorization", b"x-api-key", b"API-KEY", b"x-goog-api-key", b"Ocp-Apim-Subscription-Key"]
)
def test_any_of_these_headers_is_a_credential_that_never_prints(name: bytes) -> None:
    value = b"bearer " + CANARY if name == b"Authorization" else CANARY
    who = credential([(b"host", b"x"), (name, value)])
    assert who.secrets == ((name.lower(), CANARY),)
    assert "canary" not in repr(who)
    assert "canary" not in str(who)


def test_two_different_keys_count_together_whatever_carries_them() -> None:
    pair = [(b"Authorization", b"Bearer a"), (b"x-api-key", b"b")]
    both = tenant_of(SECRET, credential(pair))
    assert both == tenant_of(SECRET, credential(pair[::-1]))
    alone = {tenant_of(SECRET, credential([header])) for header in pair}
    swapped = tenant_of(SECRET, credential([(b"Authorization", b"Bearer b"), (b"x-api-key", b"a")]))
    assert both == swapped
    assert len({both, *alone}) == 3


def test_one_key_is_one_tenant_in_whichever_header_a_dialect_puts_it() -> None:
    named = [(b"authorization", b"Bearer a"), (b"x-api-key", b"a"), (b"api-key", b"a"), (b"x-goog-api-key", b"a")]
    assert len({tenant_of(SECRET, credential([header])) for header in named}) == 1
    assert len({tenant_of(SECRET, credential(named[:i])) for i in range(1, 5)}) == 1


def test_no_credential_is_allowed_only_where_the_operator_said_so() -> None:
    assert credential([(b"host", b"x")], anonymous=True) == ANONYMOUS
    with pytest.raises(BadRequest, match="twice"):
        credential([(b"api-key", b"a"), (b"api-key", b"a")], anonymous=True)


@given(KEYS, KEYS)
def test_tenants_are_equal_exactly_when_credentials_are(a: bytes, b: bytes) -> None:
    def of(key: bytes, secret: bytes = SECRET) -> str:
        return tenant_of(secret, credential([(b"authorization", b"Bearer " + key)]))

    assert (of(a) == of(b)) == (a == b)
    assert is_tenant(of(a))
    assert of(a) != of(a, SECRET[::-1])
    assert of(a) != hashlib.sha256(a).hexdigest()


def test_a_tenant_needs_the_installations_secret() -> None:
    with pytest.raises(ValueError, match="empty"):
        tenant_of(b"", ANONYMOUS)


@pytest.mark.parametrize("key", [b"a", CANARY, b"basically", b"k" * 4097])
def test_a_key_alone_is_the_key_that_a_bearer_brings(key: bytes) -> None:
    alone = credential([(b"Authorization", key)])
    assert alone == credential([(b"Authorization", b"Bearer " + key)])
    assert alone != credential([(b"Authorization", b"Basic " + key)])


@pytest.mark.parametrize("size", [1, 4097, 60_000])
@pytest.mark.parametrize("scheme", [b"Bearer", b"Basic", b"Token"])
def test_a_credential_of_any_scheme_and_length_is_one_tenant(scheme: bytes, size: int) -> None:
    def of(value: bytes) -> str:
        return tenant_of(SECRET, credential([(b"authorization", value)]))

    own = of(scheme + b" " + b"k" * size)
    assert own == of(scheme.lower() + b"  " + b"k" * size)
    assert own != of(scheme + b" " + b"k" * size + b"k")
    assert (own == of(b"bearer " + b"k" * size)) == (scheme == b"Bearer"), "a password is no key"


TRAVELS_AND_COUNTS = [
    "Helicone-Auth", "X-Custom", "OpenAI-Organization", "anthropic-beta",
    "cf-aig-authorization",
    "x-portkey-api-key", "X-Goog-User-Project", "Range", "If-None-Match", "x-session-token",
    "chatgpt-account-id",
    "x-ms-region", "x-request-idle", "X-Title-Of",
]  # fmt: skip
TRAVELS_ONLY = [
    "User-Agent", "Accept", "Content-Type", "X-Stainless-Lang", "Authorization", "api-key", "traceparent", "Referer",
    "HTTP-Referer", "X-Title", "X-Client-Request-Id", "x-ms-client-request-id", "x-request-id", "session_id",
    "session-id", "conversation_id", "x-claude-code-session-id", "x-session-affinity", "x-codex-turn-metadata",
    "x-irid", "originator", "x-app", "x-datadog-parent-id", "X-B3-TraceId", "X-Amzn-Trace-Id", "x-correlation-id",
    "X-Forwarded-For", "X-Real-IP", "CF-Connecting-IP", "Origin", "sec-fetch-mode", "sec-ch-ua", "accept-language",
    "Helicone-Session-Path", "sentry-trace", "baggage", "Access-Control-Request-Headers", "Ocp-Apim-Subscription-Key",
]  # fmt: skip
STAYS = [
    "X-Portkey-Custom-Host", "Helicone-Target-Url", "x-litellm-api-base", "X-Host", "Host", "Accept-Encoding",
    "Content-Encoding", "Content-Length", "Transfer-Encoding", "TE", "Proxy-Authorization",
    "Cookie", "Forwarded", "X-Forwarded-Host", "X-Original-URL", "Cache-Control", "Pragma", "X-Cache-Mode", "x-plan",
    "x-deadline", "x-cache-user", "cf-aig-skip-cache", "Helicone-Cache-Enabled", "Prefer", "Sec-WebSocket-Key",
    "Upgrade",
]  # fmt: skip


@pytest.mark.parametrize("name", [*TRAVELS_AND_COUNTS, *TRAVELS_ONLY, *STAYS])
def test_every_header_travels_but_those_of_one_hop_or_of_ibid(name: str) -> None:
    sent = [(name.encode(), b"v")]
    assert forwardable(sent) == ([] if name in STAYS else [(name, "v")])
    assert scope_headers(sent) == (((name.lower(), "v"),) if name in TRAVELS_AND_COUNTS else ())


def test_an_operator_says_more_of_headers() -> None:
    rules = HeaderRules(
        kept=frozenset({b"x-forwarded-host", b"cookie", b"host"}),
        delivery=frozenset({b"x-team"}),
        dropped=frozenset({b"x-secret", b"user-agent"}),
    )
    names = ["X-Forwarded-Host", "Cookie", "Host", "X-Team", "X-Secret", "User-Agent", "X-Other"]
    sent = [(name.encode(), b"v") for name in names]
    assert [name for name, _ in forwardable(sent, rules)] == ["X-Forwarded-Host", "X-Team", "X-Other"]
    assert [name for name, _ in scope_headers(sent, rules)] == ["x-forwarded-host", "x-other"]


def test_a_header_named_in_connection_neither_travels_nor_counts() -> None:
    sent = [
        (b"Connection", b"keep-alive, Authorization"),
        (b"connection", b"OpenAI-Beta ,x-api-key"),
        (b"Authorization", b"Bearer k"),
        (b"x-api-key", b"k"),
        (b"OpenAI-Beta", b"assistants=v2"),
        (b"OpenAI-Project", b"p"),
    ]
    assert forwardable(sent) == [("OpenAI-Project", "p")]
    assert scope_headers(sent) == (("openai-project", "p"),)


def test_header_lines_of_one_name_keep_their_order_in_the_scope() -> None:
    one = scope_headers([(b"openai-beta", b"a"), (b"anthropic-beta", b"x"), (b"OpenAI-Beta", b"b")])
    assert one == (("anthropic-beta", "x"), ("openai-beta", "a"), ("openai-beta", "b"))


def test_a_value_that_is_not_text_stays_behind() -> None:
    assert forwardable([(b"openai-project", b"\xff\xfe"), (b"openai-organization", b"o")]) == [
        ("openai-organization", "o")
    ]
