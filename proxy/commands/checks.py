"""`ibid check`: is everything there that `serve` will need, and if not, what must the operator do. Changes nothing."""

from __future__ import annotations

import argparse
import asyncio
import http.client
import importlib.metadata
import os
import socket
import sqlite3
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import orjson

from index.errors import ModelFault
from proxy.commands import printing
from proxy.commands.codes import ACT, FINE
from proxy.core.errors import ConfigError
from proxy.core.patterns import is_one_of
from proxy.core.plan import UPSTREAM
from proxy.meaning import SNAPSHOT_NAME
from proxy.money.prices import Prices, configured
from proxy.settings.config import Address, Settings

OUR_PACKAGES = ("proxy", "index")
OUR_DISTRIBUTION = "ibid-proxy"
EARLIEST_S = 1_760_000_000  # October 2025, before this program was written
LATEST_S = 4_102_444_800  # the year 2100
HEALTH_S = 5.0  # longest wait for a running ibid to say that it is there
HEALTH_BYTES = 4096


class Finding(NamedTuple):
    """`state`: "ok", "warn" (serves, less well) or "fail" (will not start, or would book what is not known)."""

    part: str
    state: str
    note: str


def inspect(settings: Settings) -> list[Finding]:
    """Every part looked at, in the order a start uses them."""
    looks: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
        _configuration, _upstreams, _failover, _prices, _packages, _clock, _data_dir, _database, _model, _snapshot,
        _token, _ports,
    )  # fmt: skip
    return [finding for look in looks for finding in look(settings)]


def _configuration(settings: Settings) -> Iterator[Finding]:
    yield Finding("configuration", "ok", str(settings.source or "defaults, environment and flags"))


def _upstreams(settings: Settings) -> Iterator[Finding]:
    """Of each dialect, which models are asked for where, and who takes the others."""
    dialects = dict.fromkeys(one.dialect for one in settings.upstreams.values())
    for dialect in dialects:
        speaking = {name: one.models for name, one in settings.upstreams.items() if one.dialect == dialect}
        named = [f"{', '.join(models)} at {name}" for name, models in speaking.items() if models]
        taking = [name for name, models in speaking.items() if not models]
        rest = f"any {'other ' if named else ''}model at {taking[0]}" if taking else "no other model"
        yield Finding("upstreams", "ok", f"{dialect}: {'; '.join([*named, rest])}")
        for idle in set(taking[1:]) - _named_by_lanes(settings):
            note = f"{idle} is asked for nothing: {taking[0]}, before it, takes every model. Set upstream.{idle}.models"
            yield Finding("upstreams", "warn", note)


def _named_by_lanes(settings: Settings) -> set[str | None]:
    routed = [name.partition("/")[0] for name in settings.lanes.route.candidates]
    return {settings.lanes.edge.upstream, *routed, *_stand_ins(settings)}


def _stand_ins(settings: Settings) -> dict[str, str]:
    """Upstreams that stand in for failed ones, and the setting that first says so."""
    found: dict[str, str] = {}
    for number, policy in enumerate(settings.policies):
        for setting, words in (("on_error", policy.plan.on_error), ("on_rate_limit", policy.plan.on_limit or ())):
            for word in words:
                if word.startswith(UPSTREAM):
                    found.setdefault(word.removeprefix(UPSTREAM), f"policy.{number}.{setting}")
    return found


def _failover(settings: Settings) -> Iterator[Finding]:
    """What would keep an upstream from standing in."""
    for name, setting in _stand_ins(settings).items():
        upstream = settings.upstreams[name]
        if upstream.key is None and not _is_here(upstream.base_url):
            note = f"{setting}: upstream {name} has no key of its own, and is never sent a client's. Set its key_env"
            yield Finding("failover", "warn", note)
        if upstream.dialect != "openai":
            note = f"{setting}: upstream {name} stands in for requests of the dialect {upstream.dialect} alone"
            yield Finding("failover", "ok", note)


def _is_here(base_url: str) -> bool:
    return Address(urlsplit(base_url).hostname or "", 0).is_loopback


class Use(NamedTuple):
    """A setting by which a model, or all of a pattern, is called in a service tier."""

    setting: str
    upstream: str
    model: str
    tier: str


def _prices(settings: Settings) -> Iterator[Finding]:
    """Which calls would be booked as unpriced, as far as the configuration names them."""
    book = configured(settings)
    found = list(price_gaps(book, settings, int(time.time() * 1000)))
    yield from found or [Finding("prices", "ok", f"{book.source}, {len(settings.prices)} overrides")]


def price_gaps(book: Prices, settings: Settings, now_ms: int) -> Iterator[Finding]:
    """What has no price. A tier without one is a failure: what it saved would be made up."""
    for name in sorted({key.partition("/")[0] for key in settings.prices} - settings.upstreams.keys()):
        yield Finding("prices", "warn", f'[prices.override."{name}/…"] prices an upstream that is not configured')
    for name in settings.upstreams:
        own = {key.partition("/")[2] for key in settings.prices if key.startswith(f"{name}/")}
        if book.known(name, now_ms) is None and "*" not in own:
            other = "calls" if not own else "calls of other models"
            instead = f'name a provider in upstream.{name}.prices_as, or prices in [prices.override."{name}/*"]'
            yield Finding("prices", "warn", f"{other} to upstream {name} are booked as unpriced: {instead}")
    for use in _uses(settings):
        if not _is_priced(book, use, now_ms):
            note = f"{use.setting}: upstream {use.upstream} has no {use.tier} price of {use.model}"
            yield Finding("prices", "warn" if use.tier == "default" else "fail", note)


def _uses(settings: Settings) -> Iterator[Use]:
    for name, upstream in settings.upstreams.items():
        for model in upstream.models:
            yield Use(f"upstream.{name}.models", name, model, "default")
    edge, route, tier = settings.lanes.edge, settings.lanes.route, settings.lanes.tier
    if edge.upstream is not None and edge.model is not None:
        yield Use("lane.edge.model", edge.upstream, edge.model, "default")
    for candidate in route.candidates:
        name, _, model = candidate.partition("/")
        yield Use("lane.route.candidates", name, model, "default")
    for model in tier.models:
        if (serving := _serving(settings, model)) is not None:
            yield Use("lane.tier.models", serving, model, tier.name)


def _is_priced(book: Prices, use: Use, now_ms: int) -> bool:
    """Of a pattern only this: whether any model there has a price in that tier. Its names are the clients' to say."""
    if not set("*?[") & set(use.model):
        return book.rates(use.upstream, use.model, use.tier, now_ms) is not None
    known = book.known(use.upstream, now_ms)
    in_list = known is not None and use.tier in known.tiers
    return use.tier == "default" or in_list or book.rates(use.upstream, "*", use.tier, now_ms) is not None


def _serving(settings: Settings, model: str) -> str | None:
    """The upstream of the OpenAI dialect, which has tiers, that a request for the model goes to."""
    found = {name: one.models for name, one in settings.upstreams.items() if one.dialect == "openai"}
    naming = [name for name, models in found.items() if is_one_of(model, models)]
    return next(iter([*naming, *(name for name, models in found.items() if not models)]), None)


def _packages(_settings: Settings) -> Iterator[Finding]:
    owners = importlib.metadata.packages_distributions()
    for name in OUR_PACKAGES:
        others = sorted(
            {owner for owner in owners.get(name, ()) if owner.lower().replace("_", "-") != OUR_DISTRIBUTION}
        )
        if others:
            note = f"{', '.join(others)} also installs a package named {name}: give ibid an environment of its own"
            yield Finding("packages", "fail", note)
            return
    yield Finding("packages", "ok", "no other distribution owns our names")


def _clock(settings: Settings) -> Iterator[Finding]:
    now_s = time.time()
    if not EARLIEST_S < now_s < LATEST_S:
        yield Finding("clock", "fail", f"the clock says {time.strftime('%Y-%m-%d', time.gmtime(now_s))}: set it")
        return
    newest_s = max((path.stat().st_mtime for path in _files(settings.data_dir)), default=0.0)
    if newest_s > now_s + 300:
        yield Finding(
            "clock", "warn", f"files of ibid are {newest_s - now_s:.0f} s in the future: was the clock set back?"
        )
    else:
        yield Finding("clock", "ok", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now_s)))


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.is_file()] if directory.is_dir() else []


def _data_dir(settings: Settings) -> Iterator[Finding]:
    path = settings.data_dir
    if not path.exists():
        parent = next(p for p in path.parents if p.exists())
        if os.access(parent, os.W_OK):
            yield Finding("data directory", "ok", f"{path} will be made")
        else:
            yield Finding("data directory", "fail", f"{path} cannot be made: {parent} is not writable")
        return
    about = path.stat()
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        yield Finding("data directory", "fail", f"{path} is not a directory this user can write to")
    elif about.st_uid != os.geteuid():
        yield Finding("data directory", "fail", f"{path} belongs to user id {about.st_uid}")
    elif stat.S_IMODE(about.st_mode) & 0o077:
        yield Finding("data directory", "warn", f"{path} is open to others; the start makes it 0700")
    else:
        yield Finding("data directory", "ok", str(path))


def _database(settings: Settings) -> Iterator[Finding]:
    from proxy.store.engine import SAFE_SQLITE, parse_url

    url = settings.store.database_url or None
    try:
        parsed = parse_url(url, settings.data_dir)
        if parsed.get_backend_name() == "sqlite" and not Path(str(parsed.database)).exists():
            yield Finding("database", "ok", f"{parsed.database} will be made")
        else:
            yield asyncio.run(_schema(url, settings.data_dir))
        if parsed.get_backend_name() == "sqlite" and sqlite3.sqlite_version_info < SAFE_SQLITE:
            note = f"version {sqlite3.sqlite_version}: let no other program write to the database (fixed in 3.51.3)"
            yield Finding("sqlite", "warn", note)
    except ConfigError as error:
        yield Finding("database", "fail", error.message)


async def _schema(url: str | None, data_dir: Path) -> Finding:
    from proxy.store import migrate, reading

    database = reading.open_reading(url, data_dir)
    try:
        found = await reading.revision(database)
        migrate.refuse_unless_current(found)
        return Finding("database", "ok", f"{database.label}, schema {found or 'empty: will be made'}")
    finally:
        await database.close()


def _model(settings: Settings) -> Iterator[Finding]:
    from index import model

    state = "fail" if settings.embedding.require_semantic else "warn"
    if not settings.rules.semantic:
        yield Finding("model", "ok", "semantic lookups are off")
        return
    wanted = settings.embedding.model
    try:
        files = model.locate(None if wanted in model.BUNDLED_NAMES else wanted, settings.data_dir / "models")
    except ModelFault as fault:
        yield Finding("model", state, f"{fault}; without it ibid serves exact hits only")
        return
    yield Finding("model", "ok", f"{files.name}, {files.window} tokens, sha256 {files.digest[:16]}…")


def _snapshot(settings: Settings) -> Iterator[Finding]:
    path = settings.data_dir / SNAPSHOT_NAME
    if not path.exists():
        yield Finding("index", "ok", "no snapshot: the start builds the index from SQL")
    elif not path.is_file() or not os.access(path, os.R_OK):
        yield Finding("index", "warn", f"{path} cannot be read: the start builds the index from SQL")
    else:
        age_s = max(time.time() - path.stat().st_mtime, 0)
        note = f"snapshot of {path.stat().st_size / 2**20:.1f} MiB, {age_s / 60:.0f} minutes old; checked at start"
        yield Finding("index", "ok", note)


def _token(settings: Settings) -> Iterator[Finding]:
    from proxy.admin.auth import TOKEN_FILE, find_token

    given, path = settings.server.admin_token, settings.data_dir / TOKEN_FILE
    if given is None and not os.path.lexists(path):
        yield Finding("admin token", "ok", f"{path} will be made")
        return
    try:
        find_token(given, settings.data_dir)
    except ConfigError as error:
        yield Finding("admin token", "fail", error.message)
    else:
        yield Finding("admin token", "ok", "IBID_ADMIN_TOKEN" if given else str(path))


def _ports(settings: Settings) -> Iterator[Finding]:
    for part, address in (("client port", settings.server.listen), ("admin port", settings.server.admin)):
        try:
            _bind(address)
        except OSError as error:
            yield _taken(settings, part, address, error.strerror or "")
        else:
            yield Finding(part, "ok", str(address))


def _taken(settings: Settings, part: str, address: Address, why: str) -> Finding:
    """Of a port that cannot be had: by the ibid that runs on this data directory it is as it should be."""
    from proxy.store.engine import is_locked

    if not _answers(settings.server.admin):
        return Finding(part, "fail", f"cannot listen on {address}: {why}; no ibid answers on {settings.server.admin}")
    if is_locked(settings.data_dir):
        return Finding(part, "ok", f"{address}, in use by the ibid that runs here")
    return Finding(part, "fail", f"cannot listen on {address}: {why}; an ibid with another data directory is running")


def _answers(admin: Address) -> bool:
    """Whether an ibid's admin listener is there."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(admin.host, admin.host)
    connection = http.client.HTTPConnection(host, admin.port, timeout=HEALTH_S)
    try:
        connection.request("GET", "/healthz")
        answer = orjson.loads(connection.getresponse().read(HEALTH_BYTES))
    except (OSError, http.client.HTTPException, orjson.JSONDecodeError):
        return False
    finally:
        connection.close()
    return isinstance(answer, dict) and answer.get("status") == "ok"


def _bind(address: Address) -> None:
    family, kind, protocol, _, where = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(where)


def run(settings: Settings, chosen: argparse.Namespace) -> int:
    found = inspect(settings)
    if chosen.json:
        sys.stdout.write(printing.as_json([finding._asdict() for finding in found]))
    else:
        for finding in found:
            print(f"{finding.state:<5} {finding.part:<15} {printing.printable(finding.note)}")
    failed = [finding for finding in found if finding.state == "fail"]
    if failed:
        print(f"ibid: {printing.printable(failed[0].part)}: {printing.printable(failed[0].note)}", file=sys.stderr)
    return ACT if failed else FINE
