"""`ibid serve`: the program in the foreground, from its banner to the signal that ends it."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Coroutine
from typing import Any
from urllib.parse import urlsplit

import uvloop

from proxy.admin.sessions import TICKET_S
from proxy.app import App, open_app
from proxy.doorstep import Doorstep
from proxy.meaning import Meaning
from proxy.settings.config import Settings
from proxy.upkeep.semantic import degraded_lines, describe
from proxy.watch import logs


def serve(settings: Settings, door: Doorstep | None = None) -> None:
    """Run in the foreground. What is written is its owner's alone. Raises ConfigError."""
    os.umask(0o077)
    uvloop.run(run(settings, door))


async def run(settings: Settings, door: Doorstep | None = None) -> None:
    """Serve until SIGTERM or SIGINT; a second signal ends the process at once. Raises ConfigError."""
    loop, main = asyncio.get_running_loop(), asyncio.current_task()
    assert main is not None
    stopping, is_open = asyncio.Event(), False

    def on_signal() -> None:
        if stopping.is_set():
            os._exit(1)
        stopping.set()
        if not is_open:
            main.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    writer = logs.set_up(settings.log.level, as_json=settings.log.format == "json", secrets=secrets_of(settings))
    meaning: Meaning | None = None
    try:
        async with open_app(settings, log_writer=writer, door=door, tell=_say, stopping=stopping) as app:
            is_open, meaning = True, app.pipeline.meaning
            settle_garbage()
            _say(banner(app))
            if sys.stderr.isatty():  # whoever reads the terminal may sign in; a log file is read by others
                _say(link(app))
            await _first(stopping.wait(), meaning.settled())
            settle_garbage()
            await stopping.wait()
        if app.semantic.refusal is not None:
            raise app.semantic.refusal
    except asyncio.CancelledError:
        if not stopping.is_set():
            raise
    finally:
        logs.tear_down(writer)
    if meaning is None or meaning.is_loading:  # a thread is importing or compiling, and nobody needs what it makes
        sys.stderr.flush()
        os._exit(0)


async def _first(*events: Coroutine[Any, Any, object]) -> None:
    """Wait for one of these."""
    waiting = [asyncio.ensure_future(event) for event in events]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for one in waiting:
        one.cancel()


def banner(app: App) -> str:
    """What the operator needs to know, once, without secrets."""
    token = app.admin_token_path or "IBID_ADMIN_TOKEN"
    host, rules = app.settings.server, app.settings.rules
    lines = [
        f"ibid serves   http://{host.listen.host}:{app.port}/v1",
        f"admin         http://{host.admin.host}:{app.admin_port}  (token: {token})",
        f"upstreams     {', '.join(f'{n} {u.base_url}' for n, u in app.settings.upstreams.items())}",
        f"database      {app.store.database.label}{' (new)' if app.store.database.is_new else ''}",
        f"semantic      {describe(app.pipeline.meaning)}",
        *(["shadow        everything is looked up, nothing is served: see `ibid report`"] if rules.shadow else []),
        *degraded_lines(app.health),
    ]
    return "\n".join(lines)


def link(app: App) -> str:
    """The address that signs one browser in, once. What follows # reaches no server's log."""
    host = app.settings.server.admin.host
    name = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    address = f"http://{name}:{app.admin_port}/#ticket={app.sessions.ticket()}"
    return f"dashboard     {address}  (works once, for {TICKET_S // 60} minutes)"


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def settle_garbage() -> None:
    """Take what was made at start out of the collector's sight and let it look less often.

    Modules, compiled kernels and SQL statements are about a million objects that never die; a full collection over
    them stopped the loop for 110-195 ms each time (measured 2026-11-22 under load).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


def secrets_of(settings: Settings) -> list[str]:
    """What no log line may show."""
    password = urlsplit(settings.store.database_url).password
    keys = [upstream.key for upstream in settings.upstreams.values()]
    return [secret for secret in (settings.server.admin_token, password, *keys) if secret]
