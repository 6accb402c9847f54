"""When an upstream failed: how that shows, when it may be asked again, and what can be asked of another.

Nothing here is done on its own: a policy says what moves (`on_error`, `on_rate_limit`), and in which order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from typing import Final

from proxy.core import search
from proxy.core.facts import Facts

LIMITED: Final = 429
FAILED: Final = frozenset({LIMITED, 500, 502, 503, 504, 529})
"""Answers of an upstream after which something else may stand in (RFC 5861 §4; 429 and 529 are its overload)."""
UNDONE: Final = frozenset({LIMITED, 503, 529})
"""Refused before anything was done for it: asking again repeats nothing."""
FIRST_PAUSE_S: Final = 0.25
LONGEST_PAUSE_S: Final = 8.0

_ERROR_FIRST: Final = re.compile(
    rb'\s*(?:event:\s*error\s|(?:data:\s*)?\{\s*"error"\s*:\s*[{"]|(?:data:\s*)?\{\s*"type"\s*:\s*"error")'
)
_CODE: Final = re.compile(rb'"(?:code|status|status_code)"\s*:\s*"?([1-5][0-9]{2})\b')
_OVERLOADED: Final = re.compile(rb"overloaded|unavailable", re.IGNORECASE)
_LIMITED: Final = re.compile(rb"rate.?limit|too many requests|resource_exhausted", re.IGNORECASE)
_SECONDS: Final = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")
_KEPT_THERE: Final = re.compile(
    rb'(?<!\\)"(?:api_?key|file_ids?|vector_store_ids?|container(?:_id)?|fileUri|file_uri|cachedContent|cached_content'
    rb'|previous_response_id|conversation|assistant_id|thread_id|item_reference)"\s*[:,}](?!\s*null)'
    rb'|(?<!\\)"prompt"\s*:\s*\{'
)
"""Members of a body, or types, that name what the provider keeps (a file, a search store, an earlier answer) or open
it."""


def error_in(start: bytes) -> int | None:
    """The status that the first bytes of a 200 should have had: some servers begin the answer before they know that
    there is none. None when they are no error."""
    if _ERROR_FIRST.match(start) is None:
        return None
    if (told := _CODE.search(start)) is not None:
        return int(told[1])
    if _LIMITED.search(start) is not None:
        return LIMITED
    return 529 if _OVERLOADED.search(start) is not None else 500


def retry_after_s(header: Callable[[str], str | None], now_s: float) -> float | None:
    """How long the upstream wants to be left alone, from `now_s` (Unix time); None when it does not say, or not in a
    way that can be read (RFC 9110 §10.2.3, and OpenAI's `retry-after-ms`)."""
    if (ms := _number(header("retry-after-ms"))) is not None:
        return ms / 1000
    told = header("retry-after")
    if told is None:
        return None
    if (seconds := _number(told)) is not None:
        return seconds
    try:
        moment = parsedate_to_datetime(told)
    except ValueError:
        return None
    return max(0.0, (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now_s)


def _number(text: str | None) -> float | None:
    return float(text) if text is not None and _SECONDS.fullmatch(text.strip()) else None


def pause_s(tried: int, told_s: float | None, chance: float) -> float:
    """Before asking again: what the upstream told, else twice as long each time. `chance`, 0 to 1, spreads those who
    failed together."""
    usual_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**tried) * (0.5 + chance / 2)
    return usual_s if told_s is None else told_s + chance * FIRST_PAUSE_S / 2


def may_repeat(facts: Facts, status: int, *, was_sent: bool) -> bool:
    """Whether asking again cannot do twice what should be done once. `status`: 0 when no answer came."""
    return not was_sent or status in UNDONE or not acts_there(facts)


def acts_there(facts: Facts) -> bool:
    """Whether the provider does more for a request than answer it: tools that it runs, work behind the answer."""
    return facts.background or search.is_offered(facts.settings.get("tools")) or "mcp_servers" in facts.settings


def may_move(facts: Facts, body: bytes) -> bool:
    """Whether another server can be asked the same: nothing in it stands for what the first one keeps or is a key to
    it, no tool is to run there, and the answer is not to be kept there under its id. Vectors never move: two models'
    have nothing in common."""
    if facts.inputs or facts.previous_response or facts.keeps_id or facts.store or acts_there(facts):
        return False
    return _KEPT_THERE.search(body) is None


def named_there(model: str, names: Sequence[str]) -> str | None:
    """What another server calls a model: by the first of `asked=own` that fits (`*` and `?` in `asked`, `*` as `own`
    for the same name). Without names all are called the same; None: it stands in for no such model."""
    if not names:
        return model
    for asked, _, own in (name.rpartition("=") for name in names):
        if fnmatchcase(model, asked):
            return model if own == "*" else own
    return None
