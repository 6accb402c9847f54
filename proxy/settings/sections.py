"""Frozen settings by section, and why each is there. Units are in the names.

Every setting is a field with a default and one line of why; `options()` lists them, and a test compares that list with
`deploy/config.example.toml`. `config.load` makes them; core receives only its own `Rules` and `Limits`.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal, NamedTuple

from proxy.core.model import Limits, Rules
from proxy.core.option import option
from proxy.core.pace import TOKENS_PER_S, Pace
from proxy.core.plan import ALIASES, UPSTREAM, Lane, Policy
from proxy.core.units import MIB
from proxy.settings.file import setting_names
from proxy.settings.lanes import LANES, AliasSettings, LaneSettings, PolicySettings


class Address(NamedTuple):
    """Where a listener binds. Port 0 lets the system choose."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


@dataclass(frozen=True, slots=True)
class Server:
    """The two listeners. `admin_token` comes from the environment alone; without one a token file is made."""

    listen: Address = option(Address("127.0.0.1", 4141), "client listener; the loopback until you decide otherwise")
    admin: Address = option(Address("127.0.0.1", 4142), "admin listener: metrics, ledger, purges; keep it private")
    anonymous: bool = option(False, "serve clients without a credential, all as one tenant; loopback listener only")
    cors_origins: tuple[str, ...] = option(
        (), "web origins that may read answers, or *; others as their upstream allows it"
    )
    keys_only: bool = option(False, "serve keys made by `ibid keys` only; any other credential, or none, is 401")
    workers: int = option(1, "event loops sharing the client port; more than 1 is not supported yet", least=1)
    memory_bytes: int = option(
        0, "memory it may take: caches go at 85 %, new requests get 503 at 95 %; 0: what the container has"
    )
    drain_timeout_s: float = option(30.0, "how long a stop waits for answers under way")
    admin_token: str | None = field(default=None, repr=False, metadata={"environment_only": True})


@dataclass(frozen=True, slots=True)
class AdminToken:
    """One more token of the admin listener, for somebody who may do less. Its name stands in the audit trail."""

    role: Literal["stats", "auditor", "admin"] = option(
        "stats", "stats: numbers without text; auditor: reads everything, judges answers; admin: everything"
    )
    token_env: str | None = option(None, "environment variable that holds the token, 32 characters or more; required")
    token: str | None = field(default=None, repr=False, metadata={"environment_only": True})


@dataclass(frozen=True, slots=True)
class UpstreamSettings:
    """One model server. The table's name is the upstream's name in headers, scopes and the ledger."""

    base_url: str = option("", "address of the server, with or without its /v1; no credential, query or fragment")
    dialect: Literal["openai", "anthropic", "gemini", "ollama"] = option("openai", "wire format it speaks")
    models: tuple[str, ...] = option(
        (), "the only models it is asked for, with * and ?; none: all that no other one of its dialect names"
    )
    key_env: str | None = option(None, "environment variable of the key it is sent; unset: the client's own")
    key: str | None = field(default=None, repr=False, metadata={"environment_only": True})
    proxy: str | None = field(default=None, repr=False, metadata={"environment_only": True})
    batch: Literal["auto", "off"] = option("auto", "auto: use its batch API if it has one; off: ordinary calls only")
    prices_as: str | None = option(None, "provider whose list prices apply; unset: the one of the upstream's name")
    stands_in_for: tuple[str, ...] = option(
        (), "asked=own: what it calls the models it stands in for, with * and ?; none: any, under the same name"
    )


@dataclass(frozen=True, slots=True)
class Forward:
    """How long a forward may take, and what more of the client's request it carries."""

    connect_timeout_s: float = option(5.0, "TCP and TLS; a dead address must fail fast", least=0.001)
    first_byte_timeout_s: float = option(600.0, "from request to response head; a long whole answer", least=0.001)
    idle_timeout_s: float = option(
        600.0, "longest silence inside a response body; the SDKs bear as much of a model that thinks", least=0.001
    )
    proxy: str | None = option(
        None,
        "http proxy to all upstreams; off: none; unset: HTTP_PROXY, HTTPS_PROXY, NO_PROXY, never for the loopback",
        is_secret=True,
    )
    extra_headers: tuple[str, ...] = option((), "request headers that reach the upstream though ibid drops them")
    delivery_headers: tuple[str, ...] = option(
        (), "more request headers that reach the upstream but do not keep requests apart"
    )
    drop_headers: tuple[str, ...] = option((), "more request headers that do not reach the upstream")
    model_aliases: tuple[str, ...] = option((), "asked=answered: other names an upstream answers with, * for any")


@dataclass(frozen=True, slots=True)
class Cache:
    """What of the cache is not a rule of the policy."""

    hot_bytes: int = option(64 * MIB, "memory for rows served without asking SQL; least recently used leave")
    usage_on_hit: Literal["original", "zero"] = option("original", "usage a hit reports: as stored, or 0")
    semantic_misses_per_min: int = option(
        600,
        "semantic misses of one key; beyond it exact hits only: no cache is mapped by near copies; 0: no bound",
    )
    judge_model: str | None = option(None, "chat model of the same upstream that compares answers; unset: none")


@dataclass(frozen=True, slots=True)
class Stream:
    """How streamed hits go out, and what becomes of a call that every client has left."""

    replay_pace: Literal["instant", "recorded", "tokens"] = option(
        "instant", "a streamed hit: at once, as the original came, or replay_tokens_per_s"
    )
    replay_tokens_per_s: float = option(
        40.0, "output tokens a second of a hit when the pace is tokens", least=TOKENS_PER_S[0], most=TOKENS_PER_S[1]
    )
    on_leave: Literal["abort", "finish", "finish_half"] = option(
        "abort", "a call all clients left: cut, read on and store, or that only from half of the usual length"
    )

    @property
    def pace(self) -> Pace:
        return self.replay_tokens_per_s if self.replay_pace == "tokens" else self.replay_pace


@dataclass(frozen=True, slots=True)
class Batch:
    """Batches and deferred calls of our own."""

    serve: bool = option(
        True, "answer /files of purpose batch, /batches and Prefer: respond-async; false: pass them on"
    )
    concurrency: int = option(16, "lines asked for at once where the upstream has no batch API", least=1)
    poll_interval_s: float = option(30.0, "how often a provider is asked how far its batch is", least=0.01)
    max_lines: int = option(100_000, "most lines of one batch; OpenAI's own bound of 50,000 stays", least=1)
    keep_days: float = option(30.0, "how long files, batches, results and deferred answers are kept", least=0.001)
    files_bytes: int = option(
        16_384 * MIB, "files handed in, together; from half of it on a tenant and an address hold an eighth", least=MIB
    )
    collect_s: float = option(60.0, "how long a deferred call waits for others to share its provider batch")


@dataclass(frozen=True, slots=True)
class Embedding:
    """The model that turns a prompt into a vector."""

    model: str = option("all-MiniLM-L6-v2", "the bundled model, or a folder in sentence-transformers layout")
    backend: Literal["onnx", "onnx-int8", "torch"] = option(
        "onnx", "onnx-int8 is faster, less exact; torch is the reference, slower, and 400 MB larger"
    )
    threads: int = option(1, "threads of one model call; more only with idle cores", least=1)
    queue: int = option(256, "texts waiting; when full the lookup is bypassed at once", least=1)
    lru: int = option(4096, "vectors kept, so wording seen before is not embedded again; 1.5 KiB each")
    states_bytes: int = option(
        64 * MIB, "memory for token states, so the pair guard encodes few texts anew; about 1.2 KB a word"
    )
    deadline_ms: int = option(150, "longest wait for a vector; then the request is forwarded", least=1)
    require_semantic: bool = option(False, "refuse to start without a working model, instead of exact hits only")


@dataclass(frozen=True, slots=True)
class Index:
    """The vector index, derived from SQL."""

    promote_at: int = option(2000, "vectors in one scope before an approximate index replaces the exact one", least=64)
    snapshot_interval_s: float = option(300.0, "how often it is saved; a start replays only later rows", least=1)
    queue: int = option(4096, "adds and removes waiting for the owner; a rebuild finds what did not fit", least=1)


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """SQL: entries and ledger. `database_url` may hold a password and is kept out of `repr`."""

    database_url: str = option(
        "", "sqlite:///FILE or postgresql://USER@HOST/NAME; unset: ibid.db in data_dir", is_secret=True
    )
    max_entries: int = option(100_000, "entries kept; the least recently used are evicted", least=1)
    max_bytes: int = option(1024 * MIB, "stored answers together; the least recently used are evicted", least=MIB)
    queue: int = option(10_000, "entries waiting for the one writer; when full an answer is not stored", least=1)


@dataclass(frozen=True, slots=True)
class Log:
    """One line per lookup on standard error."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = option("INFO", "INFO has one line per lookup")
    format: Literal["json", "text"] = option("json", "json for machines, text for people at a terminal")
    sample: float = option(1.0, "share of lookups that have a line; failed and slow ones always have", least=0, most=1)
    traces: Literal["off", "otlp"] = option(
        "off", "otlp: a span of each request goes where the OTEL_EXPORTER_OTLP_ variables say; needs the extra otel"
    )
    slow_s: float = option(
        120.0, "a request that takes longer is a warning, slow_request, with the time of its steps", above=0
    )


@dataclass(frozen=True, slots=True)
class PriceOverride:
    """Prices agreed with a provider, or of a machine of one's own, exact as written."""

    input_usd_per_mtok: Decimal | None = option(None, "input tokens; required unless time is priced, then 0")
    output_usd_per_mtok: Decimal | None = option(None, "output tokens; required unless time is priced, then 0")
    cache_read_usd_per_mtok: Decimal | None = option(None, "read from the provider's cache; unset: as input")
    cache_write_usd_per_mtok: Decimal | None = option(None, "written to the provider's cache; unset: as input")
    flex_factor: Decimal | None = option(None, "times these rates in tier flex; unset: such calls are unpriced")
    batch_factor: Decimal | None = option(None, "times these rates in a batch; unset: such calls are unpriced")
    priority_factor: Decimal | None = option(None, "times these rates in tier priority; unset: such calls are unpriced")
    per_second_usd: Decimal | None = option(None, "a second of a call, for a model of one's own")

    def rates(self) -> dict[str, str]:
        """What is set, by the names of the price book: input, output, cache_read, cache_write, the others as here."""
        given = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        return {name.removesuffix("_usd_per_mtok"): str(usd) for name, usd in given.items() if usd is not None}


DEFAULT_UPSTREAMS: Mapping[str, UpstreamSettings] = types.MappingProxyType(
    {
        "openai": UpstreamSettings("https://api.openai.com", "openai"),
        "anthropic": UpstreamSettings("https://api.anthropic.com", "anthropic"),
        "gemini": UpstreamSettings("https://generativelanguage.googleapis.com", "gemini"),
        "ollama": UpstreamSettings("http://127.0.0.1:11434", "ollama"),
    }
)


@dataclass(frozen=True, slots=True)
class Settings:
    """All of it, checked. `source` is the file it came from, if any."""

    data_dir: Path
    server: Server
    limits: Limits
    upstreams: Mapping[str, UpstreamSettings]
    forward: Forward
    rules: Rules
    cache: Cache
    stream: Stream
    batch: Batch
    embedding: Embedding
    index: Index
    store: StoreSettings
    prices: Mapping[str, PriceOverride]  # by "upstream/model" or "upstream/*"
    log: Log
    lanes: LaneSettings = field(default_factory=LaneSettings)
    policies: tuple[Policy, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=lambda: ALIASES)
    admin_tokens: Mapping[str, AdminToken] = field(default_factory=dict)
    source: Path | None = None
    is_data_dir_named: bool = False  # by somebody who may have mistyped it: then the folder above must exist

    @property
    def ready(self) -> frozenset[Lane]:
        """Lanes that have what they need."""
        lanes = self.lanes
        needs = {
            Lane.REVALIDATE: lanes.stale.while_revalidate_s > 0,
            Lane.STALE_IF_ERROR: lanes.stale.if_error_s > 0,
            Lane.UPSTREAM_IF_ERROR: any(
                word.startswith(UPSTREAM) for policy in self.policies for word in policy.plan.on_any_error
            ),
            Lane.ROUTE: bool(lanes.route.candidates),
            Lane.PREDICT: bool(lanes.predict.models),
            Lane.TIER: bool(lanes.tier.models),
            Lane.DEFER: self.batch.serve,
            **dict.fromkeys((Lane.EDGE, Lane.EDGE_IF_ERROR, Lane.CASCADE, Lane.RACE), lanes.edge.upstream is not None),
        }
        return frozenset(lane for lane in Lane if needs.get(lane, True))


@dataclass(frozen=True, slots=True)
class Flags:
    """What the command line said; None where it said nothing."""

    config: str | None = None
    listen: str | None = None
    admin: str | None = None
    upstream: str | None = None
    database: str | None = None
    data_dir: str | None = None
    workers: int | None = None
    shadow: bool | None = None


class Option(NamedTuple):
    """One documented setting, `[section] name = default`."""

    section: str
    name: str
    default: Any
    why: str


# One TOML table may fill two dataclasses: [cache] holds the policy's rules and the cache's own bounds.
SECTIONS: Mapping[str, tuple[type[Any], ...]] = {
    "server": (Server,),
    "limits": (Limits,),
    "forward": (Forward,),
    "cache": (Rules, Cache),
    "stream": (Stream,),
    "batch": (Batch,),
    "embedding": (Embedding,),
    "index": (Index,),
    "store": (StoreSettings,),
    "log": (Log,),
}
NAMED: Mapping[str, type[Any]] = {
    "upstream": UpstreamSettings,
    "prices.override": PriceOverride,
    "admin.token": AdminToken,
    "alias": AliasSettings,
}
POLICY = "policy"
"""The array of tables `[[policy]]`."""


def options() -> list[Option]:
    """Every setting a file may hold, in the order of the file; NAME stands for a name the operator gives."""
    found = [Option("", "data_dir", None, "database, index, converted model, secrets; unset: ~/.local/share/ibid")]
    tables: dict[str, tuple[type[Any], ...]] = dict(SECTIONS)
    tables |= {f"{section}.NAME": (kind,) for section, kind in NAMED.items()}
    tables |= {f"lane.{name}": (kind,) for name, kind in LANES.items()}
    for section, kinds in (tables | {POLICY: (PolicySettings,)}).items():
        for kind in kinds:
            for spec in dataclasses.fields(kind):
                if spec.name in setting_names(kind):
                    found.append(Option(section, spec.name, spec.default, spec.metadata["why"]))
    return found
