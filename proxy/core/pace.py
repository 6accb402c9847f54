"""When the events of a replayed stream go out: as they came, so many tokens a second, or all at once.

How a stream came is kept as runs of pieces, three integers each: bytes, ms of silence before the run, ms from its first
piece to its last. A replay is cut otherwise than the original (ids, usage, another dialect), so an event goes out when
the byte at the same share of the original came, counted at the event's middle: then a few bytes more or less before it
do not move it across a silence.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from heapq import nlargest
from itertools import pairwise
from typing import Literal

Pace = Literal["instant", "recorded"] | float
"""How fast a streamed hit goes out; a number is tokens a second."""

Schedule = tuple[tuple[int, float], ...]
"""Where to cut a body, and when to write what ends there, in seconds since the first."""

TOKENS_PER_S = (1.0, 10_000.0)
RUNS_MAX = 48
TOGETHER_S = 0.001  # what is due within it goes out in one piece


def runs_of(sizes: Sequence[int], arrived_s: Sequence[float]) -> tuple[int, ...]:
    """How a body came, of which piece i had sizes[i] bytes and came at arrived_s[i]; () when it came at once.

    At most RUNS_MAX runs: cut at the longest silences, which are seen, and at even steps of time, so that no run hides
    a change of pace for longer than a step.
    """
    if len(sizes) < 2:
        return ()
    begun, ended = arrived_s[0], arrived_s[-1]
    gaps = [later - earlier for earlier, later in pairwise(arrived_s)]
    half = RUNS_MAX // 2
    cuts = {at + 1 for at in nlargest(half, range(len(gaps)), key=gaps.__getitem__) if gaps[at] >= TOGETHER_S}
    cuts |= {bisect_right(arrived_s, begun + (ended - begun) * step / half) for step in range(1, half)}
    ms = [round((at - begun) * 1e3) for at in arrived_s]
    runs: list[int] = []
    before = 0
    for start, end in pairwise([0, *sorted(cuts - {0, len(sizes)}), len(sizes)]):
        runs += (sum(sizes[start:end]), ms[start] - before, ms[end - 1] - ms[start])
        before = ms[end - 1]
    return tuple(runs) if before else ()


def schedule(ends: Sequence[int], pace: Pace, runs: Sequence[int], tokens: int) -> Schedule:
    """When each event goes out that ends at ends[i]; the first at once, and a single one when there is no pace."""
    if pace == "recorded" and runs:
        times = _as_it_came(ends, runs)
    elif isinstance(pace, float) and len(ends) > 1:
        times = [tokens / pace * i / (len(ends) - 1) for i in range(len(ends))]
    else:
        return ((ends[-1], 0.0),)
    due: list[tuple[int, float]] = []
    for end, at_s in zip(ends, times, strict=True):
        if due and at_s - due[-1][1] < TOGETHER_S:
            due[-1] = (end, due[-1][1])
        else:
            due.append((end, at_s))
    return tuple(due)


def _as_it_came(ends: Sequence[int], runs: Sequence[int]) -> list[float]:
    scale = sum(runs[::3]) / ends[-1]
    begin, size, first_ms, spread_ms = 0, runs[0], 0, runs[2]
    following = zip(runs[3::3], runs[4::3], runs[5::3], strict=True)
    times = [0.0]
    for start, end in pairwise(ends):
        middle = (start + end) / 2 * scale
        while middle > begin + size and (run := next(following, None)) is not None:
            begin += size
            first_ms += spread_ms + run[1]
            size, _, spread_ms = run
        times.append((first_ms + spread_ms * min(1.0, (middle - begin) / size)) / 1e3)
    return times


def ends_of(body: bytes, stream_type: str) -> list[int]:
    """Where the events of a stream end that ibid wrote: at a blank line, or where each line is one, at its end."""
    mark = b"\n\n" if stream_type == "text/event-stream" else b"\n"
    ends = []
    at = body.find(mark)
    while at >= 0:
        ends.append(at + len(mark))
        at = body.find(mark, ends[-1])
    return ends if ends and ends[-1] == len(body) else [*ends, len(body)]
