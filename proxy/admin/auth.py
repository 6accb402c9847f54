"""Who may use the admin listener: the token's making and checking, and the refusals a browser's request can earn.

Access is bound to the handler by a decorator, never to a path (a path can be spelled in more ways than a check thinks
of), and `refuse_unguarded` stops the start when a route has neither decorator.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import hdrs, web

from proxy.core.errors import ConfigError, IbidError

TOKEN_FILE = "admin-token"
TOKEN_CHARACTERS = 32
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
CLIENT_KEY_HEADERS = ("x-api-key", "api-key", "x-goog-api-key")
_CLIENT_KEY_SHAPE = re.compile(r"(?:sk|pk|rk|gsk|xai|hf|r8|ibid)[-_]|AIza|eyJ").match
_SHAPE = re.compile(r"[\x21-\x7e]+").fullmatch

Method = Callable[[Any, web.Request], Awaitable[web.StreamResponse]]


class Refused(IbidError):
    """A request the admin listener does not take: no token, a client's key, a foreign page or another host's name."""

    status = 403
    code = "forbidden"
    should_retry = False


class Gate(NamedTuple):
    """What the listener checks requests against. `is_client_key` tells a known client's credential from noise."""

    token: str
    hosts: frozenset[str] = LOOPBACK_NAMES  # names without a port, lower case; the socket's own address is implied
    is_client_key: Callable[[str], bool] | None = None


GATE = web.AppKey("gate", Gate)


def load_token(given: str | None, data_dir: Path) -> tuple[str, Path | None]:
    """The operator's token with None, or the one kept in DATA_DIR/admin-token (made on first use, 0600) with its path.

    Raises ConfigError when the token is short or not printable ASCII, or its file cannot be read, made, or is open to
    others.
    """
    path = data_dir / TOKEN_FILE
    if given is None:
        try:
            return _make_token(path), path
        except FileExistsError:
            pass
        except OSError as error:
            raise ConfigError(f"the admin token in {path} cannot be kept: {error.strerror}") from error
    return find_token(given, data_dir)


def find_token(given: str | None, data_dir: Path) -> tuple[str, Path | None]:
    """As `load_token`, without making a token where there is none. Raises ConfigError."""
    if given is not None:
        return _checked(given, "IBID_ADMIN_TOKEN"), None
    path = data_dir / TOKEN_FILE
    try:
        return _checked(read_token(path), str(path)), path
    except OSError as error:
        raise ConfigError(f"the admin token in {path} cannot be read: {error.strerror}") from error


def _make_token(path: Path) -> str:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    token = secrets.token_urlsafe(TOKEN_CHARACTERS)
    with os.fdopen(descriptor, "w") as opened:
        opened.write(token + "\n")
        opened.flush()
        os.fsync(opened.fileno())
    return token


def read_token(path: Path) -> str:
    """The token in a file that is a plain file, ours, and closed to others. Raises OSError, ConfigError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor) as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode) or info.st_mode & 0o077:
            raise ConfigError(f"{path} must be a plain file that only its owner can read: chmod 600 it")
        return file.read(4096).strip()


def _checked(token: str, source: str) -> str:
    if len(token) < TOKEN_CHARACTERS or not _SHAPE(token):
        raise ConfigError(f"{source} must be at least {TOKEN_CHARACTERS} printable ASCII characters without spaces")
    return token


def guarded(handler: Method) -> Method:
    """The handler, behind host, origin and token checks."""

    @functools.wraps(handler)
    async def checked(owner: Any, request: web.Request) -> web.StreamResponse:
        admit(request)
        return await handler(owner, request)

    checked.access = "token"  # type: ignore[attr-defined]
    return checked


def unguarded(handler: Method) -> Method:
    """The handler, open to whoever reaches the listener under one of its own names: for what shows no data."""

    @functools.wraps(handler)
    async def checked(owner: Any, request: web.Request) -> web.StreamResponse:
        check_host(request)
        return await handler(owner, request)

    checked.access = "open"  # type: ignore[attr-defined]
    return checked


def refuse_unguarded(app: web.Application) -> None:
    """Raises ConfigError when a route's handler carries neither decorator."""
    for route in app.router.routes():
        if getattr(route.handler, "access", None) not in ("token", "open"):
            raise ConfigError(f"the admin route {route.method} {route.resource} does not check who asks")


def admit(request: web.Request) -> None:
    """Raises Refused unless the request names this host, comes from no foreign page, and carries the token."""
    check_host(request)
    _check_origin(request)
    _check_token(request)


def check_host(request: web.Request) -> None:
    """Refuse names that are not ours: a page under a rebound DNS name must not reach the listener.

    The address the connection came in on is ours too; no page can be loaded under it by a name.
    """
    name = _host_name(request.headers.get(hdrs.HOST, ""))
    if name not in request.app[GATE].hosts and name != _own_address(request):
        raise Refused("this listener does not serve that Host; add it to the admin hosts", code="host_not_allowed")


def _host_name(host: str) -> str:
    """The name of a Host header without port and brackets, lower case; "" when it is malformed."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::\d{1,5})?", host)
    return (match[1] or match[2]).lower() if match else ""


def _own_address(request: web.Request) -> str | None:
    name = request.transport.get_extra_info("sockname") if request.transport else None
    if not isinstance(name, tuple):
        return None
    return str(ipaddress.ip_address(str(name[0]).partition("%")[0]))


def _check_origin(request: web.Request) -> None:
    site = request.headers.get("Sec-Fetch-Site", "none")
    origin = request.headers.get(hdrs.ORIGIN)
    own = f"{request.url.scheme}://{request.headers.get(hdrs.HOST, '')}"
    if site not in ("same-origin", "none") or (origin is not None and origin != own):
        raise Refused("requests from other sites' pages are refused", code="foreign_origin")


def _check_token(request: web.Request) -> None:
    """401 for nothing or a wrong token, 403 for a client's credential. Digests are compared, in constant time."""
    gate = request.app[GATE]
    given = request.headers.getall(hdrs.AUTHORIZATION, [])
    scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    is_token = hmac.compare_digest(_digest(token.strip()), _digest(gate.token))
    if is_token and scheme.lower() == "bearer":
        return
    keys = [request.headers[name] for name in CLIENT_KEY_HEADERS if name in request.headers]
    is_known = gate.is_client_key is not None and any(gate.is_client_key(key) for key in (token, *keys) if key)
    if keys or is_known or _CLIENT_KEY_SHAPE(token):
        raise Refused("a client's credential does not open the admin listener", code="client_key")
    raise Refused("send the admin token as Authorization: Bearer", code="invalid_admin_token", status=401)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
