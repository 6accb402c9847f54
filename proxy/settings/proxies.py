"""Through which HTTP proxy an upstream is reached, as every SDK asked directly would find it."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

OFF: Final = "off"


def proxy_for(base_url: str, configured: str | None, environ: Mapping[str, str]) -> str | None:
    """The URL of the proxy to an upstream, or None for the direct way.

    `configured` beats the environment, whose lower-case names beat the others. As with Go's clients the environment's
    proxy is never used for the loopback: a local model server is not beyond it.
    """
    if configured:
        return None if configured == OFF else configured
    said = {name.lower(): value for name, value in sorted(environ.items()) if name.lower().endswith("_proxy")}
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    if _is_direct(host, parts.port, said.get("no_proxy", "")):
        return None
    return said.get(f"{parts.scheme}_proxy") or said.get("all_proxy") or None


def _is_direct(host: str, port: int | None, no_proxy: str) -> bool:
    """Whether a host is on this machine, or in a list of hosts, domains, addresses and networks, `*` for all."""
    entries = [entry for part in no_proxy.lower().split(",") if (entry := part.strip())]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if host == "localhost" or host.endswith(".localhost"):
            return True
    else:
        if address.is_loopback or any([address in network for network in _networks(entries)]):
            return True
    names = (host, f"{host}:{port}")
    domains = [entry.removeprefix("*").lstrip(".") for entry in entries if entry != "*"]
    return "*" in entries or any([name == d or name.endswith("." + d) for name in names for d in domains])


def _networks(entries: list[str]) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    found = []
    for entry in entries:
        try:
            found.append(ipaddress.ip_network(entry, strict=False))
        except ValueError:
            continue
    return found
