"""Events do not depend on how the network cut the stream."""

from __future__ import annotations

import json
from itertools import chain, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.errors import UpstreamError
from proxy.core.eventstream import LINE_LIMIT_BYTES, Event, EventDecoder, EventSplitter

TRANSCRIPTS = Path(__file__).parents[1] / "transcripts"
PATHS = sorted(TRANSCRIPTS.glob("*.sse"))


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
@given(data=st.data())
def test_chunk_boundaries_do_not_matter(path, data):
    raw = path.read_bytes()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=20)))
    decoder = EventDecoder()
    pieces = [decoder.feed(raw[a:b]) for a, b in pairwise([0, *cuts, len(raw)])]
    whole = EventDecoder()
    assert list(chain(*pieces)) == whole.feed(raw)
    assert decoder.end() == whole.end()
    assert decoder.names == whole.names


@given(
    lines=st.lists(st.sampled_from(["\n", "\r", "\r\n", "data: a", "data:b", ": c", "x", "event: e"])), data=st.data()
)
def test_line_ends_of_any_mixture_do_not_matter(lines, data):
    raw = "".join(lines).encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=20)))
    decoder, splitter = EventDecoder(), EventSplitter()
    slices = [raw[a:b] for a, b in pairwise([0, *cuts, len(raw)])]
    found = [*chain(*map(decoder.feed, slices)), *decoder.end()]
    whole = EventDecoder()
    assert found == [*whole.feed(raw), *whole.end()]
    assert b"".join([*chain(*map(splitter.feed, slices)), splitter.end()]) == raw


@given(
    events=st.lists(st.lists(st.text(st.characters(exclude_characters="\r\n", codec="utf-8")), min_size=1, max_size=3)),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
    space=st.sampled_from(["", " "]),
)
def test_what_was_written_is_read(events, line_end, space):
    """Data lines are joined by a line feed, one leading space is dropped, whatever ends the lines."""
    lines = [[f"data:{space or ' '}{line}" for line in event] for event in events]
    raw = "".join(line_end.join(event) + line_end * 2 for event in lines).encode()
    decoder = EventDecoder()
    assert [*decoder.feed(raw), *decoder.end()] == ["\n".join(event).encode() for event in events]


@pytest.mark.parametrize(
    ("raw", "events"),
    [
        (b"data: a\n\n", [b"a"]),
        (b"data:a\n\n", [b"a"]),
        (b"data:  a\n\n", [b" a"]),
        (b"data\n\n", [b""]),
        (b"data: \n\n", [b""]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b": comment\n\n", []),
        (b": ping\ndata: a\n\n", [b"a"]),
        (b"retry: 10\n\nid: 1\n\n", []),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [b"a"]),
        (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
        (b"data: a\n\r\ndata: b\r\n\n", [b"a", b"b"]),
        (b"data: a", []),
        (b"data: a\n", []),
        (b"data: [DONE]", [b"[DONE]"]),
        (b"\n\n\ndata: a\n\n\n\n", [b"a"]),
        (b"datax: a\n\n", []),
    ],
)
def test_lines_are_read_as_the_standard_says(raw, events):
    decoder = EventDecoder()
    assert [*decoder.feed(raw), *decoder.end()] == events


def test_names_are_kept():
    decoder = EventDecoder()
    raw = b"event: error\ndata: {}\n\ndata: 1\n\n"
    assert decoder.feed_named(raw) == [Event(b"error", b"{}"), Event(b"", b"1")]
    assert decoder.feed(raw) == [b"{}", b"1"]
    assert decoder.names == {b"error"}


@pytest.mark.parametrize("size", [1000, 65536, 3 * LINE_LIMIT_BYTES])
def test_an_event_over_the_limit_is_not_read(size):
    decoder = EventDecoder()
    line = b"data: " + b"x" * (LINE_LIMIT_BYTES - 5)
    *most, last = (line[start : start + size] for start in range(0, len(line), size))
    assert not any(map(decoder.feed, most))
    with pytest.raises(UpstreamError) as caught:
        decoder.feed(last)
    assert caught.value.code == "upstream_protocol_error"


def test_an_event_at_the_limit_is_read():
    line = b"data: " + b"x" * (LINE_LIMIT_BYTES - 8)
    assert EventDecoder().feed(line + b"\n\n") == [line[6:]]
    assert EventDecoder().feed(line + b"\n\n" + line + b"\n\n") == [line[6:], line[6:]]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_transcripts_hold_what_their_names_say(path):
    decoder = EventDecoder()
    datas = [*decoder.feed(path.read_bytes()), *decoder.end()]
    ends_in_done = path.stem not in ("without_done", "cut_mid_event", "error_mid_stream", "after_done")
    assert (datas[-1] == b"[DONE]") is ends_in_done
    if path.stem != "garbage":
        assert all(isinstance(json.loads(d), dict) for d in datas if d != b"[DONE]")
