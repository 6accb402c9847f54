"""Tables, indexes and views. The only description of the schema: migrations are compared with it in a test.

Times are epoch milliseconds (UTC), days are UTC text "2026-11-22", money is integer nano-dollars, booleans are 0/1 so
that one SQL text means the same on SQLite and PostgreSQL. No prompt text outside `entry` and the `batch_*` tables.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    text,
)

HEAD = "0013"
"""The revision this code reads and writes; a test compares it with the newest migration."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_Id = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts only INTEGER PRIMARY KEY up by itself

entry = Table(
    "entry",
    metadata,
    # The vector id. AUTOINCREMENT: an id is never reused, so a stale vector can never point at another answer.
    Column("id", _Id, primary_key=True, autoincrement=True),
    # Small and scanned columns first: SQLite then reads vectors without walking over the answers' pages.
    Column("embedder", Text),
    Column("scope", LargeBinary(32), nullable=False),
    Column("fingerprint", LargeBinary(32), nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
    Column("used_ms", BigInteger, nullable=False),  # last hit, coarse: decides eviction only
    Column("size_bytes", Integer, nullable=False),
    Column("quarantined", SmallInteger, nullable=False, default=0),
    Column("embedding", LargeBinary),
    Column("signature", LargeBinary),
    Column("checksum", LargeBinary(32), nullable=False),
    Column("tenant", Text, nullable=False),
    Column("namespace", Text, nullable=False),
    Column("upstream", Text, nullable=False),
    Column("operation", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("in_tok", BigInteger),
    Column("out_tok", BigInteger),
    Column("cache_read_tok", BigInteger),
    Column("cache_write_tok", BigInteger),
    Column("request_id", Text, nullable=False),  # the writer
    Column("total_ms", Double, nullable=False),
    Column("tags", Text, nullable=False),  # JSON list, for reading a row; `entry_tag` is for finding it
    Column("prompt", Text, nullable=False),
    Column("answer", LargeBinary, nullable=False),
    Column("group_id", BigInteger),  # the first entry found to have the same answer; NULL: this one
    Index(None, "fingerprint", unique=True),
    Index(None, "expires_ms"),
    Index(None, "used_ms", "size_bytes"),
    Index(None, "namespace", "id"),
    Index(None, "model", "id"),
    Index(None, "tenant", "id"),
    Index(None, "request_id"),
    Index(None, "created_ms"),
    CheckConstraint("quarantined IN (0, 1)", name="quarantined"),
    sqlite_autoincrement=True,
)

entry_tag = Table(
    "entry_tag",
    metadata,
    Column("tag", Text, primary_key=True),
    Column("entry_id", _Id, ForeignKey("entry.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Index(None, "entry_id"),
)

purge = Table(
    "purge",
    metadata,
    # What was purged, in the order of the commits. The newest row always stays, so that no number is given twice.
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("ts", BigInteger, nullable=False),
    Column("selector", Text, nullable=False),  # JSON
    Column("removed", LargeBinary, nullable=False),  # first eight bytes of each fingerprint, sorted
)

act = Table(
    "act",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("ts", BigInteger, nullable=False),
    Column("who", Text, nullable=False),  # name of the admin token, or "command line"
    Column("role", Text, nullable=False),
    Column("route", Text, nullable=False),  # "POST /cache/flush"
    Column("parameters", Text, nullable=False),  # JSON, without secrets and texts
    Column("touched", BigInteger),  # rows
    Column("outcome", Text, nullable=False),
    Index(None, "ts"),
    sqlite_autoincrement=True,
)

request = Table(
    "request",
    metadata,
    Column("id", Text, primary_key=True),
    Column("ts", BigInteger, nullable=False),
    Column("day", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("namespace", Text, nullable=False),
    Column("tag", Text, nullable=False),
    Column("dialect", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("stream", SmallInteger, nullable=False),
    Column("model_requested", Text, nullable=False),
    Column("model_served", Text, nullable=False),
    Column("upstream", Text, nullable=False),
    Column("lane", Text, nullable=False),  # the mechanism that answered, or "forward", "bypass", "refused"
    Column("outcome", Text, nullable=False),
    Column("cache_status", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("status", Integer, nullable=False),
    Column("similarity", Double),
    Column("entry_id", BigInteger),  # no foreign key: the ledger outlives entries
    Column("retry_of", Text),
    Column("in_tok", BigInteger),  # what the client saw; what was billed stands in upstream_call
    Column("out_tok", BigInteger),
    Column("cache_read_tok", BigInteger),
    Column("cache_write_tok", BigInteger),
    Column("usage_basis", Text, nullable=False),
    Column("baseline_nusd", BigInteger, nullable=False),
    Column("actual_nusd", BigInteger, nullable=False),
    Column("baseline_basis", Text, nullable=False),
    Column("price_id", Text, nullable=False),
    Column("ttft_ms", Double),
    Column("total_ms", Double, nullable=False),
    Column("baseline_ms", Double),
    Column("key_id", Text),  # the virtual key that asked; NULL: a credential passed through
    Column("team", Text, nullable=False, server_default=""),  # the key's project
    # What is summed by day and read page by page stands in the index: the rows are wide.
    Index("ix_request_browsed", "day", "ts", "id", "lane", "baseline_nusd", "actual_nusd", "entry_id"),
    Index(None, "key_id", "ts", sqlite_where=text("key_id IS NOT NULL"), postgresql_where=text("key_id IS NOT NULL")),
    sqlite_with_rowid=False,  # written for every request: one tree and one index, not four
)

upstream_call = Table(
    "upstream_call",
    metadata,
    Column("id", Text, primary_key=True),
    Column("request_id", Text, nullable=False),
    Column("ts", BigInteger, nullable=False),
    Column("upstream", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("tier", Text, nullable=False),
    Column("won", SmallInteger, nullable=False),
    Column("in_tok", BigInteger),
    Column("out_tok", BigInteger),
    Column("cache_read_tok", BigInteger),
    Column("cache_write_tok", BigInteger),
    Column("accepted_pred_tok", BigInteger),  # of a prediction; the rejected ones are in out_tok, as they are billed
    Column("rejected_pred_tok", BigInteger),
    Column("cost_nusd", BigInteger, nullable=False),
    Column("price_id", Text, nullable=False),
    Column("cost_basis", Text, nullable=False),  # as usage_basis, or "unpriced": no price is known for this context
    Column("usage_basis", Text, nullable=False),
    Column("status", Integer, nullable=False),
    Column("ttft_ms", Double),
    Column("total_ms", Double, nullable=False),
    Index(None, "request_id"),
    Index(None, "ts"),
)

saving = Table(
    "saving",
    metadata,
    Column("request_id", Text, primary_key=True),
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("family", Text, nullable=False),
    Column("mechanism", Text, nullable=False),
    Column("before_nusd", BigInteger, nullable=False),
    Column("after_nusd", BigInteger, nullable=False),
    Column("saved_nusd", BigInteger, nullable=False),
    Column("saved_ms", Double),
    Column("basis", Text, nullable=False),
    sqlite_with_rowid=False,
)

lookup = Table(
    "lookup",
    metadata,
    Column("request_id", Text, primary_key=True),
    Column("record", Text, nullable=False),  # JSON, see `proxy.request.explanation`
    sqlite_with_rowid=False,
)

feedback = Table(
    "feedback",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("ts", BigInteger, nullable=False),
    Column("request_id", Text),
    Column("entry_id", BigInteger),
    Column("verdict", Text, nullable=False),
    Column("source", Text, nullable=False),
    Index(None, "request_id"),
    Index(None, "entry_id"),
    CheckConstraint("verdict IN ('right', 'wrong')", name="verdict"),
    sqlite_autoincrement=True,
)

audit = Table(
    "audit",
    metadata,
    # A comparison of two answers: what the judge learns from. Arrays are the learner's, without the texts.
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("ts", BigInteger, nullable=False),
    Column("source", Text, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("namespace", Text, nullable=False),
    Column("scope", LargeBinary(32), nullable=False),
    Column("fingerprint", LargeBinary(32), nullable=False),
    Column("embedder", Text, nullable=False),
    Column("entry_id", BigInteger, nullable=False),
    Column("group_id", BigInteger, nullable=False),
    Column("similarity", Double, nullable=False),
    Column("log_odds", Double, nullable=False),
    Column("standing", Text, nullable=False),
    Column("served", SmallInteger, nullable=False),
    Column("p_same", Double, nullable=False),
    Column("weight", Double, nullable=False),
    Column("features", LargeBinary, nullable=False),
    Column("words", LargeBinary, nullable=False),
    Column("signature", LargeBinary, nullable=False),
    Column("region", Text, nullable=False, server_default=""),
    Column("comparer", Text, nullable=False, server_default="built-in"),
    Column("p_null", Double),  # of the kept question, asked again; NULL: it was not
    Column("writer", Text, nullable=False),  # the process: replicas learn from each other's rows, not from their own
    Index(None, "embedder", "id"),
    Index(None, "request_id"),
    Index(None, "entry_id"),
    Index(None, "scope", "id"),
    Index(None, "tenant", "id"),
    CheckConstraint("source IN ('forward', 'audit', 'feedback')", name="source"),
    sqlite_autoincrement=True,
)

repeated_answer = Table(
    "repeated_answer",
    metadata,
    # A question that had an answer was answered anew: how often two answers to one question look different.
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("ts", BigInteger, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("entry_id", BigInteger, nullable=False),
    Column("comparer", Text, nullable=False),
    Column("p_same", Double, nullable=False),
    Index(None, "ts"),
    sqlite_autoincrement=True,
)

PAIRED = ("more", "less", "even", "normal", "normal_wrong", "normal_more", "normal_less", "normal_even")

evidence = Table(
    "evidence",
    metadata,
    # What the judge knows of a level, added up over every process: see `proxy.core.risk.Tally`.
    Column("embedder", Text, primary_key=True),
    Column("kind", Text, primary_key=True),  # scope, namespace, tenant, installation
    Column("scope", LargeBinary(32), primary_key=True),  # of a scope, else empty
    Column("tenant", Text, primary_key=True),  # of a tenant or its namespace, else empty
    Column("namespace", Text, primary_key=True),
    Column("changed_ms", BigInteger, nullable=False),
    Column("labelled", Double, nullable=False),
    Column("hits", Double, nullable=False),
    Column("audited", Double, nullable=False),
    Column("counted_wrong", Double, nullable=False),
    Column("would_be", Double, nullable=False),
    Column("would_be_wrong", Double, nullable=False),
    Column("start", Double, nullable=False),
    Column("start_wrong", Double, nullable=False),
    *(Column(name, Double, nullable=False, server_default="0") for name in PAIRED),
    Index(None, "changed_ms"),
    CheckConstraint("kind IN ('scope', 'namespace', 'tenant', 'installation')", name="kind"),
)

refused_pair = Table(
    "refused_pair",
    metadata,
    # Hard negatives: the entry of fingerprint `kept` is never served for the question of fingerprint `asked` again.
    Column("asked", LargeBinary(32), primary_key=True),
    Column("kept", LargeBinary(32), primary_key=True),
    Column("ts", BigInteger, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("entry_id", BigInteger, nullable=False),
    Column("source", Text, nullable=False),
    Index(None, "ts"),
    Index(None, "request_id"),
    Index(None, "entry_id"),
)

route_vote = Table(
    "route_vote",
    metadata,
    # Whether a candidate's answer to the question of an entry was, or would have been, good.
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("ts", BigInteger, nullable=False),
    Column("entry_id", BigInteger, nullable=False),
    Column("candidate", Text, nullable=False),  # "upstream/model"
    Column("good", SmallInteger, nullable=False),
    Column("source", Text, nullable=False),
    Column("request_id", Text, nullable=False),
    Index(None, "request_id"),
    CheckConstraint("good IN (0, 1)", name="good"),
    sqlite_autoincrement=True,
)

api_key = Table(
    "api_key",
    metadata,
    Column("id", Text, primary_key=True),
    Column("digest", LargeBinary(32), nullable=False),  # SHA-256 of the secret, which is stored nowhere
    Column("project", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("changed_ms", BigInteger, nullable=False),  # grows with every change, so that others notice it
    Column("rotated_ms", BigInteger),
    Column("revoked_ms", BigInteger),
    Column("expires_ms", BigInteger),
    Column("limits", Text, nullable=False),  # JSON list of [kind, amount, window]; USD as nano-dollars
    Column("models", Text, nullable=False),  # JSON list of patterns; []: every model
    Column("plan", Text, nullable=False),
    Index(None, "digest", unique=True),
)

batch_file = Table(
    "batch_file",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
    Column("job_id", Text, nullable=False),  # of an output, which is a view of the job's lines; else ""
    Column("part", Text, nullable=False),
    Column("whole", SmallInteger, nullable=False),  # all of it has arrived
    Index(None, "tenant", "created_ms"),
    Index(None, "expires_ms"),
    CheckConstraint("part IN ('input', 'output', 'error')", name="part"),
    CheckConstraint("whole IN (0, 1)", name="whole"),
)

batch_chunk = Table(
    "batch_chunk",
    metadata,
    # Bytes of an uploaded file, CHUNK_BYTES in each but the last, compressed.
    Column("file_id", Text, ForeignKey("batch_file.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("data", LargeBinary, nullable=False),
)

batch_job = Table(
    "batch_job",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("dialect", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("input_file_id", Text, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("deadline_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger, nullable=False),
    Column("headers", Text, nullable=False),  # JSON, without credentials
    Column("needs_owner", SmallInteger, nullable=False),
    Column("metadata", Text),  # JSON
    Column("errors", Text, nullable=False),  # JSON
    Column("times", Text, nullable=False),  # JSON: status → ms
    Column("total", Integer, nullable=False),
    Column("succeeded", Integer, nullable=False),
    Column("errored", Integer, nullable=False),
    Column("expired", Integer, nullable=False),
    Column("cancelled", Integer, nullable=False),
    Column("output_bytes", BigInteger, nullable=False),
    Column("error_bytes", BigInteger, nullable=False),
    Column("output_file_id", Text, nullable=False),
    Column("error_file_id", Text, nullable=False),
    Column("key_id", Text, nullable=False),  # of the virtual key that handed it in, or ""
    Column("worker", Text, nullable=False),  # the process that runs it; "" for none
    Column("lease_ms", BigInteger, nullable=False),  # until when it is that process's
    Index(None, "tenant", "created_ms"),
    Index(None, "status"),
    Index(None, "expires_ms"),
    CheckConstraint("needs_owner IN (0, 1)", name="needs_owner"),
)

batch_line = Table(
    "batch_line",
    metadata,
    Column("job_id", Text, ForeignKey("batch_job.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),  # of the input's line, from 0
    Column("state", Text, nullable=False),
    Column("part", Integer),
    Column("result", LargeBinary),
    CheckConstraint("state IN ('sent', 'ok', 'error', 'expired', 'cancelled')", name="state"),
)

batch_part = Table(
    "batch_part",
    metadata,
    Column("job_id", Text, ForeignKey("batch_job.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("upstream", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("provider_id", Text, nullable=False),
    Column("input_file_id", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("lines", Integer, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("purge", BigInteger, nullable=False, server_default="0"),  # the newest one when it was handed in
    Index(None, "provider_id"),
    CheckConstraint("state IN ('creating', 'running', 'ended')", name="state"),
)

deferred = Table(
    "deferred",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant", Text, nullable=False),
    Column("path_qs", Text, nullable=False),
    Column("headers", Text, nullable=False),  # JSON, without credentials
    Column("needs_owner", SmallInteger, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("deadline_ms", BigInteger),
    Column("expires_ms", BigInteger, nullable=False),
    Column("job_id", Text, nullable=False),  # of the batch it went with, or ""
    Column("number", Integer, nullable=False),
    Column("reply", LargeBinary),
    Column("key_id", Text, nullable=False),  # as of a batch_job
    Column("worker", Text, nullable=False),  # likewise
    Column("lease_ms", BigInteger, nullable=False),
    Index(None, "expires_ms"),
    CheckConstraint("needs_owner IN (0, 1)", name="needs_owner"),
)

_COUNT = "CAST(COUNT(*) AS BIGINT)"


def _total(expression: str) -> str:
    """Whole number: PostgreSQL's SUM(bigint) is numeric."""
    return f"CAST(COALESCE(SUM({expression}), 0) AS BIGINT)"


def _usd(expression: str) -> str:
    return f"CAST({_total(expression)} AS DOUBLE PRECISION) / 1e9"


def _share(part: str, whole: str) -> str:
    return f"CAST({part} AS DOUBLE PRECISION) / NULLIF({whole}, 0)"


_REQUESTS = _total("CASE WHEN lane = 'audit' THEN 0 ELSE 1 END")  # an audit is ours, not a client's
_SAVED = "baseline_nusd - actual_nusd"
_HITS = _total("CASE WHEN lane LIKE 'cache.%' OR lane = 'stream.coalesce' THEN 1 ELSE 0 END")
_MONEY = (
    f"{_REQUESTS} AS requests, {_HITS} AS hits, {_usd('baseline_nusd')} AS baseline_usd, "
    f"{_usd('actual_nusd')} AS actual_usd, {_usd(_SAVED)} AS saved_usd"
)

VIEWS: dict[str, str] = {
    "savings_daily": f"SELECT day, {_MONEY} FROM request GROUP BY day",
    "savings_by_model": f"SELECT upstream, model_requested AS model, {_MONEY} FROM request GROUP BY upstream, "
    "model_requested",
    "savings_by_tenant": f"SELECT tenant, team, {_MONEY} FROM request GROUP BY tenant, team",
    "savings_by_strategy": (
        f"SELECT family AS strategy, mechanism, {_COUNT} AS steps, {_usd('saved_nusd')} AS saved_usd, "
        f"{_usd('CASE WHEN saved_nusd > 0 THEN saved_nusd ELSE 0 END')} AS earned_usd, "
        f"{_usd('CASE WHEN saved_nusd < 0 THEN -saved_nusd ELSE 0 END')} AS spent_usd, "
        "COALESCE(SUM(saved_ms), 0) / 1000.0 AS saved_s FROM saving GROUP BY family, mechanism"
    ),
    "hit_rate_daily": (
        f"SELECT day, {_REQUESTS} AS requests, {_HITS} AS hits, {_share(_HITS, _REQUESTS)} AS hit_rate, "
        + _share(
            _total("CASE WHEN lane LIKE 'cache.%' OR lane = 'stream.coalesce' THEN baseline_nusd ELSE 0 END"),
            "SUM(baseline_nusd)",
        )
        + " AS money_hit_rate FROM request GROUP BY day"
    ),
    "wrong_hits": (
        "SELECT r.day AS day, r.model_requested AS model, r.lane AS lane, CAST(COUNT(*) AS BIGINT) AS hits, "
        "CAST(COUNT(COALESCE(f.wrong, a.wrong)) AS BIGINT) AS judged, "
        "CAST(COALESCE(SUM(COALESCE(f.wrong, a.wrong)), 0) AS DOUBLE PRECISION) AS wrong, "
        "CAST(COALESCE(SUM(COALESCE(f.wrong, a.wrong)), 0) AS DOUBLE PRECISION) "
        "/ NULLIF(COUNT(COALESCE(f.wrong, a.wrong)), 0) AS wrong_rate "
        "FROM request r LEFT JOIN (SELECT request_id, MAX(CASE WHEN verdict = 'wrong' THEN 1.0 ELSE 0.0 END) AS wrong "
        "FROM feedback WHERE request_id IS NOT NULL GROUP BY request_id) f ON f.request_id = r.id "
        "LEFT JOIN (SELECT request_id, MAX(1.0 - p_same) AS wrong FROM audit WHERE served = 1 GROUP BY request_id) a "
        "ON a.request_id = r.id "
        "WHERE r.lane LIKE 'cache.%' GROUP BY r.day, r.model_requested, r.lane"
    ),
    "top_entries": (
        f"SELECT entry_id, {_COUNT} AS hits, {_usd(_SAVED)} AS saved_usd, MAX(ts) AS last_hit_ms FROM request "
        "WHERE entry_id IS NOT NULL AND lane LIKE 'cache.%' GROUP BY entry_id"
    ),
    "latency_by_lane": (
        "WITH ranked AS (SELECT lane, total_ms, ROW_NUMBER() OVER (PARTITION BY lane ORDER BY total_ms) AS i, "
        "COUNT(*) OVER (PARTITION BY lane) AS n, ttft_ms, ROW_NUMBER() OVER (PARTITION BY lane ORDER BY "
        "CASE WHEN ttft_ms IS NULL THEN 1 ELSE 0 END, ttft_ms) AS k, COUNT(ttft_ms) OVER (PARTITION BY lane) AS m "
        "FROM request) SELECT lane, CAST(MAX(n) AS BIGINT) AS requests, "
        "MAX(CASE WHEN i <= (n * 50 + 99) / 100 THEN total_ms END) AS p50_ms, "
        "MAX(CASE WHEN i <= (n * 95 + 99) / 100 THEN total_ms END) AS p95_ms, "
        "MAX(CASE WHEN i <= (n * 99 + 99) / 100 THEN total_ms END) AS p99_ms, "
        "MAX(CASE WHEN k <= (m * 50 + 99) / 100 THEN ttft_ms END) AS ttft_p50_ms, "
        "MAX(CASE WHEN k <= (m * 95 + 99) / 100 THEN ttft_ms END) AS ttft_p95_ms FROM ranked GROUP BY lane"
    ),
}
"""Name → SELECT. Percentiles are nearest rank, so they are measured values and equal on both databases."""
