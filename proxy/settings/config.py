"""Settings, read once: TOML file, then environment, then flags. The only reader of files and environment."""

from __future__ import annotations

import dataclasses
import os
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from proxy.core.errors import ConfigError
from proxy.core.model import Limits, Rules
from proxy.core.patterns import is_one_of
from proxy.core.plan import (
    ALIASES,
    DEFAULT_PLAN,
    ORDER,
    STANDS_IN,
    UPSTREAM,
    Lane,
    Match,
    Plan,
    Policy,
    edited,
    lane_of,
    lanes_of,
)
from proxy.settings.environment import overlay
from proxy.settings.file import Document, Fail, converted
from proxy.settings.lanes import LANES, AliasSettings, LaneSettings, PolicySettings
from proxy.settings.proxies import OFF, proxy_for
from proxy.settings.sections import (
    DEFAULT_UPSTREAMS,
    POLICY,
    SECTIONS,
    Address,
    AdminToken,
    Batch,
    Cache,
    Embedding,
    Flags,
    Forward,
    Index,
    Log,
    PriceOverride,
    Server,
    Settings,
    StoreSettings,
    Stream,
    UpstreamSettings,
    options,
)

__all__ = ["Address", "Flags", "PriceOverride", "Settings", "UpstreamSettings", "load", "options"]

Kind = TypeVar("Kind")

TOKEN_CHARACTERS = 32
FLAGS: Mapping[str, tuple[str, ...]] = {
    "listen": ("server", "listen"),
    "admin": ("server", "admin"),
    "database": ("store", "database_url"),
    "data_dir": ("data_dir",),
    "shadow": ("cache", "shadow"),
}
"""Settings that a flag of another name gives; `--upstream` and `--workers` are read where they are needed."""


def load(flags: Flags, environ: Mapping[str, str]) -> Settings:
    """Settings from file, environment and flags, the later winning. Reads one file, touches nothing else.

    Raises ConfigError; its one-line message names the file and line, the variable, or the flag.
    """
    document = Document.read(flags.config or environ.get("IBID_CONFIG"))
    overlay(document, environ)
    for name, place in FLAGS.items():
        if given := getattr(flags, name):
            document.put(place, given, f"--{name.replace('_', '-')}")
    top = frozenset({"data_dir", "admin", "prices", "upstream", "lane", "alias", POLICY, *SECTIONS})
    document.known("", document.values, top)
    document.known("admin", document.table("admin"), frozenset({"token"}))
    document.known("prices", document.table("prices"), frozenset({"override"}))
    forward = _forward(document)
    settings = Settings(
        data_dir=_data_dir(document, environ),
        server=_server(document, flags, environ),
        limits=_section(document, "limits", Limits),
        upstreams=_upstreams(document, flags, environ, forward.proxy),
        forward=forward,
        rules=_section(document, "cache", Rules),
        cache=_section(document, "cache", Cache),
        stream=_section(document, "stream", Stream),
        batch=_section(document, "batch", Batch),
        embedding=_section(document, "embedding", Embedding),
        index=_section(document, "index", Index),
        store=_store(document),
        prices=_prices(document),
        log=_section(document, "log", Log),
        lanes=_lanes(document),
        policies=tuple(_policies(document)),
        aliases=_aliases(document),
        admin_tokens=_admin_tokens(document, environ),
        source=document.path,
        is_data_dir_named="data_dir" in document.values,
    )
    _check_together(settings, document)
    return settings


def _section(document: Document, section: str, kind: type[Kind]) -> Kind:
    return document.fill(section, document.table(section), kind(), _address, *SECTIONS[section])


def _named_tables(document: Document, section: str, kind: type[Kind], bases: Mapping[str, Kind]) -> dict[str, Kind]:
    """One value per table of `[section.NAME]`, on top of the base of that name."""
    found = {}
    for name, table in document.table(section).items():
        if not isinstance(table, dict):
            document.fail(section, name, "must be a table")
        found[name] = document.fill(f"{section}.{name}", table, bases.get(name, kind()))
    return found


def _named(source: str) -> Fail:
    """A failure that names a variable or a flag."""

    def fail(message: str) -> NoReturn:
        raise ConfigError(f"{source} {message}", param=source)

    return fail


def _address(value: Any, fail: Fail) -> Address:
    """ "HOST:PORT" or "[IPV6]:PORT" as an Address."""
    found = (
        re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\s:\[\]/@]+)):(\d{1,5})", value) if isinstance(value, str) else None
    )
    if found is None or int(found[3]) > 65535:
        fail('must be "HOST:PORT", with a port up to 65535')
    return Address(found[1] or found[2], int(found[3]))


def _data_dir(document: Document, environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_DATA_HOME") or os.path.join(environ.get("HOME") or "~", ".local", "share")
    named = document.values.get("data_dir", os.path.join(base, "ibid"))
    if not isinstance(named, str) or not named or "\0" in named:
        document.fail("", "data_dir", "must be the path of a folder")
    if named.startswith("~/") and environ.get("HOME"):
        named = os.path.join(environ["HOME"], named[2:])
    return Path(os.path.abspath(named))


def _server(document: Document, flags: Flags, environ: Mapping[str, str]) -> Server:
    if "admin_token" in document.table("server"):
        document.fail("server", "admin_token", "is a secret: set IBID_ADMIN_TOKEN instead")
    server = _section(document, "server", Server)
    if flags.workers is not None:
        server = dataclasses.replace(server, workers=converted(flags.workers, Server, "workers", _named("--workers")))
    if token := environ.get("IBID_ADMIN_TOKEN"):
        if not re.fullmatch(rf"[!-~]{{{TOKEN_CHARACTERS},}}", token):
            _named("IBID_ADMIN_TOKEN")(f"must be at least {TOKEN_CHARACTERS} printable ASCII characters without spaces")
        server = dataclasses.replace(server, admin_token=token)
    return server


def _admin_tokens(document: Document, environ: Mapping[str, str]) -> Mapping[str, AdminToken]:
    found = _named_tables(document, "admin.token", AdminToken, {})
    held = {environ.get("IBID_ADMIN_TOKEN")}
    for name, one in found.items():
        if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,31}", name) or name == "admin":
            document.fail("admin.token", name, "must be 1-32 of a-z, 0-9, dot, hyphen, underscore, and not admin")
        token = environ.get(one.token_env or "", "")
        if not re.fullmatch(rf"[!-~]{{{TOKEN_CHARACTERS},}}", token):
            needs = f"must name a variable that holds {TOKEN_CHARACTERS} printable ASCII characters or more, no spaces"
            document.fail(f"admin.token.{name}", "token_env", needs)
        if token in held:
            document.fail(f"admin.token.{name}", "token_env", "holds the token of another name")
        held.add(token)
        found[name] = dataclasses.replace(one, token=token)
    return types.MappingProxyType(found)


def _forward(document: Document) -> Forward:
    forward = _section(document, "forward", Forward)
    if forward.proxy and forward.proxy != OFF and not _is_proxy(forward.proxy):
        document.fail("forward", "proxy", "must be http://HOST:PORT, or off")
    return forward


def _is_proxy(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _upstreams(
    document: Document, flags: Flags, environ: Mapping[str, str], proxy: str | None
) -> Mapping[str, UpstreamSettings]:
    """The built-in upstreams, changed and added to by the file; `--upstream` is the address of all built-in ones."""
    found = {**DEFAULT_UPSTREAMS, **_named_tables(document, "upstream", UpstreamSettings, DEFAULT_UPSTREAMS)}
    for name, upstream in found.items():
        if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,31}", name):
            document.fail("upstream", name, "must be 1-32 of a-z, 0-9, dot, hyphen, underscore")
        if problem := url_problem(upstream.base_url):
            document.fail(f"upstream.{name}", "base_url", problem)
        for pair in upstream.stands_in_for:
            if not re.fullmatch(r"[^=](.*[^=])?=[^=]+", pair):
                document.fail(f"upstream.{name}", "stands_in_for", f"{pair!r} must be asked=own")
        if upstream.key_env is not None:
            key = environ.get(upstream.key_env, "")
            if not re.fullmatch(r"[\x21-\x7e]+", key):
                document.fail(f"upstream.{name}", "key_env", f"names {upstream.key_env}, which holds no key")
            found[name] = dataclasses.replace(upstream, key=key)
    if one := flags.upstream or environ.get("IBID_UPSTREAM"):
        if problem := url_problem(one):
            _named("--upstream" if flags.upstream else "IBID_UPSTREAM")(problem)
        own = () if flags.upstream else [name for name in found if f"upstream.{name}.base_url" in document.variables]
        found |= {name: dataclasses.replace(found[name], base_url=one) for name in DEFAULT_UPSTREAMS.keys() - own}
    for name, upstream in found.items():
        if (way := proxy_for(upstream.base_url, proxy, environ)) is not None:
            found[name] = dataclasses.replace(upstream, proxy=way)
    return types.MappingProxyType(found)


def url_problem(url: str) -> str:
    """What is wrong with an upstream's address, without quoting it: it may hold a secret. "" when nothing is."""
    try:
        parts = urlsplit(url)
        has_port = parts.port != 0
    except ValueError:
        return "is not a URL"
    if parts.scheme not in ("http", "https") or not parts.hostname or not has_port or re.search(r"[\s\\]", url):
        return "must be http://HOST or https://HOST, with a port and a path if needed"
    if "@" in parts.netloc:
        return "must not hold a credential: clients bring their own"
    return "must not have a query or a fragment" if "?" in url or "#" in url else ""


def _store(document: Document) -> StoreSettings:
    store = _section(document, "store", StoreSettings)
    if store.database_url and not re.match(r"(sqlite(\+aiosqlite)?|postgres(ql)?(\+asyncpg)?)://", store.database_url):
        document.fail("store", "database_url", "must begin with sqlite:/// or postgresql://")
    return store


def _prices(document: Document) -> Mapping[str, PriceOverride]:
    found = _named_tables(document, "prices.override", PriceOverride, {})
    for name, override in found.items():
        upstream, slash, model = name.partition("/")
        if not (upstream and slash and model):
            document.fail("prices.override", name, 'must be named "upstream/model" or "upstream/*"')
        has_tokens = override.input_usd_per_mtok is not None and override.output_usd_per_mtok is not None
        if not has_tokens and override.per_second_usd is None:
            missing = "needs input_usd_per_mtok and output_usd_per_mtok, or per_second_usd"
            document.fail(f"prices.override.{name}", "", missing)
    return types.MappingProxyType(found)


def _lanes(document: Document) -> LaneSettings:
    document.known("lane", document.table("lane"), frozenset(LANES))
    tables = {name: document.table(f"lane.{name}") for name in LANES}
    return LaneSettings(**{name: document.fill(f"lane.{name}", tables[name], kind()) for name, kind in LANES.items()})


def _aliases(document: Document) -> Mapping[str, str]:
    found = dict(ALIASES)
    for name, alias in _named_tables(document, "alias", AliasSettings, {}).items():
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", name):
            document.fail("alias", name, "must be 1-32 of a-z, 0-9, hyphen, underscore, a letter first")
        try:
            edited(DEFAULT_PLAN, alias.plan)
        except ValueError as fault:
            document.fail(f"alias.{name}", "plan", f"is not a plan: {fault}")
        found[name] = alias.plan
    return types.MappingProxyType(found)


def _policies(document: Document) -> Iterator[Policy]:
    """Every `[[policy]]`, in order."""
    listed = document.values.get("policy", [])
    if not isinstance(listed, list) or not all(isinstance(table, dict) for table in listed):
        document.fail("", "policy", "must be tables of the form [[policy]]")
    for number, table in enumerate(listed):
        place = f"{POLICY}.{number}"
        policy = document.fill(place, table, PolicySettings(), _match)
        lanes = DEFAULT_PLAN.lanes
        try:
            if "plan" in table:
                lanes = lanes_of(policy.plan)
        except ValueError as fault:
            document.fail(place, "plan", f"is not a plan: {fault}")
        lanes |= _standing_in(document, place, "on_error", policy.on_error)
        lanes |= _standing_in(document, place, "on_rate_limit", policy.on_rate_limit or ())
        name = policy.name or f"policy {number + 1}"
        plan = Plan(
            lanes, name, policy.ttl_s, policy.on_error, on_limit=policy.on_rate_limit, is_listed="plan" in table
        )
        yield Policy(name, policy.match or Match(), plan)


def _standing_in(document: Document, place: str, setting: str, words: tuple[str, ...]) -> frozenset[Lane]:
    try:
        return frozenset([lane_of(word) for word in words])
    except KeyError as fault:
        known = ", ".join([f"{word}NAME" if word == UPSTREAM else word for word in STANDS_IN])
        document.fail(place, setting, f"knows {known}, not {fault}")


def _match(table: Any, fail: Fail) -> Match:
    kinds = {spec.name: bool if "bool" in str(spec.type) else str for spec in dataclasses.fields(Match)}
    if not isinstance(table, dict):
        fail('must be a table, as { model = "gpt-*" }')
    for name, value in table.items():
        if name not in kinds:
            fail(f"knows {', '.join(kinds)}, not {name}")
        if type(value) is not kinds[name]:
            fail(f"{name} must be {'true or false' if kinds[name] is bool else 'a string'}")
    return Match(**table)


def _check_together(settings: Settings, document: Document) -> None:
    server, rules = settings.server, settings.rules
    if server.workers > 1:
        document.fail("server", "workers", "(--workers) above 1 is not supported yet")
    if server.anonymous and not server.listen.is_loopback:
        document.fail("server", "anonymous", f"needs a loopback listener, and server.listen is {server.listen}")
    if server.anonymous and server.keys_only:
        document.fail("server", "keys_only", "and server.anonymous exclude each other")
    if server.listen == server.admin and server.listen.port != 0:
        document.fail("server", "admin", f"is the client listener's address, {server.listen}")
    if rules.ttl_s > rules.max_ttl_s:
        document.fail("cache", "ttl_s", f"is above max_ttl_s, {rules.max_ttl_s:g}")
    _check_lanes(settings, document)


def _check_upstreams(settings: Settings, document: Document, place: str, setting: str, words: tuple[str, ...]) -> None:
    """Every upstream that is to stand in is one."""
    for word in words:
        name = word.removeprefix(UPSTREAM)
        if name != word and name not in settings.upstreams:
            document.fail(place, setting, f"{word!r} is no upstream: {', '.join(settings.upstreams)}")


def _check_serves(settings: Settings, document: Document, section: str, field: str, upstream: str, model: str) -> None:
    """What a lane asks for by itself goes only where `models` lets a client's request go."""
    taken = settings.upstreams[upstream].models
    if taken and not is_one_of(model, taken):
        said = model if field == "model" else f"{upstream}/{model}"
        document.fail(section, field, f"{said!r} is left out by upstream.{upstream}.models: {', '.join(taken)}")


def _check_lanes(settings: Settings, document: Document) -> None:
    """Every lane that a policy or an alias switches on has what it needs."""
    edge, route = settings.lanes.edge, settings.lanes.route
    if (edge.upstream is None) != (edge.model is None):
        document.fail("lane.edge", "model" if edge.model else "upstream", "needs the other: upstream and model")
    if edge.upstream is not None and edge.upstream not in settings.upstreams:
        document.fail("lane.edge", "upstream", f"is not an upstream: {', '.join(settings.upstreams)}")
    if edge.upstream is not None and settings.upstreams[edge.upstream].dialect != "openai":
        document.fail("lane.edge", "upstream", "must be of the OpenAI dialect")
    if edge.upstream is not None and edge.model is not None:
        _check_serves(settings, document, "lane.edge", "model", edge.upstream, edge.model)
    for candidate in route.candidates:
        upstream, slash, model = candidate.partition("/")
        if not (slash and model and upstream in settings.upstreams):
            document.fail("lane.route", "candidates", f'{candidate!r} is not "upstream/model" of a known upstream')
        _check_serves(settings, document, "lane.route", "candidates", upstream, model)
    plans = [(f"policy.{number}", policy.plan) for number, policy in enumerate(settings.policies)]
    for place, plan in plans:
        for setting, words in (("on_error", plan.on_error), ("on_rate_limit", plan.on_limit or ())):
            _check_upstreams(settings, document, place, setting, words)
        if missing := plan.lanes - settings.ready:
            named = min(missing, key=ORDER.__getitem__)
            document.fail(place, "plan", f"has the lane {named.value!r}, which [lane.*] does not make ready")
    if settings.lanes.cascade.pattern is not None:
        try:
            re.compile(settings.lanes.cascade.pattern)
        except re.error as fault:
            document.fail("lane.cascade", "pattern", f"is not a regular expression: {fault}")
