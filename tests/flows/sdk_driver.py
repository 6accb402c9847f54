"""Drives the official `openai` client through lists of steps and prints what it made of the answers, as lines of JSON.

Run by path with the interpreter that has the client's major version to test; imports nothing of this repository.
Standard input, a line each time: {"base_url", "key", "steps": [{"prompt", "stream"?, "usage"?, "headers"?}]}, or
{"inputs", "format"?} as a step that asks for vectors, or {"lines"} as one that hands in a batch. Standard output, a
line for it: {"version", "results"}, one result per step, {"objects", "types", "cache": x-cache}, {"vectors",
"tokens", "cache", "partial"}, {"status", "completed", "texts", "listed", "deleted"} or {"error": {...}}. Ends with its
standard input.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import openai


def embed(client: openai.OpenAI, step: dict[str, Any]) -> dict[str, Any]:
    ask: dict[str, Any] = {"model": "text-embedding-3-small", "input": step["inputs"]}
    if step.get("format"):
        ask["encoding_format"] = step["format"]
    raw = client.embeddings.with_raw_response.create(**ask)
    parsed = raw.parse()
    return {
        "vectors": [row.embedding for row in parsed.data],
        "tokens": parsed.usage.total_tokens,
        "cache": raw.headers.get("x-cache"),
        "partial": raw.headers.get("x-cache-partial"),
    }


def batch(client: openai.OpenAI, step: dict[str, Any]) -> dict[str, Any]:
    raw = "".join(json.dumps(line) + "\n" for line in step["lines"]).encode()
    file = client.files.create(file=("lines.jsonl", raw), purpose="batch")
    made = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"by": "driver"}
    )
    while made.status not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(0.02)
        made = client.batches.retrieve(made.id)
    found = [json.loads(line) for line in client.files.content(made.output_file_id or "").text.splitlines()]
    return {
        "status": made.status,
        "completed": made.request_counts.completed if made.request_counts else None,
        "texts": {one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"] for one in found},
        "listed": [one.id for one in client.batches.list()] == [made.id],
        "deleted": client.files.delete(file.id).deleted,
    }


def run(client: openai.OpenAI, step: dict[str, Any]) -> dict[str, Any]:
    if "inputs" in step:
        return embed(client, step)
    if "lines" in step:
        return batch(client, step)
    ask: dict[str, Any] = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": step["prompt"]}]}
    if step.get("stream"):
        ask["stream"] = True
    if step.get("usage"):
        ask["stream_options"] = {"include_usage": True}
    objects: list[Any] = []
    try:
        raw = client.chat.completions.with_raw_response.create(**ask, extra_headers=step.get("headers") or {})
        parsed = raw.parse()
        if step.get("stream"):
            objects.extend(parsed)
        else:
            objects.append(parsed)
    except openai.APIError as error:
        return {"error": described(error), "before": len(objects)}
    return {
        "objects": [item.to_dict(mode="json") for item in objects],
        "types": sorted({type(item).__name__ for item in objects}),
        "cache": raw.headers.get("x-cache"),
        "tier": raw.headers.get("x-cache-tier"),
        "text": "".join(text_of(item) for item in objects),
    }


def text_of(item: Any) -> str:
    choices = item.choices
    if not choices:
        return ""
    return (choices[0].delta.content if hasattr(choices[0], "delta") else choices[0].message.content) or ""


def described(error: openai.APIError) -> dict[str, Any]:
    """Everything of an error that a program can branch on."""
    response = getattr(error, "response", None)
    return {
        "class": type(error).__name__,
        "message": error.message,
        "code": error.code,
        "param": error.param,
        "type": error.type,
        "body": error.body,
        "status": getattr(error, "status_code", None),
        "retry_after": None if response is None else response.headers.get("retry-after"),
    }


def main() -> None:
    for line in sys.stdin:
        task = json.loads(line)
        with openai.OpenAI(base_url=task["base_url"], api_key=task["key"], max_retries=0, timeout=300) as client:
            results = [run(client, step) for step in task["steps"]]
        print(json.dumps({"version": openai.__version__, "results": results}), flush=True)


if __name__ == "__main__":
    main()
