"""A replay goes out in whole events, and as its original came."""

from __future__ import annotations

import json
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.dialects.anthropic_replay import render_stream as render_anthropic
from proxy.core.dialects.openai_replay import render_stream as render_openai
from proxy.core.model import Answer, Usage
from proxy.core.pace import RUNS_MAX, ends_of, progress, runs_of, schedule, texts_of

PIECES = st.lists(st.tuples(st.integers(1, 500), st.floats(0, 3, width=32)), min_size=1, max_size=200)
SPOKEN = ["word", " a", "content", '"', "é<b>&", "\U0001f5fc", "\n\n", "a", "é\u2028"]
WORDS = st.lists(st.sampled_from(SPOKEN), min_size=3)


def came(pieces):
    """Pieces and arrival times of what is given as (bytes, seconds since the one before)."""
    return [b"x" * size for size, _ in pieces], list(accumulate(gap for _, gap in pieces))


def due(ends, pace, runs=(), tokens=0, done=None):
    """When each event goes out."""
    plan = schedule(ends, done or ends, pace, runs, tokens)
    return [next(at_s for end, at_s in plan if end >= own) for own in ends]


@given(pieces=PIECES, events=st.lists(st.integers(1, 300), min_size=1, max_size=300))
def test_every_byte_goes_out_once_in_order_and_the_first_event_at_once(pieces, events):
    bodies, times = came(pieces)
    runs = runs_of(bodies, times, [])
    ends = list(accumulate(events))
    assert len(runs) % 3 == 0
    assert len(runs) // 3 <= RUNS_MAX
    assert all(number >= 0 for number in runs)
    assert not runs or sum(runs[::3]) == sum(map(len, bodies))
    plan = schedule(ends, ends, "recorded", runs, 0)
    assert plan[0][1] == 0.0
    assert plan[-1][0] == ends[-1]
    assert {end for end, _ in plan} <= set(ends)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(plan))
    assert plan[-1][1] <= times[-1] - times[0] + 0.001


@given(st.lists(st.tuples(st.integers(50, 500), st.integers(1, 3000)), min_size=2, max_size=22))
def test_what_came_in_few_pieces_goes_out_at_their_times(pieces):
    bodies, times = came([(size, gap / 1000) for size, gap in pieces])
    told = due(list(accumulate(map(len, bodies))), "recorded", runs_of(bodies, times, []))
    allowed = 0.002 if times[-1] - times[0] >= 0.01 else 0.01
    assert told == pytest.approx([at - times[0] for at in times], abs=allowed)


@given(st.lists(st.tuples(st.just(70), st.floats(0.001, 0.5)), min_size=60, max_size=400))
def test_a_long_stream_is_never_off_by_more_than_a_step(pieces):
    bodies, times = came(pieces)
    told = due(list(accumulate(map(len, bodies))), "recorded", runs_of(bodies, times, []))
    step = (times[-1] - times[0]) / (RUNS_MAX // 2 - 1)
    assert max(abs(told_s - (at - times[0])) for told_s, at in zip(told, times, strict=True)) <= step + 0.002


def test_a_long_even_stream_is_even_again():
    bodies, times = came([(70, 0.02)] * 500)
    told = due([50 * i for i in range(1, 501)], "recorded", runs_of(bodies, times, []))
    assert told == pytest.approx([0.02 * i for i in range(500)], abs=0.002)


def test_what_came_together_goes_out_together_and_a_silence_is_kept():
    runs = runs_of([b"x" * 300, b"x" * 100], [5.0, 7.0], [])
    assert runs == (300, 0, 0, 100, 2000, 0)
    for ends in ([100, 200, 300, 400], [40, 80, 122, 160]):  # the same, and with ids of another length
        assert schedule(ends, ends, "recorded", runs, 0) == ((ends[2], 0.0), (ends[3], 2.0))


@pytest.mark.parametrize("times", [[1.0], [1.0, 1.0, 1.0], [1.0, 1.005, 1.009]])
def test_what_came_at_once_has_no_pace(times):
    assert runs_of([b"x" * 10] * len(times), times, []) == ()
    assert schedule([10, 20], [10, 20], "recorded", (), 9) == ((20, 0.0),)


@given(words=WORDS, after=st.integers(0, 1000), ascii_=st.booleans())
def test_a_silence_stays_before_its_word_in_every_dialect(words, after, ascii_):
    """Recorded with padding, pings and usage, which no replay has."""
    text = "".join(words)
    message = {"role": "assistant", "content": text}
    answer = Answer(message, "stop", "m", Usage(1, 2), None, pieces=tuple(map(len, words)))
    stop = 1 + after % (len(words) - 1)
    told = [f'data: {{"pad":"{"x" * 7 * i}","delta":{json.dumps(word, ensure_ascii=ascii_)}}}\n\n'.encode()
            for i, word in enumerate(words)]  # fmt: skip
    pieces = [b"event: ping\ndata: {}\n\n" * 9, b"".join(told[:stop]), b"".join(told[stop:]), b"data: usage\n\n" * 50]
    runs = runs_of(pieces, [0.0, 0.5, 5.0, 6.0], texts_of(text, answer.pieces))
    for template in (render_openai(answer, include_usage=False), render_anthropic(answer)):
        body = template.fill("0" * 32, 1)
        ends = ends_of(body, "text/event-stream")
        times = due(ends, "recorded", runs, done=progress(body, ends, texts_of(text, answer.pieces)))
        events = [body[start:end] for start, end in pairwise([0, *ends])]
        says = [b'{"content":"' in event or b"text_delta" in event for event in events]
        spoken = [at for at, is_text in zip(times, says, strict=True) if is_text]
        assert spoken == [0.5] * stop + [5.0] * (len(words) - stop)
        assert (times[0], times[-1]) == (0.0, 6.0)


def test_tokens_a_second_are_spread_over_the_events():
    ends = [10, 20, 30, 40, 50]
    assert schedule(ends, ends, 40.0, (), 80) == ((10, 0.0), (20, 0.5), (30, 1.0), (40, 1.5), (50, 2.0))
    assert schedule([10], [10], 40.0, (), 80) == ((10, 0.0),)
    assert schedule([10, 20, 30], [10, 20, 30], 10_000.0, (), 10) == ((20, 0.0), (30, 0.001))
    assert schedule([10, 20], [10, 20], "instant", (5, 0, 0, 5, 9, 0), 80) == ((20, 0.0),)


def test_progress_is_in_bytes_where_the_text_is_not_found():
    body = b'data: {"delta":"aa"}\n\ndata: {"delta":"bbb"}\n\n'
    ends = ends_of(body, "text/event-stream")
    assert progress(body, ends, ["aa", "bbb"]) == [2, 5]
    assert progress(body, ends, ["aa", "ccc"]) == [5, 5]
    assert progress(body, ends, ["ccc", "ddd"]) == progress(body, ends, ["aa", *"uvwxyz"]) == ends
    assert progress(body, ends, []) == ends
    assert texts_of("aabbb", (2, 0, 3)) == ["aa", "bbb"]
    assert texts_of("aabbb", (2, 2)) == texts_of(None, (1,)) == []


def test_events_end_at_their_blank_line_or_at_their_line():
    assert ends_of(b"data: 1\n\nevent: x\ndata: 2\n\n", "text/event-stream") == [9, 27]
    assert ends_of(b'{"a":1}\n{"b":2}\n', "application/x-ndjson") == [8, 16]
    assert ends_of(b"data: 1\n\nrest", "text/event-stream") == [9, 13]
