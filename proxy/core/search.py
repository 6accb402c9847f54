"""Search that runs at the provider, under every name it goes by: what it finds changes, so no answer of it is kept.

It shows in what is asked (a field, a tool, a model's name) and in what is answered (citations). Names are those of
the providers' own pages: OpenAI "Web search" and "Search models"; OpenRouter "Web Search" (plugin, `:online`, server
tools); xAI "Live Search" and "Agent Tools"; Alibaba Model Studio `enable_search`; Perplexity "Sonar"; Azure OpenAI
"On your data"; Zhipu and Tencent `web_search` and `enable_enhancement`; Cohere `connectors`; Mistral "Connectors";
Groq "Compound"; Moonshot `$web_search`; Gemini "Grounding" and "URL context"; Anthropic "Web search tool" and
"Citations".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Final

from proxy.core.model import Answer
from proxy.core.patterns import is_one_of

FIELDS: Final = frozenset(
    {
        "web_search_options",  # OpenAI
        "plugins",  # OpenRouter, see `_is_on`
        "search_parameters",  # xAI
        "search_settings",  # Groq
        "enable_search",  # Alibaba
        "search_options",
        "forced_search",
        "data_sources",  # Azure
        "web_search",  # Zhipu, Baidu, Tencent
        "enable_web_search",
        "enable_enhancement",
        "search_info",
        "connectors",  # Cohere, Mistral
        "search_mode",  # Perplexity
        "search_domain_filter",
        "search_recency_filter",
        "return_citations",
        "return_related_questions",
        "grounding",
        "online",
    }
)
"""Fields of a request that switch it on, unless their value says off."""
MODELS: Final = (
    "*:online", "*-online", "*-search", "*-search-*", "sonar*", "*/sonar*", "*deep-research*", "*deepresearch*",
    "compound*", "*/compound*", "*web-search*", "*websearch*",
)  # fmt: skip
"""Models that search by themselves, as patterns over lower-case names."""
_OWN_FUNCTIONS: Final = frozenset({"$web_search", "googleSearch", "google_search", "googleSearchRetrieval"})
"""Names of functions that some gateways run themselves."""
_OF_CLIENTS: Final = re.compile(
    r"function|custom|namespace|tool_search|local_shell|shell|apply_patch|(?:bash|text_editor|computer|memory)(?:_\w+)?"
)
"""Types of tools whose calls the client itself answers."""
_SHOWN_WHEN_USED: Final = re.compile(r"code_interpreter|code_execution\w*|image_generation|mcp\w*")
"""Types of tools that leave an item or a block of their own in an answer for which they ran."""
_HARMLESS_PLUGINS: Final = frozenset({"file-parser", "response-healing", "moderation"})
_OFF: Final = frozenset({"off", "none", "disabled", "false", "no"})
_SWITCHES: Final = ("enabled", "enable", "mode", "type")
_SHOWN: Final = frozenset(
    {"citations", "search_results", "web_search", "search_info", "annotations", "groundingMetadata",
     "grounding_metadata", "groundingChunks", "urlContextMetadata", "url_context_metadata", "executed_tools"}
)  # fmt: skip
"""Members of an answer that say what was found."""
_OF_THE_REQUEST: Final = frozenset({"char_location", "page_location", "content_block_location"})
"""Citations of documents that the request itself brought."""
_REMOTE: Final = re.compile(r"[a-z][a-z0-9+.-]{0,30}://", re.IGNORECASE)


def is_offered(tools: object, *, choice: object = None, shows_use: bool = False) -> bool:
    """Whether a tool is asked for that the provider runs. `shows_use`: the dialect's answers say which of them were
    used, so what is merely offered is judged by the answer: what does not search, and a search in a box of the client's
    own tools, as Codex sends it with every request, unless the choice of tool names it."""
    if not isinstance(tools, list | tuple):
        return False
    there = [tool for tool in tools if _is_run_there(tool)]
    if not shows_use:
        return bool(there)
    in_a_box = len(there) < len(tools)
    chosen = frozenset(_named_by(choice))
    return any([not (_shows_when_used(tool) or (in_a_box and _is_typed(tool))) or _is_chosen(tool, chosen)
                for tool in there])  # fmt: skip


def is_asked(model: str, settings: Mapping[str, Any], models: Iterable[str] = (), fields: Iterable[str] = ()) -> bool:
    """Whether a request makes its provider search. `settings` in the words of `Facts`; `models` and `fields` add to
    the tables above."""
    named = model.lower()
    if is_one_of(named, MODELS) or is_one_of(named, models):
        return True
    more = frozenset(map(_bare, fields))
    said = [(_bare(name), value) for name, value in settings.items()]
    return any([_is_on(name, value) for name, value in said if name in _BARE or name in more])


def _bare(name: str) -> str:
    """A field's name however it is written: Gemini takes `enable_search` and `enableSearch`."""
    return name.replace("_", "").lower()


_BARE: Final = frozenset(map(_bare, FIELDS))


def _is_on(name: str, value: Any) -> bool:
    if name == "plugins" and isinstance(value, list):
        return any([_plugin(one) not in _HARMLESS_PLUGINS for one in value if _is_on("", one)])
    if isinstance(value, str):
        return bool(value) and value.lower() not in _OFF
    if isinstance(value, dict):
        return all([_is_on("", value[switch]) for switch in _SWITCHES if switch in value])
    return bool(value)


def _plugin(one: Any) -> Any:
    return one.get("id") if isinstance(one, dict) else one


def _is_run_there(tool: Any) -> bool:
    if not isinstance(tool, dict):
        return True
    function = tool.get("function")
    if isinstance(function, dict) and function.get("name") in _OWN_FUNCTIONS:
        return True
    if "type" not in tool:  # of another dialect, or left out
        return not tool.keys() & {
            "function",
            "name",
            "input_schema",
            "parameters",
            "functionDeclarations",
            "function_declarations",
        }
    return _OF_CLIENTS.fullmatch(str(tool["type"])) is None and "input_schema" not in tool


def _is_typed(tool: Any) -> bool:
    return isinstance(tool, dict) and isinstance(tool.get("type"), str)


def _shows_when_used(tool: Any) -> bool:
    return _is_typed(tool) and _SHOWN_WHEN_USED.fullmatch(tool["type"]) is not None


def _is_chosen(tool: Any, chosen: Collection[str]) -> bool:
    return _is_typed(tool) and not _shows_when_used(tool) and bool({tool["type"], tool.get("name")} & set(chosen))


def _named_by(choice: object) -> Iterator[str]:
    """The types and names of tools in a choice of tool."""
    if isinstance(choice, dict):
        yield from [value for name in ("type", "name") if isinstance(value := choice.get(name), str)]
        allowed = choice.get("tools")
        for tool in allowed if isinstance(allowed, list) else ():
            yield from _named_by(tool)


def is_shown(answer: Answer) -> bool:
    """Whether an answer says that something was looked up for it."""
    return any([_finds(part) for part in (answer.message, answer.choice, answer.extra)])


def _finds(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any([(name in _SHOWN and _is_found(inner)) or _finds(inner) for name, inner in value.items()])
    return isinstance(value, list) and any([_finds(inner) for inner in value])


def _is_found(shown: Any) -> bool:
    if isinstance(shown, list):
        return any([not (isinstance(one, dict) and one.get("type") in _OF_THE_REQUEST) for one in shown])
    return bool(shown)


def texts_in(part: Any) -> Iterator[str]:
    """Every text within a content part, however deep."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, Mapping):
        for inner in part.values():
            yield from texts_in(inner)
    elif isinstance(part, Collection):
        for inner in part:
            yield from texts_in(inner)


def is_remote(part: Mapping[str, Any]) -> bool:
    """Whether a content part that is no text stands for what is behind an address: a picture, a film, a sound, a file,
    under whatever name."""
    return part.get("type") != "text" and any([_REMOTE.match(text) is not None for text in texts_in(part)])
