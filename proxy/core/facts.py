"""What a request says, dialect-neutral: filled by a dialect's `read`, judged by policy, digested by fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxy.core.model import Input


@dataclass(slots=True)  # not frozen: one is made for each body, and setting 29 frozen fields takes thrice as long
class Facts:
    """One request as policy and identity see it. Nobody changes it.

    `prompt` is the text of the last message when that is plain user text, else None; `context` is every other message
    (all of them when `prompt` is None) followed, when the last message has other fields than role and content, by
    those. `settings` holds every other field that may change what the answer says, unknown ones included, so that
    (prompt, context, settings) together lose nothing but delivery.
    """

    model: str
    prompt: str | None
    context: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any]
    unknown: tuple[str, ...] = ()  # paths of fields, roles and content types this program does not know
    stream: bool = False
    wants_usage: bool = False
    temperature: float | None = None  # None when omitted or null
    n: int = 1
    seed: int | None = None
    has_tools: bool = False
    tool_results: bool = False  # a tool's output, or a call of one, stands in the conversation
    web_search: bool = False
    has_images: bool = False
    has_audio: bool = False
    has_files: bool = False
    remote_urls: bool = False  # content behind an address, which may change
    audio_output: bool = False
    logprobs: bool = False
    store: bool = False
    keeps_id: bool = False  # the upstream keeps the answer under its id, by which later requests name it
    background: bool = False
    previous_response: bool = False  # what was said before is kept by the upstream, and not known here
    continues: str = ""  # the id of the answer that stands for all of that, where nothing else does
    response_format: str | None = None  # "text", "json_object", "json_schema"; None when omitted
    output_limit: int | None = None  # tokens; not in `settings`: what ended below it is the answer under any larger one
    has_stops: bool = False
    opaque: bool = False  # asks for signed or encrypted parts, which a reworded question must not be given
    end_user: str = ""
    first_turn: bool = False  # one user message, nothing said by the assistant before
    user_turns: int = 0
    inputs: tuple[Input, ...] = ()  # of an embedding request, which has neither prompt nor context
    encoding_format: str = ""  # of its vectors
