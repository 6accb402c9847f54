"""What a client asks of the cache, and how a verdict is told."""

from __future__ import annotations

import math
import re
from typing import Any

import http_sf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.directives import DEFAULT_CONTROLS, MODES, cache_status, controls_of, verdict_headers
from proxy.core.errors import BadRequest
from proxy.core.model import Bypass, Controls, Draft, Entry, Hit, Miss, NearMiss, Tier
from proxy.core.units import usd


def asked(*lines: str, twin: object = None) -> Controls:
    pairs = [line.split(": ", 1) for line in lines]
    return controls_of([(name.encode(), value.encode()) for name, value in pairs], twin)


def test_a_request_that_asks_nothing_shares_one_constant() -> None:
    assert asked("host: x", "authorization: Bearer k") is DEFAULT_CONTROLS
    assert DEFAULT_CONTROLS == Controls()


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("Cache-Control: no-cache", Controls(read=False, refresh=True)),
        ("Cache-Control: no-store", Controls(read=False, write=False)),
        ("Cache-Control: only-if-cached", Controls(only_if_cached=True)),
        ("Cache-Control: max-age=60", Controls(max_age_s=60.0)),
        ('cache-control: MAX-AGE = "60" ', Controls(max_age_s=60.0)),
        ("Cache-Control: max-stale", Controls(max_stale_s=math.inf)),
        ("Cache-Control: max-stale=5", Controls(max_stale_s=5.0)),
        ("Cache-Control: ,, max-age=9 ,max-age=3, ,", Controls(max_age_s=3.0)),
        ('Cache-Control: unknown, odd="a, no-store", no-transform, min-fresh=x', DEFAULT_CONTROLS),
        ("Cache-Control: max-age=999999999999", Controls(max_age_s=2.0**31)),
        ("Cache-Control: ", DEFAULT_CONTROLS),
        ("X-Cache-Mode: off", Controls(read=False, write=False)),
        ("X-Cache-Mode: read", Controls(write=False)),
        ("X-Cache-Mode: write", Controls(read=False)),
        ("X-Cache-Mode: Exact", Controls(exact_only=True)),
        ("X-Cache-Mode: semantic", DEFAULT_CONTROLS),
        ("X-Cache-Mode: shadow", Controls(shadow=True)),
        ("X-Cache-Mode: refresh", Controls(read=False, refresh=True)),
        ("X-Cache-TTL: 0", Controls(ttl_s=0.0)),
        ("X-Cache-Namespace: docs/v2", Controls(namespace="docs/v2")),
        ("X-Cache-Tags: doc:42, team:a ,,doc:42", Controls(tags=("doc:42", "team:a"))),
        ("X-Cache-Max-Error: 0.005", Controls(max_error=0.005)),
        ("X-Cache-Max-Error: 0", Controls(max_error=0.0)),
        ("X-Cache-User: user 7", Controls(user="user 7")),
        ("X-Cache-Explain: 1", Controls(explain=True)),
        ("X-Cache-Pace: Recorded", Controls(pace="recorded")),
        ("X-Cache-Pace: instant", Controls(pace="instant")),
        ("X-Cache-Pace: 40", Controls(pace=40.0)),
        ("X-Cache-Pace: 2.5/s", Controls(pace=2.5)),
        ("X-Cache-Explain: false", DEFAULT_CONTROLS),
    ],
)
def test_each_header_is_read(line: str, wanted: Controls) -> None:
    assert asked("host: x", line) == wanted


@pytest.mark.parametrize(
    ("twin", "wanted"),
    [
        ({}, DEFAULT_CONTROLS),
        ({"no-cache": True}, Controls(read=False, refresh=True)),
        ({"no-cache": False, "no-store": False, "use-cache": True}, DEFAULT_CONTROLS),
        ({"no-store": True}, Controls(read=False, write=False)),
        ({"use-cache": False}, Controls(read=False, write=False)),
        ({"ttl": 60, "s-maxage": 1.5}, Controls(ttl_s=60.0, max_age_s=1.5)),
        (
            {"namespace": "n", "tags": ["a", "b"], "mode": "exact"},
            Controls(namespace="n", tags=("a", "b"), exact_only=True),
        ),
    ],
)
def test_the_body_twin_is_read(twin: dict[str, Any], wanted: Controls) -> None:
    assert asked(twin=twin) == wanted


@pytest.mark.parametrize(
    "line",
    [
        "cache-control: max-age",
        "cache-control: max-age=-1",
        "cache-control: max-age=1.5",
        "cache-control: max-age=abc",
        "cache-control: max-stale=x",
        'cache-control: no-cache="open',
        "cache-control: no cache",
        "x-cache-mode: fast",
        "x-cache-mode: ",
        "x-cache-ttl: -1",
        "x-cache-ttl: 1e9",
        "x-cache-ttl: \u0661",
        "x-cache-namespace: a b",
        "x-cache-namespace: ../\u00e9",
        "x-cache-namespace: " + "n" * 129,
        "x-cache-tags: a b",
        "x-cache-tags: " + ",".join(f"t{i}" for i in range(17)),
        "x-cache-tags: " + "t" * 65,
        "x-cache-max-error: nan",
        "x-cache-max-error: 1.01",
        "x-cache-max-error: -0.1",
        "x-cache-max-error: ' OR 1=1--",
        "x-cache-user: " + "u" * 257,
        "x-cache-explain: maybe",
        "x-cache-pace: fast",
        "x-cache-pace: 0",
        "x-cache-pace: -1",
        "x-cache-pace: 10001",
        "x-cache-pace: 1e3",
        "x-cache-pace: nan",
        "x-cache-pace: ",
    ],
)
def test_a_header_that_cannot_be_read_is_refused_and_named(line: str) -> None:
    with pytest.raises(BadRequest) as caught:
        asked(line)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_value", line.split(":")[0])


@pytest.mark.parametrize(
    ("twin", "param"),
    [
        ([], "cache"),
        ("no-cache", "cache"),
        (True, "cache"),
        ({"ttl": "60"}, "cache.ttl"),
        ({"ttl": True}, "cache.ttl"),
        ({"ttl": -1}, "cache.ttl"),
        ({"ttl": None}, "cache.ttl"),
        ({"s-maxage": []}, "cache.s-maxage"),
        ({"no-cache": 1}, "cache.no-cache"),
        ({"namespace": 5}, "cache.namespace"),
        ({"tags": "a"}, "cache.tags"),
        ({"tags": [1]}, "cache.tags"),
        ({"mode": "fast"}, "cache.mode"),
        ({"no_cache": True}, "cache.no_cache"),
    ],
)
def test_a_twin_that_cannot_be_read_is_refused_and_named(twin: object, param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        asked(twin=twin)
    assert (caught.value.code, caught.value.param) == ("invalid_value", param)


def test_where_two_places_disagree_the_narrower_holds() -> None:
    both = asked(
        "cache-control: max-age=60, max-stale=9", "x-cache-ttl: 10", "x-cache-ttl: 20", twin={"s-maxage": 5, "ttl": 99}
    )
    assert (both.max_age_s, both.ttl_s, both.max_stale_s) == (5.0, 10.0, 9.0)
    assert asked("x-cache-mode: off", "x-cache-mode: read", twin={"mode": "semantic"}) == Controls(
        read=False, write=False
    )
    assert asked("x-cache-max-error: 0.5", "x-cache-max-error: 0.001").max_error == 0.001
    assert asked("x-cache-tags: a", twin={"tags": ["b", "a"]}).tags == ("a", "b")
    with pytest.raises(BadRequest, match="one value"):
        asked("x-cache-namespace: a", twin={"namespace": "b"})
    with pytest.raises(BadRequest, match="one value"):
        asked("x-cache-user: a", "x-cache-user: b")
    with pytest.raises(BadRequest, match="one value"):
        asked("x-cache-pace: instant", "x-cache-pace: 40")


LINES = st.sampled_from(
    ["cache-control: no-cache", "cache-control: no-store", "cache-control: max-age=5", "cache-control: max-stale=5",
     "cache-control: only-if-cached", *(f"x-cache-mode: {mode}" for mode in MODES),
     "x-cache-max-error: 0.9", "x-cache-max-error: 0.001", "x-cache-ttl: 7"]
)  # fmt: skip


@given(st.lists(LINES, max_size=5), LINES)
def test_one_more_wish_never_widens(lines: list[str], more: str) -> None:
    before, after = asked(*lines), asked(*lines, more)
    assert after.read <= before.read
    assert after.write <= before.write
    assert after.exact_only >= before.exact_only
    assert after.only_if_cached >= before.only_if_cached
    for name in ("max_age_s", "ttl_s", "max_error"):
        wide, narrow = getattr(before, name), getattr(after, name)
        assert wide is None or narrow <= wide


def test_cache_status_reads_as_rfc_9211_writes_it() -> None:
    assert cache_status(hit=True, ttl_s=30, detail="exact") == "ibid; hit; ttl=30; detail=exact"
    assert cache_status(hit=True, ttl_s=-3) == "ibid; hit; ttl=-3"
    assert (
        cache_status(fwd="miss", fwd_status=200, stored=True, collapsed=True, detail="nothing_alike")
        == "ibid; fwd=miss; fwd-status=200; stored; collapsed; detail=nothing_alike"
    )
    assert cache_status(fwd="bypass", detail='a "b" \\ é\r\n') == 'ibid; fwd=bypass; detail="a \\"b\\" \\\\ ???"'
    with pytest.raises(ValueError, match="either"):
        cache_status(hit=True, fwd="miss")
    with pytest.raises(ValueError, match="either"):
        cache_status()


@given(
    st.none() | st.sampled_from(["bypass", "request", "stale", "miss"]),
    st.none() | st.integers(100, 599),
    st.none() | st.integers(-(10**9), 2**31),
    st.booleans(),
    st.booleans(),
    st.none() | st.text(min_size=1),
)
def test_another_parser_of_structured_fields_reads_what_was_said(
    fwd: str | None, fwd_status: int | None, ttl_s: int | None, stored: bool, collapsed: bool, detail: str | None
) -> None:
    said = {"fwd-status": fwd_status, "ttl": ttl_s, "stored": stored or None, "collapsed": collapsed or None}
    expected = {"hit": True} if fwd is None else {"fwd": fwd}
    expected |= {name: value for name, value in said.items() if value is not None}
    if detail is not None:
        expected["detail"] = re.sub(r"[^\x20-\x7e]", "?", detail)
    line = cache_status(
        hit=fwd is None, fwd=fwd, fwd_status=fwd_status, ttl_s=ttl_s, stored=stored, collapsed=collapsed, detail=detail
    )
    ((cache, parameters),) = http_sf.parse(line.encode(), tltype="list")
    assert (str(cache), parameters) == ("ibid", expected)
    assert list(parameters) == list(expected)


@given(st.text(min_size=1))
def test_no_reason_breaks_out_of_its_header(reason: str) -> None:
    headers = verdict_headers(Bypass(reason), request_id="r", upstream="u")
    for _, value in headers:
        assert re.fullmatch(r"[\x20-\x7e]*", value)
    status = dict(headers)["Cache-Status"]
    assert re.fullmatch(r'ibid; fwd=bypass; detail=("(?:[^"\\]|\\["\\])*"|[A-Za-z*][^ ;"\\]*)', status)


def entry() -> Entry:
    draft = Draft(b"", b"", "", "", "u", "chat", "m", "", b"", None, 0, 1, "r", 1.0)
    return Entry(42, draft, b"")


def test_a_hit_says_where_it_came_from() -> None:
    headers = verdict_headers(
        Hit(entry(), Tier.SEMANTIC, 0.98765, 0.9961), request_id="r1", upstream="openai", age_s=7, ttl_s=100,
        saved_nusd=1_234, cost_nusd=0,
    )  # fmt: skip
    assert headers == [
        ("Cache-Status", "ibid; hit; ttl=100; detail=semantic"),
        ("x-cache", "HIT"),
        ("x-cache-tier", "semantic"),
        ("x-cache-similarity", "0.9877"),
        ("x-cache-confidence", "0.9961"),
        ("x-cache-entry", "42"),
        ("Age", "7"),
        ("x-cache-saved-usd", "0.000001234"),
        ("x-cost-usd", "0.000000000"),
        ("x-upstream", "openai"),
        ("x-request-id", "r1"),
    ]
    stale = dict(verdict_headers(Hit(entry(), Tier.STALE, 1.0, 1.0), request_id="r", upstream="u", ttl_s=-5))
    assert (stale["x-cache"], stale["Cache-Status"]) == ("STALE", "ibid; hit; ttl=-5; detail=stale")


@pytest.mark.parametrize(
    ("verdict", "extra", "status", "word"),
    [
        (Miss("nothing_alike"), {}, "fwd=miss", "MISS"),
        (Miss("expired"), {}, "fwd=stale", "MISS"),
        (NearMiss(3, 0.9, 0.97, "numbers"), {}, "fwd=miss", "MISS"),
        (Bypass("temperature"), {}, "fwd=bypass", "BYPASS"),
        (Bypass("refresh"), {"refresh": True}, "fwd=request", "REFRESH"),
        (Miss("nothing_alike"), {"shadow": True}, "fwd=miss", "SHADOW"),
        (NearMiss(3, 0.9, 0.97, "numbers"), {"shadow": True}, "fwd=miss", "SHADOW"),
        (Bypass("temperature"), {"shadow": True}, "fwd=bypass", "BYPASS"),
        (Bypass("refresh"), {"refresh": True, "shadow": True}, "fwd=request", "REFRESH"),
    ],
)
def test_a_forward_says_why(verdict: Any, extra: dict[str, bool], status: str, word: str) -> None:
    headers = dict(verdict_headers(verdict, request_id="r", upstream="u", fwd_status=200, stored=True, **extra))
    assert headers["Cache-Status"] == f"ibid; {status}; fwd-status=200; stored; detail={verdict.reason}"
    assert (headers["x-cache"], headers["x-cache-reason"]) == (word, verdict.reason)
    assert "x-cache-entry" not in headers


@pytest.mark.parametrize("tier", [Tier.EXACT, Tier.SEMANTIC, Tier.STALE])
def test_shadow_says_what_would_have_been_served(tier: Tier) -> None:
    hit = Hit(entry(), tier, 0.97, 0.99)
    headers = dict(verdict_headers(hit, request_id="r", upstream="u", fwd_status=200, shadow=True))
    assert headers["Cache-Status"] == f"ibid; fwd=miss; fwd-status=200; detail=would_{tier.value}"
    assert (headers["x-cache"], headers["x-cache-reason"]) == ("SHADOW", f"would_{tier.value}")
    assert (headers["x-cache-tier"], headers["x-cache-entry"]) == (tier.value, "42")
    assert headers["x-cache-similarity"] == "0.9700"


def test_nano_dollars_are_written_exactly() -> None:
    assert [usd(n) for n in (0, 1, -1, 10**9, -1_500_000_001)] == [
        "0.000000000",
        "0.000000001",
        "-0.000000001",
        "1.000000000",
        "-1.500000001",
    ]


OFF = Controls(read=False, write=False)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("cf-aig-skip-cache", "true", OFF),
        ("cf-aig-skip-cache", "false", Controls()),
        ("cf-aig-cache-ttl", "3600", Controls(ttl_s=3600.0)),
        ("cf-aig-cache-key", "faq", Controls(namespace="faq")),
        ("x-portkey-cache-force-refresh", "true", Controls(read=False, refresh=True)),
        ("x-portkey-cache-namespace", "faq", Controls(namespace="faq")),
        ("Helicone-Cache-Enabled", "false", OFF),
        ("Helicone-Cache-Enabled", "true", Controls()),
        ("Helicone-Cache-Seed", "user-7", Controls(namespace="user-7")),
        ("x-bf-cache-key", "session-1", Controls(namespace="session-1")),
        ("x-bf-cache-ttl", "5m", Controls(ttl_s=300.0)),
        ("x-bf-cache-type", "direct", Controls(exact_only=True)),
        ("x-bf-cache-type", "semantic", Controls()),
        ("x-bf-cache-no-store", "true", Controls(write=False)),
        ("x-vsr-cache-control", "no-store", OFF),
        ("x-vsr-cache-control", "bypass", OFF),
        ("x-vsr-cache-control", "no-cache, ttl=60", Controls(read=False, refresh=True, ttl_s=60.0)),
        ("x-vsr-cache-control", "max-age=30", Controls(max_age_s=30.0)),
        ("X-OpenRouter-Cache", "false", OFF),
        ("X-OpenRouter-Cache-Clear", "true", Controls(read=False, refresh=True)),
        ("x-higress-skip-ai-cache", "on", OFF),
    ],
)
def test_what_other_gateways_call_it_means_the_same_here(name: str, value: str, expected: Controls) -> None:
    assert controls_of([(name.encode(), value.encode())]) == expected


def test_a_key_of_the_clients_own_keeps_requests_apart_whatever_it_is() -> None:
    found = [controls_of([(b"cf-aig-cache-key", key)]).namespace for key in (b"a b", b"a  b", b"{}", b"plain")]
    assert len(set(found)) == 4
    assert found[-1] == "plain"
    with pytest.raises(BadRequest):
        controls_of([(b"cf-aig-cache-key", b"a"), (b"x-cache-namespace", b"b")])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-bf-cache-ttl", "soon"),
        ("x-bf-cache-type", "fuzzy"),
        ("cf-aig-skip-cache", "maybe"),
        ("x-vsr-cache-control", "ttl=x"),
    ],
)
def test_a_value_nobody_can_read_is_refused_by_the_name_it_came_under(name: str, value: str) -> None:
    with pytest.raises(BadRequest) as caught:
        controls_of([(name.encode(), value.encode())])
    assert (caught.value.code, caught.value.status) == ("invalid_value", 400)
