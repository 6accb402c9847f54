"""A model server with a batch API of its own beside its plain one: files, batches and message batches as the providers
have them, worked off when a test says so, at half the price on its own meter."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

from tests.upstream import Body, Json, Reply, ScriptedUpstream, Seen, tokens_in, usage_of, vector_for

NO_ROUTE = Json(404, {"error": {"message": "M has no such route", "type": "invalid_request_error"}})


@dataclass
class Handed:
    """One batch of this server's."""

    id: str
    path: str
    requests: list[tuple[str, Any]]  # custom_id, body
    metadata: dict[str, str] | None = None
    file_id: str = ""
    status: str = "in_progress"
    polls: int = 0
    output: str = ""  # ids of files
    errors: str = ""
    failure: Any = None
    results: list[dict[str, Any]] = field(default_factory=list)


class BatchUpstream:
    """Answers the batch API of a ScriptedUpstream: `up.default = BatchUpstream(up)`.

    A batch ends after `polls` questions about it. `expire` names custom ids' last parts whose lines are not answered;
    `outcome` is how batches end. Tokens are counted as the plain server counts them, in `input_tokens` and
    `output_tokens` here, so that a test can price both meters.
    """

    def __init__(self, up: ScriptedUpstream, *, polls: int = 1, outcome: str = "completed") -> None:
        self.up = up
        self.plain = up.default
        self.polls = polls
        self.outcome = outcome
        self.expire: set[int] = set()  # places in a batch
        self.refuse: set[int] = set()  # answered with a 400
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, Handed] = {}
        self.lines = 0
        self.input_tokens = 0
        self.output_tokens = 0
        up.default = self.answer
        up.vectors = self.answer  # type: ignore[assignment]

    def answer(self, seen: Seen) -> Reply:
        path = seen.path.partition("?")[0].removeprefix("/v1")
        place = re.fullmatch(r"/(files|batches|messages/batches)(?:/([\w-]+))?(?:/(\w+))?", path)
        if place is None:
            assert not callable(self.plain)
            return self.plain
        area, name, verb = place[1], place[2], place[3]
        if area == "files":
            return self._files(seen, name, verb)
        if area == "batches":
            return self._batches(seen, name, verb)
        return self._messages(seen, name, verb)

    # -- OpenAI ---------------------------------------------------------------------------------------------------

    def _files(self, seen: Seen, name: str | None, verb: str | None) -> Reply:
        if seen.method == "POST":
            form = _form(seen)
            assert form["purpose"] == b"batch"
            file_id = self._keep(form["file"])
            return Json(200, {"id": file_id, "object": "file", "bytes": len(form["file"]), "purpose": "batch"})
        if name is None:
            listed = [{"id": file_id, "object": "file", "filename": "ibid-x.jsonl"} for file_id in self.files]
            return Json(200, {"object": "list", "data": listed, "has_more": False})
        if name not in self.files:
            return NO_ROUTE
        if seen.method == "DELETE":
            del self.files[name]
            return Json(200, {"id": name, "object": "file", "deleted": True})
        return Body(200, self.files[name], "application/octet-stream")

    def _keep(self, raw: bytes) -> str:
        file_id = f"file-M{len(self.files) + 1}x{self.up.nonce}"
        self.up.nonce += 1
        self.files[file_id] = raw
        return file_id

    def _batches(self, seen: Seen, name: str | None, verb: str | None) -> Reply:
        if seen.method == "POST" and name is None:
            asked = seen.json
            lines = [json.loads(line) for line in self.files[asked["input_file_id"]].splitlines()]
            assert all(line["method"] == "POST" and line["url"] == asked["endpoint"] for line in lines)
            assert len({line["body"]["model"] for line in lines}) == 1, "one model for each batch"
            requests = [(line["custom_id"], line["body"]) for line in lines]
            batch = self._take("batch", asked["endpoint"], requests, asked.get("metadata"), asked["input_file_id"])
            return Json(200, self._shown(batch))
        if name is None:
            listed = [self._shown(batch) for batch in reversed(self.batches.values()) if batch.metadata is not None]
            return Json(200, {"object": "list", "data": listed, "has_more": False})
        if (batch := self.batches.get(name)) is None:
            return NO_ROUTE
        self._move(batch, verb)
        return Json(200, self._shown(batch))

    def _shown(self, batch: Handed) -> dict[str, Any]:
        errors = None if batch.failure is None else {"object": "list", "data": [batch.failure]}
        return {
            "id": batch.id, "object": "batch", "status": batch.status, "metadata": batch.metadata, "errors": errors,
            "endpoint": batch.path, "input_file_id": batch.file_id, "completion_window": "24h", "created_at": 1,
            "output_file_id": batch.output or None, "error_file_id": batch.errors or None,
        }  # fmt: skip

    # -- Anthropic ------------------------------------------------------------------------------------------------

    def _messages(self, seen: Seen, name: str | None, verb: str | None) -> Reply:
        if seen.method == "POST" and name is None:
            requests = [(one["custom_id"], one["params"]) for one in seen.json["requests"]]
            assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", custom_id) for custom_id, _ in requests)
            return Json(200, self._message_batch(self._take("msgbatch", "/v1/messages", requests, None, "")))
        if name is None:
            listed = [self._message_batch(batch) for batch in reversed(self.batches.values())]
            return Json(200, {"data": listed, "has_more": False, "first_id": None, "last_id": None})
        if (batch := self.batches.get(name)) is None:
            return Json(404, {"type": "error", "error": {"type": "not_found_error", "message": "none"}})
        if verb == "results":
            return Body(200, _jsonl(batch.results), "application/x-jsonl")
        self._move(batch, verb)
        return Json(200, self._message_batch(batch))

    def _message_batch(self, batch: Handed) -> dict[str, Any]:
        has_ended = batch.status != "in_progress"
        return {
            "id": batch.id, "type": "message_batch", "created_at": "2999-01-01T00:00:00Z",
            "processing_status": "ended" if has_ended else "in_progress", "results_url": None,
            "request_counts": {"processing": len(batch.requests), "succeeded": 0, "errored": 0, "canceled": 0,
                               "expired": 0},
        }  # fmt: skip

    # -- work -----------------------------------------------------------------------------------------------------

    def _take(self, kind: str, path: str, requests: Any, metadata: Any, file_id: str) -> Handed:
        batch = Handed(f"{kind}_M{len(self.batches) + 1}", path, requests, metadata, file_id)
        self.batches[batch.id] = batch
        return batch

    def _move(self, batch: Handed, verb: str | None) -> None:
        if batch.status != "in_progress":
            return
        batch.polls += 1
        if verb == "cancel":
            self._work(batch, "cancelled", set(range(1, len(batch.requests))))
        elif self.polls and batch.polls > self.polls - 1:
            self._work(batch, self.outcome, self.expire)

    def _work(self, batch: Handed, outcome: str, expire: set[int]) -> None:
        batch.status = outcome
        if outcome == "failed":
            batch.failure = {"code": "model_not_found", "line": 1, "message": "No such model.", "param": "body.model"}
            return
        done, lost = [], []
        for place, (custom_id, body) in enumerate(batch.requests):
            if place in expire:
                lost.append(self._lost(batch, custom_id))
            elif place in self.refuse:
                lost.append(self._refused(batch, custom_id))
            else:
                done.append(self._answered(batch, custom_id, body))
        done.reverse()  # in any order
        batch.results = done + lost
        if batch.path != "/v1/messages":
            batch.output, batch.errors = self._keep(_jsonl(done)), self._keep(_jsonl(lost)) if lost else ""

    def _answered(self, batch: Handed, custom_id: str, body: Any) -> dict[str, Any]:
        self.lines += 1
        answer, usage = self._say(batch.path, body)
        self.input_tokens += usage[0]
        self.output_tokens += usage[1]
        if batch.path == "/v1/messages":
            return {"custom_id": custom_id, "result": {"type": "succeeded", "message": answer}}
        response = {"status_code": 200, "request_id": f"req_{self.lines}", "body": answer}
        return {"id": f"batch_req_{self.lines}", "custom_id": custom_id, "response": response, "error": None}

    def _say(self, path: str, body: Any) -> tuple[dict[str, Any], tuple[int, int]]:
        model = body["model"]
        if path == "/v1/embeddings":
            asked = [body["input"]] if isinstance(body["input"], str) else body["input"]
            rows = [
                {"object": "embedding", "index": i, "embedding": [float(x) for x in _floats(one)]}
                for i, one in enumerate(asked)
            ]
            tokens = sum(tokens_in(one) for one in asked)
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            return {"object": "list", "data": rows, "model": model, "usage": usage}, (tokens, 0)
        text = f"batch answer #{self.lines} to: {body['messages'][-1]['content']}"
        counted = usage_of(body["messages"], text)
        used = (counted["prompt_tokens"], counted["completion_tokens"])
        if path == "/v1/messages":
            return {
                "id": f"msg_M{self.lines}", "type": "message", "role": "assistant", "model": model,
                "content": [{"type": "text", "text": text}], "stop_reason": "end_turn", "stop_sequence": None,
                "usage": {"input_tokens": used[0], "output_tokens": used[1]},
            }, used  # fmt: skip
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        return {
            "id": f"chatcmpl-B{self.lines}", "object": "chat.completion", "created": 1_700_000_000, "model": model,
            "choices": [choice], "usage": counted, "system_fingerprint": "fp_m",
        }, used  # fmt: skip

    @staticmethod
    def _lost(batch: Handed, custom_id: str) -> dict[str, Any]:
        word = "cancelled" if batch.status == "cancelled" else "expired"
        if batch.path == "/v1/messages":
            kind = "canceled" if word == "cancelled" else word
            return {"custom_id": custom_id, "result": {"type": kind}}
        error = {"code": f"batch_{word}", "message": f"It was {word}."}
        return {"id": "batch_req_0", "custom_id": custom_id, "response": None, "error": error}

    @staticmethod
    def _refused(batch: Handed, custom_id: str) -> dict[str, Any]:
        if batch.path == "/v1/messages":
            error = {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}}
            return {"custom_id": custom_id, "result": {"type": "errored", "error": error}}
        body = {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": None}}
        response = {"status_code": 400, "request_id": "req_0", "body": body}
        return {"id": "batch_req_0", "custom_id": custom_id, "response": response, "error": None}


def _floats(one: Any) -> Any:
    import numpy as np

    return [str(x) for x in np.frombuffer(vector_for(one), "<f4")]


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _form(seen: Seen) -> dict[str, bytes]:
    """A form as the standard library reads one."""
    head = f"Content-Type: {seen.header('Content-Type')}\r\n\r\n".encode()
    parts = BytesParser(policy=HTTP).parsebytes(head + seen.body).iter_parts()
    return {str(part.get_param("name", header="content-disposition")): part.get_payload(decode=True) for part in parts}
