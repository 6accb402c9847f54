"""`ibid stats`, `entries`, `explain` and `purge`: what a running ibid says and does, over its admin listener."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import re
import sys
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import orjson

from proxy.commands import printing
from proxy.commands.codes import FINE
from proxy.core.errors import ConfigError
from proxy.settings.config import Settings

ADMIN_TIMEOUT_S = 60.0
SIMILAR_ROWS = 20
REQUEST_ID = re.compile(r"(req_)?[0-9a-f]{32}[A-Za-z0-9_.-]*")
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
    if REQUEST_ID.fullmatch(chosen.file) and not os.path.exists(chosen.file):
        return _explain_past(settings, chosen)
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


def _explain_past(settings: Settings, chosen: argparse.Namespace) -> int:
    """Why a request was answered as it was: in words first, then the numbers."""
    found = ask(settings, "GET", f"/requests/{chosen.file}")
    if chosen.json:
        sys.stdout.write(printing.as_json(found))
        return FINE
    sys.stdout.writelines(f"{printing.printable(line)}\n" for line in (*found.pop("story"), *found.pop("bill")))
    sys.stdout.write("\n" + printing.as_table(("what", "value"), printing.flat(found)))
    return FINE


def purge(settings: Settings, chosen: argparse.Namespace) -> int:
    names = ("ids", "tags", "namespace", "model", "older_than", "writer", "similar_to", "above")
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
    if not chosen.json and "nearest" in done:
        _tell_similar(settings, done)
    return FINE


def _tell_similar(settings: Settings, done: dict[str, Any]) -> None:
    """How alike what was selected is, and while it is still there, its question."""
    rows = []
    for found in done["nearest"][:SIMILAR_ROWS]:
        prompt = ask(settings, "GET", f"/cache/entries/{found['id']}")["prompt"] if done["dry_run"] else None
        rows.append((found["id"], found["similarity"], prompt))
    if rows:
        sys.stdout.write("\n" + printing.as_table(("id", "similarity", "prompt"), rows))
    if done["not_compared"]:
        print(f"{done['not_compared']:,} entries have no vector yet and were not compared")


def _some(ids: Sequence[int]) -> str:
    return f" ({', '.join(map(str, ids[:10]))}{', …' if len(ids) > 10 else ''})" if ids else ""


class Unanswered(ConfigError):
    """No admin listener answers."""


def ask(settings: Settings, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
    """What the running ibid's admin listener answers. Raises ConfigError when it cannot be reached or refuses."""
    with answering(settings, method, path, body) as response:
        return dict(orjson.loads(response.read()))


@contextlib.contextmanager
def answering(
    settings: Settings,
    method: str,
    path: str,
    body: bytes | Iterable[bytes] | None = None,
    content_type: str = "application/json",
) -> Iterator[http.client.HTTPResponse]:
    """The same as a response whose body is still to be read. Raises ConfigError, also while it is read."""
    from proxy.admin.auth import find_token

    server = settings.server
    token, _ = find_token(server.admin_token, settings.data_dir)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.admin.host, server.admin.host)
    headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
    if body is not None:
        headers["Content-Type"] = content_type
    connection = http.client.HTTPConnection(host, server.admin.port, timeout=ADMIN_TIMEOUT_S)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        if response.status >= 400:
            error = orjson.loads(response.read())["error"]
            raise ConfigError(f"ibid on {server.admin} refused: {error['message']} ({error['code']})")
        yield response
    except (OSError, http.client.HTTPException, orjson.JSONDecodeError) as error:
        raise Unanswered(f"no ibid answers on {server.admin}: start it with `ibid serve` ({error})") from error
    finally:
        connection.close()
