"""What each reason means, in the words of the page that lists them.

A reason is said by whoever decides (`proxy.core.policy`, the judge, the guards, the store); a test holds this list
equal to what the code can say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple


class Group(NamedTuple):
    """Reasons with one consequence. `about`: what happened to the request, in a sentence."""

    title: str
    about: str
    reasons: Mapping[str, str]


GROUPS: Final[tuple[Group, ...]] = (
    Group(
        "Served",
        "The answer came from the cache.",
        {
            "hit": "a stored answer was served; `ibid explain` says on what evidence",
            "stale": "an answer past its lifetime was served, as `lane.stale` or the client's `max-stale` allows",
            "stale-if-error": "the model server failed, and an answer past its lifetime stood in for its error",
            "collapsed": "the request shared the answer of an identical one that was under way",
            "repeated": "a line of a batch shared the answer of another line that asks the same",
        },
    ),
    Group(
        "Would have been served",
        "Shadow is on: the answer was in the cache, and the request went to the model server all the same.",
        {
            "would_exact": "the same question was answered before",
            "would_semantic": "a question alike enough was answered before",
            "would_stale": "there was an answer past its lifetime, and `lane.stale` or `max-stale` allows that",
        },
    ),
    Group(
        "Miss",
        "Nothing stored could answer. The request went to the model server.",
        {
            "no_candidate": "nothing was stored yet under these exact conditions",
            "nothing_alike": "the closest stored question is less similar than `cache.near_floor`",
            "expired": "there was an answer, but it is too old for its lifetime or for the request's `max-age`",
            "max_tokens": "the stored answer is longer than this request allows, or its length is unknown",
            "not_expressible": "the stored answer has parts this API cannot say, such as signed thinking or citations",
            "routed": "the router sent the question to a cheaper model",
            "shadow": "the router also asked the other model, to compare; no client waits for this call",
            "prefetch": "the question likely to come next was fetched ahead; no client waits for this call",
            "repeat": "an audit asked the stored question again, too; no client waits for this call",
            "unseen": "embeddings: none of the inputs is stored",
            "partial": "embeddings: some inputs are stored; only the others went to the model server",
            "unfinished": "the client left while its question was looked up",
            "held": "the response had to begin before anybody knew who would answer (`x-deadline`)",
            "asked_whole": "embeddings: the smaller request was refused or did not fit, so everything was asked for",
        },
    ),
    Group(
        "Near-miss",
        "A stored question is alike, but ibid would not risk its answer. The request went to the model server.",
        {
            "below_bound": "not certain enough for `max_error_rate`",
            "budget_spent": "it would be served, but too many wrong answers were counted, or audits show too many",
            "refused_before": "this answer was found wrong for this question before",
            "gone": "the stored row was removed in the meantime",
            "changed": "the stored row no longer agrees with the index",
            "numbers": "the two questions have different numbers, in digits or words",
            "units": "different units or currencies",
            "dates": "different dates",
            "ids": "different identifiers, such as order or part numbers",
            "quoted": "different quoted text",
            "code": "different code, paths or operators",
            "entities": "different names",
            "negation": "one of them is negated",
            "antonyms": "one says the opposite of the other (enable, disable)",
            "question": "another question word (who, why, how many)",
            "script": "another alphabet or language",
            "direction": "from A to B against from B to A",
            "order": "the same words in another order",
            "substitution": "one meaningful word is replaced by another",
            "addition": "one has meaningful words more than the other",
            "possessive": "my against your: never refuses by itself, but counts",
            "pair_guard": "the small trained model that reads both texts takes them for different questions",
            "no_guard": "there is no such model for this embedding model, and only likeness speaks for the hit",
        },
    ),
    Group(
        "Exact only",
        "The request is found again only if it is repeated word for word; it is not compared by meaning.",
        {
            "semantic_off": "the operator switched comparing by meaning off",
            "exact_only": "the client asked for exact hits only",
            "too_many_misses": "this key made more misses a minute than `cache.semantic_misses_per_min`",
            "temperature": "a temperature above `cache.semantic_temperature_max`: the client wants variety; above "
            "`cache.exact_temperature_max` there is no lookup at all",
            "seed": "a `seed` asks for one particular sample; with `cache.cache_seeded` off there is no lookup at all",
            "tool_results": "a tool was called, or its output is part of the conversation",
            "tools": "tools are offered to the model; with `cache.cache_tools` off there is no lookup at all",
            "pii": "personal data in the question; without a named end user there is no lookup at all",
            "thinking": "signed thinking belongs to the very question it was made for",
            "images": "the question has images",
            "audio": "the question has audio",
            "files": "the question has files",
            "unknown_field": "a field, role or content type ibid does not know; it must match exactly",
            "no_prompt": "the last message is not plain text of the user",
            "multi_turn": "not the first question of the conversation; what came before decides too much",
            "short": "fewer words than `cache.min_words`",
            "too_long": "longer than 8,192 characters, or than the embedding model can read",
            "time_words": "about now or a near date; the answer lives `cache.volatile_ttl_s` at most",
            "invisible": "characters that cannot be seen",
            "mixed_script": "letters of several alphabets in one word",
            "symbols": "symbols the embedding model cannot tell apart",
            "injection": "reads like an attempt to steer the model",
        },
    ),
    Group(
        "Bypass",
        "The cache was not used at all.",
        {
            "no_store": "the client asked for it (`Cache-Control: no-store`, `x-cache-mode: off`)",
            "no_cache": "the client wants a new answer; it is stored",
            "refresh": "the same, asked for by `x-cache-mode: refresh` or another gateway's header",
            "pass_through": "a path that is not cached",
            "batch": "a batch line that nobody answered in time, or one whose vectors came from a provider's batch",
            "encoding_format": "embeddings in a format that is neither float nor base64",
            "no_input": "embeddings of nothing; Ollama loads a model that way",
            "n": "several answers are asked for",
            "logprobs": "token probabilities are asked for",
            "audio_output": "a spoken answer is asked for, or came",
            "store": "chat completions with `store: true`: the provider keeps the answer",
            "previous_response": "the request continues what the provider keeps and ibid did not see",
            "background": "the provider is to answer in the background",
            "web_search": "the provider searches the web; results change",
            "remote_urls": "the content behind a link may change",
            "body_too_large": "larger than `limits.body_bytes`: forwarded unread",
            "body_encoding": "in a content coding that ibid does not know: forwarded unread",
            "prompt_too_large": "larger than `cache.prompt_limit_bytes`",
        },
    ),
    Group(
        "Trouble of ibid's own",
        "A part of ibid could not help. The request went to the model server as if there were no cache.",
        {
            "loading": "the model or the index is still being loaded; exact hits are served meanwhile",
            "embedder_busy": "too many texts wait for the embedding model",
            "embedder_late": "no vector within `embedding.deadline_ms`",
            "embedder_down": "the embedding model is missing, failing or hanging",
            "index_busy": "too much waits for the vector index",
            "index_down": "the vector index does not answer",
            "index_rebuilding": "the vector index is being built",
            "index_fault": "any other fault of the vector index",
            "snapshot_refused": "at a start: the saved index is absent, damaged or of another model; it is built anew",
            "store_busy": "the database is locked or overloaded",
            "store_down": "the database cannot be reached",
            "store_full": "the disk is full",
            "store_refused": "the database refused one row",
            "timeout": "another deadline of ibid's own passed",
        },
    ),
    Group(
        "Not stored",
        "The answer reached the client but is not kept. Known only after it went out: see the metric "
        "`ibid_unstored_total`.",
        {
            "non_200": "the model server answered with another status than 200",
            "truncated": "the answer broke off",
            "finish_length": "the answer used up its token limit and may be cut",
            "finish_other": "the answer ended in a way ibid does not know",
            "finish_content_filter": "the provider's filter ended it",
            "content_filter": "the provider's filter ended it",
            "blocked": "the provider refused to answer",
            "refusal": "the model refused to answer; in plain words, kept with `cache.cache_refusals`",
            "empty": "the answer has no text",
            "tool_calls": "the answer calls a tool; kept with `cache.cache_tool_calls`",
            "citations": "the answer cites what was looked up for it",
            "provider_tools": "the provider ran tools of its own",
            "image_output": "the answer is an image",
            "error_object": "an error in place of an answer",
            "error_event": "an error in the middle of a stream",
            "garbage": "bytes ibid could not read",
            "encoded": "compressed in a way that cannot be undone here: `br` and `zstd` need packages of their own",
            "unknown_event": "an event ibid does not know",
            "unknown_delta": "a part of a stream ibid does not know",
            "data_after_done": "more came after the end of the stream",
            "choices": "several answers came",
            "content_type": "another content type than the API promises",
            "too_large": "larger than `cache.answer_limit_bytes`",
            "invalid_json": "JSON was asked for, and this is none",
            "model_mismatch": "another model answered than was asked; see `forward.model_aliases`",
            "other_model": "the local model answered, or something stood in for a server that failed",
            "purged": "a purge named it while the answer was under way",
            "upstream_no_store": "the provider's `Cache-Control: no-store` forbids it",
            "upstream_private": "the provider's `Cache-Control: private` forbids it",
            "vary": "the provider's `Vary: *` forbids it",
            "set_cookie": "the provider set a cookie that may be personal",
            "ttl_zero": "its lifetime would be 0",
        },
    ),
)

MEANINGS: Final[Mapping[str, str]] = {name: text for group in GROUPS for name, text in group.reasons.items()}
