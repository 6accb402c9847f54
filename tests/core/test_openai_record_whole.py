"""A recording of a whole body says the same as one of its pieces, whatever stands between the usual chunks."""

import json

from hypothesis import given
from hypothesis import strategies as st

from proxy.core.dialects.openai_filter import UsageFilter
from proxy.core.dialects.openai_record import Recorder, record

TEXTS = st.text(max_size=8) | st.sampled_from(
    ['"', "\\", "a\nb", 'x"},"finish_reason":null}]}\n\ndata: {', "\u2028", "😀", ""]
)


def chunk(delta: dict[str, object], finish: str | None = None, **more: object) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    body = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice], **more}
    return b"data: " + json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


ODD = st.sampled_from(
    [
        b": comment\n\n",
        chunk({"reasoning_content": "hm"}),
        chunk({"content": "with role", "role": "assistant"}),
        chunk({"content": "padded"}, obfuscation="xyz"),
        b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n',
    ]
)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    events = [chunk({"role": "assistant", "content": ""})]
    for item in draw(st.lists(TEXTS.map(lambda text: chunk({"content": text})) | ODD, max_size=12)):
        events.append(item)
    events.append(chunk({}, "stop"))
    if draw(st.booleans()):
        events.append(b"data: [DONE]\n\n")
    body = b"".join(events)
    return body[: draw(st.integers(0, len(body)))] if draw(st.integers(0, 4)) == 0 else body


@given(streams())
def test_whole_and_event_by_event_agree(body: bytes) -> None:
    by_event = Recorder()
    by_event.feed(body)
    found = record(body, is_stream=True)
    assert (found.answer or found.refusal_reason) == by_event.finish()


@given(streams(), st.booleans())
def test_the_filter_gives_the_same_bytes_for_one_chunk_as_for_many(body: bytes, strip: bool) -> None:
    whole, small = UsageFilter(strip), UsageFilter(strip)
    at_once = whole.feed(body) + whole.end()
    in_pieces = b"".join(small.feed(body[i : i + 7]) for i in range(0, len(body), 7)) + small.end()
    assert at_once == in_pieces
    assert (whole.complete, whole.failed) == (small.complete, small.failed)
