"""The providers' own clients cannot tell ibid from the provider, and one stored answer serves all of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anthropic
import ollama
import openai
import pytest
from google import genai
from google.genai import errors as genai_errors

from tests.flows.running import EXACT_ONLY, Ibid, running
from tests.models import converted_data_dir
from tests.providers import MODEL, provider, text_for
from tests.upstream import Body, Json, ScriptedUpstream, Stream

ASKED = "How do I repair a leaking garden hose?"
REWORDED = "How can I repair a leaking garden hose?"
TOOL = {"type": "object", "properties": {"city": {"type": "string"}}}
KEY = "sk-dialects"
pytestmark = pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession:DeprecationWarning")
OPENED: list[Callable[[], Awaitable[None]]] = []  # how to close the clients of this test


@pytest.fixture(autouse=True)
async def closed() -> AsyncIterator[None]:
    yield
    while OPENED:
        await OPENED.pop()()


class Said(NamedTuple):
    """What a client made of an answer."""

    objects: list[dict[str, Any]]  # one, or the events of a stream
    text: str
    headers: Mapping[str, str]


class AnthropicClient:
    failure = anthropic.APIError

    def __init__(self, url: str) -> None:
        self.sdk = anthropic.AsyncAnthropic(base_url=url, api_key=KEY, max_retries=0)
        OPENED.append(self.sdk.close)

    async def ask(
        self, prompt: str, *, stream: bool = False, headers: Mapping[str, str] | None = None, **f: Any
    ) -> Said:
        ask = {"model": MODEL, "max_tokens": 512, "messages": [{"role": "user", "content": prompt}], **f}
        if prompt.startswith("call"):
            ask["tools"] = [{"name": "weather", "description": "Weather", "input_schema": TOOL}]
        raw = await self.sdk.messages.with_raw_response.create(**ask, stream=stream, extra_headers=headers)
        parsed = await raw.parse()
        objects = [event async for event in parsed] if stream else [parsed]
        if not stream:
            text = "".join(block.text for block in parsed.content if block.type == "text")
        else:
            deltas = [event.delta for event in objects if event.type == "content_block_delta"]
            text = "".join(delta.text for delta in deltas if delta.type == "text_delta")
        return Said([item.model_dump(mode="json") for item in objects], text, raw.headers)


class OpenAIClient:
    failure = openai.APIError

    def __init__(self, url: str) -> None:
        self.sdk = openai.AsyncOpenAI(base_url=url + "/v1", api_key=KEY, max_retries=0)
        OPENED.append(self.sdk.close)

    async def ask(
        self, prompt: str, *, stream: bool = False, headers: Mapping[str, str] | None = None, **f: Any
    ) -> Said:
        ask = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **f}
        if prompt.startswith("call"):
            function = {"name": "weather", "description": "Weather", "parameters": TOOL}
            ask["tools"] = [{"type": "function", "function": function}]
        raw = await self.sdk.chat.completions.with_raw_response.create(**ask, stream=stream, extra_headers=headers)
        parsed = raw.parse()
        objects = [chunk async for chunk in parsed] if stream else [parsed]
        parts = [c.choices[0].delta if stream else c.choices[0].message for c in objects if c.choices]
        text = "".join(part.content or "" for part in parts)
        return Said([item.model_dump(mode="json") for item in objects], text, raw.headers)


class GeminiClient:
    failure = Exception  # a cut body is whatever its transport says

    def __init__(self, url: str) -> None:
        options = genai.types.HttpOptions(base_url=url, retry_options=genai.types.HttpRetryOptions(attempts=1))
        self.sdk = genai.Client(api_key=KEY, http_options=options)
        OPENED.append(self.sdk.aio.aclose)

    async def ask(
        self, prompt: str, *, stream: bool = False, headers: Mapping[str, str] | None = None, **f: Any
    ) -> Said:
        config: dict[str, Any] = {"http_options": {"headers": dict(headers or {})}, **f}
        if prompt.startswith("call"):
            declared = {"name": "weather", "description": "Weather", "parameters_json_schema": TOOL}
            config["tools"] = [{"function_declarations": [declared]}]
        ask: dict[str, Any] = {"model": MODEL, "contents": prompt, "config": config}
        if stream:
            objects = [chunk async for chunk in await self.sdk.aio.models.generate_content_stream(**ask)]
        else:
            objects = [await self.sdk.aio.models.generate_content(**ask)]
        heads = objects[0].sdk_http_response.headers or {}
        text = "".join(
            part.text or ""
            for item in objects
            for part in ((item.candidates[0].content.parts if item.candidates else None) or ())
        )
        dumped = [item.model_dump(mode="json", exclude={"sdk_http_response", "response_id"}) for item in objects]
        return Said(dumped, text, {name.lower(): value for name, value in heads.items()})


class OllamaClient:
    failure = (ollama.ResponseError, Exception)

    def __init__(self, url: str) -> None:
        self.url = url
        self.headers: dict[str, str] = {}

    async def ask(
        self, prompt: str, *, stream: bool = False, headers: Mapping[str, str] | None = None, **f: Any
    ) -> Said:
        seen: dict[str, str] = {}

        async def note(response: Any) -> None:
            seen.update({name.lower(): value for name, value in response.headers.items()})

        sdk = ollama.AsyncClient(host=self.url, headers={"Authorization": f"Bearer {KEY}", **(headers or {})})
        sdk._client.event_hooks["response"].append(note)
        OPENED.append(sdk._client.aclose)
        ask: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], **f}
        if prompt.startswith("call"):
            function = {"name": "weather", "description": "Weather", "parameters": TOOL}
            ask["tools"] = [{"type": "function", "function": function}]
        answer = await sdk.chat(**ask, stream=stream)
        objects = [line async for line in answer] if stream else [answer]
        text = "".join(item.message.content or "" for item in objects)
        return Said([item.model_dump(mode="json", exclude={"created_at"}) for item in objects], text, seen)


CLIENTS: Mapping[str, Callable[[str], Any]] = {
    "anthropic": AnthropicClient, "gemini": GeminiClient, "ollama": OllamaClient, "openai": OpenAIClient,
}  # fmt: skip
every = pytest.mark.parametrize("name", sorted(CLIENTS))
streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


def prepare(data_dir: Path) -> None:
    """A data directory that finds the converted model."""
    data_dir.mkdir(mode=0o700)
    (data_dir / "models").symlink_to(converted_data_dir() / "models", target_is_directory=True)


@asynccontextmanager
async def served(data_dir: Path, cache: Mapping[str, Any]) -> AsyncIterator[tuple[ScriptedUpstream, Ibid]]:
    if cache.get("semantic", True):
        prepare(data_dir)
    sections = {"cache": cache, "embedding": {"deadline_ms": 10_000}}
    async with ScriptedUpstream(provider) as up, running(data_dir, up.url, sections) as ibid:
        yield up, ibid


async def ask(ibid: Ibid, client: Any, prompt: str, **fields: Any) -> Said:
    """Ask, and wait until what may be stored is stored."""
    said: Said = await client.ask(prompt, **fields)
    await ibid.settled()
    return said


def alike(said: Said) -> list[dict[str, Any]]:
    """What two answers to one question have in common: all but ids and times."""
    text = json.dumps(said.objects)
    for item in said.objects:
        for found in _ids(item):
            text = text.replace(json.dumps(found), '"*"')
    return [
        {name: value for name, value in item.items() if name not in ("created", "service_tier", "system_fingerprint")}
        for item in json.loads(text)
        if item.get("type") != "ping"
    ]


def _ids(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["id"]] if isinstance(value.get("id"), str) else []
        return own + [found for inner in value.values() for found in _ids(inner)]
    return [found for inner in value for found in _ids(inner)] if isinstance(value, list) else []


# -- one dialect ------------------------------------------------------------------------------------------------------


@every
@streamed
async def test_a_miss_and_a_hit_are_what_the_provider_itself_says(name: str, stream: bool, tmp_path: Path) -> None:
    async with served(tmp_path / "data", EXACT_ONLY["cache"]) as (up, ibid):
        direct = await CLIENTS[name](up.url).ask(ASKED, stream=stream)
        client = CLIENTS[name](ibid.url)
        miss, hit = [await ask(ibid, client, ASKED, stream=stream) for _ in range(2)]
        assert direct.text == miss.text == hit.text == text_for(ASKED)
        assert (miss.headers["x-cache"], hit.headers["x-cache"]) == ("MISS", "HIT")
        assert alike(miss) == alike(direct)
        if stream and name in ("anthropic", "gemini"):  # counters that grew on the way are told at the end
            assert [item["usage_metadata" if name == "gemini" else "type"] for item in alike(hit)[-1:]] == [
                item["usage_metadata" if name == "gemini" else "type"] for item in alike(direct)[-1:]
            ]
        else:
            assert alike(hit) == alike(direct)
        assert len(up.requests) == 2


@every
async def test_one_entry_serves_stream_and_whole(name: str, tmp_path: Path) -> None:
    async with served(tmp_path / "data", EXACT_ONLY["cache"]) as (up, ibid):
        client = CLIENTS[name](ibid.url)
        first = await ask(ibid, client, ASKED, stream=True)
        whole = await ask(ibid, client, ASKED)
        assert (first.text, whole.headers["x-cache"]) == (whole.text, "HIT")
        direct = await CLIENTS[name](up.url).ask(ASKED)
        assert alike(whole) == alike(direct)


@every
async def test_a_reworded_question_is_answered_from_the_cache(name: str, tmp_path: Path) -> None:
    async with served(tmp_path / "data", {}) as (up, ibid):
        client = CLIENTS[name](ibid.url)
        await ask(ibid, client, ASKED)
        again = await ask(ibid, client, REWORDED, stream=True)
        assert (again.headers["x-cache"], again.headers["x-cache-tier"]) == ("HIT", "semantic")
        assert again.text == text_for(ASKED)
        assert len(up.requests) == 1


@every
@streamed
async def test_a_tool_call_is_kept_unless_the_operator_wants_none(name: str, stream: bool, tmp_path: Path) -> None:
    asked = "call for the weather in Paris"
    async with served(tmp_path / "off", {**EXACT_ONLY["cache"], "cache_tool_calls": False}) as (up, ibid):
        client = CLIENTS[name](ibid.url)
        seen = [await ask(ibid, client, asked, stream=stream) for _ in range(2)]
        assert [said.headers["x-cache"] for said in seen] == ["MISS", "MISS"]
        direct = await CLIENTS[name](up.url).ask(asked, stream=stream)
        assert alike(seen[0]) == alike(direct)
    async with served(tmp_path / "on", EXACT_ONLY["cache"]) as (up, ibid):
        client = CLIENTS[name](ibid.url)
        seen = [await ask(ibid, client, asked, stream=stream) for _ in range(3)]
        assert [said.headers["x-cache"] for said in seen] == ["MISS", "HIT", "HIT"]
        assert "weather" in json.dumps(seen[1].objects)
        if name in ("anthropic", "openai"):
            ids = [{found for item in said.objects for found in _ids(item)} for said in seen]
            assert not ids[0] & ids[1]
            assert not ids[1] & ids[2]


@pytest.mark.parametrize("name", ["anthropic", "gemini"])
@streamed
async def test_signed_thoughts_are_replayed_as_they_were_and_to_nobody_else(
    name: str, stream: bool, tmp_path: Path
) -> None:
    asked = "think about why the sky is blue at noon"
    async with served(tmp_path / "data", {}) as (up, ibid):
        client = CLIENTS[name](ibid.url)
        miss, hit = [await ask(ibid, client, asked, stream=stream) for _ in range(2)]
        assert (miss.headers["x-cache"], hit.headers["x-cache"]) == ("MISS", "HIT")
        assert json.dumps(hit.objects).count("c2lnbmVk") == json.dumps(miss.objects).count("c2lnbmVk") > 0
        reworded = await ask(ibid, client, "think about why the sky is blue at midday", stream=stream)
        assert reworded.headers["x-cache"] == "MISS"
        other = await ask(ibid, OpenAIClient(ibid.url), asked)
        assert (other.headers["x-cache"], other.headers["x-cache-reason"]) == ("MISS", "not_expressible")
        assert len(up.requests) == 3


@every
async def test_fifty_clients_at_once_make_one_call(name: str, tmp_path: Path) -> None:
    async with served(tmp_path / "data", EXACT_ONLY["cache"]) as (up, ibid):
        client = CLIENTS[name](ibid.url)
        said = await asyncio.gather(*(client.ask(ASKED, stream=i % 2 == 0) for i in range(50)))
        assert {one.text for one in said} == {text_for(ASKED)}
        assert len(up.requests) == 1


# -- when it goes wrong -----------------------------------------------------------------------------------------------

ERRORS = {
    "anthropic": {"type": "error", "error": {"type": "rate_limit_error", "message": "Slow down."}},
    "gemini": {"error": {"code": 429, "message": "Slow down.", "status": "RESOURCE_EXHAUSTED"}},
    "ollama": {"error": "Slow down."},
    "openai": {"error": {"message": "Slow down.", "type": "rate_limit", "param": None, "code": "rate_limit"}},
}


def status_of(error: BaseException) -> int | None:
    found = getattr(error, "status_code", None) or getattr(error, "code", None)
    return found if isinstance(found, int) else None


@every
@streamed
async def test_the_providers_error_is_the_clients_error(name: str, stream: bool, tmp_path: Path) -> None:
    async with served(tmp_path / "data", EXACT_ONLY["cache"]) as (up, ibid):
        up.script(*[Json(429, ERRORS[name], headers={"Retry-After": "7"})] * 2)
        caught = []
        for url in (up.url, ibid.url):
            with pytest.raises(CLIENTS[name](url).failure) as raised:
                await CLIENTS[name](url).ask(ASKED, stream=stream)
            caught.append(raised.value)
        direct, through = caught
        assert type(through) is type(direct)
        assert status_of(through) == status_of(direct) == 429
        assert "Slow down." in str(through)


@every
async def test_an_error_of_ibid_is_said_in_the_clients_dialect(name: str, tmp_path: Path) -> None:
    async with served(tmp_path / "data", EXACT_ONLY["cache"]) as (_, ibid):
        client = CLIENTS[name](ibid.url)
        with pytest.raises(client.failure) as raised:
            await ask(ibid, client, ASKED, headers={"Cache-Control": "only-if-cached"})
        assert status_of(raised.value) == 504
        assert "Not in the cache" in str(raised.value)


@every
async def test_a_stream_that_breaks_off_is_an_error_and_is_not_kept(name: str, tmp_path: Path) -> None:
    async with served(tmp_path / "data", EXACT_ONLY["cache"]) as (up, ibid):

        def broken(seen: Any) -> Stream:
            whole = provider(seen)
            assert isinstance(whole, Stream)
            return Stream(whole.chunks[: len(whole.chunks) // 2], content_type=whole.content_type)

        up.script(broken)
        client = CLIENTS[name](ibid.url)
        with pytest.raises(client.failure):
            await ask(ibid, client, ASKED, stream=True)
        after = await ask(ibid, client, ASKED, stream=True)
        assert (after.headers["x-cache"], after.text) == ("MISS", text_for(ASKED))


async def test_a_broken_gemini_answer_is_an_error_of_its_client(tmp_path: Path) -> None:
    async with served(tmp_path / "data", EXACT_ONLY["cache"]) as (up, ibid):
        up.script(Body(status=400, body=json.dumps(ERRORS["gemini"]).encode()))
        with pytest.raises(genai_errors.ClientError):
            await GeminiClient(ibid.url).ask(ASKED)


# -- every dialect ----------------------------------------------------------------------------------------------------


@every
@streamed
async def test_an_answer_stored_in_one_dialect_is_served_in_every_other(
    name: str, stream: bool, tmp_path: Path
) -> None:
    async with served(tmp_path / "data", EXACT_ONLY["cache"]) as (up, ibid):
        first = await ask(ibid, CLIENTS[name](ibid.url), ASKED, stream=stream)
        assert first.headers["x-cache"] == "MISS"
        for other in CLIENTS:
            for as_stream in (False, True):
                said = await ask(ibid, CLIENTS[other](ibid.url), ASKED, stream=as_stream)
                assert (other, said.headers["x-cache"]) == (other, "HIT")
                assert said.text == text_for(ASKED)
        assert len(up.requests) == 1
        rows = await ibid.sql(
            "SELECT SUM(baseline_nusd - actual_nusd) - (SELECT SUM(saved_nusd) FROM saving) AS off FROM request"
        )
        assert rows == [{"off": 0}]


@pytest.mark.parametrize("name", sorted({*CLIENTS} - {"gemini"}))
async def test_a_limit_is_kept_whoever_stored_the_answer(name: str, tmp_path: Path) -> None:
    """max_tokens is not part of the question: an answer that stayed below it is the answer."""
    limits = {"anthropic": "max_tokens", "openai": "max_completion_tokens"}
    async with served(tmp_path / "data", EXACT_ONLY["cache"]) as (_, ibid):
        await ask(ibid, AnthropicClient(ibid.url), ASKED)

        def under(tokens: int) -> dict[str, Any]:
            return {limits[name]: tokens} if name in limits else {"options": {"num_predict": tokens}}

        within = await ask(ibid, CLIENTS[name](ibid.url), ASKED, **under(25))
        beyond = await ask(ibid, CLIENTS[name](ibid.url), ASKED, **under(24))
        assert (within.headers["x-cache"], beyond.headers["x-cache"]) == ("HIT", "MISS")
        assert beyond.headers["x-cache-reason"] == "max_tokens"


async def test_an_operator_sees_how_a_request_of_another_dialect_would_be_answered(tmp_path: Path) -> None:
    async with served(tmp_path / "data", EXACT_ONLY["cache"]) as (_, ibid):
        await ask(ibid, OpenAIClient(ibid.url), ASKED)
        body = {"model": MODEL, "messages": [{"role": "user", "content": ASKED}], "max_tokens": 512}
        found = await ibid.admin("POST", "/cache/explain?path=/v1/messages", body)
        assert (found["verdict"], found["tier"]) == ("hit", "exact")
        short = await ibid.admin("POST", "/cache/explain?path=/v1/messages", {**body, "max_tokens": 3})
        assert (short["verdict"], short["reason"]) == ("miss", "max_tokens")


async def test_two_credentials_never_share_across_dialects(tmp_path: Path) -> None:
    async with served(tmp_path / "data", EXACT_ONLY["cache"]) as (up, ibid):
        await ask(ibid, AnthropicClient(ibid.url), ASKED)
        stranger = OpenAIClient(ibid.url)
        stranger.sdk = stranger.sdk.with_options(api_key="sk-other")
        assert (await ask(ibid, stranger, ASKED)).headers["x-cache"] == "MISS"
        assert len(up.requests) == 2


async def test_an_ollama_client_needs_no_key_on_the_loopback(tmp_path: Path) -> None:
    async with served(tmp_path / "data", EXACT_ONLY["cache"]) as (up, ibid):
        sdk = ollama.AsyncClient(host=ibid.url)
        OPENED.append(sdk._client.aclose)
        for _ in range(2):
            answer = await sdk.generate(model=MODEL, prompt=ASKED)
            assert answer.response == text_for(ASKED)
        assert len(up.requests) == 1
        async with ibid.session.get(ibid.url + "/v1/models") as refused:
            assert refused.status == 401


async def test_the_request_id_is_where_the_client_looks_for_it(tmp_path: Path) -> None:
    async with served(tmp_path / "data", EXACT_ONLY["cache"]) as (_, ibid):
        for _ in range(2):
            await ibid.settled()
            message = await AnthropicClient(ibid.url).sdk.messages.create(
                model=MODEL, max_tokens=512, messages=[{"role": "user", "content": ASKED}]
            )
            assert message._request_id
