"""Batches as values: lines, forms and bodies in any cut, objects as the SDKs read them."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from anthropic.types.messages import MessageBatch
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Batch as OpenAIBatch
from openai.types import FileObject

from proxy.core.batches import (
    ENDPOINTS,
    BatchFile,
    Job,
    Line,
    LineFault,
    Place,
    anthropic_loss,
    anthropic_result,
    batch_object,
    file_object,
    is_own,
    message_batch,
    openai_loss,
    openai_result,
    place_of,
    read_create,
    read_openai_line,
    read_reply,
    read_requests_item,
    spell_reply,
)
from proxy.core.directives import deadline_s_of
from proxy.core.errors import BadRequest
from proxy.core.jsonitems import Items
from proxy.core.multipart import Form, boundary_of

OWN = "batch_ibid" + "0" * 24


def cut(raw: bytes, places: set[int]) -> list[bytes]:
    ends = sorted(places | {0, len(raw)})
    return [raw[a:b] for a, b in pairwise(ends)]


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/v1/files", Place("files")),
        ("/files", Place("files")),
        ("/v1/v1/files/f-1", Place("files", "f-1")),
        ("/openai/v1/files/f-1/content", Place("files", "f-1", "content")),
        ("/v1/batches", Place("batches")),
        ("/v1/batches/", Place("batches")),
        ("/v1/batches/b/cancel", Place("batches", "b", "cancel")),
        ("/messages/batches", Place("messages/batches")),
        ("/v1/messages/batches/m/results", Place("messages/batches", "m", "results")),
        ("/v1/deferred/d", Place("deferred", "d")),
        ("/v1/batches/b/content", None),
        ("/v1/files/f/cancel", None),
        ("/v1/messages", None),
        ("/v1/files/f/content/more", None),
        ("/v2/files", None),
        ("/v1/fine_tuning/files", None),
    ],
)
def test_a_path_has_a_place_in_the_batch_api(path: str, place: Place | None) -> None:
    assert place_of(path) == place


def test_an_id_of_ours_is_known_by_its_spelling() -> None:
    assert is_own(OWN)
    assert is_own("file-ibid" + "a" * 24)
    assert not any(is_own(name) for name in ("batch_abc", "file-ibid", OWN + "0", OWN.upper(), "ibid" + "0" * 24))


# -- lines -------------------------------------------------------------------------------------------------------------


def test_a_lines_body_is_its_very_bytes() -> None:
    raw = b'{"custom_id":"a","method":"POST","url":"/v1/embeddings","body": {"seed": 1e400, "x":"\\u00e9"} }'
    raw = raw.replace(b"1e400", b"1.50")
    line = read_openai_line(raw, "/v1/embeddings", json.loads)
    assert line == Line("a", b'{"seed": 1.50, "x":"\\u00e9"}')


@pytest.mark.parametrize("raw", [b"", b"nonsense", b"[]", b'"x"', b"{}", b'{"custom_id": 5}', b"\xff"])
def test_what_is_no_line_is_a_fault_and_never_an_exception(raw: bytes) -> None:
    found = read_openai_line(raw, ENDPOINTS[0], json.loads)
    assert isinstance(found, LineFault)
    assert found.shown(3)["line"] == 3


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(raw: bytes) -> None:
    assert isinstance(read_openai_line(raw, ENDPOINTS[0], json.loads), Line | LineFault)


@pytest.mark.parametrize(
    ("item", "param"),
    [
        (b"nonsense", "requests.7"),
        (b"[]", "requests.7"),
        (b"{}", "requests.7.custom_id"),
        (b'{"custom_id": ""}', "requests.7.custom_id"),
        (b'{"custom_id": "' + b"x" * 65 + b'"}', "requests.7.custom_id"),
        (b'{"custom_id": "a"}', "requests.7.params"),
        (b'{"custom_id": "a", "params": 3}', "requests.7.params"),
        (b'{"custom_id": "a", "params": {"stream": true}}', "requests.7.params.stream"),
    ],
)
def test_a_request_that_cannot_be_read_names_its_place(item: bytes, param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read_requests_item(item, 7, json.loads)
    assert refused.value.param == param


# -- create ------------------------------------------------------------------------------------------------------------

ASKED = {"input_file_id": "f", "endpoint": "/v1/responses", "completion_window": "24h"}


def test_what_a_batch_asks_for_is_read() -> None:
    body = {**ASKED, "metadata": {"a": "b"}, "output_expires_after": {"anchor": "created_at", "seconds": 3600}}
    assert read_create(body) == ("f", "/v1/responses", {"a": "b"}, 3600)
    assert read_create(ASKED) == ("f", "/v1/responses", None, None)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input_file_id": None}, "input_file_id"),
        ({"input_file_id": 3}, "input_file_id"),
        ({"endpoint": "/v1/audio"}, "endpoint"),
        ({"completion_window": "48h"}, "completion_window"),
        ({"metadata": []}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3599}}, "output_expires_after"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": True}}, "output_expires_after"),
    ],
)
def test_a_wrong_parameter_is_named(change: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read_create({**ASKED, **change})
    assert refused.value.param == param


# -- objects -----------------------------------------------------------------------------------------------------------


def job(**changes: Any) -> Job:
    fields: dict[str, Any] = {
        "id": OWN, "tenant": "t", "dialect": "openai", "path": ENDPOINTS[0], "status": "completed",
        "input_file_id": "f", "created_ms": 1_000_500, "deadline_ms": 2_000_000, "expires_ms": 3_000_000,
        "times": {"in_progress": 1_100_000, "completed": 1_200_999}, "total": 9, "succeeded": 4, "errored": 3,
        "expired": 1, "cancelled": 1, "output_file_id": "out",
    }  # fmt: skip
    return Job(**{**fields, **changes})


def test_objects_are_what_the_sdks_read() -> None:
    shown = batch_object(job(metadata={"a": "b"}, errors=[{"code": "c", "line": 2, "message": "m", "param": None}]))
    read = OpenAIBatch.model_validate(shown, strict=True)
    assert set(shown) <= set(OpenAIBatch.model_fields)
    assert (read.created_at, read.in_progress_at, read.completed_at, read.failed_at) == (1000, 1100, 1200, None)
    assert (read.request_counts.total, read.request_counts.completed, read.request_counts.failed) == (9, 4, 3)
    assert (read.errors.data[0].line, read.error_file_id, read.output_file_id) == (2, None, "out")
    file = file_object(BatchFile("file-x", "t", "batch", "a.jsonl", 5, 1_000, 9_000))
    assert FileObject.model_validate(file, strict=True).status == "processed"
    assert set(file) <= set(FileObject.model_fields)
    told = message_batch(job(dialect="anthropic"), "http://h")
    batch = MessageBatch.model_validate(told)
    assert set(told) == set(MessageBatch.model_fields)
    assert (batch.processing_status, batch.results_url) == ("ended", f"http://h/v1/messages/batches/{OWN}/results")
    assert (batch.request_counts.processing, batch.request_counts.canceled, batch.ended_at.minute) == (0, 1, 20)
    assert message_batch(job(status="cancelling"), "")["processing_status"] == "canceling"
    assert message_batch(job(status="validating", times={}), "")["results_url"] is None


def test_results_are_lines_of_json() -> None:
    name = json.dumps('a"b').encode()
    rows = [
        openai_result(name, "ff", 200, b'{"id":1}'),
        openai_loss(name, "ff", b'{"code":"c"}'),
        anthropic_result(name, 200, b'{"id":1}'),
        anthropic_result(name, 400, b'{"type":"error"}'),
        anthropic_loss(name, "expired"),
        anthropic_loss(name, "cancelled"),
    ]
    assert all(row.endswith(b"\n") and row.count(b"\n") == 1 for row in rows)
    said = [json.loads(row) for row in rows]
    assert {one["custom_id"] for one in said} == {'a"b'}
    assert said[0]["response"] == {"status_code": 200, "request_id": "ff", "body": {"id": 1}}
    assert (said[1]["response"], said[1]["error"]) == (None, {"code": "c"})
    assert [one["result"]["type"] for one in said[2:]] == ["succeeded", "errored", "expired", "canceled"]


def test_counts_follow_what_became_of_the_lines() -> None:
    counted = job(succeeded=0, errored=0, expired=0, cancelled=0)
    for state in ("ok", "ok", "error", "expired", "cancelled"):
        counted.count(state, 10)
    assert (counted.succeeded, counted.errored, counted.expired, counted.cancelled) == (2, 1, 1, 1)
    assert (counted.output_bytes, counted.error_bytes) == (20, 30)


@given(st.integers(100, 599), st.binary())
def test_a_reply_is_read_as_it_was_spelled(status: int, body: bytes) -> None:
    headers = [("Content-Type", "text/é"), ("x", 'a "b"\\')]
    assert read_reply(spell_reply(status, headers, body)) == (status, headers, body)


# -- forms -------------------------------------------------------------------------------------------------------------

CONTENT = b"line\r\n--not the boundary\r\n--\r\n{}\n"
FORM = (
    b'preamble\r\n--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--B  \r\nContent-Disposition: form-data; name="file"; filename="a \\"b\\".jsonl"\r\nContent-Type: x/y\r\n\r\n'
    + CONTENT
    + b'\r\n--B\r\nContent-Disposition: form-data; name="expires_after[seconds]"\r\n\r\n\r\n--B--\r\nepilogue'
)


@given(st.sets(st.integers(1, len(FORM) - 1), max_size=40))
def test_it_does_not_matter_how_a_form_was_cut(places: set[int]) -> None:
    form = Form(b"B")
    pieces = [piece for chunk in cut(FORM, places) for piece in form.feed(chunk)]
    assert b"".join(pieces) == CONTENT
    assert form.fields == {"purpose": b"batch", "expires_after[seconds]": b""}
    assert (form.ended, form.filename) == (True, 'a \\"b\\".jsonl')


def test_a_form_without_its_end_never_ends() -> None:
    form = Form(b"B")
    form.feed(FORM[: FORM.index(b"--B--")])
    assert not form.ended


@pytest.mark.parametrize(
    "raw",
    [
        b"--B\r\nContent-Type: x\r\n\r\n",
        b"--B\r\n" + b"x" * 9000,
        b"--Bad\r\n\r\n",
        b'--B\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"x" * 70_000,
        FORM.replace(b'name="purpose"', b'name="file"'),
    ],
)
def test_a_broken_form_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        Form(b"B").feed(raw)


def test_the_boundary_is_read_from_the_media_type() -> None:
    assert boundary_of('multipart/form-data; charset=x; boundary="a b"') == b"a b"
    assert boundary_of("Multipart/Form-Data; Boundary=xYz; y") == b"xYz"
    for media_type in ("application/json; boundary=x", "multipart/form-data", ""):
        with pytest.raises(BadRequest):
            boundary_of(media_type)


# -- bodies ------------------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.lists(st.dictionaries(st.text(), values), max_size=5), st.data(), st.sampled_from([None, 1]))
def test_elements_come_out_of_any_cut(elements: list[Any], data: st.DataObject, indent: int | None) -> None:
    raw = json.dumps({"requests": elements}, indent=indent, ensure_ascii=data.draw(st.booleans())).encode(
        "utf-8", "replace"
    )
    items = Items(1 << 20)
    places = data.draw(st.sets(st.integers(1, len(raw) - 1), max_size=30))
    found = [item for chunk in cut(raw, places) for item in items.feed(chunk)]
    items.close()
    assert [json.loads(item) for item in found] == json.loads(raw)["requests"]
    assert items.count == len(elements)


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"[]", b"{}", b'{"requests": 3}', b'{"requests": [1]}', b'{"requests": [{}', b'{"requests": [{},]}',
        b'{"requests": [,{}]}', b'{"requests": [{}{}]}', b'{"requests": [{}], "more": 1}',
        b'{"more": 1, "requests": []}',
        b'{"requests": []} x', b" " * 3000,
    ],
)  # fmt: skip
def test_any_other_body_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        take_all(raw)
    assert refused.value.status == 400


def take_all(raw: bytes) -> None:
    items = Items(1 << 20)
    items.feed(raw)
    items.close()


def test_an_element_is_bounded() -> None:
    items = Items(100)
    with pytest.raises(BadRequest) as refused:
        items.feed(b'{"requests": [{"a": "' + b"x" * 200)
    assert (refused.value.status, refused.value.code) == (413, "request_too_large")


# -- deadlines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "seconds"), [("90s", 90), ("5m", 300), ("1.5h", 5400), (" 2D ", 172_800), ("0s", 0), ("999999999d", 2**31)]
)
def test_a_deadline_is_read(said: str, seconds: float) -> None:
    assert deadline_s_of([(b"X-Deadline", said.encode())]) == seconds


def test_the_shorter_of_two_deadlines_holds_and_none_is_none() -> None:
    assert deadline_s_of([(b"x-deadline", b"2h"), (b"x-deadline", b"1h")]) == 3600
    assert deadline_s_of([(b"host", b"x")]) is None


@pytest.mark.parametrize("said", ["", "1", "h", "1 h", "-1h", "1h30m", "1w", "1,5h", "NaNs"])
def test_any_other_deadline_is_refused(said: str) -> None:
    with pytest.raises(BadRequest) as refused:
        deadline_s_of([(b"x-deadline", said.encode())])
    assert (refused.value.code, refused.value.param) == ("invalid_value", "x-deadline")
