"""The twelve recipes of the manual: `ibid serve` starts each as it stands on the page, a request shows what it is for.

The addresses in a recipe are moved to scripted servers by variables (`IBID_UPSTREAM__NAME__BASE_URL`), which beat the
file. Where meaning is not the point, `IBID_CACHE__SEMANTIC=false` starts without the embedding model. LiteLLM, Azure
and the clouds are stand-ins that speak their words.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from proxy.settings import config
from tests.docs.manual import DOCS
from tests.flows import batching
from tests.flows.running import MODEL, ROOT, Process, Reply, chat_body, credential, started, until
from tests.providers import provider
from tests.upstream import Chat, Json, ScriptedUpstream
from tests.waiting import PATIENCE_S

PAGE = (DOCS / "recipes.md").read_text()
RECIPES: Mapping[int, str] = {
    int(found[1]): found[2]
    for found in re.finditer(r"^## (\d+)\. (?:(?!^## |^```).)*^```toml\n(.*?)^```$", PAGE, re.M | re.S)
}
WITHOUT_MODEL = {"IBID_CACHE__SEMANTIC": "false"}
UNHURRIED = {"IBID_EMBEDDING__DEADLINE_MS": str(int(PATIENCE_S * 1000))}
KEYS = {
    "LOCAL_KEY": "sk-local",
    "DEEPSEEK_API_KEY": "sk-deepseek",
    "OPENAI_API_KEY": "sk-openai",
    "ANTHROPIC_API_KEY": "sk-a6c",
}
DOWN = Json(503, {"error": {"message": "down", "type": "server_error", "param": None, "code": None}})
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "capital", "strict": True, "schema": CITY}}


@pytest.fixture
async def other() -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream() as server:
        yield server


@contextlib.asynccontextmanager
async def recipe(
    number: int, data_dir: Path, env: Mapping[str, str] = WITHOUT_MODEL, **moved: ScriptedUpstream
) -> AsyncIterator[Process]:
    """`ibid serve --config` with a recipe; `moved`: the scripted server at the address of each upstream."""
    path = data_dir.with_suffix(".toml")
    path.write_text(RECIPES[number])
    places = {f"IBID_UPSTREAM__{name.upper()}__BASE_URL": server.url for name, server in moved.items()}
    arguments = ["--config", str(path), "--data-dir", str(data_dir)]
    async with started(arguments, data_dir.with_suffix(".log"), {**KEYS, **places, **env}, forked=True) as ibid:
        yield ibid


async def post(ibid: Process, path: str, body: Any, headers: Mapping[str, str]) -> Reply:
    async with ibid.session.post(ibid.url + path, json=body, headers=headers) as response:
        return Reply(response.status, response.headers, await response.read())


async def stored(ibid: Process, count: int, namespace: str | None = None) -> None:
    """So many answers are there, of this namespace if one is named."""

    async def are_there() -> bool:
        found = await ibid.entries()
        return len([one for one in found if namespace in (None, one["namespace"])]) >= count

    await until(are_there)


async def hit(ibid: Process, first: Reply, prompt: str, **asked: Any) -> Reply:
    """The repeat of a question whose first answer is stored."""
    assert (first.status, first.cache) == (200, "MISS"), first.body
    await stored(ibid, 1)
    again = await ibid.ask(prompt, **asked)
    assert again.cache == "HIT", again
    return again


async def sql(ibid: Process, statement: str) -> list[list[Any]]:
    return list((await ibid.admin("POST", "/savings/query", {"sql": statement}))["rows"])


def test_there_are_twelve_and_each_is_a_complete_file() -> None:
    assert list(RECIPES) == list(range(1, 13))
    assert len(re.findall(r"^\*Shows:\*", PAGE, re.M)) == 12


async def test_1_a_local_server_gets_its_own_key_and_repeats_are_hits(data_dir, up):
    async with recipe(1, data_dir, openai=up) as ibid:
        again = await hit(
            ibid, await ibid.ask("Hi there, who are you?", key="sk-mine"), "Hi there, who are you?", key="sk-mine"
        )
        assert [credential(seen) for seen in up.requests] == ["sk-local"]
        assert float(again.headers["x-cache-saved-usd"]) > 0


async def test_2_the_models_name_decides_which_cloud_is_asked(data_dir, up, other):
    async with recipe(2, data_dir, openai=up, deepseek=other) as ibid:
        assert (await ibid.ask("To whom?", key="sk-mine")).headers["x-upstream"] == "openai"
        assert (await ibid.ask("To whom?", key="sk-mine", model="deepseek-chat")).headers["x-upstream"] == "deepseek"
        nobody = await ibid.ask("To whom?", model="mistral-large")
        assert (nobody.status, nobody.json["error"]["code"]) == (404, "model_not_served")
    assert [credential(seen) for seen in (*up.requests, *other.requests)] == ["sk-mine", "sk-deepseek"]


async def test_3_azures_paths_are_cached_and_its_key_goes_on(data_dir, up):
    path = f"/openai/deployments/{MODEL}/chat/completions?api-version=2024-10-21"
    body = {"messages": [{"role": "user", "content": "Who are you?"}]}
    up.default = Chat(model=f"{MODEL}-2024-07-18")  # Azure names what is deployed
    async with recipe(3, data_dir, openai=up) as ibid:
        first = await post(ibid, path, body, {"api-key": "azure-key"})
        assert (first.status, first.cache) == (200, "MISS"), first.body
        await stored(ibid, 1)
        again = await post(ibid, path, body, {"api-key": "azure-key"})
        assert (again.cache, float(again.headers["x-cache-saved-usd"]) > 0) == ("HIT", True)
    (seen,) = up.requests
    assert (seen.path, seen.header("api-key")) == (path, "azure-key")


async def test_4_the_local_model_answers_while_the_cloud_does_not(data_dir, up, other):
    up.default = DOWN
    async with recipe(4, data_dir, openai=up, local=other) as ibid:
        reply = await ibid.ask("Are you there?", key="sk-mine")
        assert (reply.status, reply.tier, reply.headers["x-upstream"]) == (200, "edge", "local")
    assert len(up.requests) >= 1
    assert [credential(seen) for seen in other.requests] == [""]  # the client's key stays with ibid


@pytest.mark.parametrize(("said", "by"), [('{"city": "Paris"}', "local"), ("Paris, of course", "openai")])
async def test_5_the_local_models_answer_is_served_only_with_its_proof(data_dir, up, other, said, by):
    other.default, up.default = Chat(text=said), Chat(text='{"city": "Paris, of the cloud"}')
    async with recipe(5, data_dir, openai=up, local=other) as ibid:
        reply = await ibid.ask("Capital of France?", response_format=SCHEMA)
        assert reply.headers["x-upstream"] == by
        assert "city" in json.loads(reply.text)
    assert (len(other.requests), len(up.requests)) == (1, 0 if by == "local" else 1)


async def test_6_repeated_lines_are_asked_once_and_night_work_is_kept_a_month(data_dir, up):
    questions = ["Who wrote Faust?", "Who wrote Hamlet?", "Who wrote Faust?"]
    async with recipe(6, data_dir, openai=up) as ibid:
        async with batching.sdk(ibid) as client:
            batch = await batching.hand_in(client, [batching.line(f"n{i}", text) for i, text in enumerate(questions)])
            done = await batching.ended(client, batch)
            answers = await batching.rows(client, done.output_file_id)
        assert (done.status, sorted(answers)) == ("completed", ["n0", "n1", "n2"])
        assert batching.text(answers["n0"]) == batching.text(answers["n2"]) != batching.text(answers["n1"])
        assert up.meter.calls == 2

        async def is_booked() -> bool:
            return await sql(ibid, "SELECT COUNT(*) FROM saving WHERE mechanism = 'batch.dedup'") == [[1]]

        await until(is_booked)
        night = {"x-cache-tags": "night"}
        await ibid.ask("Who wrote Emma?", headers=night)
        await stored(ibid, 3)
        again = await ibid.ask("Who wrote Emma?", headers=night)
        assert 2_500_000 < int(re.search(r"ttl=(\d+)", again.headers["Cache-Status"])[1]) <= 2_592_000


async def test_7_each_team_has_its_own_answers_and_its_own_budget(data_dir, up):
    async with recipe(7, data_dir, openai=up) as ibid:
        wrong = await ibid.ask("May I?", key="sk-anybody")
        assert (wrong.status, wrong.json["error"]["code"]) == (401, "invalid_api_key")
        tight = {"project": "search", "limit_usd": ["0.000000001/day"]}
        search = (await ibid.admin("POST", "/cache/keys", tight))["secret"]
        support = (await ibid.admin("POST", "/cache/keys", {"project": "support"}))["secret"]
        await hit(ibid, await ibid.ask("May I?", key=search), "May I?", key=search)

        async def is_spent() -> bool:
            reply = await ibid.ask("And another one?", key=search)
            return reply.status == 429 and reply.json["error"]["code"] == "budget_exceeded"

        await until(is_spent)
        assert (await ibid.ask("May I?", key=search)).cache == "HIT"  # costs nothing
        assert (await ibid.ask("May I?", key=support)).cache == "MISS"  # another team's answer is not its own
    assert {credential(seen) for seen in up.requests} == {"sk-openai"}


async def test_8_a_namespace_has_its_own_lifetime_and_no_semantic_hits(data_dir, up):
    legal, other_words = {"x-cache-namespace": "legal"}, "Tell me, what is the capital of France?"
    async with recipe(8, data_dir, UNHURRIED, openai=up) as ibid:

        async def is_indexed() -> bool:
            return "\nibid_vectors 1.0\n" in await ibid.admin("GET", "/metrics")

        await ibid.ask("What is the capital of France?")
        await until(is_indexed)
        assert (await ibid.ask(other_words)).tier == "semantic"
        await ibid.ask("What is the capital of France?", headers=legal)
        await stored(ibid, 1, namespace="legal")
        assert (await ibid.ask(other_words, headers=legal)).cache == "MISS"
        again = await ibid.ask("What is the capital of France?", headers=legal)
        assert again.cache == "HIT"
        assert 3_000 < int(re.search(r"ttl=(\d+)", again.headers["Cache-Status"])[1]) <= 3_600


async def test_9_in_shadow_everything_is_asked_nothing_served_and_the_report_says_what_for(data_dir, up):
    async with recipe(9, data_dir, openai=up) as ibid:
        await ibid.ask("Would you have known?")
        await stored(ibid, 1)
        again = await ibid.ask("Would you have known?")
        assert (again.status, again.cache, again.reason) == (200, "SHADOW", "would_exact")
        assert up.meter.calls == 2

        async def is_told() -> bool:
            found = json.loads(await asyncio.to_thread(run, ["report", "--json", "--data-dir", str(data_dir)]))
            return found["shadow"]["would_be_hits"].get("exact", {}).get("requests") == 1

        await until(is_told)
        assert "Advice: " in await asyncio.to_thread(run, ["report", "--data-dir", str(data_dir)])


def run(arguments: list[str], env: Mapping[str, str] | None = None) -> str:
    """What a command prints."""
    around = {name: value for name, value in os.environ.items() if not name.startswith("IBID_")}
    command = [sys.executable, "-m", "proxy", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**around, **(env or {})}, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def migrate(places: list[str], env: Mapping[str, str]) -> None:
    run(["migrate", *places], env)


async def test_10_answers_and_ledger_are_in_postgresql(data_dir, up, pg_url):
    env = {**WITHOUT_MODEL, "IBID_DATABASE_URL": pg_url}
    path = data_dir.with_suffix(".toml")
    path.write_text(RECIPES[10])
    await asyncio.to_thread(migrate, ["--config", str(path), "--data-dir", str(data_dir)], env)
    async with recipe(10, data_dir, env, openai=up) as ibid:
        await hit(ibid, await ibid.ask("Where is this kept?"), "Where is this kept?")

        async def is_booked() -> bool:
            return await sql(ibid, "SELECT COUNT(*) FROM request WHERE lane = 'cache.exact'") == [[1]]

        await until(is_booked)
        assert "PostgreSQL" in (await sql(ibid, "SELECT version()"))[0][0]
    assert not (data_dir / "ibid.db").exists()


async def test_11_litellms_key_reaches_litellm_and_its_model_names_are_kept(data_dir, up):
    up.default = Chat(model="gpt-4o-mini-of-another-name")
    async with recipe(11, data_dir, openai=up, anthropic=up) as ibid:
        first = await ibid.ask("Who answers?", key="sk-litellm", model="smart")
        await hit(ibid, first, "Who answers?", key="sk-litellm", model="smart")
    assert [credential(seen) for seen in up.requests] == ["sk-litellm"]


async def test_12_nothing_leaves_for_the_outside(data_dir, up, tmp_path):
    path = tmp_path / "ibid.toml"
    path.write_text(RECIPES[12])
    upstreams = config.load(config.Flags(config=str(path)), {"HOME": "/home/ann"}).upstreams
    assert {name for name, one in upstreams.items() if ".internal" not in one.base_url} == {"gemini"}
    up.default = provider
    async with recipe(12, data_dir, openai=up, anthropic=up, ollama=up) as ibid:
        closed = await post(
            ibid, "/v1beta/models/gemini-2.5-flash:generateContent",
            {"contents": [{"role": "user", "parts": [{"text": "Hi?"}]}]}, {"x-goog-api-key": "k"},
        )  # fmt: skip
        assert (closed.status, up.requests) == (404, [])
        places = {  # each asks something else: one answer would serve all of them
            "/v1/chat/completions": {"Authorization": "Bearer sk-a"},
            "/v1/messages": {"x-api-key": "sk-a", "anthropic-version": "2023-06-01"},
            "/api/chat": {},
        }
        replies = [
            await post(ibid, path, chat_body(f"Are you inside, {path}?", max_tokens=99, stream=False), headers)
            for path, headers in places.items()
        ]
        assert [reply.status for reply in replies] == [200, 200, 200]
    assert len(up.requests) == 3
