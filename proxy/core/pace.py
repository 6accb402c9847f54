"""When the events of a replayed stream go out: as they came, so many tokens a second, or all at once.

How a stream came is kept as runs, three integers each: progress, ms of silence before the run, ms from its first piece
to its last. Progress is counted in characters of the text, wherever they stand in the bytes, so that a replay in
another dialect, with other ids and without usage, is at the same word at the same time; where the text cannot be found
it is counted in bytes. An event belongs to the run in which its middle came; those of one run are evenly spread.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from heapq import nlargest
from itertools import accumulate, pairwise
from json.encoder import encode_basestring, encode_basestring_ascii
from typing import Literal

Pace = Literal["instant", "recorded"] | float
"""How fast a streamed hit goes out; a number is tokens a second."""

Schedule = tuple[tuple[int, float], ...]
"""Where to cut a body, and when to write what ends there, in seconds since the first."""

TOKENS_PER_S = (1.0, 10_000.0)
RUNS_MAX = 48
TOGETHER_S = 0.001  # what is due within it goes out in one piece
AT_ONCE_S = 0.01  # a stream as short has no pace
SEEN_FROM_S = 0.1  # nor one that anybody would see: reading it off costs a quarter of a millisecond
SCANS_MAX = 16  # of a body's rest, for a text that is not there as it is spelled; then it is counted in bytes


def runs_of(pieces: Sequence[bytes], arrived_s: Sequence[float], texts: Sequence[str]) -> tuple[int, ...]:
    """How a body came, of which pieces[i] came at arrived_s[i]; () when it came at once. `texts`: see `progress`.

    About RUNS_MAX runs at most: cut at the longest silences, which are seen, and at even steps of time, so that no run
    hides a change of pace for longer than a step; and where the text begins and ends.
    """
    if len(pieces) < 2 or arrived_s[-1] - arrived_s[0] < AT_ONCE_S:
        return ()
    begun, ended, half = arrived_s[0], arrived_s[-1], RUNS_MAX // 2 - 1
    done = progress(b"".join(pieces), list(accumulate(map(len, pieces))), texts)
    gaps = [later - earlier for earlier, later in pairwise(arrived_s)]
    cuts = {at + 1 for at in nlargest(half, range(len(gaps)), key=gaps.__getitem__) if gaps[at] >= TOGETHER_S}
    cuts |= {bisect_right(arrived_s, begun + (ended - begun) * step / half) for step in range(1, half)}
    cuts |= {bisect_right(done, 0), bisect_right(done, done[-1] - 1) + 1}
    ms = [round((at - begun) * 1e3) for at in arrived_s]
    runs: list[int] = []
    before = 0
    for start, end in pairwise([0, *sorted(cuts - {0, len(ms), len(ms) + 1}), len(ms)]):
        runs += (done[end - 1] - (done[start - 1] if start else 0), ms[start] - before, ms[end - 1] - ms[start])
        before = ms[end - 1]
    return tuple(runs)


def has_pace(arrived_s: Sequence[float]) -> bool:
    """Whether a body that came at these times has a pace worth keeping."""
    return len(arrived_s) > 1 and arrived_s[-1] - arrived_s[0] >= SEEN_FROM_S


def texts_of(content: object, lengths: Sequence[int]) -> list[str]:
    """The pieces in which a text was streamed, none empty; nothing where that is not known."""
    if not isinstance(content, str) or sum(lengths) != len(content):
        return []
    ends = accumulate(lengths)
    return [content[end - length : end] for end, length in zip(ends, lengths, strict=True) if length]


def progress(body: bytes, ends: Sequence[int], texts: Sequence[str]) -> Sequence[int]:
    """How far the body is at each of these places: characters of the texts, found in it one after the other as JSON
    strings, else bytes."""
    places: list[int] = []  # where each text has ended
    spellings = [_raw, _ascii, _as_go, _as_ours]  # the one found last is tried first
    at = scans = 0
    for text in texts:
        for spell in spellings:
            if (found := _end_of(spell(text), body, at)) > 0:
                at = found
                if spell is not spellings[0]:
                    spellings.remove(spell)
                    spellings.insert(0, spell)
                break
            scans += 1
            if scans > SCANS_MAX:
                return ends
        places.append(at)
    if not at:
        return ends
    known = [0, *accumulate(map(len, texts))]
    return [known[bisect_right(places, end)] for end in ends]


def _end_of(spelled: bytes, body: bytes, start: int) -> int:
    """Where this string has ended in the body, a member's name not counted; 0 when it is not there."""
    while (found := body.find(spelled, start)) >= 0:
        start = found + len(spelled)
        if not body.startswith(b":", start):
            return start
    return 0


def _raw(text: str) -> bytes:
    """A JSON string as most write it."""
    return encode_basestring(text).encode("utf-8", "replace")


def _ascii(text: str) -> bytes:
    return encode_basestring_ascii(text).encode()


def _as_go(text: str) -> bytes:
    return _as_ours(text).replace(b"<", b"\\u003c").replace(b">", b"\\u003e").replace(b"&", b"\\u0026")


def _as_ours(text: str) -> bytes:
    """Ends of lines to some clients are escaped, see `openai_replay.escaped`."""
    raw = encode_basestring(text)
    for mark in "\x85\u2028\u2029":
        raw = raw.replace(mark, f"\\u{ord(mark):04x}")
    return raw.encode("utf-8", "replace")


def schedule(ends: Sequence[int], done: Sequence[int], pace: Pace, runs: Sequence[int], tokens: int) -> Schedule:
    """When each event goes out that ends at ends[i], with done[i] of the progress made; the first at once. One moment
    for all when there is no pace."""
    if pace == "recorded" and runs:
        times = _as_it_came(done, runs)
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


def _as_it_came(done: Sequence[int], runs: Sequence[int]) -> list[float]:
    """Seconds for each event. What is before all text goes out with the first run, what is after it with the last."""
    until = list(accumulate(runs[::3]))
    last_ms = list(accumulate(a + b for a, b in zip(runs[1::3], runs[2::3], strict=True)))
    scale = until[-1] / done[-1]
    times_ms = [0.0] * len(done)
    members: dict[int, list[int]] = {}
    for i, (start, end) in enumerate(pairwise([0, *done])):
        if end > start:
            members.setdefault(_run_of((start + end) / 2 * scale, until), []).append(i)
        elif start == done[-1]:
            times_ms[i] = last_ms[-1]
    for run, events in members.items():
        spread_ms, steps = runs[3 * run + 2], len(events) - 1
        for j, i in enumerate(events):
            times_ms[i] = last_ms[run] - (spread_ms * (1 - j / steps) if steps else 0.0)
    times_ms[0] = 0.0
    return [ms / 1e3 for ms in accumulate(times_ms, max)]


def _run_of(middle: float, until: Sequence[int]) -> int:
    return min(bisect_right(until, middle - 1e-9), len(until) - 1)


def ends_of(body: bytes, stream_type: str) -> list[int]:
    """Where the events of a stream end that ibid wrote: at a blank line, or where each line is one, at its end."""
    mark = b"\n\n" if stream_type == "text/event-stream" else b"\n"
    ends = []
    at = body.find(mark)
    while at >= 0:
        ends.append(at + len(mark))
        at = body.find(mark, ends[-1])
    return ends if ends and ends[-1] == len(body) else [*ends, len(body)]
