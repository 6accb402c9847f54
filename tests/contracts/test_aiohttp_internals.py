"""What ibid reads of aiohttp beyond its documentation, looked at on real objects: another release may move any of it.

One that did fails here first, with the list of what moved.
"""

from __future__ import annotations

import ast
import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import HttpVersion, StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from yarl import URL

from proxy import aiohttp_internals as internals
from tests.waiting import PATIENCE_S, until

PROXY = Path(internals.__file__).parent
PROMISED = {"aiohttp", "aiohttp.abc", "aiohttp.hdrs", "aiohttp.web"}
READ: dict[type, dict[str, Any]] = {
    web.RequestHandler: {
        "_close": bool,
        "_current_request": (web.BaseRequest, type(None)),
        "_force_close": bool,
        "_lingering_time": float,
        "_loop": asyncio.AbstractEventLoop,
        "_messages": deque,
        "_request_count": int,
        "_task_handler": (asyncio.Task, type(None)),
        "_upgraded": bool,
        "_waiter": (asyncio.Future, type(None)),
    },
    web.BaseRequest: {"_cache": dict, "_version": HttpVersion},
    AbstractStreamWriter: {"_eof": bool, "chunked": bool, "output_size": int},
    StreamReader: {
        "_buffer": deque,
        "_buffer_offset": int,
        "_cursor": int,
        "_eof": bool,
        "_http_chunk_splits": (deque, type(None)),
        "_protocol": asyncio.Protocol,
        "_read_nowait": Callable,
        "_size": int,
        "_wait": Callable,
        "total_bytes": int,
    },
    internals.ResponseHandler: {
        "_reading_paused": bool,
        "exception": Callable,
        "read": Callable,
        "set_response_params": Callable,
        "transport": (asyncio.BaseTransport, type(None)),
    },
    internals.RawResponseMessage: {"code": int, "headers": Mapping},
}
MOVED = f"aiohttp {aiohttp.__version__} moved what proxy.aiohttp_internals reads"
IMPORTED = {"_ErrInfo", "_serialize_headers"}


def moved(seen: object, kind: type) -> Iterator[str]:
    """What of this object is not where it is read."""
    if not isinstance(seen, kind):
        yield f"a {kind.__name__} is now a {type(seen).__name__}"
    for name, wanted in READ[kind].items():
        if not hasattr(seen, name):
            yield f"{kind.__name__}.{name} is gone"
        elif not isinstance(value := getattr(seen, name), wanted):
            yield f"{kind.__name__}.{name} is now a {type(value).__name__}"


class Server(web.Server):
    """Answers over real connections, and looks at what it is handed."""

    def __init__(self) -> None:
        super().__init__(self.answer)
        self.moved: list[str] = []
        self.refused: list[BaseException | None] = []
        self.bodies: list[bytes] = []
        self.open: list[Connection] = []

    def __call__(self) -> Connection:
        settings = {"max_line_size": 200, "max_field_size": 100, "max_headers": 10}
        self.open.append(Connection(self, asyncio.get_running_loop(), **settings))
        return self.open[-1]

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        connection, content = request.protocol, request.content
        assert isinstance(connection, Connection)
        self.moved += [*moved(connection, web.RequestHandler), *moved(request, web.BaseRequest)]
        self.moved += [*moved(request.writer, AbstractStreamWriter), *moved(content, StreamReader)]
        assert connection.request is request
        assert connection.task is not None
        assert not connection.task.done()
        whole = b""
        while piece := await internals.read_all_there_is(content):
            whole += piece
        self.bodies.append(whole)
        assert connection.is_answering()
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        assert not internals.can_take_a_chunk(request)
        await response.prepare(request)
        await response.write(b"answer")
        assert internals.can_take_a_chunk(request)
        await response.write_eof()
        assert not internals.can_take_a_chunk(request)
        internals.close_undrained(request)
        return response


class Connection(internals.ServerConnection):
    __slots__ = ("has_begun",)

    def head_grew(self, size_bytes: int) -> None:
        self.has_begun = self.head_since

    def handle_error(self, request: web.BaseRequest, status: int = 500, exc: Any = None, message: Any = None) -> Any:
        assert isinstance(self._manager, Server)
        self._manager.refused.append(exc)
        internals.answer_as_http11(request)
        assert request.version == aiohttp.HttpVersion11
        return web.Response(status=400)


async def exchanged(session: aiohttp.ClientSession, url: URL) -> tuple[list[str], bytes]:
    """What moved on the client's side of an exchange made as `proxy.upstreams` makes it, and the body it brought."""
    request = aiohttp.ClientRequest("POST", url, data=b"", session=session, loop=asyncio.get_running_loop())
    del request.headers["Content-Length"]
    request.headers["Transfer-Encoding"] = "chunked"
    head = internals.serialize_headers(f"POST {url.raw_path_qs} HTTP/1.1", request.headers)
    assert session.connector is not None
    connection = await session.connector.connect(request, [], aiohttp.ClientTimeout())
    protocol = connection.protocol
    assert protocol is not None
    found = list(moved(protocol, internals.ResponseHandler))
    protocol.set_response_params(skip_payload=False, read_until_eof=True, auto_decompress=False)
    assert protocol.transport is not None
    protocol.transport.write(head + b"3\r\nabc\r\n")
    protocol.transport.write(b"2\r\nde\r\n0\r\n\r\n")
    message, content = await protocol.read()
    assert protocol.exception() is None
    found += [*moved(message, internals.RawResponseMessage), *moved(content, StreamReader)]
    body = b""
    while piece := await internals.read_all_there_is(content):
        body += piece
    connection.release()
    return found, body


async def refused(server: Server, port: int, head: bytes) -> BaseException | None:
    """What the parser says of this head."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    before = len(server.refused)
    writer.write(head)
    await until(lambda: len(server.refused) > before)
    assert (await reader.readline()).startswith(b"HTTP/1.1 400")
    writer.close()
    return server.refused[-1]


def unbounded(connection: Connection) -> Iterator[str]:
    """What the listener leaves to aiohttp, and a release before 3.14.4 does not do."""
    if getattr(connection, "_keepalive_handle", None) is None:
        yield "a connection that asks nothing is never closed"
    if not getattr(connection, "_max_msg_queue_size", 0):
        yield "a client may send requests ahead without end"


async def test_a_silent_and_a_hasty_client_are_bounded() -> None:
    server = Server()
    listening = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    _reader, writer = await asyncio.open_connection(*listening.sockets[0].getsockname())
    await until(lambda: server.open and server.open[0].transport is not None)
    assert list(unbounded(server.open[0])) == [], f"aiohttp {aiohttp.__version__}"
    writer.close()
    listening.close()
    await server.shutdown(0)


async def test_aiohttp_has_everything_where_it_is_read() -> None:
    server = Server()
    loop = asyncio.get_running_loop()
    connection = server()
    made = {
        web.RequestHandler: connection,
        AbstractStreamWriter: internals.StreamWriter(connection, loop),
        StreamReader: StreamReader(connection, 2**16, loop=loop),
        internals.ResponseHandler: internals.ResponseHandler(loop),
    }
    found = [line for kind, seen in made.items() for line in moved(seen, kind)]
    assert found == [], MOVED
    listening = await loop.create_server(server, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with asyncio.timeout(PATIENCE_S), aiohttp.ClientSession() as session:
        found, body = await exchanged(session, URL(f"http://127.0.0.1:{port}/x"))
        assert [*server.moved, *found] == [], MOVED
        assert (server.refused, server.bodies, body) == ([], [b"abcde"], b"answer")
        await the_words_are_the_same(server, port)
    listening.close()
    await server.shutdown(0)


async def the_words_are_the_same(server: Server, port: int) -> None:
    """Faults that aiohttp tells apart by nothing else."""
    start = b"GET /x HTTP/1.1\r\nHost: h\r\n"
    many = await refused(server, port, start + b"a: b\r\n" * 20 + b"\r\n")
    assert isinstance(many, internals.BadHttpMessage)
    assert many.message == internals.TOO_MANY_HEADERS
    long_header = await refused(server, port, start + b"a: " + b"b" * 150 + b"\r\n\r\n")
    assert isinstance(long_header, internals.LineTooLong)
    assert internals.limit_of(long_header) == 100
    long_line = await refused(server, port, b"GET /" + b"x" * 300 + b" HTTP/1.1\r\nHost: h\r\n\r\n")
    assert isinstance(long_line, internals.LineTooLong)
    assert internals.limit_of(long_line) == 200
    _reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /x HT")
    await until(lambda: server.open[-1].head_since)
    connection = server.open[-1]
    assert connection.has_begun == connection.head_since
    assert connection.is_idle()
    assert connection.transport is not None
    connection.transport.abort()
    with pytest.raises(aiohttp.ClientConnectionResetError, match=internals.CLOSING):
        await internals.StreamWriter(connection, asyncio.get_running_loop()).write(b"late")
    writer.close()


def test_every_name_that_is_read_is_looked_at() -> None:
    tree = ast.parse((PROXY / "aiohttp_internals.py").read_text())
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    private = {name for name in attributes | names if name.startswith("_") and not name.startswith("__")}
    looked_at = IMPORTED.union(*READ.values())
    assert private - own_names(tree) == {name for name in looked_at if name.startswith("_")}


def own_names(tree: ast.Module) -> set[str]:
    """Attributes and methods that a file makes: named in `__slots__`, set on `self`, defined."""
    found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__slots__" for target in node.targets):
            found |= {part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant)}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.attr for t in targets if isinstance(t, ast.Attribute) and getattr(t.value, "id", "") == "self"}
    return found


def borrowed(tree: ast.Module) -> set[str]:
    """What a file reads of aiohttp beyond its documentation."""
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found = {name for name in modules if name.startswith("aiohttp.")} - PROMISED
    if any(name.partition(".")[0] == "aiohttp" for name in modules):
        known = own_names(tree) | {"_replace", "_fields", "_asdict"}  # of a NamedTuple
        private = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") != "os"  # os._exit
        } - known
        found |= {name for name in private if name.startswith("_") and not name.startswith("__")}
    return found


def test_nobody_else_reads_what_aiohttp_does_not_promise() -> None:
    found = {
        str(path.relative_to(PROXY)): names
        for path in sorted(PROXY.rglob("*.py"))
        if path.name != "aiohttp_internals.py" and (names := borrowed(ast.parse(path.read_text())))
    }
    assert found == {}


def test_the_search_for_borrowed_names_finds_them() -> None:
    assert borrowed(ast.parse("from aiohttp import web\nrequest.protocol._waiter")) == {"_waiter"}
    assert borrowed(ast.parse("from aiohttp.web_protocol import _ErrInfo")) == {"aiohttp.web_protocol"}
    assert borrowed(ast.parse("import aiohttp.streams")) == {"aiohttp.streams"}
    inherited = "from aiohttp import web\nclass A(web.RequestHandler):\n    def f(self):\n        self._close = True\n"
    assert borrowed(ast.parse(inherited.replace("self._close = True", "return self._close"))) == {"_close"}
    assert borrowed(ast.parse("from aiohttp import web, hdrs\nself._mine = 1\nself._mine")) == set()
