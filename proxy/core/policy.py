"""The built-in policy, readable aloud: what may be looked up, served and stored, and why not.

Rules someone may disagree with live here and nowhere else. Every refusal has one machine-readable reason; it reaches
the Cache-Status header, the log, the metric and the ledger row.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import date
from typing import NamedTuple

from proxy.core.facts import Facts
from proxy.core.model import (
    Answer,
    Candidate,
    Controls,
    Eligibility,
    Judgement,
    Level,
    Miss,
    NearMiss,
    Query,
    Rules,
    Usage,
)
from proxy.core.words import READ_LIMIT_CHARS, Reading, read_prompt

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
    if facts.web_search:
        yield "web_search"  # freezes data
    if facts.tool_results:
        yield "tool_results"  # would repeat side effects
    if facts.remote_urls:
        yield "remote_urls"  # what is behind an address may change
    if facts.has_tools and not rules.cache_tools:
        yield "tools"
    if facts.seed is not None and not rules.cache_seeded:
        yield "seed"  # a given sample was asked for
    if facts.prompt is not None and _is_longer(facts.prompt, rules.prompt_limit_bytes):
        yield "prompt_too_large"


def _limiting(facts: Facts, controls: Controls, rules: Rules, reading: Reading | None) -> Iterator[str]:
    """Reasons against semantic matching; what is left is found by its exact identity only."""
    if not rules.semantic:
        yield "semantic_off"
    if controls.exact_only:
        yield "exact_only"
    if _is_sampled(facts, rules):
        yield "temperature"
    if facts.seed is not None:
        yield "seed"
    if facts.has_tools:
        yield "tools"
    if facts.has_images:
        yield "images"
    if facts.has_audio:
        yield "audio"
    if facts.has_files:
        yield "files"
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

KNOTS = (
    (-1.0, 0.0),
    (0.50, 0.20),
    (0.80, 0.88),  # QQP: 12.3 % wrong by labels among hits at .80 and above
    (0.90, 0.97),  # QQP: 6.6 % by labels, of which most are the same question on reading; banking77 2.4 %
    (0.95, 0.99),  # QQP, 596 hits read: 0.7 % clearly wrong, 0.8 % with borderline
    (0.97, 0.995),  # 366 hits: 0.3 %, 0.5 %
    (0.985, 0.9975),  # .98, 232 hits: none seen; the rule of three allows 1.3 %
    (1.00, 0.9995),  # the same vector is not the same text
)
"""similarity → probability that one answer serves both texts, straight lines between.

Measured 2026-11 with all-MiniLM-L6-v2 without guards, as shares of all hits at or above a similarity: at the bound
itself the true rate is higher, and on slot-filling traffic (ATIS: 54 % at .95) much higher, which is what the vetoes
are for. No constant is right for two workloads; a calibrated judge replaces this curve behind `judge`.
"""

_KNOT_SIMILARITIES = [similarity for similarity, _ in KNOTS]
_ROUNDING = 1e-4  # an inner product of float32 unit vectors may exceed 1 by less
_EPSILON = 1e-12


def error_bound(rules: Rules, controls: Controls) -> float:
    """The share of wrong hits that is accepted; a client may only tighten it."""
    if controls.max_error is None:
        return rules.max_error_rate
    return min(rules.max_error_rate, controls.max_error)


def probability_of(similarity: float) -> float:
    """KNOTS, interpolated: monotone on -1...1, 0 for anything a similarity cannot be."""
    if not -1.0 <= similarity <= 1.0 + _ROUNDING:
        return 0.0
    right = bisect_right(_KNOT_SIMILARITIES, similarity)
    if right >= len(KNOTS):
        return KNOTS[-1][1]
    (x0, y0), (x1, y1) = KNOTS[right - 1], KNOTS[right]
    return y0 + (y1 - y0) * (similarity - x0) / (x1 - x0)


def judge(
    similarity: float, vetoes: int, rules: Rules, controls: Controls, veto_names: Sequence[str] = GUARDS
) -> Judgement:
    """Features in, probability and reason out. Reasons: "alike", "below_bound", "bad_similarity", or a guard's name."""
    if vetoes:
        lowest = (vetoes & -vetoes).bit_length() - 1
        return Judgement(0.0, veto_names[lowest] if lowest < len(veto_names) else "veto", False)
    probability = probability_of(similarity)
    if probability == 0.0:
        return Judgement(0.0, "bad_similarity", False)
    serves = probability + _EPSILON >= 1.0 - error_bound(rules, controls)
    return Judgement(probability, "alike" if serves else "below_bound", serves)


class Choice(NamedTuple):
    """The candidate to serve, once its row has passed the gate."""

    candidate: Candidate
    judgement: Judgement

    @property
    def entry_id(self) -> int:
        return self.candidate.entry_id

    @property
    def similarity(self) -> float:
        return self.candidate.similarity

    @property
    def probability(self) -> float:
        return self.judgement.probability


def choose(
    candidates: Sequence[Candidate], rules: Rules, controls: Controls, veto_names: Sequence[str] = GUARDS
) -> Choice | NearMiss | Miss:
    """The most similar candidate that passes; a vetoed best one does not hide a good second.

    NearMiss tells of the most similar one when none passes and it reaches `near_floor`.
    """
    ordered = sorted(
        (candidate for candidate in candidates if math.isfinite(candidate.similarity)), key=lambda c: -c.similarity
    )
    best: tuple[Candidate, Judgement] | None = None
    for candidate in ordered:
        judgement = judge(candidate.similarity, candidate.vetoes, rules, controls, veto_names)
        if judgement.serves:
            return Choice(candidate, judgement)
        if best is None:
            best = candidate, judgement
    if best is None:
        return Miss("no_candidate")
    candidate, judgement = best
    if candidate.similarity < rules.near_floor:
        return Miss("nothing_alike")
    return NearMiss(candidate.entry_id, candidate.similarity, judgement.probability, judgement.reason)


# -- what may be stored ------------------------------------------------------------------------------------------------

FINISHED = frozenset({"stop", "end_turn", "stop_sequence"})
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
    {"__cf_bm", "_cfuvid", "__cflb", "__cfruid", "awsalb", "awsalbcors", "awsalbtg", "awsalbtgcors", "arraffinity",
     "arraffinitysamesite"}
)  # fmt: skip
"""Set by a network edge on every response to tell connections apart (api.openai.com does), not by who answers.

They say nothing about the answer, so they do not keep it from being stored; no cookie is ever stored or replayed.
"""
_COOKIE_NAME = re.compile(r"(?:^|,\s*|\n\s*)([!#$%&'*+\-.^_`|~0-9A-Za-z]+)=")
_DIRECTIVE = re.compile(r'([A-Za-z-]+)(?:\s*=\s*(?:"(?:[^"\\]|\\.)*"|[^\s,"]*))?')
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
    if query.eligibility.level is Level.NONE:
        return query.eligibility.reason or "bypass"
    if not query.controls.write:
        return "no_store"
    if status != 200:
        return "non_200"
    if (reason := _header_against(header)) is not None:
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
    if query.wants_json and not _is_json(answer.message.get("content")):
        return "invalid_json"
    if not _is_model(query.model, answer.model, (aliases or {}).get(query.model, ())):
        return "model_mismatch"
    return None


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
        if not names or not all(name.lower() in EDGE_COOKIES for name in names):
            return "set_cookie"
    return None


def _answer_against(answer: Answer, rules: Rules) -> str | None:
    message = answer.message
    if message.get("tool_calls") or message.get("function_call"):
        return "tool_calls"
    if message.get("refusal"):
        return "refusal"
    if message.get("audio"):
        return "audio_output"
    if answer.finish_reason not in FINISHED:
        return _FINISHES.get(answer.finish_reason, "finish_other") if answer.finish_reason else "truncated"
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        return "empty"
    if _is_longer(content, rules.answer_limit_bytes):
        return "too_large"
    return None


def _is_json(content: object) -> bool:
    try:
        json.loads(content if isinstance(content, str) else "")
    except (ValueError, RecursionError):
        return False
    return True


def _is_model(asked: str, answered: str, also: Collection[str]) -> bool:
    """Whether an answer's `model` is the one asked: itself, its dated snapshot, an alias, or not said."""
    if not answered or answered == asked or answered in also or "*" in also:
        return True
    wanted = asked.rpartition("/")[2].lower().removesuffix("-latest")
    given = answered.rpartition("/")[2].lower()
    return given == wanted or (given.startswith(wanted) and _SNAPSHOT.fullmatch(given[len(wanted) :]) is not None)


# -- what was spent ----------------------------------------------------------------------------------------------------

_BYTES_PER_TOKEN = 4  # of English JSON text
_BYTES_PER_CHUNK = 200  # of an event stream, which frames about one token an event


def estimate_usage(request_body: bytes, response_bytes: int, is_stream: bool) -> Usage:
    """Token counts when an upstream reports none: an estimate by size, booked as such."""
    per_token = _BYTES_PER_CHUNK if is_stream else _BYTES_PER_TOKEN
    return Usage(len(request_body) // _BYTES_PER_TOKEN + 1, response_bytes // per_token + 1)
