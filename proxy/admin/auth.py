"""Who may use the admin listener: the token's making and checking, and the refusals a browser's request can earn.

A program sends the token with every request. A browser sends it once and then the cookie of a session, which counts
for less: what changes something must also say that it comes from our own page.

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

from proxy.admin.roles import FIRST, Role, Token, Who
from proxy.admin.routes import BY_NAME
from proxy.admin.sessions import SESSION_S, Sessions
from proxy.core.errors import ConfigError, IbidError

TOKEN_FILE = "admin-token"
TOKEN_CHARACTERS = 32
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
CLIENT_KEY_HEADERS = ("x-api-key", "api-key", "x-goog-api-key")
_CLIENT_KEY_SHAPE = re.compile(r"(?:sk|pk|rk|gsk|xai|hf|r8|ibid)[-_]|AIza|eyJ").match
_SHAPE = re.compile(r"[\x21-\x7e]+").fullmatch

WHO = web.RequestKey("who", Who)
"""Whose token a request came with."""

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
    sessions: Sessions | None = None  # None: nobody signs in here
    others: tuple[Token, ...] = ()  # more tokens, each with its role


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
    """The handler, behind host, origin and token checks, and that of the role its route needs."""
    route = BY_NAME.get(handler.__name__)
    needed = Role.ADMIN if route is None else route.needs

    @functools.wraps(handler)
    async def checked(owner: Any, request: web.Request) -> web.StreamResponse:
        admit(request, needed)
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


def admit(request: web.Request, needed: Role = Role.STATS) -> None:
    """Raises Refused unless the request names this host, comes from no foreign page, and carries a token of that role
    or a higher one."""
    check_host(request)
    check_origin(request)
    if (who := signed_in(request)) is not None:
        _check_page(request)
    else:
        who = _check_token(request)
    request[WHO] = who
    if who.role < needed:
        raise Refused(f"this needs the role {needed}; the token {who.name} has the role {who.role}", code="role_needed")


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


def check_origin(request: web.Request) -> None:
    """Raises Refused for what another site's page sent."""
    site = request.headers.get("Sec-Fetch-Site", "none")
    origin = request.headers.get(hdrs.ORIGIN)
    own = f"{request.url.scheme}://{request.headers.get(hdrs.HOST, '')}"
    if site not in ("same-origin", "none") or (origin is not None and origin != own):
        raise Refused("requests from other sites' pages are refused", code="foreign_origin")


def _check_page(request: web.Request) -> None:
    """Refuse a change that comes by cookie and does not say that our own page sent it."""
    if request.method in (hdrs.METH_GET, hdrs.METH_HEAD):
        return
    if request.headers.get("Sec-Fetch-Site") != "same-origin" and hdrs.ORIGIN not in request.headers:
        raise Refused("a change by cookie must come from the dashboard's own page", code="foreign_origin")


def signed_in(request: web.Request) -> Who | None:
    """Whose session's cookie came, where no other credential came that would speak for the request."""
    sessions, secret = request.app[GATE].sessions, request.cookies.get(cookie_name(request))
    if sessions is None or secret is None or hdrs.AUTHORIZATION in request.headers:
        return None
    return sessions.owner(secret)


def cookie_name(request: web.Request) -> str:
    """Of this listener alone: browsers keep the cookies of all ports of a host together."""
    _, _, port = request.headers.get(hdrs.HOST, "").rpartition(":")
    return f"ibid-session-{port}" if port.isdecimal() and port.isascii() else "ibid-session"


def sign_in(request: web.Request, response: web.Response, *, token: str | None, ticket: str | None) -> None:
    """Put a new session's cookie on the response. Raises Refused for a wrong token or a spent ticket."""
    gate = request.app[GATE]
    secret = None
    if gate.sessions is not None and ticket is not None:
        secret = gate.sessions.redeem(ticket)
    elif gate.sessions is not None and token is not None and (who := _owner(token.strip(), gate)) is not None:
        secret = gate.sessions.open(who)
    if secret is None:
        raise Refused(
            "this is no admin token" if ticket is None else "this link was used or is too old; use the token",
            code="invalid_admin_token" if ticket is None else "invalid_ticket",
        )
    response.set_cookie(
        cookie_name(request),
        secret,
        max_age=SESSION_S,
        httponly=True,
        samesite="Strict",
        secure=request.secure,
    )


def sign_out(request: web.Request, response: web.Response) -> None:
    """End the session that asks, if one does."""
    name = cookie_name(request)
    sessions = request.app[GATE].sessions
    if sessions is not None and name in request.cookies:
        sessions.close(request.cookies[name])
    response.del_cookie(name, httponly=True, samesite="Strict", secure=request.secure)


def _check_token(request: web.Request) -> Who:
    """Whose token it is. 401 for nothing or a wrong token, 403 for a client's credential."""
    gate = request.app[GATE]
    given = request.headers.getall(hdrs.AUTHORIZATION, [])
    scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    if (who := _owner(token.strip(), gate)) is not None and scheme.lower() == "bearer":
        return who
    keys = [request.headers[name] for name in CLIENT_KEY_HEADERS if name in request.headers]
    is_known = gate.is_client_key is not None and any(gate.is_client_key(key) for key in (token, *keys) if key)
    if keys or is_known or _CLIENT_KEY_SHAPE(token):
        raise Refused("a client's credential does not open the admin listener", code="client_key")
    raise Refused("send the admin token as Authorization: Bearer", code="invalid_admin_token", status=401)


def _owner(given: str, gate: Gate) -> Who | None:
    """Whose token it is. Digests are compared, all of them, in constant time."""
    known = [(FIRST, gate.token), *((Who(one.name, one.role), one.secret) for one in gate.others)]
    owners = [who for who, secret in known if hmac.compare_digest(_digest(given), _digest(secret))]
    return owners[0] if owners else None


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
