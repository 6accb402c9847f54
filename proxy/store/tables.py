"""What each table is for, and each column of the ledger with its unit, as the page of the schema lists them.

The tables themselves stand in `schema`; a test compares these columns with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple


class Described(NamedTuple):
    """`columns`: name → what it is and its unit; empty for tables that only ibid reads."""

    about: str
    columns: Mapping[str, str] = {}


TABLES: Final[Mapping[str, Described]] = {
    "request": Described(
        "one row for each request that was planned, and one for each audit of ibid's own",
        {
            "id": "as `x-request-id` told the client",
            "ts": "when it began, epoch ms",
            "day": "the same as a UTC day, 2026-11-22",
            "tenant": "digest of the credential, or of the virtual key's project",
            "namespace": "of `x-cache-namespace`",
            "tag": "the first of `x-cache-tags`",
            "dialect": "the API it was asked in",
            "endpoint": "the path it was sent to",
            "stream": "1 when a stream was asked for",
            "model_requested": "as the client named it",
            "model_served": "as the answer named it",
            "upstream": "the server it was for, by its configured name",
            "lane": "the mechanism that answered, or `forward`, `bypass`, `refused`, `audit`",
            "outcome": "`ok`, `error` or `cancelled`",
            "cache_status": "as the header `x-cache`, or `AUDIT`",
            "reason": "as the header `x-cache-reason`",
            "status": "HTTP status the client got",
            "similarity": "of the closest stored question, -1 to 1",
            "entry_id": "the stored answer that was served or nearly served; it may be gone",
            "retry_of": "id of the request that this one, a library's own retry, joined",
            "in_tok": "input tokens the client was told",
            "out_tok": "output tokens the client was told",
            "cache_read_tok": "of the input, read from the provider's own cache",
            "cache_write_tok": "of the input, written to the provider's own cache",
            "usage_basis": "how the tokens are known: `measured`, `estimated`, `none`",
            "baseline_nusd": "cost without ibid, nano-dollars",
            "actual_nusd": "cost paid, nano-dollars",
            "baseline_basis": "how the baseline is known: `measured`, `estimated`, `failed`, `unpriced`, …",
            "price_id": "the price list that was used",
            "ttft_ms": "to the first byte of the answer, ms",
            "total_ms": "to the last byte, ms",
            "baseline_ms": "time the same answer took when it was fetched, ms",
            "key_id": "virtual key that asked; NULL for any other credential",
            "team": "project of that key, or empty",
        },
    ),
    "upstream_call": Described(
        "one row for each call to a model server, as the provider bills it",
        {
            "id": "of the call",
            "request_id": "the request it was made for",
            "ts": "when it began, epoch ms",
            "upstream": "configured name of the server",
            "model": "as it was asked for there",
            "purpose": "`answer`, `pass` for what passes through, or why ibid asked on its own: `audit`, `hedge`, …",
            "tier": "service tier: `default`, `flex`, `batch`, `priority`",
            "won": "1 when its answer reached somebody",
            "in_tok": "input tokens billed",
            "out_tok": "output tokens billed",
            "cache_read_tok": "of the input, read from the provider's own cache",
            "cache_write_tok": "of the input, written to it",
            "accepted_pred_tok": "tokens of a prediction that were right",
            "rejected_pred_tok": "tokens of a prediction that were wrong; they are billed and part of `out_tok`",
            "cost_nusd": "nano-dollars",
            "price_id": "the price list that was used",
            "cost_basis": "how the cost is known: `measured`, `estimated`, `none`, `unpriced`",
            "usage_basis": "how the tokens are known",
            "status": "HTTP status, 0 without a response",
            "ttft_ms": "to the first byte, ms",
            "total_ms": "to the last byte, ms",
        },
    ),
    "saving": Described(
        "one row for each step between what a request would have cost and what it did cost",
        {
            "request_id": "the request",
            "step": "number of the step, from 0",
            "family": "strategy: cached, streaming, batch, edge, hybrid, speculative",
            "mechanism": "what saved or cost it, such as `cache.exact`",
            "before_nusd": "cost without this step, nano-dollars",
            "after_nusd": "cost with it, nano-dollars",
            "saved_nusd": "the difference; negative where the step cost money",
            "saved_ms": "waiting time saved, ms, where it is known",
            "basis": "how it is known: `measured`, `estimated`, `failed`, …",
        },
    ),
    "lookup": Described(
        "how a request was looked up, for `ibid explain REQUEST_ID`; no text of anybody's",
        {
            "request_id": "the request",
            "record": "JSON: what limited it, the stored questions that came closest, what was held against each, "
            "and the bound they had to clear",
        },
    ),
    "feedback": Described(
        "judgements by people, sent to `POST /cache/feedback`",
        {
            "id": "of the judgement",
            "ts": "epoch ms",
            "request_id": "the hit it is about",
            "entry_id": "the stored answer it is about",
            "verdict": "`right` or `wrong`",
            "source": "who said so",
        },
    ),
    "act": Described(
        "what administrators did or tried, so that a purge can be traced to whoever made it; never removed by ibid",
        {
            "id": "of the act, in the order they began",
            "ts": "when it began, epoch ms",
            "who": "name of the admin token, `admin` for the first, `command line` for `ibid keys` without a server",
            "role": "that token's role: `stats`, `auditor`, `admin`",
            "route": "method and path, as `POST /cache/invalidate`",
            "parameters": "JSON of what was asked; of texts only their length, and no secret",
            "touched": "entries, keys or lines it reached; NULL where none are counted",
            "outcome": "`done`, `dry run`, `broken off`, `begun` after a crash, or the code of the error",
        },
    ),
    "entry": Described("stored answers with their questions: the only table of the cache with text in it"),
    "entry_tag": Described("tags of stored answers"),
    "audit": Described("comparisons of two answers, and what the judge saw, as numbers without text"),
    "repeated_answer": Described("how alike two answers to one question were, wherever one was answered anew"),
    "evidence": Described("what the judge knows, by scope, namespace, tenant and installation"),
    "refused_pair": Described("stored answers that are never served again for one particular question"),
    "route_vote": Described("whether a cheaper model did well on a question, and how that is known"),
    "purge": Described("purges that were made, by number, without text"),
    "api_key": Described("virtual keys and their limits; of the secret only a digest"),
    "batch_file": Described("files of batches"),
    "batch_chunk": Described("their bytes, compressed; gone after `batch.keep_days`, as all of the batch tables"),
    "batch_job": Described("batches"),
    "batch_line": Described("results of batches, line by line"),
    "batch_part": Described("what was handed to a provider's own batch API"),
    "deferred": Described("single calls that are answered later"),
}
