"""The official client, both majors in use, cannot tell ibid from the provider except by headers."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.running import chat_body
from tests.upstream import Chat, Json, Seen, Stream, event
from tests.waiting import PATIENCE_S

DRIVER = Path(__file__).with_name("sdk_driver.py")
ASKED = "How do I repair a leaking garden hose?"
REWORDED = "How can I repair a leaking garden hose?"


def python_with(major: str) -> str:
    """An interpreter that has this major of the client."""
    if major == "3":
        return sys.executable
    found = os.environ.get("IBID_OPENAI2_PYTHON")
    if not found:
        reason = "IBID_OPENAI2_PYTHON does not name a Python with openai 2.x; `make test` sets it"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


class Driver:
    """The client of one major in a process of its own, a new client object for every list of steps."""

    def __init__(self, major: str, child: subprocess.Popen[str]) -> None:
        self.major = major
        self.child = child

    def converse(self, task: dict) -> dict:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        print(json.dumps(task), file=self.child.stdin, flush=True)
        line = self.child.stdout.readline()
        assert line, "the client's process has ended"
        return json.loads(line)


@pytest.fixture(scope="module", params=["2", "3"])
def client(request: pytest.FixtureRequest) -> Iterator[Driver]:
    command = [python_with(request.param), str(DRIVER)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") as child:
        try:
            yield Driver(request.param, child)
            child.stdin.close()
            assert child.wait(PATIENCE_S) == 0
        finally:
            child.kill()


async def drive(client: Driver, url: str, steps: list[dict], key: str = "sk-a"):
    """What the client made of every step; its major version is the one asked for."""
    task = {"base_url": f"{url}/v1", "key": key, "steps": steps}
    talk = asyncio.get_running_loop().run_in_executor(None, client.converse, task)
    try:
        async with asyncio.timeout(PATIENCE_S):
            answer = await asyncio.shield(talk)
    except TimeoutError:
        client.child.kill()  # and so end the thread that reads
        raise
    assert answer["version"].startswith(f"{client.major}.")
    return answer["results"]


def steady(seen):
    """The same answer for the same question every time, but for its id and time; some questions fail."""
    prompt = seen.json["messages"][-1]["content"]
    if prompt.startswith("fail "):
        status = int(prompt.split()[1])
        error = {"message": f"refused {status}", "type": "some_error", "param": "model", "code": f"c{status}"}
        return Json(status, {"error": error}, {"Retry-After": "13"} if status == 429 else {})
    return Chat(text=f"This is the answer: {ASKED} Ünïcode \U0001f600 \\n.")


def without_ids(result):
    """A result without what must differ: ids and times."""
    return {
        "types": result["types"],
        "text": result["text"],
        "objects": [{**item, "id": "", "created": 0} for item in result["objects"]],
    }


def without_null_usage(result):
    """On a miss ibid asks for the usage chunk, and the upstream then writes `"usage": null` into the others too."""
    objects = [{k: v for k, v in item.items() if (k, v) != ("usage", None)} for item in result["objects"]]
    return without_ids({**result, "objects": objects})


async def test_the_client_reads_the_same_objects_on_miss_hit_and_semantic_hit(ibid, up, client):
    up.default = steady
    forms = [
        {"stream": False, "usage": False},
        {"stream": True, "usage": False},
        {"stream": True, "usage": True},
    ]
    direct = await drive(client, up.url, [{"prompt": ASKED, **form} for form in forms])
    assert [len(result["objects"]) > 1 for result in direct] == [False, True, True]
    fresh = [{"prompt": ASKED, "headers": {"x-cache-namespace": f"n{i}"}, **form} for i, form in enumerate(forms)]
    missed = await drive(client, ibid.url, fresh)
    await ibid.settled()
    again = [{**step, **form} for step in fresh for form in forms]
    hits = await drive(client, ibid.url, again + [{**step, "prompt": REWORDED} for step in again])
    assert [result["cache"] for result in missed] == ["MISS"] * 3
    assert [result["tier"] for result in hits] == ["exact"] * 9 + ["semantic"] * 9
    for original, result in zip(direct, missed, strict=True):
        assert without_null_usage(result) == without_null_usage(original)
    assert without_ids(missed[2]) == without_ids(direct[2])
    for number, result in enumerate(hits):
        original = direct[number % 3]
        assert (result["types"], result["text"]) == (original["types"], original["text"])
        if number % 3 == 0 or (number // 3) % 3 > 0:  # a stream replayed from a whole answer is cut where ibid likes
            assert without_ids(result) == without_ids(original), number
        ids = {item["id"] for item in result["objects"]}
        assert len(ids) == 1
        assert ids.isdisjoint(item["id"] for item in original["objects"])
    assert up.meter.calls == 6


async def test_the_client_raises_the_same_errors(exact, up, client):
    up.default = steady
    statuses = (400, 401, 404, 422, 429, 500, 503)
    steps = [{"prompt": f"fail {status}", "stream": stream} for stream in (False, True) for status in statuses]
    direct = await drive(client, up.url, steps)
    through = await drive(client, exact.url, steps)
    assert through == direct
    assert [result["error"]["class"] for result in through] == [
        "BadRequestError",
        "AuthenticationError",
        "NotFoundError",
        "UnprocessableEntityError",
        "RateLimitError",
        "InternalServerError",
        "InternalServerError",
    ] * 2
    assert {through[n]["error"]["retry_after"] for n in (4, 11)} == {"13"}


async def test_the_client_raises_when_a_stream_is_cut(exact, up, client):
    head = {"id": "chatcmpl-x", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o-mini"}
    piece = event({**head, "choices": [{"index": 0, "delta": {"content": "Half an"}, "finish_reason": None}]})
    finish = event({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    done = event("[DONE]")
    cuts = [Stream([piece], cut="fin"), Stream([piece], cut="rst"), Stream([piece]),
            Stream([piece, finish, piece[:20]]), Stream([piece, done]), Stream([piece, piece[:20]])]  # fmt: skip
    up.script(*cuts)
    results = await drive(client, exact.url, [{"prompt": f"{ASKED} {n}", "stream": True} for n in range(len(cuts))])
    for result in results:
        assert result["error"]["class"] == "APIError", result
        assert result["error"]["code"] in ("upstream_incomplete", "upstream_reset")
        assert result["before"] >= 1
    await exact.settled()
    assert await exact.entries() == []


async def test_our_own_errors_read_as_the_providers(exact, up, client):
    steps = [{"prompt": ASKED, "headers": {"Cache-Control": "only-if-cached"}}]
    steps += [{"prompt": ASKED, "headers": {"x-cache-ttl": "soon"}}]
    missing, refused = await drive(client, exact.url, steps)
    assert (missing["error"]["status"], missing["error"]["code"]) == (504, "not_cached")
    assert missing["error"]["class"] == "InternalServerError"
    assert (refused["error"]["status"], refused["error"]["param"]) == (400, "x-cache-ttl")
    assert up.requests == []


async def test_the_client_reads_the_same_vectors_whatever_was_seen_of_them(exact, up, client):
    inputs = [f"passage {i} of a corpus" for i in range(20)]
    steps = [{"inputs": inputs, "format": form} for form in (None, "float", "base64")]
    direct = await drive(client, up.url, steps)
    await drive(client, exact.url, [{"inputs": inputs[::2]}])
    await exact.settled()
    (partial,) = await drive(client, exact.url, steps[:1])
    await exact.settled()
    hits = await drive(client, exact.url, steps)
    tokens = [{"inputs": asked} for asked in ([1, 2, 3], [[4, 5], [6]])]
    assert (partial["cache"], partial["partial"]) == ("MISS", "10/20")
    assert [hit["cache"] for hit in hits] == ["HIT"] * 3
    assert partial["vectors"] == direct[0]["vectors"]
    assert [(hit["vectors"], hit["tokens"]) for hit in hits] == [(one["vectors"], one["tokens"]) for one in direct]
    told = [answer["vectors"] for answer in await drive(client, exact.url, tokens)]
    assert told == [answer["vectors"] for answer in await drive(client, up.url, tokens)]


async def test_the_client_hands_in_a_batch_and_reads_its_results(exact, up, client):
    up.default = lambda seen: steady(seen) if seen.path == "/v1/chat/completions" else Json(404, {})
    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": chat_body(prompt)}
        for name, prompt in (("a", ASKED), ("b", ASKED), ("c", REWORDED))
    ]
    (result,) = await drive(client, exact.url, [{"lines": lines}])
    text = steady(Seen("POST", "", (), json.dumps(lines[0]["body"]).encode())).text
    assert result == {
        "status": "completed", "completed": 3, "texts": dict.fromkeys("abc", text), "listed": True, "deleted": True
    }  # fmt: skip
    assert sum(seen.path == "/v1/chat/completions" for seen in up.requests) == 2
