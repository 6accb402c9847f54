"""The dashboard's own files: one page, its styles and its scripts, as they lie in `dashboard/`. No build, no data."""

from __future__ import annotations

import functools
from importlib.resources import files

from aiohttp import web

PAGE = "index.html"
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""What the page may do. The last two make every way from a string to markup an error: what is shown is text."""


@functools.cache
def served() -> dict[str, bytes]:
    """Every file by its name."""
    return {file.name: file.read_bytes() for file in files("proxy.admin").joinpath("dashboard").iterdir()}


def response(name: str) -> web.Response:
    """One of `served`. Raises KeyError."""
    kind = TYPES[name.rpartition(".")[2]]
    headers = {"Content-Security-Policy": POLICY}
    return web.Response(body=served()[name], content_type=kind, charset="utf-8", headers=headers)
