"""A whole ibid for a test: in this process, or as a process of its own; and a client that speaks to it over sockets."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy

from proxy.app import App, open_app
from proxy.settings import config
from proxy.watch.logs import LineFormat, LogWriter, Redactor
from tests.flows.forked import Forked
from tests.upstream import Chat, Seen
from tests.waiting import PATIENCE_S, until

ROOT = Path(__file__).parents[2]
MODEL = "gpt-4o-mini"
TOKEN = "flow-tests-admin-token-0123456789abcdef"
ROLE_TOKENS = {role: f"flow-tests-{role}-token-0123456789abcdef" for role in ("stats", "auditor")}
ROLE_ENV = {role: f"FLOW_{role.upper()}_TOKEN" for role in ROLE_TOKENS}
ROLES: Mapping[str, Mapping[str, Any]] = {
    f"admin.token.{role}-of-anna": {"role": role, "token_env": ROLE_ENV[role]} for role in ROLE_TOKENS
}
CHAT = "/v1/chat/completions"
EMBEDDINGS = "/v1/embeddings"
EMBEDDER = "text-embedding-3-small"
EXACT_ONLY: Mapping[str, Mapping[str, Any]] = {"cache": {"semantic": False}}
KEY_ENV, UPSTREAM_KEY = "FLOW_UPSTREAM_KEY", "sk-the-upstreams-own"
KEYED: Mapping[str, Mapping[str, Any]] = {
    **EXACT_ONLY,
    **{f"upstream.{name}": {"key_env": KEY_ENV} for name in ("openai", "anthropic", "gemini")},
}
"""Upstreams have a key of their own, as virtual keys need them."""
UNAUDITED: Mapping[str, Any] = {"audit_share": 0}  # unless a test says otherwise: the upstream's meter counts calls
UNHURRIED: Mapping[str, Any] = {"deadline_ms": int(PATIENCE_S * 1000)}  # a busy machine makes a vector late, not a miss


def write_config(data_dir: Path, sections: Mapping[str, Any]) -> Path:
    """A TOML file beside the data directory. The tables of a section that is a list are written one by one."""
    lines = []
    defaults = {"cache": UNAUDITED, "embedding": UNHURRIED}
    told = {name: {**values, **sections.get(name, {})} for name, values in defaults.items()}
    for section, values in {**sections, **told}.items():
        header = f"[[{section}]]" if isinstance(values, list) else f"[{section}]"
        for table in values if isinstance(values, list) else [values]:
            lines += [header, *(f"{name} = {_toml(value)}" for name, value in table.items()), ""]
    path = data_dir.with_suffix(".toml")
    path.write_text("\n".join(lines))
    return path


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(inner)}" for name, inner in value.items()) + " }"
    return json.dumps(value)


def settings_of(
    data_dir: Path, upstream: str, sections: Mapping[str, Any], database: str | None = None
) -> config.Settings:
    flags = config.Flags(
        config=str(write_config(data_dir, sections)),
        listen="127.0.0.1:0",
        admin="127.0.0.1:0",
        upstream=upstream,
        data_dir=str(data_dir),
        database=database,
    )
    tokens = {ROLE_ENV[role]: token for role, token in ROLE_TOKENS.items()}
    return config.load(flags, {"IBID_ADMIN_TOKEN": TOKEN, KEY_ENV: UPSTREAM_KEY, **tokens})


def chat_body(prompt: str | Sequence[Mapping[str, Any]], **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return {"model": MODEL, "messages": messages, **fields}


@dataclass
class Reply:
    """One answer as it came over the wire."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def chunks(self) -> list[Any]:
        """Parsed events of a stream, without its `[DONE]`, which must be there and last."""
        events = [line[6:] for line in self.body.decode().splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]", events[-1]
        return [json.loads(event) for event in events[:-1]]

    @property
    def text(self) -> str:
        if self.headers["Content-Type"].startswith("text/event-stream"):
            return "".join(c["choices"][0]["delta"].get("content") or "" for c in self.chunks if c["choices"])
        return str(self.json["choices"][0]["message"]["content"])

    @property
    def cache(self) -> str | None:
        return self.headers.get("x-cache")

    @property
    def tier(self) -> str | None:
        return self.headers.get("x-cache-tier")

    @property
    def reason(self) -> str | None:
        return self.headers.get("x-cache-reason")

    @property
    def entry(self) -> int:
        return int(self.headers["x-cache-entry"])


class Client:
    """Speaks to one ibid. `key` is the credential used when a call names none."""

    def __init__(self, session: aiohttp.ClientSession, port: int, admin_port: int, key: str = "sk-a") -> None:
        self.session = session
        self.url = f"http://127.0.0.1:{port}"
        self.admin_url = f"http://127.0.0.1:{admin_port}"
        self.key = key

    @contextlib.asynccontextmanager
    async def open(
        self, body: Mapping[str, Any] | bytes, *, key: str | None = None, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = CIMultiDict({"Authorization": f"Bearer {key or self.key}", "Content-Type": "application/json"})
        sent.extend(headers or {})
        async with self.session.post(self.url + CHAT, data=data, headers=sent) as response:
            yield response

    async def send(
        self, body: Mapping[str, Any] | bytes, *, key: str | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        async with self.open(body, key=key, headers=headers) as response:
            return Reply(response.status, response.headers, await response.read())

    async def ask(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> Reply:
        return await self.send(chat_body(prompt, **fields), key=key, headers=headers)

    async def embed(
        self,
        asked: Any,
        *,
        path: str = EMBEDDINGS,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> Reply:
        """Ask for vectors. A field that is None is left out."""
        body = {"model": EMBEDDER, "input": asked, **fields}
        data = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
        sent = CIMultiDict({"Authorization": f"Bearer {key or self.key}", "Content-Type": "application/json"})
        sent.extend(headers or {})
        async with self.session.post(self.url + path, data=data, headers=sent) as response:
            return Reply(response.status, response.headers, await response.read())

    async def admin(self, method: str, path: str, body: Any = None) -> Any:
        """What the admin listener answers; the call must succeed."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with self.session.request(method, self.admin_url + path, json=body, headers=headers) as response:
            answer = await response.text()
            assert response.status == 200, answer
            return answer if response.content_type == "text/plain" else json.loads(answer)

    async def entries(self) -> list[dict[str, Any]]:
        """Every stored entry, newest first."""
        found: list[dict[str, Any]] = []
        cursor = ""
        while True:
            page = await self.admin("GET", f"/cache/entries?limit=1000{cursor}")
            found += page["entries"]
            if page["next_cursor"] is None:
                return found
            cursor = f"&cursor={page['next_cursor']}"


class Ibid(Client):
    """ibid in this process. Answers are compared over the wire; `app` is for waiting and for breaking parts."""

    def __init__(self, app: App, session: aiohttp.ClientSession, log: Log) -> None:
        super().__init__(session, app.port, app.admin_port)
        self.app = app
        self.log = log

    async def settled(self) -> None:
        """Every forward has ended and what may be stored is stored."""
        await until(lambda: not self.app.pipeline.flights and not len(self.app.pipeline.tasks))

    async def fill(self, prompt: str, **fields: Any) -> Reply:
        """Ask something new and wait until its answer is stored."""
        reply = await self.ask(prompt, **fields)
        assert (reply.status, reply.cache) == (200, "MISS"), reply
        await self.settled()
        return reply

    async def sql(self, statement: str) -> list[dict[str, Any]]:
        """Rows of the ledger, everything recorded so far included."""
        await self.app.store.ledger.flush()
        await self.app.store.comparisons.flush()
        result = await self.app.store.queries.run_readonly(statement, row_limit=10_000)
        return [dict(zip(result.columns, row, strict=True)) for row in result.rows]

    async def row(self, reply: Reply) -> dict[str, Any]:
        """The one ledger row of a reply."""
        found = await self.sql(f"SELECT * FROM request WHERE id = '{reply.headers['x-request-id']}'")
        assert len(found) == 1, found
        return found[0]


class Log:
    """Where an ibid in this process writes its lines."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.writer = LogWriter(self, LineFormat(Redactor(), as_json=True))  # type: ignore[arg-type]

    def write(self, text: str) -> int:
        self.written.append(text)
        return len(text)

    def flush(self) -> None:
        pass

    def line(self, reply: Reply) -> dict[str, Any]:
        """The one lookup line of a reply."""
        self.writer.flush()
        lines = [json.loads(line) for line in "".join(self.written).splitlines()]
        found = [line for line in lines if line.get("request_id") == reply.headers["x-request-id"]]
        assert len(found) == 1, found
        return dict(found[0])


@contextlib.asynccontextmanager
async def running(
    data_dir: Path,
    upstream: str,
    sections: Mapping[str, Any] | None = None,
    database: str | None = None,
    *,
    loaded: bool = True,
) -> AsyncIterator[Ibid]:
    """An ibid in this process, on ports of its own; `loaded`: once it compares by meaning."""
    log = Log()
    log.writer.start()
    try:
        async with (
            open_app(settings_of(data_dir, upstream, sections or {}, database), log_writer=log.writer) as app,
            aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=PATIENCE_S)
            ) as session,
        ):
            if loaded:
                await app.settled()
            yield Ibid(app, session, log)
    finally:
        log.writer.close()


Child = subprocess.Popen[bytes] | Forked


class Process(Client):
    """`python -m proxy serve` as a process of its own, logging into `log_path`."""

    def __init__(self, child: Child, session: aiohttp.ClientSession, ports: tuple[int, int]) -> None:
        super().__init__(session, *ports)
        self.child = child

    def kill(self) -> None:
        """Power off: nothing of ours runs any more."""
        self.child.send_signal(signal.SIGKILL)
        self.child.wait(PATIENCE_S)

    async def ready(self) -> None:
        """Everything is loaded. Fails when it ends before."""

        async def is_ready() -> bool:
            async with self.session.get(self.admin_url + "/readyz") as response:
                assert self.child.poll() is None, await response.text()
                return response.status == 200

        await until(is_ready)

    async def stopped(self) -> int:
        """Its exit code."""
        await until(lambda: self.child.poll() is not None)
        return int(self.child.returncode)


@contextlib.asynccontextmanager
async def serving(
    data_dir: Path,
    upstream: str,
    sections: Mapping[str, Any] | None = None,
    *,
    forked: bool = False,
    loaded: bool = True,
    env: Mapping[str, str] | None = None,
) -> AsyncIterator[Process]:
    """A serving process; it is killed at the end if it still runs. `forked`: see tests/flows/forked.py. `loaded`: once
    it is ready, which is some time after it listens. `env` is added to its environment."""
    path = write_config(data_dir, sections or {})
    arguments = ["--config", str(path), "--data-dir", str(data_dir), "--upstream", upstream]
    around = {KEY_ENV: UPSTREAM_KEY, **(env or {})}
    async with started(arguments, data_dir.with_suffix(".log"), around, forked=forked, loaded=loaded) as served:
        yield served


@contextlib.asynccontextmanager
async def started(
    arguments: Sequence[str], log_path: Path, env: Mapping[str, str], *, forked: bool = False, loaded: bool = True
) -> AsyncIterator[Process]:
    """`ibid serve` with these arguments, on ports of its own; see `serving`."""
    said = ["serve", *arguments, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]
    around = {name: value for name, value in os.environ.items() if not name.startswith("IBID_")}
    child = (Forked if forked else _start)(said, {**around, "IBID_ADMIN_TOKEN": TOKEN, **env}, log_path)
    try:
        ports = await _ports(child, log_path)
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=PATIENCE_S)
        ) as session:
            served = Process(child, session, ports)
            if loaded:
                await served.ready()
            yield served
    finally:
        if child.poll() is None:
            child.kill()
        child.wait(PATIENCE_S)


def _start(arguments: list[str], env: Mapping[str, str], log_path: Path) -> subprocess.Popen[bytes]:
    with log_path.open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", "proxy", *arguments], cwd=ROOT, env=env, stderr=log)


async def _ports(child: Child, log_path: Path) -> tuple[int, int]:
    """Client and admin port, from the banner."""
    said = ""

    def has_banner() -> bool:
        nonlocal said
        said = log_path.read_text()
        assert child.poll() is None, said
        return "semantic  " in said

    await until(has_banner)
    client, admin = re.findall(r"^(?:ibid serves|admin) +http://127\.0\.0\.1:(\d+)", said, re.MULTILINE)
    return int(client), int(admin)


def credential(seen: Seen) -> str:
    """Who asked, as the upstream sees it."""
    return (seen.header("Authorization") or "").removeprefix("Bearer ")


def told_apart(seen: Seen) -> Chat:
    """An answer that carries whom it was for and what was asked."""
    return Chat(text=f"for {credential(seen)}: {seen.json['messages'][-1]['content']}")
