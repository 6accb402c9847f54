"""`ibid stats`, `entries`, `explain` and `purge`: what a running ibid says and does, over its admin listener."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import sys
import urllib.parse
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import orjson

from proxy.commands import printing
from proxy.commands.codes import FINE
from proxy.core.errors import ConfigError
from proxy.settings.config import Settings

ADMIN_TIMEOUT_S = 60.0
ENTRY_COLUMNS = ("id", "model", "prompt", "namespace", "tags", "answer_bytes", "created", "expires", "quarantined")


def stats(settings: Settings, chosen: argparse.Namespace) -> int:
    stats = ask(settings, "GET", "/cache/stats")
    if chosen.json:
        sys.stdout.write(printing.as_json(stats))
    else:
        sys.stdout.write(printing.as_table(("what", "value"), printing.flat(stats)))
    return FINE


def entries(settings: Settings, chosen: argparse.Namespace) -> int:
    names = ("namespace", "model", "tag", "q", "limit", "cursor")
    wanted = {name: value for name in names if (value := getattr(chosen, name)) is not None}
    page = ask(settings, "GET", f"/cache/entries?{urllib.parse.urlencode(wanted)}")
    if chosen.json:
        sys.stdout.write(printing.as_json(page))
        return FINE
    rows = [
        [
            _moment(entry.get(f"{name}_ms")) if name in ("created", "expires") else entry.get(name)
            for name in ENTRY_COLUMNS
        ]
        for entry in page["entries"]
    ]
    sys.stdout.write(printing.as_table(ENTRY_COLUMNS, rows))
    if page.get("next_cursor") is not None:
        print(f"more: --cursor {page['next_cursor']}")
    return FINE


def _moment(ms: int | None) -> str | None:
    return None if ms is None else datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def explain(settings: Settings, chosen: argparse.Namespace) -> int:
    try:
        with contextlib.ExitStack() as stack:
            file = sys.stdin.buffer if chosen.file == "-" else stack.enter_context(open(chosen.file, "rb"))
            body = file.read()
    except OSError as error:
        raise ConfigError(f"{chosen.file}: {error.strerror}") from error
    wanted = {name: value for name in ("tenant", "path") if (value := getattr(chosen, name))}
    path = "/cache/explain" + (f"?{urllib.parse.urlencode(wanted)}" if wanted else "")
    explained = ask(settings, "POST", path, body)
    if chosen.json:
        sys.stdout.write(printing.as_json(explained))
    else:
        sys.stdout.write(printing.as_table(("what", "value"), printing.flat(explained)))
    return FINE


def purge(settings: Settings, chosen: argparse.Namespace) -> int:
    names = ("ids", "tags", "namespace", "model", "older_than", "writer")
    wanted = {name: value for name in names if (value := getattr(chosen, name)) is not None}
    if chosen.everything:
        if wanted or not chosen.yes:
            raise ConfigError("--everything goes with --yes and nothing else")
        done = ask(settings, "POST", "/cache/flush", orjson.dumps({"confirm": "flush"}))
    else:
        done = ask(settings, "POST", "/cache/invalidate", orjson.dumps({**wanted, "dry_run": not chosen.yes}))
    if chosen.json:
        sys.stdout.write(printing.as_json(done))
    elif done["dry_run"]:
        print(f"{done['count']:,} entries would be purged{_some(done['ids'])}; --yes does it")
    else:
        print(f"{done['count']:,} entries purged{_some(done['ids'])}")
    return FINE


def _some(ids: Sequence[int]) -> str:
    return f" ({', '.join(map(str, ids[:10]))}{', …' if len(ids) > 10 else ''})" if ids else ""


class Unanswered(ConfigError):
    """No admin listener answers."""


def ask(settings: Settings, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
    """What the running ibid's admin listener answers. Raises ConfigError when it cannot be reached or refuses."""
    from proxy.admin.auth import find_token

    server = settings.server
    token, _ = find_token(server.admin_token, settings.data_dir)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.admin.host, server.admin.host)
    headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
    if body is not None:
        headers["Content-Type"] = "application/json"
    connection = http.client.HTTPConnection(host, server.admin.port, timeout=ADMIN_TIMEOUT_S)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        answer = orjson.loads(response.read())
    except (OSError, http.client.HTTPException, orjson.JSONDecodeError) as error:
        raise Unanswered(f"no ibid answers on {server.admin}: start it with `ibid serve` ({error})") from error
    finally:
        connection.close()
    if response.status >= 400:
        raise ConfigError(f"ibid on {server.admin} refused: {answer['error']['message']} ({answer['error']['code']})")
    return dict(answer)
