"""WebSockets, from a client to an upstream: messages either way until one side closes; so does the other, with the same
code."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from aiohttp import WSCloseCode, WSMsgType, web
from aiohttp.hdrs import METH_GET, SEC_WEBSOCKET_PROTOCOL, UPGRADE

from proxy.ports import FarSocket, WebSocket

MESSAGE_LIMIT_BYTES: Final = 16 * 1024 * 1024


def is_websocket(request: web.BaseRequest) -> bool:
    return request.method == METH_GET and request.headers.get(UPGRADE, "").lower() == "websocket"


def protocols_of(request: web.BaseRequest) -> list[str]:
    """What the client offers, but for those in which browsers hide a key of ours."""
    offered = [word.strip() for word in request.headers.get(SEC_WEBSOCKET_PROTOCOL, "").split(",")]
    return [protocol for protocol in offered if protocol and "ibid-" not in protocol]


async def join(request: web.BaseRequest, far: FarSocket, headers: Sequence[tuple[str, str]]) -> web.WebSocketResponse:
    """Shake hands with the client as the upstream did, and carry until both are closed. Closes `far`."""
    chosen = (far.protocol,) if far.protocol else ()
    near = web.WebSocketResponse(protocols=chosen, autoping=False, autoclose=False, max_msg_size=MESSAGE_LIMIT_BYTES)
    near.headers.extend(headers)
    ways: list[asyncio.Future[None]] = []
    try:
        await near.prepare(request)
        ways += [asyncio.ensure_future(_carry(near, far)), asyncio.ensure_future(_carry(far, near))]
        await asyncio.wait(ways)  # either way ends by closing what it writes to, and so ends the other
    finally:  # a client that is gone cancels this task
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        await far.close(code=WSCloseCode.GOING_AWAY)
    await near.close()
    return near


async def _carry(source: WebSocket, target: WebSocket) -> None:
    """Every message of one side to the other, then its close."""
    while True:
        message = await source.receive()
        match message.type:
            case WSMsgType.TEXT:
                await target.send_str(message.data)
            case WSMsgType.BINARY:
                await target.send_bytes(message.data)
            case WSMsgType.PING:
                await target.ping(message.data)
            case WSMsgType.PONG:
                await target.pong(message.data)
            case WSMsgType.CLOSE:
                code, reason = message.data or WSCloseCode.OK, (message.extra or "").encode()
                await target.close(code=code, message=reason)
                await source.close(code=code, message=reason)  # only now: who closed may go at once
                return
            case _:  # it broke, or was closed by us
                await target.close(code=WSCloseCode.GOING_AWAY)
                return
