"""Who asks, and what travels on."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.errors import BadRequest
from proxy.core.identity import ANONYMOUS, credential, forwardable, is_tenant, scope_headers, tenant_of

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
        [(b"Authorization", CANARY)],
        [(b"Authorization", b"Basic " + CANARY)],
        [(b"Authorization", b"Bearer " + CANARY), (b"authorization", b"Bearer " + CANARY)],
        [(b"x-api-key", CANARY), (b"X-API-Key", b"other")],
        [(b"Authorization", b"Bearer " + CANARY * 600)],
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


@pytest.mark.parametrize("name", [b"Authorization", b"x-api-key", b"API-KEY", b"x-goog-api-key"])
def test_any_of_the_four_headers_is_a_credential_that_never_prints(name: bytes) -> None:
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


def test_only_the_allow_list_travels() -> None:
    sent = [
        (b"Host", b"evil"),
        (b"User-Agent", b"OpenAI/Python"),
        (b"Accept", b"*/*"),
        (b"Accept-Encoding", b"zstd"),
        (b"Content-Type", b"application/json"),
        (b"Content-Encoding", b"gzip"),
        (b"Content-Length", b"5"),
        (b"Transfer-Encoding", b"chunked"),
        (b"TE", b"trailers"),
        (b"Proxy-Authorization", b"Basic x"),
        (b"Cookie", b"a=b"),
        (b"X-Forwarded-Host", b"evil"),
        (b"Forwarded", b"host=evil"),
        (b"Helicone-Auth", b"x"),
        (b"X-Portkey-Custom-Host", b"http://169.254.169.254"),
        (b"Cache-Control", b"no-cache"),
        (b"X-Cache-Mode", b"off"),
        (b"OpenAI-Organization", b"org"),
        (b"anthropic-beta", b"b"),
        (b"X-Stainless-Lang", b"python"),
        (b"X-Custom", b"yes"),
        (b"Authorization", b"Bearer k"),
        (b"traceparent", b"00-1"),
    ]
    assert [name for name, _ in forwardable(sent, extra={"x-custom", "cookie", "host"})] == [
        "User-Agent",
        "Accept",
        "Content-Type",
        "OpenAI-Organization",
        "anthropic-beta",
        "X-Stainless-Lang",
        "X-Custom",
        "Authorization",
        "traceparent",
    ]
    assert scope_headers(sent, extra={"x-custom"}) == (
        ("anthropic-beta", "b"),
        ("openai-organization", "org"),
        ("x-custom", "yes"),
    )


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
