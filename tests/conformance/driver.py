"""Drives one Python client; the twin of driver.mjs. Run by path with the interpreter that has the client.

Argument: a name of CLIENTS, below. Imports nothing of this repository.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

TOOL = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "weather", "description": "Weather", "parameters": TOOL}
Said = tuple[list[Any], str]
Ask = Callable[[], Awaitable[Said]]


def openai(task: dict[str, Any]) -> Ask:
    from openai import AsyncOpenAI

    sdk = AsyncOpenAI(base_url=f"{task['url']}/v1", api_key=task["key"], max_retries=0)
    ask: dict[str, Any] = {"model": task["model"], "messages": [{"role": "user", "content": task["prompt"]}]}
    if task["tools"]:
        ask["tools"] = [{"type": "function", "function": FUNCTION}]
    if task["schema"]:
        schema = {"name": "trip", "schema": task["schema"], "strict": True}
        ask["response_format"] = {"type": "json_schema", "json_schema": schema}

    async def run() -> Said:
        async with sdk:
            answer = await sdk.chat.completions.create(**ask, stream=task["stream"])
            objects = [chunk async for chunk in answer] if task["stream"] else [answer]
        parts = [c.delta if task["stream"] else c.message for o in objects for c in o.choices]
        return [o.model_dump(mode="json") for o in objects], "".join(part.content or "" for part in parts)

    return run


def openai_responses(task: dict[str, Any]) -> Ask:
    from openai import AsyncOpenAI

    sdk = AsyncOpenAI(base_url=f"{task['url']}/v1", api_key=task["key"], max_retries=0)
    ask: dict[str, Any] = {"model": task["model"], "input": task["prompt"]}
    if task["tools"]:
        ask["tools"] = [{"type": "function", "strict": False, **FUNCTION}]
    if task["schema"]:
        ask["text"] = {"format": {"type": "json_schema", "name": "trip", "schema": task["schema"], "strict": True}}

    async def run() -> Said:
        async with sdk:
            answer = await sdk.responses.create(**ask, stream=task["stream"])
            objects = [event async for event in answer] if task["stream"] else [answer]
        dumped = [o.model_dump(mode="json", warnings=False) for o in objects]
        if task["stream"]:
            return dumped, "".join(o.delta for o in objects if o.type == "response.output_text.delta")
        return dumped, answer.output_text

    return run


def openai_completions(task: dict[str, Any]) -> Ask:
    from openai import AsyncOpenAI

    sdk = AsyncOpenAI(base_url=f"{task['url']}/v1", api_key=task["key"], max_retries=0)

    async def run() -> Said:
        async with sdk:
            answer = await sdk.completions.create(model=task["model"], prompt=task["prompt"], stream=task["stream"])
            objects = [chunk async for chunk in answer] if task["stream"] else [answer]
        text = "".join(choice.text or "" for o in objects for choice in o.choices)
        return [o.model_dump(mode="json") for o in objects], text

    return run


def openai_embeddings(task: dict[str, Any]) -> Ask:
    from openai import AsyncOpenAI

    sdk = AsyncOpenAI(base_url=f"{task['url']}/v1", api_key=task["key"], max_retries=0)

    async def run() -> Said:
        async with sdk:
            answer = await sdk.embeddings.create(model=task["model"], input=task.get("inputs") or task["prompt"])
        return [answer.model_dump(mode="json")], ""

    return run


def anthropic(task: dict[str, Any]) -> Ask:
    from anthropic import AsyncAnthropic

    ask: dict[str, Any] = {"model": task["model"], "messages": [{"role": "user", "content": task["prompt"]}]}
    if task["tools"]:
        ask["tools"] = [{"name": "weather", "description": "Weather", "input_schema": TOOL}]
    if task["schema"]:
        ask["output_config"] = {"format": {"type": "json_schema", "schema": task["schema"]}}

    async def run() -> Said:
        async with AsyncAnthropic(base_url=task["url"], api_key=task["key"], max_retries=0) as sdk:
            if task["stream"]:
                async with sdk.messages.stream(**ask, max_tokens=8000) as events:
                    message = await events.get_final_message()
            else:
                message = await sdk.messages.create(**ask, max_tokens=8000)
        if message.stop_reason is None:
            raise RuntimeError("the message has no end")
        return [message.model_dump(mode="json")], "".join(getattr(b, "text", "") for b in message.content)

    return run


def gemini(task: dict[str, Any]) -> Ask:
    from google import genai

    retry = genai.types.HttpRetryOptions(attempts=1)
    options = genai.types.HttpOptions(base_url=task["url"], retry_options=retry)
    config: dict[str, Any] = {}
    if task["tools"]:
        declared = {"name": "weather", "description": "Weather", "parameters_json_schema": TOOL}
        config["tools"] = [{"function_declarations": [declared]}]
    if task["schema"]:
        config |= {"response_mime_type": "application/json", "response_json_schema": task["schema"]}
    ask = {"model": task["model"], "contents": task["prompt"], "config": config}

    def ask_synchronously() -> Said:  # the other transport of this client than its asyncio one
        with genai.Client(api_key=task["key"], http_options=options) as sdk:
            if task["stream"]:
                objects = list(sdk.models.generate_content_stream(**ask))
            else:
                objects = [sdk.models.generate_content(**ask)]
        parts = [p for o in objects for c in o.candidates or () for p in (c.content and c.content.parts) or ()]
        dumped = [o.model_dump(mode="json", exclude={"sdk_http_response", "response_id"}) for o in objects]
        return dumped, "".join(part.text or "" for part in parts)

    return lambda: asyncio.to_thread(ask_synchronously)


def ollama(task: dict[str, Any]) -> Ask:
    from ollama import AsyncClient

    ask: dict[str, Any] = {"model": task["model"], "messages": [{"role": "user", "content": task["prompt"]}]}
    if task["tools"]:
        ask["tools"] = [{"type": "function", "function": FUNCTION}]
    if task["schema"]:
        ask["format"] = task["schema"]

    async def run() -> Said:
        sdk = AsyncClient(host=task["url"], headers={"Authorization": f"Bearer {task['key']}"})
        answer = await sdk.chat(**ask, stream=task["stream"])
        objects = [line async for line in answer] if task["stream"] else [answer]
        dumped = [o.model_dump(mode="json", exclude={"created_at"}) for o in objects]
        return dumped, "".join(o.message.content or "" for o in objects)

    return run


def gemini_embeddings(task: dict[str, Any]) -> Ask:
    from google import genai

    retry = genai.types.HttpRetryOptions(attempts=1)
    options = genai.types.HttpOptions(base_url=task["url"], retry_options=retry)

    def ask_synchronously() -> Said:
        with genai.Client(api_key=task["key"], http_options=options) as sdk:
            said = sdk.models.embed_content(model=task["model"], contents=task.get("inputs") or task["prompt"])
        return [said.model_dump(mode="json", exclude={"sdk_http_response"})], ""

    return lambda: asyncio.to_thread(ask_synchronously)


def ollama_embeddings(task: dict[str, Any]) -> Ask:
    from ollama import AsyncClient

    async def run() -> Said:
        sdk = AsyncClient(host=task["url"], headers={"Authorization": f"Bearer {task['key']}"})
        said = await sdk.embed(task["model"], task.get("inputs") or task["prompt"])
        return [said.model_dump(mode="json", exclude={"total_duration", "load_duration"})], ""

    return run


def _langchain(chat: Any, task: dict[str, Any]) -> Ask:
    if task["tools"]:
        chat = chat.bind_tools([{"type": "function", "function": FUNCTION}])
    if task["schema"]:
        chat = chat.with_structured_output({"title": "trip", **task["schema"]}, method="json_schema")

    async def run() -> Said:
        if task["schema"]:
            found = await chat.ainvoke(task["prompt"])
            return [found], json.dumps(found, sort_keys=True)
        if task["stream"]:
            whole: Any = None
            async for chunk in chat.astream(task["prompt"]):
                whole = chunk if whole is None else whole + chunk
        else:
            whole = await chat.ainvoke(task["prompt"])
        calls = [{"name": call["name"], "args": call["args"]} for call in whole.tool_calls]
        usage = dict(whole.usage_metadata or {})
        return [{"text": str(whole.text), "calls": calls, "usage": usage}], str(whole.text)

    return run


def langchain_openai(task: dict[str, Any]) -> Ask:
    from langchain_openai import ChatOpenAI

    return _langchain(
        ChatOpenAI(model=task["model"], base_url=f"{task['url']}/v1", api_key=task["key"], max_retries=0), task
    )


def langchain_anthropic(task: dict[str, Any]) -> Ask:
    from langchain_anthropic import ChatAnthropic

    return _langchain(
        ChatAnthropic(model=task["model"], base_url=task["url"], api_key=task["key"], max_retries=0, max_tokens=8000),
        task,
    )


def llama_index(task: dict[str, Any]) -> Ask:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai import OpenAI

    llm = OpenAI(model="gpt-4o-mini", api_base=f"{task['url']}/v1", api_key=task["key"], max_retries=0)
    more: dict[str, Any] = {}
    if task["tools"]:
        more["tools"] = [{"type": "function", "function": FUNCTION}]
    if task["schema"]:
        schema = {"name": "trip", "schema": task["schema"], "strict": True}
        more["response_format"] = {"type": "json_schema", "json_schema": schema}
    asked = [ChatMessage(role="user", content=task["prompt"])]

    async def run() -> Said:
        if task["stream"]:
            last = [said async for said in await llm.astream_chat(asked, **more)][-1]
        else:
            last = await llm.achat(asked, **more)
        calls = [block.tool_kwargs for block in last.message.blocks if hasattr(block, "tool_kwargs")]
        return [{"text": last.message.content, "calls": calls}], last.message.content or ""

    return run


def pydantic_ai(task: dict[str, Any]) -> Ask:
    from pydantic import BaseModel
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Trip(BaseModel):
        city: str
        days: int

    provider = OpenAIProvider(base_url=f"{task['url']}/v1", api_key=task["key"])
    model = OpenAIChatModel(task["model"], provider=provider)

    async def run() -> Said:
        if task["schema"]:
            from pydantic_ai import NativeOutput

            found = await Agent(model, output_type=NativeOutput(Trip), retries=0).run(task["prompt"])
            return [found.output.model_dump()], json.dumps(found.output.model_dump(), sort_keys=True)
        if task["tools"]:  # an agent would go on with what the tool says
            return await _bare_call(model, task)
        agent = Agent(model, retries=0)
        if task["stream"]:
            async with agent.run_stream(task["prompt"]) as streamed:
                text = await streamed.get_output()
                usage = streamed.usage() if callable(streamed.usage) else streamed.usage
        else:
            found = await agent.run(task["prompt"])
            text, usage = found.output, found.usage() if callable(found.usage) else found.usage
        return [{"text": text, "in": usage.input_tokens, "out": usage.output_tokens}], text

    return run


async def _bare_call(model: Any, task: dict[str, Any]) -> Said:
    from pydantic_ai import ModelRequest, direct
    from pydantic_ai.models import ModelRequestParameters
    from pydantic_ai.tools import ToolDefinition

    weather = ToolDefinition(name="weather", description="Weather", parameters_json_schema=TOOL)
    asked = [ModelRequest.user_text_prompt(task["prompt"])]
    wanted = ModelRequestParameters(function_tools=[weather])
    if task["stream"]:
        async with direct.model_request_stream(model, asked, model_request_parameters=wanted) as stream:
            events = [event async for event in stream]
            answer = stream.get()
        kinds = [type(event).__name__ for event in events]
    else:
        answer, kinds = await direct.model_request(model, asked, model_request_parameters=wanted), []
    calls = [{"name": call.tool_name, "args": call.args_as_dict()} for call in answer.tool_calls]
    usage = {"in": answer.usage.input_tokens, "out": answer.usage.output_tokens}
    return [{"calls": calls, "usage": usage, "events": kinds}], answer.text or ""


def instructor(task: dict[str, Any]) -> Ask:
    import instructor as library
    from openai import AsyncOpenAI
    from pydantic import BaseModel

    class Trip(BaseModel):
        city: str
        days: int

    class weather(BaseModel):  # a model's name is its tool's
        city: str

    mode = library.Mode.TOOLS if task["tools"] else library.Mode.JSON_SCHEMA
    ask = {"model": task["model"], "messages": [{"role": "user", "content": task["prompt"]}],
           "response_model": weather if task["tools"] else Trip, "max_retries": 0}  # fmt: skip

    async def run() -> Said:
        async with AsyncOpenAI(base_url=f"{task['url']}/v1", api_key=task["key"], max_retries=0) as sdk:
            client = library.from_openai(sdk, mode=mode)
            if task["stream"]:
                partial = client.chat.completions.create_partial(**ask)
                objects = [found.model_dump() async for found in partial]
            else:
                objects = [(await client.chat.completions.create(**ask)).model_dump()]
        return objects, str(objects[-1]["city"])

    return run


CLIENTS: dict[str, Callable[[dict[str, Any]], Ask]] = {
    "openai": openai, "responses": openai_responses, "completions": openai_completions,
    "embeddings": openai_embeddings, "anthropic": anthropic, "gemini": gemini, "ollama": ollama,
    "gemini-embeddings": gemini_embeddings, "ollama-embeddings": ollama_embeddings,
    "langchain-openai": langchain_openai, "langchain-anthropic": langchain_anthropic, "llama-index": llama_index,
    "pydantic-ai": pydantic_ai, "instructor": instructor,
}  # fmt: skip


async def attempt(ask: Ask) -> dict[str, Any]:
    try:
        objects, text = await ask()
    except Exception as error:  # whatever the client makes of it is what is compared
        cause: BaseException | None = error
        status = None
        while cause is not None and status is None:
            found = getattr(cause, "status_code", None) or getattr(cause, "code", None)
            status = found if isinstance(found, int) else None
            cause = cause.__cause__ or cause.__context__
        return {"error": {"status": status, "kind": type(error).__name__, "message": str(error)[:300]}}
    return {"objects": objects, "text": text}


def main() -> None:
    make = CLIENTS[sys.argv[1]]
    loop = asyncio.new_event_loop()
    for line in sys.stdin:
        task = json.loads(line)

        async def all_of(task: dict[str, Any] = task) -> list[dict[str, Any]]:
            return list(await asyncio.gather(*(attempt(make(task)) for _ in range(task.get("times", 1)))))

        print(json.dumps({"said": loop.run_until_complete(all_of())}, default=str), flush=True)


if __name__ == "__main__":
    main()
