"""OpenAI legacy completions: read a request, and what joins the parts of the dialect.

One text in, one text out. A prompt that is a list of one string is that string. Several prompts are answered by as many
choices, so they count as `n`. Token ids are compared exactly and nothing else. Fields as of the SDK 3.54.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxy.core.dialects.completions_answer import record, render_stream, render_whole
from proxy.core.dialects.dialect import Recording, Spoken, StreamFilter, Template, UsageMode
from proxy.core.dialects.fields import (
    BOOLEAN,
    CACHE_TWIN,
    INTEGER,
    NUMBER,
    OBJECT,
    SESSION_FIELDS,
    STRING,
    Types,
    limit_of,
    model_in,
    whole,
)
from proxy.core.dialects.openai_chat import (
    DELIVERY_FIELDS,
    check_types,
    choices_of,
    end_user_of,
    error_body,
    forward_body,
    invalid_type,
    stream_error,
)
from proxy.core.dialects.openai_filter import UsageFilter
from proxy.core.dialects.openai_record import find_usage
from proxy.core.errors import IbidError
from proxy.core.facts import Facts
from proxy.core.model import Answer, Usage

_TYPES: Types = {
    "best_of": INTEGER,
    "echo": BOOLEAN,
    "frequency_penalty": NUMBER,
    "logit_bias": OBJECT,
    "max_tokens": INTEGER,
    "metadata": OBJECT,
    "presence_penalty": NUMBER,
    "prompt": (str, list),
    "seed": INTEGER,
    "stop": (str, list),
    "stream": BOOLEAN,
    "stream_options": OBJECT,
    "suffix": STRING,
    "temperature": NUMBER,
    "top_p": NUMBER,
    "user": STRING,
}
KNOWN_FIELDS = frozenset(_TYPES) | SESSION_FIELDS | {"model", "n", "logprobs", CACHE_TWIN}
_ELSEWHERE = DELIVERY_FIELDS | {"model", "prompt", "max_tokens"}  # of `Facts`


def read(body: Mapping[str, Any]) -> Facts:
    """What the request says. Raises BadRequest (invalid_type, invalid_value) naming the parameter.

    Where the answer repeats the prompt or has to lead up to a suffix, the very same text alone is the same question.
    """
    model = model_in(body)
    if model is None:
        raise invalid_type("model", "a string")
    check_types(body, _TYPES)
    prompt = _plain(body.get("prompt"))
    is_text = isinstance(prompt, str) and not body.get("echo") and not body.get("suffix")
    logprobs = body.get("logprobs")
    settings = {name: value for name, value in body.items() if name not in _ELSEWHERE}
    if isinstance(stop := settings.get("stop"), str):
        settings["stop"] = [stop]
    return Facts(
        model=model,
        prompt=prompt if is_text else None,
        context=() if is_text else ({"prompt": prompt},),
        settings=settings,
        unknown=(*([] if model else ["model"]), *sorted(body.keys() - KNOWN_FIELDS)),
        stream=body.get("stream") is True,
        wants_usage=(body.get("stream_options") or {}).get("include_usage") is True,
        temperature=body.get("temperature"),
        n=max(choices_of(body), whole(body.get("best_of")) or 1) * _prompts(prompt),
        seed=body.get("seed"),
        logprobs=not (logprobs is None or logprobs is False),  # 0 asks for those of the text itself
        output_limit=limit_of(body.get("max_tokens")),
        has_stops=bool(body.get("stop")),
        end_user=end_user_of(body),
        first_turn=True,
        user_turns=1,
    )


def _plain(prompt: Any) -> Any:
    is_alone = isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str)
    return prompt[0] if is_alone else prompt


def _prompts(prompt: Any) -> int:
    """How many prompts these are: strings, or lists of token ids; one list of ids is one prompt."""
    return len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1


class Completions(Spoken):
    """`Dialect` of OpenAI legacy completions."""

    name = "completions"
    operation = "completion"

    def read(self, body: Mapping[str, Any], *, model: str = "", stream: bool = False) -> Facts:
        """See `read`; a model in the path (Azure's deployments) stands for the body's."""
        return read({**body, "model": model} if model else body)

    def forward_body(self, raw: bytes, parsed: Mapping[str, Any]) -> bytes:
        return forward_body(raw, parsed)

    def record(self, body: bytes, *, is_stream: bool, n: int, keeps_id: bool = False) -> Recording:
        return record(body, is_stream=is_stream, loads=self._loads)

    def find_usage(self, body: bytes) -> Usage | None:
        return find_usage(body)

    def filter(self, *, wants_usage: bool, n: int) -> StreamFilter:
        return UsageFilter(not wants_usage, n, self._loads)

    def expresses(self, answer: Answer, *, has_stops: bool, keeps_id: bool = False) -> bool:
        """Its own answers: no other dialect has this operation."""
        return answer.dialect == self.name

    def render(self, answer: Answer, *, stream: bool, wants_usage: bool, usage_mode: UsageMode) -> Template:
        return render_stream(answer, wants_usage, usage_mode) if stream else render_whole(answer, usage_mode)

    def error_body(self, error: IbidError, request_id: str = "") -> bytes:
        return error_body(error)

    def stream_error(self, error: IbidError, request_id: str = "", *, after: int = -1) -> bytes:
        return stream_error(error)
