"""What a client asks of the cache, and how a verdict is told: Cache-Control in, Cache-Status and x-cache* out.

RFC 9111 §5.2.1 for the directives, RFC 9211 for Cache-Status, RFC 8941 for its spelling.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Final, NoReturn

from proxy.core.errors import BadRequest
from proxy.core.headers import ASKED, PEERS
from proxy.core.model import Bypass, Controls, Hit, Miss, NearMiss, Tier, Verdict
from proxy.core.pace import TOKENS_PER_S, Pace
from proxy.core.plan import DEFAULT_PLAN, edited
from proxy.core.units import duration_s, usd

DEFAULT_CONTROLS = Controls()
"""Shared by every request that asks for nothing special."""

MODES: Mapping[str, Mapping[str, bool]] = {
    "off": {"read": False, "write": False},
    "read": {"write": False},
    "write": {"read": False},
    "exact": {"exact_only": True},
    "semantic": {},
    "shadow": {"shadow": True},
    "refresh": {"read": False, "refresh": True},
}

WOULD: Final = "would_"
"""Begins the reason of what shadow kept from being served; the tier follows."""

SECONDS_MAX = 2.0**31  # RFC 9111 §1.2.2: larger counts as this
TAGS_MAX = 16

_NAMES = frozenset(asked.name.encode() for asked in ASKED) - {b"prefer"}  # which is read where answers are deferred
_PEERS: Mapping[bytes, str] = {name.encode(): meaning for name, meaning in PEERS.items()}
OWN_HEADERS = _NAMES | _PEERS.keys()
"""What is said to ibid, and to nobody behind it."""

_DURATION = re.compile(r"([0-9]{1,9})([smhd]?)")
_DEADLINE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([smhd])")
_DIRECTIVE = re.compile(r'\s*([!#$%&\'*+\-.^_`|~0-9A-Za-z]+)(?:\s*=\s*("(?:[^"\\]|\\.)*"|[^\s,"]*))?\s*(?:,|$)|\s*,')
_SECONDS = re.compile(r"[0-9]{1,18}")
_FRACTION = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,18})?(?:[eE]-?[0-9]{1,2})?|\.[0-9]{1,18}")
_NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")
_SAMPLE = re.compile(r"[A-Za-z0-9._:-]{1,64}")
TAG = r"[A-Za-z0-9][A-Za-z0-9._:/@=-]{0,63}"
_TAG = re.compile(TAG)
_PACES: Mapping[str, Pace] = {"instant": "instant", "recorded": "recorded"}
_PACE = re.compile(r"([0-9]{1,5}(?:\.[0-9]{1,3})?)(?:/s)?")
_USER = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,254}[\x21-\x7e])?")
_TRUE, _FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})


class _Wishes:
    """Collects wishes from several places; two of one kind meet at the narrower."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: dict[str, object] = {}

    def deny(self, name: str) -> None:
        self.values[name] = False

    def ask(self, name: str) -> None:
        self.values[name] = True

    def at_most(self, name: str, number: float) -> None:
        known = self.values.get(name)
        self.values[name] = min(known, number) if isinstance(known, int | float) else number

    def only(self, name: str, said: str | float, param: str) -> None:
        """A name: said twice it must be the same, else the two would ask for different things."""
        if self.values.setdefault(name, said) != said:
            _refuse(param, "one value")

    def mode(self, word: str, param: str) -> None:
        if word not in MODES:
            _refuse(param, f"one of {', '.join(MODES)}")
        self.values.update(MODES[word])

    def tags(self, tags: Iterable[str], param: str) -> None:
        known = self.values.setdefault("tags", ())
        assert isinstance(known, tuple)
        wanted = tuple(dict.fromkeys([*known, *tags]))
        if len(wanted) > TAGS_MAX or not all(_TAG.fullmatch(tag) for tag in wanted):
            _refuse(param, f"at most {TAGS_MAX} tags of 1 to 64 letters, digits and ._:/@=-")
        self.values["tags"] = wanted

    def controls(self) -> Controls:
        return Controls(**self.values) if self.values else DEFAULT_CONTROLS  # type: ignore[arg-type]


def controls_of(headers: Iterable[tuple[bytes, bytes]], body_twin: object = None) -> Controls:
    """The client's wishes: `headers` as received, `body_twin` the body's `cache` member or None.

    A client can only narrow: where two places disagree the narrower holds. Raises BadRequest (`invalid_value`, naming
    the header or `cache.<member>`) for a value that cannot be read; unknown Cache-Control directives are ignored.
    """
    found = [(low, value) for name, value in headers if (low := name.lower()) in _NAMES or low in _PEERS]
    if not found and body_twin is None:
        return DEFAULT_CONTROLS
    wishes = _Wishes()
    for name, value in found:
        param = name.decode("ascii")
        try:
            text = value.decode("ascii").strip()
        except UnicodeDecodeError:
            _refuse(param, "ASCII")
        if name in _PEERS:
            _read_peer(_PEERS[name], text, param, wishes)
        elif param == "cache-control":
            _read_cache_control(text, wishes)
        else:
            _read_header(param, text, wishes)
    if body_twin is not None:
        _read_twin(body_twin, wishes)
    return wishes.controls()


_DEADLINE_HEADER = "x-deadline"


def deadline_s_of(headers: Iterable[tuple[bytes, bytes]]) -> float | None:
    """How long a client can wait, by its `x-deadline`: a number with s, m, h or d. None when it does not say; said
    twice, the shorter. Raises BadRequest (`invalid_value`)."""
    found: list[float] = []
    for name, value in headers:
        if name.lower() == _DEADLINE_HEADER.encode():
            found.append(_deadline_s(value.decode("latin-1").strip()))
    return min(found, default=None)


def _deadline_s(text: str) -> float:
    seconds = duration_s(text.lower(), _DEADLINE)
    if seconds is None:
        _refuse(_DEADLINE_HEADER, "a number with s, m, h or d")
    return min(seconds, SECONDS_MAX)


def _refuse(param: str, wanted: str) -> NoReturn:
    raise BadRequest(f"Invalid value for '{param}': expected {wanted}.", code="invalid_value", param=param)


def _read_cache_control(text: str, wishes: _Wishes) -> None:
    at = 0
    while at < len(text):
        match = _DIRECTIVE.match(text, at)
        if match is None:
            _refuse("cache-control", "a list of directives")
        at = match.end()
        if match[1] is None:  # an empty element, RFC 9110 §5.6.1
            continue
        argument = match[2]
        if argument is not None and argument.startswith('"'):
            argument = re.sub(r"\\(.)", r"\1", argument[1:-1])
        _read_directive(match[1].lower(), argument, wishes)


def _read_directive(name: str, argument: str | None, wishes: _Wishes) -> None:
    match name:
        case "no-cache":
            wishes.deny("read")
            wishes.ask("refresh")
        case "no-store":
            wishes.deny("read")
            wishes.deny("write")
        case "only-if-cached":
            wishes.ask("only_if_cached")
        case "max-age":
            wishes.at_most("max_age_s", _seconds(argument or "", "cache-control"))
        case "max-stale":
            wishes.at_most("max_stale_s", math.inf if argument is None else _seconds(argument, "cache-control"))
        case _:
            pass  # RFC 9111 §5.2.3: a cache ignores what it does not know


def _seconds(text: str, param: str) -> float:
    if _SECONDS.fullmatch(text) is None:
        _refuse(param, "whole seconds")
    return float(min(int(text), SECONDS_MAX))


def _read_header(param: str, text: str, wishes: _Wishes) -> None:
    match param:
        case "x-cache-mode":
            wishes.mode(text.lower(), param)
        case "x-cache-ttl":
            wishes.at_most("ttl_s", _seconds(text, param))
        case "x-cache-namespace":
            _read_namespace(text, param, wishes)
        case "x-cache-tags":
            wishes.tags([tag for part in text.split(",") if (tag := part.strip())], param)
        case "x-cache-max-error":
            if _FRACTION.fullmatch(text) is None or not 0.0 <= float(text) <= 1.0:
                _refuse(param, "a number from 0 to 1")
            wishes.at_most("max_error", float(text))
        case "x-cache-user":
            if _USER.fullmatch(text) is None:
                _refuse(param, "1 to 256 printable characters")
            wishes.only("user", text, param)
        case "x-cache-sample":
            if _SAMPLE.fullmatch(text) is None:
                _refuse(param, "1 to 64 letters, digits and ._:-")
            wishes.only("sample", text, param)
        case "x-plan":
            _read_plan(text, param, wishes)
        case "x-deadline":
            wishes.at_most("deadline_s", _deadline_s(text))
        case "x-cache-pace":
            wishes.only("pace", _pace(text.lower(), param), param)
        case _:
            if _truth(text, param):
                wishes.ask("explain")


def _duration_s(text: str, param: str) -> float:
    seconds = duration_s(text.lower(), _DURATION)
    if seconds is None:
        _refuse(param, "seconds, or a number with s, m, h or d")
    return min(seconds, SECONDS_MAX)


def _read_plan(text: str, param: str, wishes: _Wishes) -> None:
    try:
        edited(DEFAULT_PLAN, text)
    except ValueError as fault:
        raise BadRequest(f"Invalid value for '{param}': {fault}.", code="invalid_value", param=param) from None
    wishes.only("plan", text, param)


def _pace(text: str, param: str) -> Pace:
    if (named := _PACES.get(text)) is not None:
        return named
    found = _PACE.fullmatch(text)
    least, most = TOKENS_PER_S
    if found is None or not least <= float(found[1]) <= most:
        _refuse(param, f"instant, recorded, or tokens a second from {least:g} to {most:g}")
    return float(found[1])


def _read_peer(meaning: str, text: str, param: str, wishes: _Wishes) -> None:
    match meaning:
        case "ttl":
            wishes.at_most("ttl_s", _duration_s(text, param))
        case "key":
            _read_namespace(text if _NAMESPACE.fullmatch(text) else _digest(text), param, wishes)
        case "type":
            if text.lower() == "direct":
                wishes.mode("exact", param)
            elif text.lower() not in ("semantic", ""):
                _refuse(param, "direct or semantic")
        case "control":
            for part in filter(None, (part.strip().lower() for part in text.split(","))):
                said, _, argument = part.partition("=")
                if said == "bypass":
                    wishes.mode("off", param)
                elif said == "ttl":
                    wishes.at_most("ttl_s", _seconds(argument, param))
                else:
                    _read_directive(said, argument or None, wishes)
        case _:
            is_true = _truth(text, param)
            if meaning == "on" and not is_true:
                wishes.mode("off", param)
            elif meaning == "no_store" and is_true:
                wishes.deny("write")
            elif meaning in ("off", "refresh") and is_true:
                wishes.mode(meaning, param)


def _digest(text: str) -> str:
    return "key." + hashlib.sha256(text.encode()).hexdigest()[:32]


def _truth(text: str, param: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() not in _FALSE:
        _refuse(param, "true or false")
    return False


def _read_namespace(text: str, param: str, wishes: _Wishes) -> None:
    if _NAMESPACE.fullmatch(text) is None:
        _refuse(param, "1 to 128 letters, digits and ._:/@-")
    wishes.only("namespace", text, param)


def _read_twin(twin: object, wishes: _Wishes) -> None:
    if not isinstance(twin, dict):
        _refuse("cache", "an object")
    for name, value in twin.items():
        param = f"cache.{name[:64]}"
        match name:
            case "no-cache" | "no-store" | "use-cache":
                if type(value) is not bool:
                    _refuse(param, "true or false")
                if name == "use-cache":
                    if not value:
                        wishes.mode("off", param)
                elif value:
                    _read_directive(name, None, wishes)
            case "ttl" | "s-maxage":
                if type(value) not in (int, float) or not 0 <= value:
                    _refuse(param, "seconds")
                wishes.at_most("ttl_s" if name == "ttl" else "max_age_s", float(min(value, SECONDS_MAX)))
            case "namespace":
                _read_namespace(_text(value, param), param, wishes)
            case "mode":
                wishes.mode(_text(value, param).lower(), param)
            case "plan":
                _read_plan(_text(value, param), param, wishes)
            case "tags":
                if not isinstance(value, list) or not all(isinstance(tag, str) for tag in value):
                    _refuse(param, "an array of strings")
                wishes.tags(value, param)
            case _:
                _refuse(param, "a known control")


def _text(value: object, param: str) -> str:
    if not isinstance(value, str):
        _refuse(param, "a string")
    return value


# -- out ---------------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"[A-Za-z*][!#$%&'*+\-.^_`|~0-9A-Za-z:/]*")
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]")


def _sf_item(text: str) -> str:
    """A token where RFC 8941 §3.3.4 allows one, else a quoted string (§3.3.3)."""
    if _TOKEN.fullmatch(text) is not None:
        return text
    printable = _UNPRINTABLE.sub("?", text)
    return '"' + printable.replace("\\", "\\\\").replace('"', '\\"') + '"'


def cache_status(
    *,
    hit: bool = False,
    fwd: str | None = None,
    fwd_status: int | None = None,
    ttl_s: int | None = None,
    stored: bool = False,
    collapsed: bool = False,
    detail: str | None = None,
) -> str:
    """One Cache-Status member (RFC 9211 §2): either `hit`, or `fwd` with bypass, request, stale or miss."""
    if hit == (fwd is not None):
        raise ValueError("a Cache-Status says either hit or fwd")
    said = ["ibid", "hit" if hit else f"fwd={fwd}"]
    if fwd_status is not None:
        said.append(f"fwd-status={fwd_status}")
    if ttl_s is not None:
        said.append(f"ttl={ttl_s}")
    if stored:
        said.append("stored")
    if collapsed:
        said.append("collapsed")
    if detail:
        said.append(f"detail={_sf_item(detail)}")
    return "; ".join(said)


def verdict_headers(
    verdict: Verdict,
    *,
    upstream: str,
    request_id: str | None = None,
    age_s: int | None = None,
    ttl_s: int | None = None,
    fwd_status: int | None = None,
    stored: bool = False,
    collapsed: bool = False,
    shadow: bool = False,
    refresh: bool = False,
    saved_nusd: int | None = None,
    cost_nusd: int | None = None,
    server: Tier | None = None,
    plan: str = "",
) -> list[tuple[str, str]]:
    """Cache-Status, x-cache* and the rest, known before the first byte. In shadow a hit was seen but not served.
    `server`: EDGE or FAILOVER where another server than the one asked answers."""
    if isinstance(verdict, Hit) and not shadow:
        tier = verdict.tier
        status = cache_status(hit=True, ttl_s=ttl_s, collapsed=collapsed, detail=tier.value)
        word = "STALE" if tier is Tier.STALE else "HIT"
        headers = [("Cache-Status", status), ("x-cache", word), ("x-cache-tier", tier.value)]
        if tier is Tier.SEMANTIC:
            headers.append(("x-cache-similarity", f"{verdict.similarity:.4f}"))
            headers.append(("x-cache-confidence", f"{verdict.probability:.4f}"))
        headers.append(("x-cache-entry", str(verdict.entry.id)))
    else:
        headers = _forwarded(verdict, fwd_status, stored, collapsed, shadow, refresh)
        if server is not None:
            headers.append(("x-cache-tier", server.value))
    if age_s is not None:
        headers.append(("Age", str(age_s)))
    if saved_nusd is not None:
        headers.append(("x-cache-saved-usd", usd(saved_nusd)))
    if cost_nusd is not None:
        headers.append(("x-cost-usd", usd(cost_nusd)))
    headers.append(("x-upstream", upstream))
    if plan:
        headers.append(("x-plan", plan))
    if request_id is not None:
        headers.append(("x-request-id", request_id))
    return headers


def stale_headers(
    entry_id: int, *, upstream: str, request_id: str, age_s: int, ttl_s: int, plan: str
) -> list[tuple[str, str]]:
    """Of an expired entry that stands in for an upstream that failed (RFC 5861 §4). `ttl_s` is negative."""
    status = cache_status(hit=True, ttl_s=ttl_s, detail="stale-if-error")
    return [
        ("Cache-Status", status),
        ("x-cache", "STALE"),
        ("x-cache-tier", Tier.STALE.value),
        ("x-cache-entry", str(entry_id)),
        ("x-cache-reason", "stale-if-error"),
        ("Age", str(age_s)),
        ("x-upstream", upstream),
        ("x-plan", plan),
        ("x-request-id", request_id),
    ]


def held_headers(plan: str, request_id: str) -> list[tuple[str, str]]:
    """Of a response begun before it was known who answers."""
    status = cache_status(fwd="miss", detail="held")
    return [("Cache-Status", status), ("x-cache-reason", "held"), ("x-plan", plan), ("x-request-id", request_id)]


def partial_header(served: int, asked: int) -> tuple[str, str]:
    """How many of a request's inputs the cache answered."""
    return ("x-cache-partial", f"{served}/{asked}")


def _forwarded(
    verdict: Verdict, fwd_status: int | None, stored: bool, collapsed: bool, shadow: bool, refresh: bool
) -> list[tuple[str, str]]:
    if refresh:
        fwd, word = "request", "REFRESH"
    elif isinstance(verdict, Bypass):
        fwd, word = "bypass", "BYPASS"
    elif isinstance(verdict, Miss) and verdict.reason == "expired":
        fwd, word = "stale", "MISS"
    else:
        fwd, word = "miss", "MISS"
    if shadow and word == "MISS":  # what was not looked up is no shadow of anything
        word = "SHADOW"
    reason = reason_told(verdict, shadow=shadow)
    status = cache_status(fwd=fwd, fwd_status=fwd_status, stored=stored, collapsed=collapsed, detail=reason)
    headers = [("Cache-Status", status), ("x-cache", word)]
    if collapsed:
        headers.append(("x-cache-tier", Tier.COLLAPSED.value))
    elif isinstance(verdict, Hit):
        headers += [("x-cache-tier", verdict.tier.value), ("x-cache-entry", str(verdict.entry.id))]
    if isinstance(verdict, NearMiss | Hit):
        headers.append(("x-cache-similarity", f"{verdict.similarity:.4f}"))
        headers.append(("x-cache-confidence", f"{verdict.probability:.4f}"))
    headers.append(("x-cache-reason", header_text(reason)))
    return headers


def reason_told(verdict: Verdict, *, shadow: bool) -> str:
    """The reason of a request; of a hit that was only seen, how it would have been served."""
    return f"{WOULD}{verdict.tier.value}" if shadow and isinstance(verdict, Hit) else verdict.reason


def header_text(text: str) -> str:
    """Text that cannot end a header or start another: printable ASCII only."""
    return _UNPRINTABLE.sub("?", text)
