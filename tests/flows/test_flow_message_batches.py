"""Anthropic's message batches, with its own SDK."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import anthropic
import pytest

from proxy.core.model import Usage
from tests.batch_upstream import BatchUpstream
from tests.flows.batching import QUICK, balanced
from tests.flows.running import running, until
from tests.upstream import Json, Seen
from tests.waiting import PATIENCE_S

MODEL = "claude-sonnet-4-6"


def sdk(ibid, key: str = "sk-a") -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=ibid.url, api_key=key, max_retries=0, timeout=PATIENCE_S)


def request(custom_id: str, prompt: str, **fields: Any) -> Any:
    params = {"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": prompt}], **fields}
    return {"custom_id": custom_id, "params": params}


NUMBERS = itertools.count()


def message(seen: Seen) -> Json:
    asked = seen.json["messages"][-1]["content"]
    if "refuse" in asked:
        return Json(400, {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}})
    content = [{"type": "text", "text": f"answer to {asked}"}]
    return Json(200, {
        "id": f"msg_{next(NUMBERS)}", "type": "message", "role": "assistant", "model": MODEL, "content": content,
        "stop_reason": "end_turn", "stop_sequence": None, "usage": {"input_tokens": 5, "output_tokens": 7},
    })  # fmt: skip


async def ended(client: anthropic.AsyncAnthropic, batch: Any) -> Any:
    async with asyncio.timeout(PATIENCE_S):
        while batch.processing_status != "ended":
            await asyncio.sleep(0.01)
            batch = await client.messages.batches.retrieve(batch.id)
    return batch


async def results(client: anthropic.AsyncAnthropic, batch: Any) -> dict[str, Any]:
    return {one.custom_id: one.result async for one in await client.messages.batches.results(batch.id)}


@pytest.mark.parametrize("has_api", [True, False])
async def test_requests_are_answered_from_the_cache_once_or_by_the_batch(data_dir, up, has_api):
    theirs = BatchUpstream(up) if has_api else None
    if theirs is None:
        up.default = lambda seen: message(seen) if seen.path == "/v1/messages" else Json(404, {})
    else:
        theirs.plain = Json(500, {})
    async with running(data_dir, up.url, QUICK) as ibid, sdk(ibid) as client:
        asked = [request("a", "What is a hinge?"), request("b", "What is a hinge?"), request("c", "What is a latch?")]
        batch = await client.messages.batches.create(requests=asked)
        assert batch.request_counts.processing == 3
        batch = await ended(client, batch)
        assert (batch.request_counts.succeeded, batch.request_counts.processing) == (3, 0)
        assert batch.results_url.startswith(ibid.url)
        found = await results(client, batch)
        texts = {name: result.message.content[0].text for name, result in found.items()}
        assert texts["a"] == texts["b"]
        assert texts["c"].endswith("What is a latch?")
        assert len({result.message.id for result in found.values()}) == 3
        live = await client.messages.create(**asked[2]["params"])
        assert live.content[0].text == texts["c"]
        mechanisms = await ibid.sql("SELECT mechanism, COUNT(*) AS n FROM saving GROUP BY mechanism ORDER BY mechanism")
        assert [(row["mechanism"], row["n"]) for row in mechanisms] == [
            ("batch.dedup", 1), *([("batch.provider", 2)] if has_api else []), ("cache.exact", 1)
        ]  # fmt: skip
        if theirs is not None:
            (handed,) = theirs.batches.values()
            assert len(handed.requests) == 2
            paid = (await ibid.sql("SELECT SUM(actual_nusd) AS n FROM request"))[0]["n"]
            usage = Usage(theirs.input_tokens, theirs.output_tokens)
            assert paid == usage.input_tokens * 1500 + usage.output_tokens * 7500
        assert await balanced(ibid)


async def test_errors_expiry_and_cancelling_are_told_in_the_providers_words(data_dir, up):
    theirs = BatchUpstream(up, polls=0)
    async with running(data_dir, up.url, QUICK) as ibid, sdk(ibid) as client, sdk(ibid, "sk-b") as other:
        batch = await client.messages.batches.create(requests=[request(n, f"What is {n}?") for n in "abc"])
        await until(lambda: theirs.batches)
        with pytest.raises(anthropic.BadRequestError, match="must have ended"):
            await client.messages.batches.delete(batch.id)
        async with ibid.session.get(
            f"{ibid.url}/v1/messages/batches/{batch.id}/results", headers={"x-api-key": "sk-a"}
        ) as response:
            assert response.status == 404
        assert (await client.messages.batches.cancel(batch.id)).processing_status == "canceling"
        batch = await ended(client, batch)
        assert (batch.request_counts.succeeded, batch.request_counts.canceled) == (1, 2)
        assert {name: result.type for name, result in (await results(client, batch)).items()} == {
            "a": "succeeded", "b": "canceled", "c": "canceled"
        }  # fmt: skip
        theirs.polls, theirs.expire, theirs.refuse = 1, {0}, {1}
        second = await ended(client, await client.messages.batches.create(
            requests=[request(n, f"What is {n}?") for n in "def"]
        ))  # fmt: skip
        found = await results(client, second)
        assert {name: result.type for name, result in found.items()} == {
            "d": "expired",
            "e": "errored",
            "f": "succeeded",
        }
        assert found["e"].error.error.type == "invalid_request_error"
        assert [one.id async for one in client.messages.batches.list(limit=1)] == [second.id, batch.id]
        assert [one.id async for one in other.messages.batches.list()] == []
        for asked in (other.messages.batches.retrieve, other.messages.batches.cancel, other.messages.batches.delete):
            with pytest.raises(anthropic.NotFoundError):
                await asked(batch.id)
        assert (await client.messages.batches.delete(batch.id)).type == "message_batch_deleted"
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.batches.retrieve(batch.id)
        assert await balanced(ibid)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"requests": []}, "at least 1 item"),
        ({"requests": [{"params": {}}]}, "requests.0.custom_id: Field required"),
        ({"requests": [request("a b", "q")]}, "requests.0.custom_id: String should match"),
        ({"requests": [request("a", "q"), {"custom_id": "b"}]}, "requests.1.params: Field required"),
        ({"requests": [request("a", "q"), request("a", "r")]}, "'a' is not unique"),
        ({"requests": [request("a", "q", stream=True)]}, "Streaming is not supported"),
        ({"other": []}, "must be"),
        (b'{"requests": [{"custom_id": ', "must be"),
        (b'{"requests": [{"custom_id": oops}]}', "not valid JSON"),
        (b"", "Field required"),
    ],
)
async def test_a_batch_that_cannot_be_read_is_refused_at_once(exact, up, body, said):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"x-api-key": "sk-a", "anthropic-version": "2023-06-01", "Content-Type": "application/json"}
    async with exact.session.post(exact.url + "/v1/messages/batches", data=raw, headers=headers) as response:
        told = await response.json()
        assert (response.status, told["type"], told["error"]["type"]) == (400, "error", "invalid_request_error")
        assert said in told["error"]["message"]
    assert not up.requests


async def test_a_request_that_is_refused_is_an_errored_result(data_dir, up):
    up.default = lambda seen: message(seen) if seen.path == "/v1/messages" else Json(404, {})
    async with running(data_dir, up.url, QUICK) as ibid, sdk(ibid) as client:
        asked = [
            request("a", "Please refuse this."),
            request("b", "q", max_tokens="many"),
            request("c", "What is well?"),
        ]
        batch = await ended(client, await client.messages.batches.create(requests=asked))
        found = await results(client, batch)
        assert {name: result.type for name, result in found.items()} == {
            "a": "errored",
            "b": "errored",
            "c": "succeeded",
        }
        assert found["a"].error.error.message == "no"
        assert "max_tokens" in found["b"].error.error.message


async def test_files_and_models_of_anthropics_clients_pass_through(exact, up):
    headers = {"x-api-key": "sk-a", "anthropic-version": "2023-06-01"}
    for path in ("/v1/files", "/v1/models", "/v1/batches", "/v1/files/file-ibid" + "0" * 24):
        up.script(Json(200, {"data": []}))
        async with exact.session.get(exact.url + path, headers=headers) as response:
            assert response.status == 200
        assert up.requests[-1].path == path
