"""Batches as values: what a line says, and how jobs, files and results are spelled for either provider's clients.

What a provider answers to a bad file was taken from recorded answers of OpenAI's API: a file whose lines cannot be read
fails its batch while it validates, with one error for each such line; a line whose request is refused stands in the
error file with the status and body of the refusal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from proxy.core.dialects.dialect import rfc3339
from proxy.core.errors import BadRequest
from proxy.core.jsontext import members
from proxy.core.units import DAY_S

CHUNK_BYTES: Final = 1 << 20  # of a file, in one row; all of its chunks but the last are as long
ENDPOINTS: Final = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
FILE_LIMIT_BYTES: Final = 200 * 1024 * 1024
REQUESTS_LIMIT_BYTES: Final = 256 * 1024 * 1024  # of Anthropic's one body
REQUESTS_LIMIT: Final = 100_000
WINDOW_S: Final = DAY_S
ERRORS_SHOWN: Final = 100
METADATA_LIMIT: Final = 16
RETRIABLE: Final = frozenset({408, 429, 500, 502, 503, 504, 529})
"""Statuses after which a line is asked again: whoever hands in a batch has left waiting to us."""

ENDED: Final = frozenset({"failed", "completed", "expired", "cancelled"})
_ROUTE = re.compile(
    r"(?:/v1/v1|/v1|/openai/v1)?/(?P<area>files|batches|messages/batches|deferred)"
    r"(?:/(?P<id>[A-Za-z0-9_.-]{1,128})(?:/(?P<verb>content|cancel|results))?)?"
)
_VERBS: Final = {"files": ("content",), "batches": ("cancel",), "messages/batches": ("cancel", "results")}
_CUSTOM_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_OWN = re.compile(r"(?:file-|batch_|msgbatch_|def_)ibid[0-9a-f]{24}")

Loads = Callable[[bytes], Any]


class Place(NamedTuple):
    """What of the batch API a path names."""

    area: str  # "files" | "batches" | "messages/batches" | "deferred"
    id: str = ""
    verb: str = ""  # "content" | "cancel" | "results"


def place_of(path: str) -> Place | None:
    """The place of a path, or None where the batch API has none."""
    found = _ROUTE.fullmatch(path.removesuffix("/"))
    if found is None:
        return None
    place = Place(found["area"], found["id"] or "", found["verb"] or "")
    return None if place.verb and place.verb not in _VERBS.get(place.area, ()) else place


def is_own(name: str) -> bool:
    """Whether an id is spelled as ours: such a one never goes upstream, whosever it is."""
    return _OWN.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class BatchFile:
    """A file as its client sees it. Outputs are views of their job's lines."""

    id: str
    tenant: str
    purpose: str  # "batch" | "batch_output" | "requests": lines of a job that came without a file
    filename: str
    size_bytes: int
    created_ms: int
    expires_ms: int
    job_id: str = ""  # of an output
    part: str = "input"  # "input" | "output" | "error"


@dataclass(slots=True)
class Job:
    """One batch. `status` is OpenAI's word; `times` holds when each was reached, in ms."""

    id: str
    tenant: str
    dialect: str  # "openai" | "anthropic" | "deferred": how its results are spelled
    path: str  # of every line
    status: str
    input_file_id: str
    created_ms: int
    deadline_ms: int
    expires_ms: int  # its rows go
    headers: tuple[tuple[str, str], ...] = ()  # of its client, without a credential
    needs_owner: bool = True  # a credential came with it, which is in memory alone
    metadata: Mapping[str, str] | None = None
    errors: Sequence[Mapping[str, Any]] = ()
    times: dict[str, int] = field(default_factory=dict)
    total: int = 0
    succeeded: int = 0
    errored: int = 0
    expired: int = 0
    cancelled: int = 0
    output_bytes: int = 0
    error_bytes: int = 0
    output_file_id: str = ""
    error_file_id: str = ""
    key_id: str = ""  # of the virtual key that handed it in: its limits hold for every line

    @property
    def is_ended(self) -> bool:
        return self.status in ENDED

    def reach(self, status: str, now_ms: int) -> None:
        """Go on to a status."""
        self.status = status
        self.times[status] = now_ms

    def count(self, state: str, size_bytes: int) -> None:
        """One more line has ended."""
        match state:
            case "ok":
                self.succeeded += 1
                self.output_bytes += size_bytes
                return
            case "error":
                self.errored += 1
            case "expired":
                self.expired += 1
            case _:
                self.cancelled += 1
        self.error_bytes += size_bytes


class LineRow(NamedTuple):
    """A line that was answered, or handed to a provider. `result` is a line of an output, its end included."""

    number: int
    state: str  # "sent" | "ok" | "error" | "expired" | "cancelled"
    part: int | None = None  # of the job, when a provider has it
    result: bytes | None = None


@dataclass(slots=True)
class Part:
    """Lines that went to a provider's batch API together."""

    number: int
    upstream: str
    model: str
    provider_id: str = ""  # "" until the provider has said it
    input_file_id: str = ""  # the provider's
    state: str = "creating"  # "creating" | "running" | "ended"
    lines: int = 0
    created_ms: int = 0
    purge: int = 0  # number of the newest one when it was handed in


@dataclass(slots=True)
class Deferred:
    """A plain call whose answer is fetched later."""

    id: str
    tenant: str
    path_qs: str
    headers: tuple[tuple[str, str], ...]
    needs_owner: bool
    body: bytes
    created_ms: int
    deadline_ms: int | None
    expires_ms: int
    job_id: str = ""  # of the batch it went with
    number: int = 0
    reply: bytes | None = None  # `spell_reply`
    key_id: str = ""  # as of a job


class Line(NamedTuple):
    custom_id: str
    body: bytes


class LineFault(NamedTuple):
    """Why a line cannot be read; it fails the whole batch, as the provider does it."""

    code: str
    message: str
    param: str | None = None

    def shown(self, line: int | None) -> dict[str, Any]:
        return {"code": self.code, "line": line, "message": self.message, "param": self.param}


# -- lines in ----------------------------------------------------------------------------------------------------------


def read_openai_line(raw: bytes, endpoint: str, loads: Loads) -> Line | LineFault:
    """One line of an input file."""
    try:
        said = loads(raw)
    except ValueError:
        return LineFault("invalid_json_line", "This line is not parseable as valid JSON.")
    if not isinstance(said, dict):
        return LineFault("invalid_request", "Each line must be a JSON object.")
    for name, kind, word in _MEMBERS:
        value = said.get(name)
        if value is None or value == "":
            return LineFault("missing_required_parameter", f"Missing required parameter: '{name}'.", name)
        if not isinstance(value, kind):
            return LineFault("invalid_type", f"Invalid type for '{name}': expected {word}.", name)
    if said["method"] != "POST":
        return LineFault("invalid_method", "The HTTP method provided for this request must be POST.", "method")
    if said["url"] != endpoint:
        message = "The URL provided for this request does not match the batch endpoint."
        return LineFault("invalid_url", message, "url")
    if said["body"].get("stream"):
        return LineFault("streaming_unsupported", "Streaming is not supported in the Batch API.", "body.stream")
    return Line(said["custom_id"], _member(raw, "body"))


_MEMBERS: Final = (
    ("custom_id", str, "a string"),
    ("method", str, "a string"),
    ("url", str, "a string"),
    ("body", dict, "an object"),
)


def read_requests_item(raw: bytes, index: int, loads: Loads) -> Line:
    """One element of Anthropic's `requests`. Raises BadRequest naming it."""
    place = f"requests.{index}"
    try:
        said = loads(raw)
    except ValueError:
        raise BadRequest(f"{place}: not valid JSON.", code="invalid_json", param=place) from None
    if not isinstance(said, dict):
        raise BadRequest(f"{place}: Input should be an object", code="invalid_type", param=place)
    custom_id, params = said.get("custom_id"), said.get("params")
    if custom_id is None:
        raise _missing(f"{place}.custom_id")
    if not isinstance(custom_id, str) or _CUSTOM_ID.fullmatch(custom_id) is None:
        message = f"{place}.custom_id: String should match pattern '^[a-zA-Z0-9_-]{{1,64}}$'"
        raise BadRequest(message, code="invalid_value", param=f"{place}.custom_id")
    if params is None:
        raise _missing(f"{place}.params")
    if not isinstance(params, dict):
        raise BadRequest(f"{place}.params: Input should be an object", code="invalid_type", param=f"{place}.params")
    if params.get("stream"):
        message = f"{place}.params.stream: Streaming is not supported in a batch"
        raise BadRequest(message, code="invalid_value", param=f"{place}.params.stream")
    return Line(custom_id, _member(raw, "params"))


def _missing(place: str) -> BadRequest:
    return BadRequest(f"{place}: Field required", code="missing_required_parameter", param=place)


def _member(raw: bytes, name: str) -> bytes:
    """The bytes of a member as they were sent: what is read from them is what a plain request would have said."""
    _, start, end = members(raw)[name]
    return raw[start:end]


def duplicate_of(custom_id: str) -> LineFault:
    message = (
        f"The custom_id '{custom_id}' for this request is a duplicate of another request. The custom_id parameter "
        "must be unique for each request in a batch."
    )
    return LineFault("duplicate_custom_id", message, "custom_id")


EMPTY: Final = LineFault(
    "empty_file", "The input file is empty. Please ensure that the batch contains at least one request."
)


def too_many(limit: int) -> LineFault:
    return LineFault("too_many_tasks", f"The batch input file contains more than {limit} requests.")


# -- results out -------------------------------------------------------------------------------------------------------

LOST: Final[Mapping[str, tuple[str, str]]] = {
    "expired": (
        "batch_expired",
        "This request could not be executed before the completion window expired.",
    ),
    "cancelled": ("batch_cancelled", "This request was not executed because the batch was cancelled."),
}
"""State of a line that nobody answered → code and message of its error."""


def openai_result(custom_id: bytes, token: str, status: int, body: bytes) -> bytes:
    """A line of an output or error file. `custom_id` and `body` are JSON on one line."""
    return (
        b'{"id":"batch_req_%b","custom_id":%b,"response":{"status_code":%d,"request_id":"%b","body":%b},"error":null}\n'
        % (token.encode(), custom_id, status, token.encode(), body)
    )


def openai_loss(custom_id: bytes, token: str, error: bytes) -> bytes:
    """A line that got no response. `error` is JSON with code and message."""
    return b'{"id":"batch_req_%b","custom_id":%b,"response":null,"error":%b}\n' % (token.encode(), custom_id, error)


def anthropic_result(custom_id: bytes, status: int, body: bytes) -> bytes:
    """A line of the results."""
    if status == 200:
        return b'{"custom_id":%b,"result":{"type":"succeeded","message":%b}}\n' % (custom_id, body)
    return b'{"custom_id":%b,"result":{"type":"errored","error":%b}}\n' % (custom_id, body)


def anthropic_loss(custom_id: bytes, state: str) -> bytes:
    kind = b"expired" if state == "expired" else b"canceled"
    return b'{"custom_id":%b,"result":{"type":"%b"}}\n' % (custom_id, kind)


def spell_reply(status: int, headers: Sequence[tuple[str, str]], body: bytes) -> bytes:
    """A whole reply as bytes: a line of JSON with its head, then the body."""
    return json.dumps([status, [list(pair) for pair in headers]]).encode() + b"\n" + body


def read_reply(spelled: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
    head, _, body = spelled.partition(b"\n")
    status, headers = json.loads(head)
    return status, [(name, value) for name, value in headers], body


# -- objects -----------------------------------------------------------------------------------------------------------


def file_object(file: BatchFile) -> dict[str, Any]:
    """OpenAI's `file`."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": file.created_ms // 1000,
        "expires_at": file.expires_ms // 1000,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


_TIMES: Final = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")


def batch_object(job: Job) -> dict[str, Any]:
    """OpenAI's `batch`."""
    reached = {f"{status}_at": _second(job.times.get(status)) for status in _TIMES}
    return {
        "id": job.id,
        "object": "batch",
        "endpoint": job.path,
        "errors": {"object": "list", "data": list(job.errors)} if job.errors else None,
        "input_file_id": job.input_file_id,
        "completion_window": "24h",
        "status": job.status,
        "output_file_id": job.output_file_id or None,
        "error_file_id": job.error_file_id or None,
        "created_at": job.created_ms // 1000,
        "expires_at": job.deadline_ms // 1000,
        **reached,
        "request_counts": {"total": job.total, "completed": job.succeeded, "failed": job.errored},
        "metadata": job.metadata,
    }


def message_batch(job: Job, base: str) -> dict[str, Any]:
    """Anthropic's `message_batch`. `base`: the address at which its client reaches us."""
    status = "ended" if job.is_ended else "canceling" if job.status == "cancelling" else "in_progress"
    done = job.succeeded + job.errored + job.expired + job.cancelled
    ended_ms = max((job.times[word] for word in ENDED if word in job.times), default=None)
    return {
        "id": job.id,
        "type": "message_batch",
        "processing_status": status,
        "request_counts": {
            "processing": max(job.total - done, 0),
            "succeeded": job.succeeded,
            "errored": job.errored,
            "canceled": job.cancelled,
            "expired": job.expired,
        },
        "ended_at": _date(ended_ms),
        "created_at": _date(job.created_ms),
        "expires_at": _date(job.deadline_ms),
        "archived_at": None,
        "cancel_initiated_at": _date(job.times.get("cancelling")),
        "results_url": f"{base}/v1/messages/batches/{job.id}/results" if status == "ended" else None,
    }


def _second(ms: int | None) -> int | None:
    return None if ms is None else ms // 1000


def _date(ms: int | None) -> str | None:
    return None if ms is None else rfc3339(ms // 1000)


class Wanted(NamedTuple):
    """What `POST /v1/batches` asks for."""

    input_file_id: str
    endpoint: str
    metadata: Mapping[str, str] | None
    keep_s: int | None  # of its outputs


def read_create(body: Mapping[str, Any]) -> Wanted:
    """Raises BadRequest naming the parameter."""
    for name in ("input_file_id", "endpoint", "completion_window"):
        value = body.get(name)
        if value is None:
            message = f"Missing required parameter: '{name}'."
            raise BadRequest(message, code="missing_required_parameter", param=name)
        if not isinstance(value, str):
            raise BadRequest(f"Invalid type for '{name}': expected a string.", code="invalid_type", param=name)
    if (endpoint := body["endpoint"]) not in ENDPOINTS:
        _unsupported("endpoint", endpoint, ENDPOINTS)
    if body["completion_window"] != "24h":
        _unsupported("completion_window", body["completion_window"], ("24h",))
    return Wanted(body["input_file_id"], endpoint, _metadata(body.get("metadata")), _keep_s(body))


def _unsupported(name: str, value: str, known: Sequence[str]) -> None:
    said = " and ".join(filter(None, (", ".join(f"'{one}'" for one in known[:-1]), f"'{known[-1]}'")))
    message = f"Invalid value: '{value[:64]}'. Supported values are: {said}."
    raise BadRequest(message, code="invalid_value", param=name)


def _metadata(said: object) -> Mapping[str, str] | None:
    if said is None:
        return None
    if not isinstance(said, dict):
        raise BadRequest("Invalid type for 'metadata': expected an object.", code="invalid_type", param="metadata")
    if len(said) > METADATA_LIMIT or any(len(name) > 64 for name in said):
        message = f"Invalid 'metadata': at most {METADATA_LIMIT} pairs, with names of at most 64 characters."
        raise BadRequest(message, code="invalid_value", param="metadata")
    for name, value in said.items():
        if not isinstance(value, str) or len(value) > 512:
            message = f"Invalid type for 'metadata.{name}': expected a string of at most 512 characters."
            raise BadRequest(message, code="invalid_type", param=f"metadata.{name}")
    return said


def _keep_s(body: Mapping[str, Any]) -> int | None:
    said = body.get("output_expires_after")
    if said is None:
        return None
    seconds = said.get("seconds") if isinstance(said, dict) and said.get("anchor") == "created_at" else None
    if type(seconds) is not int or not 3600 <= seconds <= 2_592_000:
        message = "Invalid 'output_expires_after': expected anchor 'created_at' and 3600 to 2592000 seconds."
        raise BadRequest(message, code="invalid_value", param="output_expires_after")
    return seconds
