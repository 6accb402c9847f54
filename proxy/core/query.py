"""What a client asked, read by its dialect and classified by the policy."""

from __future__ import annotations

from dataclasses import dataclass

from proxy.core.dialects.dialect import Dialect
from proxy.core.model import Controls, Eligibility, Input
from proxy.core.plan import DEFAULT_PLAN, Plan


@dataclass(frozen=True, slots=True)
class Batch:
    """The inputs of an embedding request; the rest of it is in its Query."""

    inputs: tuple[Input, ...]  # as asked, repeats included
    fingerprints: tuple[bytes, ...]  # one each; () when nothing is looked up
    encoding_format: str  # "float" | "base64", as the client reads it
    is_open: bool  # all of the request is understood: an upstream may be asked in either format


@dataclass(frozen=True, slots=True)
class Query:
    """What a client asked, parsed and classified. Equal bytes from equal credentials give an equal Query."""

    dialect: Dialect
    endpoint: str  # "/v1/chat/completions"
    upstream: str  # configured upstream's name
    tenant: str  # 64 hex digits
    model: str
    stream: bool
    wants_usage: bool  # the client itself asked for the usage chunk of a stream
    prompt: str  # the text whose meaning is compared; "" when level is not full
    scope: bytes  # 32 bytes; b"" when level is none: nothing is looked up
    fingerprint: bytes  # 32 bytes, digest of scope and prompt; b"" likewise
    eligibility: Eligibility
    controls: Controls
    body: bytes  # as received, decoded
    forward_body: bytes  # as it goes upstream: usage asked for, body twin removed, otherwise the client's bytes
    n: int = 1  # choices asked for
    wants_json: bool = False  # the answer was asked to be JSON (response_format json_object or json_schema)
    output_limit: int | None = None  # tokens
    has_stops: bool = False  # texts were named that end the answer
    batch: Batch | None = None  # of an embedding request
    keeps_id: bool = False  # see `Facts`
    plan: Plan = DEFAULT_PLAN
    tier: str = "default"  # service tier the client asked for
    has_tools: bool = False
    path_qs: str = ""  # the target as it goes upstream
    is_placed: bool = False  # the path names the model: whatever answers there is what was asked
    form: int = 0  # equal for two queries whose hits on one entry differ in nothing but their ids and times
    key_id: str | None = None  # of the virtual key that asks
    team: str = ""  # its project
