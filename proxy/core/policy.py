"""The built-in policy, readable aloud: what may be looked up, served and stored, and why not.

Rules someone may disagree with live here and nowhere else. Every refusal has one machine-readable reason; it reaches
the Cache-Status header, the log, the metric and the ledger row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import date
from typing import Any

from proxy.core import search
from proxy.core.facts import Facts
from proxy.core.model import Answer, Controls, Eligibility, Level, Rules, Usage
from proxy.core.query import Query
from proxy.core.refusals import is_refusal
from proxy.core.words import READ_LIMIT_CHARS, Reading, read_prompt

FORMATS = ("float", "base64")
"""Spellings of a vector, both of float32 numbers."""

# -- what may be looked up ---------------------------------------------------------------------------------------------


def classify(facts: Facts, controls: Controls, rules: Rules, today: date | None = None) -> Eligibility:
    """How far a lookup may go, the first reason that stops it, and a cap on the lifetime of what is stored.

    `today` decides which written dates are near; without it every date is. Equal arguments give equal results.
    """
    if (reason := next(_forbidding(facts, controls, rules), None)) is not None:
        return Eligibility(Level.NONE, reason)
    reading = None if facts.prompt is None else read_prompt(facts.prompt, today)
    if reading is not None and reading.personal and not (facts.end_user or controls.user):
        return Eligibility(Level.NONE, "pii")
    cap_s = rules.volatile_ttl_s if reading is not None and reading.time else None
    reason = next(_limiting(facts, controls, rules, reading), None)
    return Eligibility(Level.FULL if reason is None else Level.EXACT, reason, cap_s)


def _forbidding(facts: Facts, controls: Controls, rules: Rules) -> Iterator[str]:
    """Reasons against any use of the cache."""
    if not controls.read and not controls.write:
        yield "no_store"
    if facts.n > 1:
        yield "n"  # a sampled set
    if facts.logprobs:
        yield "logprobs"
    if facts.audio_output:
        yield "audio_output"
    if facts.store:
        yield "store"  # the upstream keeps state under the answer's id
    if facts.previous_response:
        yield "previous_response"
    if facts.background:
        yield "background"
    if facts.web_search or _searches(facts, rules):
        yield "web_search"  # freezes data
    if facts.remote_urls:
        yield "remote_urls"  # what is behind an address may change
    if (facts.has_tools or facts.tool_results) and not rules.cache_tools:
        yield "tools"
    if facts.temperature is not None and facts.temperature > rules.exact_temperature_max and not controls.sample:
        yield "temperature"  # a wish for another sample
    if facts.seed is not None and not rules.cache_seeded:
        yield "seed"  # a given sample was asked for
    if facts.prompt is not None and _is_longer(facts.prompt, rules.prompt_limit_bytes):
        yield "prompt_too_large"
    if facts.inputs and facts.encoding_format not in FORMATS:
        yield "encoding_format"  # vectors that cannot be read
    if facts.encoding_format and not facts.inputs:
        yield "no_input"  # nothing is asked


def _limiting(facts: Facts, controls: Controls, rules: Rules, reading: Reading | None) -> Iterator[str]:
    """Reasons against semantic matching; what is left is found by its exact identity only."""
    if not rules.semantic:
        yield "semantic_off"
    if controls.exact_only or controls.sample:
        yield "exact_only"
    if _is_sampled(facts, rules):
        yield "temperature"
    if facts.seed is not None:
        yield "seed"
    if facts.has_tools:
        yield "tools"
    if facts.tool_results:
        yield "tool_results"  # a conversation like any other, to the byte
    if facts.has_images:
        yield "images"
    if facts.has_audio:
        yield "audio"
    if facts.has_files:
        yield "files"
    if facts.opaque:
        yield "thinking"  # what is signed belongs to the very question it was thought for
    if facts.unknown:
        yield "unknown_field"
    if facts.prompt is None or reading is None:
        yield "no_prompt"
        return
    if len(facts.prompt) > READ_LIMIT_CHARS:
        yield "too_long"
    if not facts.first_turn:
        yield "multi_turn"  # context dominates: alike last turns in unlike conversations
    if reading.words < rules.min_words:
        yield "short"
    if reading.time:
        yield "time_words"
    if reading.personal:
        yield "pii"
    if reading.odd is not None:
        yield reading.odd
    if reading.injection:
        yield "injection"


def _searches(facts: Facts, rules: Rules) -> bool:
    is_embedding = bool(facts.encoding_format)  # some models of that are called after searching
    return not is_embedding and search.is_asked(facts.model, facts.settings, rules.search_models, rules.search_fields)


def _is_sampled(facts: Facts, rules: Rules) -> bool:
    """An explicit wish for variety; an omitted temperature is not one. NaN is."""
    return facts.temperature is not None and not facts.temperature <= rules.semantic_temperature_max


def _is_longer(text: str, limit_bytes: int) -> bool:
    return len(text) > limit_bytes or (
        len(text) * 4 > limit_bytes and len(text.encode("utf-8", "replace")) > limit_bytes
    )


def ttl_s(eligibility: Eligibility, controls: Controls, rules: Rules) -> float:
    """Lifetime of what is stored now, in seconds: the client's wish within the operator's and the text's bounds."""
    wished_s = rules.ttl_s if controls.ttl_s is None else controls.ttl_s
    bounds_s = [wished_s, rules.max_ttl_s]
    if eligibility.ttl_cap_s is not None:
        bounds_s.append(eligibility.ttl_cap_s)
    return max(0.0, min(bounds_s))


# -- what may be served ------------------------------------------------------------------------------------------------

GUARDS = (
    "numbers",
    "units",
    "dates",
    "ids",
    "quoted",
    "code",
    "entities",
    "negation",
    "antonyms",
    "question",
    "script",
    "direction",
    "possessive",
    "order",
    "substitution",
    "addition",
)
"""Names of the veto bits, lowest first, as the index sets them; a test holds them equal to `index.tokens.GUARDS`."""


def mask(*guards: str) -> int:
    """The veto set of these guards. Raises ValueError for an unknown name."""
    return sum(1 << GUARDS.index(guard) for guard in guards)


def names(vetoes: int) -> tuple[str, ...]:
    """The guards in a veto set, in the order of GUARDS."""
    return tuple([guard for i, guard in enumerate(GUARDS) if vetoes >> i & 1])


HARD = mask(*(name for name in GUARDS if name != "possessive"))
"""Guards that forbid a hit for which there is no evidence but the likeness itself.

Possessives only inform: as a veto at bound 0.92 they cost 13 % (banking77) and 9 % (QQP) of the hits and take away 2 of
14 and 2 of 9 hits that the labels call wrong.
"""
ALWAYS = mask("numbers", "units", "dates", "ids", "quoted", "code", "script")
"""Guards that no evidence overrules. The others are features, which a scope's own labels may outweigh: with negation,
antonyms and direction here as well, banking77 keeps .27 hits at 2 % instead of .34."""

KNOWN = ALWAYS | mask("negation", "antonyms", "direction", "order")
"""Guards that know: what they object to is another question, whatever the pair guard thinks. The others of HARD are
suspicions (a word exchanged or added, a name, another way to ask), which most rewordings raise."""


def error_bound(rules: Rules, controls: Controls) -> float:
    """The share of wrong hits that is accepted; a client may only tighten it."""
    if controls.max_error is None:
        return rules.max_error_rate
    return min(rules.max_error_rate, controls.max_error)


UNFIT = frozenset({"max_tokens", "not_expressible"})


def unfit(answer: Answer, query: Query) -> str | None:
    """None when a stored answer may be given to this query as it is, else the reason why not."""
    if query.output_limit is not None:
        length = answer.limit if answer.usage is None else answer.usage.output_tokens
        if length is None or length > query.output_limit:
            return "max_tokens"
    if answer.dialect != query.dialect.name and not query.dialect.expresses(
        answer, has_stops=query.has_stops, keeps_id=query.keeps_id
    ):
        return "not_expressible"
    return None


# -- what may be stored ------------------------------------------------------------------------------------------------

FINISHED = frozenset({"stop", "end_turn", "stop_sequence"})
CALLED = frozenset({"tool_calls", "function_call"})
_FINISHES = {
    "length": "finish_length",
    "max_tokens": "finish_length",
    "model_context_window_exceeded": "finish_length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "tool_use": "tool_calls",
    "content_filter": "content_filter",
    "refusal": "refusal",
    "pause_turn": "finish_other",
}
EDGE_COOKIES = frozenset(
    {"__cf_bm", "__cflb", "__cfruid", "__cfwaitingroom", "_cfuvid", "cf_clearance",  # Cloudflare
     "arraffinity", "arraffinitysamesite", "aslbsa", "aslbsacors", "tipmix", "x-ms-routing-name",  # Azure
     "applicationgatewayaffinity", "applicationgatewayaffinitycors",
     "gclb", "gcilb",  # Google
     "acw_tc", "aliyungf_tc", "tgw_l7_route", "hwwafsesid", "hwwafsestime", "x-oracle-bmc-lbs-route",  # other clouds
     "ingresscookie", "route", "serverid", "srv_id", "srvid", "srv", "server_id", "srvname", "backend", "sticky",
     "stickysession", "lb", "lbcookie", "lb-cookie", "do-lb", "routeid", "balanceid", "x-contour-session-affinity",
     "heroku-session-affinity", "citrix_ns_id", "ak_bmsc", "bm_sv", "bm_sz", "bm_mi", "_abck"}
)  # fmt: skip
EDGE_COOKIE_PREFIXES = (
    "awsalb", "awselb", "bigipserver", "nsc_", "incap_ses_", "visid_incap_", "nlbi_", "akaalb_", "dtcookie",
)  # fmt: skip
"""Set by a network edge on every response to tell connections apart (api.openai.com does), or by a balancer to keep to
one server (ingress-nginx, HAProxy, Apache, F5, Citrix, Imperva, Akamai, the clouds' own), not by who answers.

They say nothing about the answer, so they do not keep it from being stored; no cookie is ever stored or replayed.
"""
_COOKIE_NAME = re.compile(r"(?:^|,\s*|\n\s*)([!#$%&'*+\-.^_`|~0-9A-Za-z]+)=")
_DIRECTIVE = re.compile(r'([A-Za-z-]+)(?:\s*=\s*(?:"(?:[^"\\]|\\.)*"|[^\s,"]*))?')
_VARIANT = re.compile(r":(?:latest|free|nitro|floor|extended|thinking|exacto)$")
"""Ollama's tag of what is asked without one, and OpenRouter's ways to reach one and the same model."""
_SNAPSHOT = re.compile(r"-(?:\d{4}-\d\d-\d\d|\d{8}|\d{6}|\d{4}|\d{3}|latest)")


def storable(
    answer: Answer | str | None,
    query: Query,
    rules: Rules,
    *,
    status: int,
    size_bytes: int,
    header: Callable[[str], str | None],
    aliases: Mapping[str, Collection[str]] | None = None,
) -> str | None:
    """None when the answer may be kept, else the reason why not.

    `answer` is what the recorder made of the whole response: an Answer, the reason it is none, or None when the end
    was never reached. `header` looks up one response header, the lines of a repeated one joined by ", ". `aliases`
    names the models an upstream may answer with for a model asked.
    """
    if (reason := _request_or_head_against(query, status, header)) is not None:
        return reason
    if answer is None:
        return "truncated"
    if isinstance(answer, str):
        return answer
    if size_bytes > rules.answer_limit_bytes:
        return "too_large"
    if ttl_s(query.eligibility, query.controls, rules) <= 0:
        return "ttl_zero"
    if (reason := _answer_against(answer, rules)) is not None:
        return reason
    if _fills(answer, query.output_limit):
        return "finish_length"
    if query.wants_json and not answer.calls and not _is_json(answer.message.get("content")):
        return "invalid_json"
    if not query.is_placed and not _is_model(query.model, answer.model, (aliases or {}).get(query.model, ())):
        return "model_mismatch"
    return None


def storable_vectors(
    model: str,
    query: Query,
    rules: Rules,
    *,
    status: int,
    row_bytes: int,
    header: Callable[[str], str | None],
    aliases: Mapping[str, Collection[str]] | None = None,
) -> str | None:
    """None when the rows of an embedding answer may be kept, else the reason why not.

    `model` is what answered, `row_bytes` the size of one of its equal rows.
    """
    if (reason := _request_or_head_against(query, status, header)) is not None:
        return reason
    if row_bytes > rules.answer_limit_bytes:
        return "too_large"
    if ttl_s(query.eligibility, query.controls, rules) <= 0:
        return "ttl_zero"
    if not query.is_placed and not _is_model(query.model, model, (aliases or {}).get(query.model, ())):
        return "model_mismatch"
    return None


def _request_or_head_against(query: Query, status: int, header: Callable[[str], str | None]) -> str | None:
    if query.eligibility.level is Level.NONE:
        return query.eligibility.reason or "bypass"
    if not query.controls.write:
        return "no_store"
    return "non_200" if status != 200 else _header_against(header)


def _header_against(header: Callable[[str], str | None]) -> str | None:
    """RFC 9111 §3. `no-cache` does not count: event streams carry it, and what it asks is kept by the key."""
    directives = {name.lower() for name in _DIRECTIVE.findall(header("cache-control") or "")}
    if "no-store" in directives:
        return "upstream_no_store"
    if "private" in directives:
        return "upstream_private"
    if any(name.strip() == "*" for name in (header("vary") or "").split(",")):
        return "vary"
    cookies = header("set-cookie")
    if cookies is not None:
        names = _COOKIE_NAME.findall(cookies)
        if not names or not all(_is_of_an_edge(name.lower()) for name in names):
            return "set_cookie"
    return None


def _is_of_an_edge(cookie: str) -> bool:
    return cookie in EDGE_COOKIES or cookie.startswith(EDGE_COOKIE_PREFIXES)


def _answer_against(answer: Answer, rules: Rules) -> str | None:
    message = answer.message
    calls = answer.calls
    if calls and not rules.cache_tool_calls:
        return "tool_calls"  # would repeat side effects
    if message.get("refusal"):
        return "refusal"
    if message.get("audio"):
        return "audio_output"
    if search.is_shown(answer):
        return "citations"  # of what was found
    if calls and answer.finish_reason in FINISHED | CALLED:
        return None if all([_is_readable(call) for call in calls]) else "tool_calls"
    if answer.finish_reason not in FINISHED:
        return _FINISHES.get(answer.finish_reason, "finish_other") if answer.finish_reason else "truncated"
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        return "empty"
    if _is_longer(content, rules.answer_limit_bytes):
        return "too_large"
    if not rules.cache_refusals and is_refusal(content):
        return "refusal"
    return None


def _fills(answer: Answer, output_limit: int | None) -> bool:
    """Whether an answer took all it was allowed and so may be cut: llama.cpp calls a cut Responses answer completed
    (measured 2026-11-28)."""
    return output_limit is not None and answer.usage is not None and answer.usage.output_tokens >= output_limit > 0


def _is_readable(function: Any) -> bool:
    return isinstance(function, dict) and _is_json(function.get("arguments") or "{}")


def _is_json(content: object) -> bool:
    try:
        json.loads(content if isinstance(content, str) else "")
    except (ValueError, RecursionError):
        return False
    return True


def _is_model(asked: str, answered: str, also: Collection[str]) -> bool:
    """Whether an answer's `model` is the one asked: itself, its dated snapshot, an alias, or not said. Of a server that
    was asked for whatever it has, any is."""
    if not asked or not answered or answered == asked or answered in also or "*" in also:
        return True
    wanted = _VARIANT.sub("", asked.rpartition("/")[2].lower().removesuffix("-latest"))
    given = answered.rpartition("/")[2].lower().removesuffix(":latest")
    return given == wanted or (given.startswith(wanted) and _SNAPSHOT.fullmatch(given[len(wanted) :]) is not None)


# -- what was spent ----------------------------------------------------------------------------------------------------

_BYTES_PER_TOKEN = 4  # of English JSON text
_BYTES_PER_CHUNK = 200  # of an event stream, which frames about one token an event


def estimate_usage(request_body: bytes, response_bytes: int, is_stream: bool, *, has_output: bool = True) -> Usage:
    """Token counts when an upstream reports none: an estimate by size, booked as such. Vectors are no tokens."""
    if not has_output:
        return Usage(len(request_body) // _BYTES_PER_TOKEN + 1, 0)
    per_token = _BYTES_PER_CHUNK if is_stream else _BYTES_PER_TOKEN
    return Usage(len(request_body) // _BYTES_PER_TOKEN + 1, response_bytes // per_token + 1)
