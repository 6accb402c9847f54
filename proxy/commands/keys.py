"""`ibid keys`: through the admin listener of a running ibid, so that it counts at once, else in the database itself."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson

from proxy.admin.auth import TOKEN_FILE
from proxy.admin.routes import BY_NAME
from proxy.admin.schema import read_values
from proxy.commands import printing, running
from proxy.commands.codes import FINE
from proxy.core.errors import BadRequest, CacheFault
from proxy.core.keys import Kind, moment
from proxy.money.keys import KeyRing
from proxy.money.prices import configured
from proxy.settings.sections import Settings
from proxy.store.reading import refuse_unless_there
from proxy.store.store import open_store

Asked = Callable[[str, str, bytes | None], dict[str, Any] | None]
"""(method, path, body) → what the admin listener answers, None when none does."""

COMMAND_LINE = "command line"
"""Who acted, in the audit trail, where no ibid runs."""

WORDS = ("project", "name", "plan", "expires")
LISTS = (*(f"limit_{kind.value}" for kind in Kind), "models")
LISTED = ("id", "project", "name", "state", "limits", "models", "created", "expires")


def run(settings: Settings, chosen: argparse.Namespace) -> int:
    """One of the commands. Raises ConfigError, BadRequest, CacheFault."""

    def ask(method: str, path: str, body: bytes | None) -> dict[str, Any] | None:
        try:
            return running.ask(settings, method, path, body)
        except running.Unanswered:
            return None

    match chosen.action:
        case "create":
            found = _create(settings, chosen, ask)
        case "list":
            found = _done(settings, ask, "GET", "/cache/keys", _list)
        case "show":
            found = _done(settings, ask, "GET", f"/cache/keys/{chosen.id}", _one(chosen.id, _show))
        case "revoke":
            found = _done(settings, ask, "POST", f"/cache/keys/{chosen.id}/revoke", _one(chosen.id, KeyRing.revoke))
        case _:
            found = _done(settings, ask, "POST", f"/cache/keys/{chosen.id}/rotate", _one(chosen.id, KeyRing.rotate))
    if chosen.json:
        sys.stdout.write(printing.as_json(found))
    elif chosen.action == "list":
        sys.stdout.write(printing.as_table(LISTED, [_row(key) for key in found["keys"]]))
    else:
        sys.stdout.write(described(found))
    return FINE


def _create(settings: Settings, chosen: argparse.Namespace, ask: Asked) -> dict[str, Any]:
    wanted = {name: value for name in WORDS + LISTS if (value := getattr(chosen, name)) is not None}
    values = read_values(wanted, BY_NAME["create_key"].body or (), 0, from_text=False)
    return _done(settings, ask, "POST", "/cache/keys", lambda ring: ring.create(values), orjson.dumps(wanted))


def _done(
    settings: Settings,
    ask: Asked,
    method: str,
    path: str,
    act: Callable[[KeyRing], Awaitable[dict[str, Any]]],
    body: bytes | None = None,
) -> dict[str, Any]:
    server = settings.server
    may_run = server.admin_token is not None or (settings.data_dir / TOKEN_FILE).exists()
    answer = ask(method, path, body) if may_run else None
    is_first = method == "POST" and path == "/cache/keys"
    if answer is not None:
        return answer
    written = None if method == "GET" else (f"{method} {path}", orjson.loads(body or b"{}"))
    return asyncio.run(_directly(settings, act, written, may_begin=is_first))


async def _directly(
    settings: Settings,
    act: Callable[[KeyRing], Awaitable[dict[str, Any]]],
    written: tuple[str, Mapping[str, Any]] | None,
    *,
    may_begin: bool,
) -> dict[str, Any]:
    """Without a running ibid, or on another machine's: it follows the table. `may_begin`: a database that is not there
    yet is made. `written`: route and parameters of what is written down as an act."""
    prices, url = configured(settings), settings.store.database_url or None
    if not may_begin:
        refuse_unless_there(url, settings.data_dir)
    store = await open_store(url, settings.data_dir, price=prices.price)
    try:
        if store.database.is_new:
            print(f"ibid: made a new database: {store.database.label}", file=sys.stderr)
        ring = KeyRing(store.keys, prices)
        await ring.load()
        if written is None:
            return await act(ring)
        route, parameters = written
        act_id = await store.acts.begin(int(time.time() * 1000), COMMAND_LINE, "admin", route, parameters)
        try:
            done = await act(ring)
        except (BadRequest, CacheFault) as error:
            await store.acts.end(act_id, error.code, None)
            raise
        await store.acts.end(act_id, "done", 1)
        return done
    finally:
        await store.close()


async def _list(ring: KeyRing) -> dict[str, Any]:
    return {"keys": ring.listed()}


async def _show(ring: KeyRing, key_id: str) -> dict[str, Any] | None:
    return ring.described(key_id)


def _one(
    key_id: str, act: Callable[[KeyRing, str], Awaitable[dict[str, Any] | None]]
) -> Callable[[KeyRing], Awaitable[dict[str, Any]]]:
    async def found(ring: KeyRing) -> dict[str, Any]:
        if (key := await act(ring, key_id)) is None:
            raise BadRequest(f"there is no key {key_id[:64]}", code="not_found", status=404, param="id")
        return key

    return found


def _row(key: Mapping[str, Any]) -> list[Any]:
    shown = {**key, "limits": [_limit(limit) for limit in key["limits"]]}
    shown |= {name: _moment(key[f"{name}_ms"]) for name in ("created", "expires")}
    return [shown[name] or None for name in LISTED]


def described(key: Mapping[str, Any]) -> str:
    """A key for people: what it is, its limits, and its secret where it was just made."""
    rows = [(name, key[name]) for name in ("id", "project", "name", "state", "tenant", "plan") if key[name]]
    rows += [(name, moment(key[f"{name}_ms"])) for name in ("created", "rotated", "revoked", "expires")
             if key[f"{name}_ms"] is not None]  # fmt: skip
    if key["models"]:
        rows.append(("models", ",".join(key["models"])))
    lines = [f"{name:<9} {printing.printable(str(value))}" for name, value in rows]
    if "secret" in key:
        lines.append(f"{'secret':<9} {key['secret']}   (told this once, kept nowhere)")
    text = "\n".join(lines) + "\n"
    if not key["limits"]:
        return text
    columns = ("limit", "spent", "held", "remaining", "resets")
    limits = [
        (_limit(limit), limit["spent"], limit["held"], limit["remaining"], moment(limit["resets_ms"]))
        for limit in key["limits"]
    ]
    return f"{text}\n{printing.as_table(columns, limits)}"


def _limit(limit: Mapping[str, Any]) -> str:
    amount = str(limit["amount"])
    if limit["kind"] == Kind.USD.value:
        amount = amount.rstrip("0").rstrip(".")
    return f"{amount} {limit['kind']}/{limit['window']}"


def _moment(ms: int | None) -> str | None:
    return None if ms is None else moment(ms)
