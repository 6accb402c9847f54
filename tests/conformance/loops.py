"""Drives one Python client that asks more than once for a task. Run by path with the interpreter that has the client.

Argument: a name of CLIENTS, below. Tasks and answers as in driver.py, and one more member of a task: `loop`, to let the
client run a tool. Imports nothing of this repository.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from driver import attempt
from pydantic import BaseModel

SYSTEM = "You are a helpful assistant."


class Trip(BaseModel):
    city: str
    days: int


def weather(city: str) -> str:
    """How the weather is.

    Args:
        city: where
    """
    return f"It is warm in {city}."


async def weather_async(city: str) -> str:
    """How the weather is."""
    return weather(city)


def dumped(trip: Any) -> str:
    return json.dumps(trip if isinstance(trip, dict) else trip.model_dump(), sort_keys=True)


def _langchain(task: dict[str, Any]) -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=task["model"], base_url=f"{task['url']}/v1", api_key=task["key"], max_retries=0)


async def langgraph(task: dict[str, Any]) -> str:
    from langgraph.prebuilt import create_react_agent

    more = {"response_format": Trip} if task["schema"] else {}
    graph = create_react_agent(_langchain(task), [weather] if task["loop"] else [], prompt=SYSTEM, **more)
    asked = {"messages": [("user", task["prompt"])]}
    if task["stream"]:
        parts = [part async for part, _ in graph.astream(asked, stream_mode="messages") if part.type != "tool"]
        return "".join(str(part.content) for part in parts)
    state = await graph.ainvoke(asked)
    return dumped(state["structured_response"]) if task["schema"] else str(state["messages"][-1].content)


async def openai_agents(task: dict[str, Any]) -> str:
    import agents
    from openai import AsyncOpenAI

    agents.set_tracing_disabled(True)
    async with AsyncOpenAI(base_url=f"{task['url']}/v1", api_key=task["key"], max_retries=0) as sdk:
        agent = agents.Agent(
            name="helper",
            instructions=SYSTEM,
            model=agents.OpenAIResponsesModel(task["model"], sdk),
            tools=[agents.function_tool(weather)] if task["loop"] else [],
            output_type=Trip if task["schema"] else None,
        )
        if task["stream"]:
            run = agents.Runner.run_streamed(agent, task["prompt"])
            async for _ in run.stream_events():
                pass
            return str(run.final_output)
        found = (await agents.Runner.run(agent, task["prompt"])).final_output
    return dumped(found) if task["schema"] else str(found)


async def autogen(task: dict[str, Any]) -> str:
    from autogen_agentchat.agents import AssistantAgent
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    able = {"vision": False, "function_calling": True, "json_output": True, "structured_output": True,
            "family": "unknown"}  # fmt: skip
    model = OpenAIChatCompletionClient(
        model=task["model"], base_url=f"{task['url']}/v1", api_key=task["key"], model_info=able, max_retries=0
    )
    agent = AssistantAgent(
        "helper",
        model,
        tools=[weather] if task["loop"] else [],
        system_message=SYSTEM,
        reflect_on_tool_use=True,
        model_client_stream=task["stream"],
        output_content_type=Trip if task["schema"] else None,
    )
    async for event in agent.run_stream(task=task["prompt"]):
        last = event
    said = last.messages[-1].content  # type: ignore[union-attr]
    await model.close()
    return dumped(said) if task["schema"] else str(said)


async def haystack(task: dict[str, Any]) -> str:
    from haystack.components.agents import Agent
    from haystack.components.generators.chat import OpenAIChatGenerator
    from haystack.dataclasses import ChatMessage
    from haystack.tools import create_tool_from_function
    from haystack.utils import Secret

    generator = OpenAIChatGenerator(
        model=task["model"],
        api_base_url=f"{task['url']}/v1",
        api_key=Secret.from_token(task["key"]),
        max_retries=0,
        generation_kwargs={"response_format": Trip} if task["schema"] else None,
    )
    pieces: list[str] = []

    def keep(chunk: Any) -> None:
        pieces.append(chunk.content or "")

    more = {"streaming_callback": keep} if task["stream"] else {}
    tools = [create_tool_from_function(weather)] if task["loop"] else []
    agent = Agent(chat_generator=generator, tools=tools, system_prompt=SYSTEM)
    found = await asyncio.to_thread(agent.run, messages=[ChatMessage.from_user(task["prompt"])], **more)
    said = found["messages"][-1].text
    return "".join(pieces) if task["stream"] else said


async def smolagents(task: dict[str, Any]) -> str:
    import smolagents as library

    model = library.OpenAIModel(
        task["model"], api_base=f"{task['url']}/v1", api_key=task["key"], client_kwargs={"max_retries": 0}, retry=False
    )
    if task["schema"]:
        shape = {"type": "json_schema", "json_schema": {"name": "trip", "schema": Trip.model_json_schema()}}
        asked = [library.ChatMessage(role="user", content=[{"type": "text", "text": task["prompt"]}])]
        return str((await asyncio.to_thread(model.generate, asked, response_format=shape)).content)
    agent = library.ToolCallingAgent(
        [library.tool(weather)], model, max_steps=3, verbosity_level=0, stream_outputs=task["stream"]
    )
    return str(await asyncio.to_thread(agent.run, task["prompt"]))


async def dspy(task: dict[str, Any]) -> str:
    import dspy as library

    model = library.LM(
        f"openai/{task['model']}", api_base=f"{task['url']}/v1", api_key=task["key"], cache=False, num_retries=0
    )
    with library.context(lm=model, adapter=library.ChatAdapter(use_json_adapter_fallback=False)):
        if task["schema"]:
            found = await library.Predict("question -> city: str, days: int").acall(question=task["prompt"])
            return dumped({"city": found.city, "days": found.days})
        if task["loop"]:
            return str((await library.ReAct("question -> answer", [weather]).acall(question=task["prompt"])).answer)
        predict = library.Predict("question -> answer")
        if not task["stream"]:
            return str((await predict.acall(question=task["prompt"])).answer)
        fields = [library.streaming.StreamListener("answer")]
        said = ""
        async for part in library.streamify(predict, stream_listeners=fields)(question=task["prompt"]):
            said += part.chunk if isinstance(part, library.streaming.StreamResponse) else ""
        return said


async def inspect_ai(task: dict[str, Any]) -> str:
    from inspect_ai.model import ChatMessageSystem, ChatMessageUser, GenerateConfig, ResponseSchema, get_model
    from inspect_ai.model import execute_tools as run_tools
    from inspect_ai.tool import tool
    from inspect_ai.util import json_schema

    @tool(name="weather")
    def telling() -> Any:
        async def execute(city: str) -> str:
            """How the weather is.

            Args:
                city: where
            """
            return weather(city)

        return execute

    shape = ResponseSchema(name="trip", json_schema=json_schema(Trip)) if task["schema"] else None
    model = get_model(
        f"openai/{task['model']}", base_url=f"{task['url']}/v1", api_key=task["key"], responses_api=False,
        config=GenerateConfig(max_retries=0, response_schema=shape), memoize=False,
    )  # fmt: skip
    said: list[Any] = [ChatMessageSystem(content=SYSTEM), ChatMessageUser(content=task["prompt"])]
    async with model:
        while True:
            try:
                answer = await model.generate(said, tools=[telling()] if task["loop"] else [])
            except Exception as error:  # its own message quotes the request, with an id drawn anew
                raise error.__cause__ or error from None
            if not answer.message.tool_calls:
                return answer.completion
            said.append(answer.message)
            said += (await run_tools(said, [telling()])).messages


CLIENTS: dict[str, Callable[[dict[str, Any]], Awaitable[str]]] = {
    "langgraph": langgraph, "openai-agents": openai_agents, "autogen": autogen, "haystack": haystack,
    "smolagents": smolagents, "dspy": dspy, "inspect-ai": inspect_ai,
}  # fmt: skip


def main() -> None:
    ask = CLIENTS[sys.argv[1]]
    loop = asyncio.new_event_loop()
    answers, sys.stdout = sys.stdout, sys.stderr  # some print what they do
    for line in sys.stdin:
        task = json.loads(line)

        async def run(task: dict[str, Any] = task) -> tuple[list[Any], str]:
            return [], await ask(task)

        said = loop.run_until_complete(attempt(run))
        print(json.dumps({"said": [said]}, default=str), flush=True, file=answers)


if __name__ == "__main__":
    main()
