"""Age and lifetime of an entry, after RFC 9111 §4.2. Times are milliseconds since the epoch, `now` is an argument.

A wall clock may step. Going forward an entry merely expires early. Going back, its age is never negative and its
lifetime never longer than it was; an entry from further ahead than `SKEW_MS` has no age we could state and is not
fresh. `steady_ms` keeps a process from ever seeing the step back.
"""

from __future__ import annotations

from typing import NamedTuple

SKEW_MS = 5_000  # what clocks of two machines may differ by


class Anchor(NamedTuple):
    """A moment on both clocks."""

    now_ms: int
    monotonic_ms: int


def steady_ms(anchor: Anchor, wall_ms: int, monotonic_ms: int) -> int:
    """Now, never earlier than the anchor plus the time that really passed: a clock stepped back extends nothing."""
    return max(wall_ms, anchor.now_ms + max(0, monotonic_ms - anchor.monotonic_ms))


def age_s(created_ms: int, now_ms: int) -> int:
    """Whole seconds for the `Age` header, never negative (RFC 9111 §5.1)."""
    return max(0, now_ms - created_ms) // 1000


def remaining_s(created_ms: int, expires_ms: int, now_ms: int) -> int:
    """Seconds of freshness left, never more than the entry was given; negative once stale (RFC 9211 §2.3)."""
    left_ms = min(expires_ms - now_ms, expires_ms - created_ms)
    return left_ms // 1000


def is_fresh(created_ms: int, expires_ms: int, now_ms: int, max_age_s: float | None = None) -> bool:
    """Within its lifetime, and not older than the client's `max-age`. At `expires_ms` itself it is stale."""
    if not created_ms - SKEW_MS <= now_ms < expires_ms or expires_ms <= created_ms:
        return False
    return max_age_s is None or max(0, now_ms - created_ms) <= max_age_s * 1000


def may_serve_stale(
    created_ms: int, expires_ms: int, now_ms: int, max_stale_s: float | None, max_age_s: float | None = None
) -> bool:
    """Expired by no more than the client's `max-stale` (RFC 9111 §5.2.1.2). Without one, never."""
    if max_stale_s is None or now_ms < expires_ms or now_ms < created_ms - SKEW_MS:
        return False
    if max_age_s is not None and max(0, now_ms - created_ms) > max_age_s * 1000:
        return False
    return now_ms - expires_ms <= max_stale_s * 1000
