"""Drives the official `openai` client's Responses and legacy completions, as sdk_driver.py does chat completions.

A step is {"ask": {...}, "form", "headers"?}: `ask` are the arguments of the call, `form` is "whole", "stream", "helper"
(`responses.stream`), "completion" or "completion_stream". A result tells ids, text, items and headers of what came, and
of a stream the types of its events; or {"error": {...}, "before": events}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import openai


def run(client: openai.OpenAI, step: dict[str, Any]) -> dict[str, Any]:
    told: list[Any] = []
    try:
        if step["form"].startswith("completion"):
            return completed(client, step, told)
        if step["form"] == "helper":
            with client.responses.stream(**step["ask"], extra_headers=step.get("headers") or {}) as stream:
                told.extend(stream)
                final = stream.get_final_response()
            return {**described(final), "types": [event.type for event in told], "deltas": deltas(told)}
        stream = {"stream": True} if step["form"] == "stream" else {}
        create = client.responses.with_raw_response.create
        raw = create(**step["ask"], **stream, extra_headers=step.get("headers") or {})
        parsed = raw.parse()
        head = {"cache": raw.headers.get("x-cache"), "tier": raw.headers.get("x-cache-tier"),
                "reason": raw.headers.get("x-cache-reason")}  # fmt: skip
        if not stream:
            return {**described(parsed), **head, "types": []}
        for event in parsed:
            told.append(event)
        numbers = [event.sequence_number for event in told]
        assert numbers == list(range(len(numbers))), numbers
        return {
            **described(told[-1].response),
            **head,
            "types": [event.type for event in told],
            "deltas": deltas(told),
            "lifecycle": sorted({event.response.id for event in told if hasattr(event, "response")}),
        }
    except openai.APIError as error:
        found = {"class": type(error).__name__, "code": error.code, "message": error.message}
        return {"error": found, "before": len(told)}


def deltas(told: list[Any]) -> list[str]:
    return [event.delta for event in told if event.type == "response.output_text.delta"]


def described(response: Any) -> dict[str, Any]:
    return {
        "id": response.id,
        "text": response.output_text,
        "items": [item.to_dict(mode="json") for item in response.output],
        "status": response.status,
        "usage": response.usage and response.usage.total_tokens,
    }


def completed(client: openai.OpenAI, step: dict[str, Any], told: list[Any]) -> dict[str, Any]:
    stream = {"stream": True} if step["form"] == "completion_stream" else {}
    raw = client.completions.with_raw_response.create(**step["ask"], **stream)
    parsed = raw.parse()
    told.extend(parsed if stream else [parsed])
    return {
        "ids": sorted({item.id for item in told}),
        "text": "".join(choice.text for item in told for choice in item.choices),
        "usage": [item.usage.total_tokens for item in told if item.usage],
        "finish": [choice.finish_reason for item in told for choice in item.choices][-1],
        "objects": sorted({item.object for item in told}),
        "cache": raw.headers.get("x-cache"),
    }


def main() -> None:
    for line in sys.stdin:
        task = json.loads(line)
        with openai.OpenAI(base_url=task["base_url"], api_key=task["key"], max_retries=0, timeout=300) as client:
            results = [run(client, step) for step in task["steps"]]
        print(json.dumps({"version": openai.__version__, "results": results}), flush=True)


if __name__ == "__main__":
    main()
