"""Batches: with the official SDKs, against an upstream with a batch API of its own and against one without."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import sqlite3
import time
from typing import Any

import openai
import pytest

from proxy.core.model import Usage
from proxy.money.prices import Prices
from tests.batch_upstream import BatchUpstream
from tests.flows.batching import QUICK, balanced, ended, hand_in, jsonl, line, rows, sdk, text
from tests.flows.running import EMBEDDER, MODEL, chat_body, running, until
from tests.upstream import Chat, Json
from tests.waiting import PATIENCE_S


@pytest.mark.parametrize("has_api", [True, False])
async def test_a_cached_line_is_not_sent_and_a_repeated_one_is_sent_once(data_dir, up, has_api):
    theirs = BatchUpstream(up) if has_api else None
    async with running(data_dir, up.url, QUICK) as ibid, sdk(ibid) as client:
        cached = await ibid.fill("What is a hinge?")
        calls = up.meter.calls
        lines = [line("a", "What is a hinge?"), line("b", "What is a latch?"), line("c", "What is a latch?")]
        batch = await ended(client, await hand_in(client, lines, metadata={"team": "doors"}))
        assert (batch.status, batch.metadata) == ("completed", {"team": "doors"})
        assert (batch.request_counts.total, batch.request_counts.completed) == (3, 3)
        found = await rows(client, batch.output_file_id)
        assert text(found["a"]) == cached.text
        assert text(found["b"]) == text(found["c"])
        assert "What is a latch?" in text(found["b"])
        ids = {row["response"]["body"]["id"] for row in found.values()}
        assert len(ids) == 3
        assert up.meter.calls - calls == (0 if has_api else 1)
        if theirs is not None:
            assert [len(one.requests) for one in theirs.batches.values()] == [1]
        assert (await ibid.ask("What is a latch?")).text == text(found["b"])  # the live client gets it too
        assert (await ibid.admin("POST", "/savings/query", {"name": "balance"}))["rows"] == []


def ten_thousand() -> list[Any]:
    """6,000 of 10,000 lines repeat one of the 4,000 others."""
    chance = random.Random(7)
    prompts = [f"What is part number {n} of the great machine for?" for n in range(4000)]
    asked = prompts + [chance.choice(prompts) for _ in range(6000)]
    chance.shuffle(asked)
    return [line(f"line-{n}", prompt) for n, prompt in enumerate(asked)]


@pytest.mark.parametrize("has_api", [True, False])
async def test_ten_thousand_lines_of_which_six_thousand_repeat_send_four_thousand(data_dir, up, has_api):
    theirs = BatchUpstream(up) if has_api else None
    lines = ten_thousand()
    async with running(data_dir, up.url, QUICK) as ibid, sdk(ibid) as client:
        batch = await ended(client, await hand_in(client, lines))
        assert (batch.status, batch.request_counts.completed, batch.error_file_id) == ("completed", 10_000, None)
        found = await rows(client, batch.output_file_id)
        assert len(found) == 10_000
        for one in lines:
            assert text(found[one["custom_id"]]).endswith(one["body"]["messages"][0]["content"])
        assert len({row["response"]["body"]["id"] for row in found.values()}) == 10_000
        await ibid.settled()
        if theirs is None:
            sent, tokens = up.meter.calls, Usage(up.meter.input_tokens, up.meter.output_tokens)
        else:
            sent, tokens = theirs.lines, Usage(theirs.input_tokens, theirs.output_tokens)
            assert up.meter.calls == 0
        assert sent == 4000
        tier = "batch" if theirs else "default"
        cost = Prices().price("openai", MODEL, tokens, tier, int(time.time() * 1000)).nusd
        paid = (await ibid.sql("SELECT SUM(actual_nusd) AS n, COUNT(*) AS requests FROM request"))[0]
        assert paid == {"n": cost, "requests": 10_000}
        calls = (await ibid.sql("SELECT SUM(cost_nusd) AS n, COUNT(*) AS calls, MIN(tier) AS tier FROM upstream_call"))[
            0
        ]
        assert calls == {"n": cost, "calls": 4000, "tier": tier}
        steps = await ibid.sql(
            "SELECT mechanism, COUNT(*) AS n, SUM(saved_nusd) AS saved FROM saving GROUP BY mechanism"
        )
        counted = {step["mechanism"]: step["n"] for step in steps}
        assert counted == {"batch.dedup": 6000, **({"batch.provider": 4000} if theirs else {})}
        if theirs:
            assert {step["mechanism"]: step["saved"] for step in steps}["batch.provider"] == cost
        assert await balanced(ibid)


@pytest.mark.parametrize("base", ["", "/v1/v1", "/openai/v1"])
async def test_every_spelling_of_the_paths_is_served(data_dir, up, base):
    async with running(data_dir, up.url, QUICK) as ibid, sdk(ibid, base=base) as client:
        batch = await ended(client, await hand_in(client, [line("a", "What is a hinge?")]))
        assert text((await rows(client, batch.output_file_id))["a"]).endswith("What is a hinge?")


BAD = [
    (b"{not json", "invalid_json_line", None),
    ({"method": "POST", "url": "/v1/chat/completions", "body": {}}, "missing_required_parameter", "custom_id"),
    ({**line("x", "q"), "method": None}, "missing_required_parameter", "method"),
    ({**line("x", "q"), "url": ""}, "missing_required_parameter", "url"),
    ({"custom_id": "x", "method": "POST", "url": "/v1/chat/completions"}, "missing_required_parameter", "body"),
    ({**line("x", "q"), "method": "GET"}, "invalid_method", "method"),
    ({**line("x", "q"), "url": "/v1/embeddings"}, "invalid_url", "url"),
    (line("good", "q"), "duplicate_custom_id", "custom_id"),
    (line("x", "q", stream=True), "streaming_unsupported", "body.stream"),
    ({**line("x", "q"), "body": []}, "invalid_type", "body"),
    ([1], "invalid_request", None),
]


async def test_a_line_that_cannot_be_read_fails_the_batch_and_says_where(exact, up):
    async with sdk(exact) as client:
        lines = [line("good", "q"), b"", *[bad for bad, _, _ in BAD]]
        batch = await ended(client, await hand_in(client, lines))
        assert (batch.status, batch.output_file_id, batch.request_counts.total) == ("failed", None, 0)
        assert batch.failed_at is not None
        said = [(error.line, error.code, error.param) for error in batch.errors.data]
        assert said == [(n, code, param) for n, (_, code, param) in enumerate(BAD, start=3)]
        assert not up.requests


async def test_a_line_whose_request_is_refused_stands_in_the_error_file(exact, up):
    up.script(Json(404, {"error": {"message": "no batches here"}}))
    up.default = lambda seen: (
        Json(400, {"error": {"message": "too hot", "type": "invalid_request_error", "param": None, "code": "hot"}})
        if b"hot" in seen.body
        else Chat()
    )
    async with sdk(exact) as client:
        lines = [
            line("fine", "What is cold?"),
            line("hot", "What is hot?"),
            line("bad", "q", temperature="high"),
            {**line("dup", "q"), "body": b"@"},
        ]
        raw = (
            jsonl(lines[:3])
            + json.dumps({**lines[3], "body": 0}).replace('"body": 0', '"body": {"a":1,"a":2}').encode()
        )
        batch = await ended(client, await hand_in(client, raw))
        counts = batch.request_counts
        assert (batch.status, counts.total, counts.completed, counts.failed) == ("completed", 4, 1, 3)
        assert set(await rows(client, batch.output_file_id)) == {"fine"}
        wrong = await rows(client, batch.error_file_id)
        assert {name: row["response"]["status_code"] for name, row in wrong.items()} == {
            "hot": 400,
            "bad": 400,
            "dup": 400,
        }
        assert wrong["hot"]["response"]["body"]["error"]["code"] == "hot"
        assert wrong["bad"]["response"]["body"]["error"]["param"] == "temperature"
        assert wrong["dup"]["response"]["body"]["error"]["code"] == "duplicate_key"


async def test_what_cannot_be_handed_in_is_refused_as_the_provider_refuses_it(data_dir, up):
    async with running(data_dir, up.url, {**QUICK, "batch": {"max_lines": 2}}) as ibid, sdk(ibid) as client:
        for raw in (b"", b"{oh no\n"):
            with pytest.raises(openai.BadRequestError, match="Invalid file format"):
                await client.files.create(file=("lines.jsonl", raw), purpose="batch")
        file = await client.files.create(file=("lines.jsonl", jsonl([line("a", "q")])), purpose="batch")
        asked: dict[str, Any] = {
            "input_file_id": file.id,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        }
        for change, param in (
            ({"endpoint": "/v1/images"}, "endpoint"),
            ({"completion_window": "1h"}, "completion_window"),
            ({"metadata": {"n": 1}}, "metadata.n"),
            ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after"),
        ):
            with pytest.raises(openai.BadRequestError) as refused:
                await client.batches.create(**{**asked, **change})
            assert refused.value.param == param
        with pytest.raises(openai.BadRequestError, match="expires_after"):
            await client.files.create(
                file=("f.jsonl", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 9}
            )
        short = await client.files.create(
            file=("f.jsonl", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert short.expires_at - short.created_at == 3600
        assert file.expires_at - file.created_at == 30 * 86_400
        unknown = "file-ibid" + "0" * 24
        batch = await client.batches.create(**{**asked, "input_file_id": unknown})
        assert (batch.status, batch.errors.data[0].code) == ("failed", "invalid_request")
        batch = await ended(client, await hand_in(client, [line(str(n), "q") for n in range(3)]))
        assert (batch.status, batch.errors.data[0].code) == ("failed", "too_many_tasks")
        batch = await ended(client, await hand_in(client, jsonl([line("a", "x" * 5_000_000)])))
        assert (batch.status, batch.errors.data[0].code) == ("failed", "request_too_large")
        with pytest.raises(openai.ConflictError, match="Cannot cancel a batch with status 'failed'"):
            await client.batches.cancel(batch.id)


async def test_files_are_listed_shown_and_deleted_and_other_files_are_the_upstreams(data_dir, up):
    async with running(data_dir, up.url, QUICK) as ibid, sdk(ibid) as client, sdk(ibid, "sk-b") as other:
        raw = jsonl([line("a", "What is a hinge?")]) * 1
        file = await client.files.create(file=("lines.jsonl", raw), purpose="batch")
        assert (file.bytes, file.filename, file.purpose, file.status) == (len(raw), "lines.jsonl", "batch", "processed")
        assert (await client.files.content(file.id)).content == raw
        theirs = {
            "object": "list",
            "data": [{"id": "file-far", "object": "file", "filename": "t.jsonl"}],
            "has_more": False,
        }
        up.script(Json(200, theirs))
        assert [one.id async for one in client.files.list()] == [file.id, "file-far"]
        up.script(Json(500, {}))
        assert [one.id async for one in client.files.list(purpose="batch")] == [file.id]
        for asked in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError, match="No such File object"):
                await asked(file.id)
        assert (await client.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(file.id)
        seen = len(up.requests)
        up.script(Json(200, {"id": "file-far", "object": "file", "bytes": 3, "purpose": "fine-tune"}))
        tuned = await client.files.create(file=("tune.jsonl", b"{}\n" * 250_000), purpose="fine-tune")
        assert tuned.id == "file-far"
        sent = up.requests[seen]
        assert b"fine-tune" in sent.body
        assert sent.body.count(b"{}\n") == 250_000
        assert sent.header("Content-Length") == str(len(sent.body))
        up.script(Json(200, {"id": "file-far", "object": "file"}), Json(200, {"id": "batch_far", "object": "batch"}))
        assert (await client.files.retrieve("file-far")).id == "file-far"
        assert (await client.batches.create(
            input_file_id="file-far", endpoint="/v1/chat/completions", completion_window="24h"
        )).id == "batch_far"  # fmt: skip
        assert up.requests[-1].json["input_file_id"] == "file-far"


async def test_a_purpose_that_comes_behind_the_file_counts_all_the_same(exact):
    raw = jsonl([line("a", "What is a hinge?")])
    form = (
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="f.jsonl"\r\n\r\n' + raw
        + b'\r\n--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--B--\r\n'
    )  # fmt: skip
    headers = {"Authorization": "Bearer sk-a", "Content-Type": "multipart/form-data; boundary=B"}
    async with exact.session.post(exact.url + "/v1/files", data=form, headers=headers) as response:
        assert (await response.json())["bytes"] == len(raw)
    cut = (
        b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        + form[: form.index(b'name="purpose') - 50]
    )
    async with exact.session.post(exact.url + "/v1/files", data=cut, headers=headers) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (400, "invalid_multipart")


async def test_another_credential_does_not_see_a_batch(data_dir, up):
    async with running(data_dir, up.url, QUICK) as ibid, sdk(ibid) as client, sdk(ibid, "sk-b") as other:
        batch = await ended(client, await hand_in(client, [line("a", "What is a hinge?")]))
        up.script(Json(404, {}))
        assert [one.id async for one in client.batches.list()] == [batch.id]
        up.script(Json(404, {}))
        assert [one.id async for one in other.batches.list()] == []
        for asked in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError, match="No batch found"):
                await asked(batch.id)
        with pytest.raises(openai.NotFoundError):
            await other.files.content(batch.output_file_id)
        theirs = await ended(other, await hand_in(other, [line("a", "What is a hinge?")]))
        assert theirs.status == "completed"
        assert up.meter.calls == 2  # nor does it get its answers


async def test_lists_are_paged_and_go_on_with_the_upstreams_own(data_dir, up):
    theirs = BatchUpstream(up)
    async with running(data_dir, up.url, QUICK) as ibid, sdk(ibid) as client:
        own = [(await ended(client, await hand_in(client, [line("a", f"What is {n}?")]))).id for n in range(3)]
        theirs._take("batch", "/v1/chat/completions", [], {"team": "x"}, "file-far").id = "batch_far"
        page = await client.batches.list(limit=2)
        assert ([one.id for one in page.data], page.has_more) == (own[:0:-1], True)
        assert {one.id async for one in client.batches.list(limit=2)} == {*own, "batch_far"}
        assert {one.id async for one in client.batches.list(limit=50)} == {*own, "batch_far"}


async def test_what_a_provider_did_not_answer_is_reported_as_the_provider_does(data_dir, up):
    theirs = BatchUpstream(up, outcome="expired")
    theirs.expire, theirs.refuse = {1}, {2}
    async with running(data_dir, up.url, QUICK) as ibid, sdk(ibid) as client:
        prompts = {"a": "What is one?", "b": "What is two?", "c": "What is three?", "d": "What is two?"}
        batch = await ended(client, await hand_in(client, [line(*pair) for pair in prompts.items()]))
        counts = batch.request_counts
        assert (batch.status, counts.completed, counts.failed) == ("expired", 1, 1)
        assert set(await rows(client, batch.output_file_id)) == {"a"}
        wrong = await rows(client, batch.error_file_id)
        assert {name: (row["error"] or {}).get("code") for name, row in wrong.items()} == {
            "b": "batch_expired", "c": None, "d": "batch_expired"
        }  # fmt: skip
        assert wrong["c"]["response"]["status_code"] == 400
        assert len(await ibid.sql("SELECT id FROM request")) == 4
        assert await balanced(ibid)
        theirs.outcome = "failed"
        batch = await ended(client, await hand_in(client, [line("a", "What is never said?")]))
        assert (batch.status, batch.errors.data[0].code) == ("failed", "model_not_found")


async def test_an_upstream_whose_batch_api_is_off_is_asked_line_by_line(data_dir, up):
    theirs = BatchUpstream(up)
    off = {**QUICK, "upstream.openai": {"batch": "off"}}
    async with running(data_dir, up.url, off) as ibid, sdk(ibid) as client:
        assert (await ended(client, await hand_in(client, [line("a", "What is a hinge?")]))).status == "completed"
        assert (up.meter.calls, theirs.batches) == (1, {})


async def test_a_line_that_fails_for_a_moment_is_asked_again(exact, up, monkeypatch):
    monkeypatch.setattr("proxy.batch.lines.PAUSE_S", 0.01)
    busy = {"error": {"message": "busy"}}
    up.script(Json(404, {}), Json(429, busy), Json(503, busy))
    async with sdk(exact) as client:
        batch = await ended(client, await hand_in(client, [line("a", "What is a hinge?")]))
        assert (batch.request_counts.completed, up.meter.calls) == (1, 1)
        assert await balanced(exact)


@pytest.mark.parametrize("has_api", [True, False])
async def test_a_cancelled_batch_keeps_what_it_has(data_dir, up, has_api):
    gate = asyncio.Event()
    theirs = BatchUpstream(up, polls=0) if has_api else None

    async def held(seen):
        await gate.wait()
        return Chat()

    if not has_api:
        up.script(Json(404, {}))
        up.default = lambda seen: held(seen) if b"slow" in seen.body else Chat()
    quick = {**QUICK, "batch": {"poll_interval_s": 0.02, "concurrency": 1}}
    async with running(data_dir, up.url, quick) as ibid, sdk(ibid) as client:
        lines = [line("a", "What is quick?"), *[line(str(n), f"What is slow {n}?") for n in range(3)]]
        batch = await hand_in(client, lines)
        if theirs is not None:
            await until(lambda: theirs.batches)
        else:
            await until(lambda: sum(b"slow" in seen.body for seen in up.requests) == 1)
            assert (await client.batches.retrieve(batch.id)).request_counts.completed == 1  # progress shows
        with pytest.raises(openai.ConflictError, match="reading this file"):
            await client.files.delete(batch.input_file_id)
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        gate.set()
        batch = await ended(client, batch)
        assert (batch.status, batch.cancelled_at is not None) == ("cancelled", True)
        assert "a" in await rows(client, batch.output_file_id)
        wrong = await rows(client, batch.error_file_id)
        assert len(wrong) == (3 if has_api else 2)
        assert {row["error"]["code"] for row in wrong.values()} == {"batch_cancelled"}
        assert (await client.batches.cancel(batch.id)).status == "cancelled"
        assert await balanced(ibid)


@pytest.mark.parametrize("has_api", [True, False])
async def test_embedding_lines_share_rows_with_live_traffic(data_dir, up, has_api):
    theirs = BatchUpstream(up) if has_api else None
    async with running(data_dir, up.url, QUICK) as ibid, sdk(ibid) as client:
        await ibid.embed("known")
        await ibid.settled()
        calls = up.meter.calls
        lines = [
            {"custom_id": name, "method": "POST", "url": "/v1/embeddings", "body": {"model": EMBEDDER, "input": asked}}
            for name, asked in (("k", "known"), ("n", ["new", "newer"]), ("m", ["new", "newer"]))
        ]
        batch = await ended(client, await hand_in(client, lines, endpoint="/v1/embeddings"))
        found = await rows(client, batch.output_file_id)
        assert set(found) == {"k", "n", "m"}
        assert found["n"]["response"]["body"]["data"] == found["m"]["response"]["body"]["data"]
        assert up.meter.calls - calls == (0 if has_api else 1)
        await ibid.settled()
        calls = up.meter.calls
        for asked, name in ((["new", "newer"], "n"), ("known", "k")):
            live = await ibid.embed(asked, encoding_format="float")
            assert live.cache == "HIT"
            assert [row["embedding"] for row in live.json["data"]] == [
                row["embedding"] for row in found[name]["response"]["body"]["data"]
            ]
        assert up.meter.calls == calls
        if theirs is not None:
            row = (await ibid.sql("SELECT tier, cost_nusd FROM upstream_call WHERE in_tok = 2"))[0]
            assert row == {"tier": "default", "cost_nusd": 40}  # nobody lists a batch price of this model
        assert await balanced(ibid)


async def test_a_reworded_line_gets_the_stored_answer_by_the_same_judge(ibid, up):
    stored = await ibid.fill("How do I repair a leaking garden hose?")
    async with sdk(ibid) as client:
        lines = [
            line("a", "How can I repair a leaking garden hose?"),
            line("b", "How do I repair a leaking garden tap?"),
        ]
        batch = await ended(client, await hand_in(client, lines))
        found = await rows(client, batch.output_file_id)
        assert text(found["a"]) == stored.text
        assert "tap" in text(found["b"])
        lanes = await ibid.sql("SELECT lane, COUNT(*) AS n FROM request GROUP BY lane ORDER BY lane")
        assert {row["lane"]: row["n"] for row in lanes} == {"cache.semantic": 1, "forward": 2}


async def test_the_whole_path_on_postgresql(data_dir, up, pg_url):
    theirs = BatchUpstream(up)
    async with running(data_dir, up.url, QUICK, database=pg_url) as ibid, sdk(ibid) as client:
        lines = [line(str(n), f"What is {n % 3}?") for n in range(9)]
        batch = await ended(client, await hand_in(client, lines))
        assert (batch.status, batch.request_counts.completed, theirs.lines) == ("completed", 9, 3)
        assert len(await rows(client, batch.output_file_id)) == 9
        await client.files.delete(batch.output_file_id)
        assert await balanced(ibid)


async def test_with_batches_off_every_path_passes_through(data_dir, up):
    async with running(data_dir, up.url, {**QUICK, "batch": {"serve": False}}) as ibid, sdk(ibid) as client:
        up.script(Json(200, {"id": "file-ibid" + "0" * 24, "object": "file"}))
        assert (await client.files.create(file=("f.jsonl", b"{}"), purpose="batch")).object == "file"
        assert up.requests[-1].path == "/v1/files"


async def test_responses_and_legacy_completions_are_lines_too(exact, up):
    said = {"id": "resp_1", "object": "response", "created_at": 1, "status": "completed", "model": MODEL, "output": [
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [
            {"type": "output_text", "text": "It is a hinge.", "annotations": []}]}],
        "usage": {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}}  # fmt: skip
    legacy = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "gpt-3.5-turbo-instruct", "choices": [
        {"index": 0, "text": "a hinge", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}  # fmt: skip
    answers = {"/v1/responses": Json(200, said), "/v1/completions": Json(200, legacy)}
    up.default = lambda seen: answers.get(seen.path, Json(404, {}))
    bodies = {
        "/v1/responses": {"model": MODEL, "input": "What is this?"},
        "/v1/completions": {"model": "gpt-3.5-turbo-instruct", "prompt": "This is"},
    }
    async with sdk(exact) as client:
        for path, body in bodies.items():
            lines = [{"custom_id": n, "method": "POST", "url": path, "body": body} for n in "ab"]
            batch = await ended(client, await hand_in(client, lines, endpoint=path))
            found = await rows(client, batch.output_file_id)
            assert set(found) == {"a", "b"}, batch
            ids = {row["response"]["body"]["id"] for row in found.values()}
            assert len(ids) == (1 if path == "/v1/responses" else 2)  # what the provider keeps is asked for by its id
            assert sum(seen.path == path for seen in up.requests) == 1
        assert await balanced(exact)


async def test_lines_go_to_the_provider_by_model_and_in_batches_it_can_take(data_dir, up, monkeypatch):
    monkeypatch.setattr("proxy.batch.run.handing.PART_LIMIT_BYTES", 1200)
    theirs = BatchUpstream(up)
    models = ("gpt-4o-mini", "gpt-4o")
    async with running(data_dir, up.url, QUICK) as ibid, sdk(ibid) as client:
        lines = [
            {**line(f"{n}", ""), "body": {**chat_body(f"What is {n}?"), "model": models[n % 2]}} for n in range(20)
        ]
        batch = await ended(client, await hand_in(client, lines))
        assert batch.request_counts.completed == 20
        found = await rows(client, batch.output_file_id)
        assert {name: row["response"]["body"]["model"] for name, row in found.items()} == {
            f"{n}": models[n % 2] for n in range(20)
        }
        assert len(theirs.batches) > 2
        assert all(sum(len(json.dumps(body)) for _, body in one.requests) <= 1200 for one in theirs.batches.values())
        assert theirs.files == {}  # nothing of ours is left there


class SaysNothing(BatchUpstream):
    """Takes batches, and leaves whoever asks for their list without an answer."""

    def answer(self, seen):
        if seen.path == "/v1/batches?limit=1":
            return self.nothing()
        return super().answer(seen)

    async def nothing(self):
        await self.up.stopping.wait()
        return Json(404, {})


async def test_an_upstream_that_does_not_say_whether_it_has_batches_holds_nobody_up(data_dir, up, monkeypatch):
    monkeypatch.setattr("proxy.batch.offers.PROBE_S", 0.05)
    theirs = SaysNothing(up)
    async with running(data_dir, up.url, QUICK) as ibid, sdk(ibid) as one, sdk(ibid, "sk-b") as other:
        handed = [(client, await hand_in(client, [line("a", f"What is {client.api_key}?")])) for client in (one, other)]
        for client, batch in handed:
            batch = await ended(client, batch)
            assert (batch.status, batch.request_counts.completed) == ("completed", 1)
    assert len(theirs.batches) == 2
    asked = [seen for seen in up.requests if seen.path == "/v1/batches?limit=1"]
    assert len(asked) == 1  # its silence is the upstream's, whoever asks


async def test_replicas_share_batches_and_one_of_them_works_on_each(data_dir, tmp_path, up, pg_url):
    theirs = BatchUpstream(up, polls=0)
    second = tmp_path / "second"
    async with running(data_dir, up.url, QUICK, database=pg_url) as one, sdk(one) as client:
        second.mkdir(mode=0o700)
        shutil.copy2(data_dir / "installation-secret", second)  # what makes them one installation
        async with running(second, up.url, QUICK, database=pg_url) as two, sdk(two) as other:
            batch = await hand_in(client, [line(n, f"What is {n}?") for n in "abc"])
            await until(lambda: theirs.batches)
            assert (await other.batches.retrieve(batch.id)).status == "in_progress"
            assert (await other.batches.cancel(batch.id)).status == "cancelling"
            batch = await ended(other, batch)
            assert (batch.status, batch.request_counts.completed) == ("cancelled", 1)
            assert len(await rows(other, batch.error_file_id)) == 2
            assert len(theirs.batches) == 1


@pytest.mark.parametrize("status", [401, 503])
async def test_an_upstream_that_cannot_say_whether_it_has_a_batch_api_is_not_asked_for_every_line(data_dir, up, status):
    theirs = BatchUpstream(up)
    denied = Json(status, {"error": {"message": "not now"}})
    up.default = lambda seen: denied if seen.path == "/v1/batches?limit=1" else theirs.answer(seen)
    async with running(data_dir, up.url, QUICK) as ibid, sdk(ibid) as client:
        batch = await ended(client, await hand_in(client, [line(str(n), f"What is {n}?") for n in range(40)]))
        assert batch.request_counts.completed == 40
        assert sum(seen.path == "/v1/batches?limit=1" for seen in up.requests) == 1
        assert (up.meter.calls, theirs.lines) == ((40, 0) if status == 401 else (0, 40))


async def test_a_database_that_does_not_write_for_a_while_delays_a_batch_and_loses_nothing(data_dir, up):
    gate = asyncio.Event()

    async def held(_seen):
        await gate.wait()
        return Chat()

    up.script(Json(404, {}))
    up.default = held
    async with running(data_dir, up.url, QUICK) as ibid, sdk(ibid) as client:
        batch = await hand_in(client, [line(str(n), f"What is {n}?") for n in range(40)])
        await until(lambda: len(up.requests) > 10)
        with contextlib.closing(
            sqlite3.connect(data_dir / "ibid.db", isolation_level=None, timeout=PATIENCE_S)
        ) as database:
            database.execute("BEGIN IMMEDIATE")
            gate.set()
            await until(lambda: ibid.app.store.state != "ok")
            assert (await client.batches.retrieve(batch.id)).status == "in_progress"
        batch = await ended(client, batch)
        assert (batch.status, batch.request_counts.completed, up.meter.calls) == ("completed", 40, 40)
        assert len(await rows(client, batch.output_file_id)) == 40
        assert await balanced(ibid)
