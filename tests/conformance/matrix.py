"""The matrix of clients and scenarios: what a client makes of ibid beside what it makes of the provider itself."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.flows.running import Ibid
from tests.models import converted_data_dir
from tests.waiting import PATIENCE_S

HERE: Final = Path(__file__).parent
SCHEMA: Final = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
DIFFERENCES: Final = 3  # told of a pair of answers
VOLATILE: Final = frozenset(
    {"created", "created_at", "completed_at", "service_tier", "system_fingerprint", "id", "item_id", "call_id",
     "_request_id", "request_id"}
)  # fmt: skip


Lacks = Mapping[str, str]
"""Scenario → why it does not apply."""


class Talk(NamedTuple):
    """What is asked of a server. `phrasings`: how whoever speaks so puts it; {} is the question."""

    model: str
    asked: str
    reworded: str
    streamed: str
    together: str
    long: str
    long_chars: int  # the answer to `long` has at least as many
    refused: str
    phrasings: Mapping[str, str]


@dataclass
class Server:
    """The provider: where it is, how it is talked to, what counts the requests an ibid sends it, and what it lacks.

    `cut` is an ibid for which every answer that is longer than CUT_BYTES breaks off; `volatile` names what differs
    between two answers of the server itself.
    """

    url: str
    talk: Talk
    count: Callable[[Ibid], Awaitable[int]]
    lacks: Callable[[Client], Lacks]
    cut: Ibid
    volatile: frozenset[str] = VOLATILE


@dataclass
class Client:
    """A client in a process of its own, one task at a time."""

    name: str
    command: Sequence[str]
    speaks: str = "openai"
    lacks: Lacks = field(default_factory=dict)  # what it cannot be asked
    child: asyncio.subprocess.Process | None = None

    async def ask(self, url: str, key: str, model: str, prompt: str, **task: Any) -> list[dict[str, Any]]:
        if self.child is None:
            pipe = asyncio.subprocess.PIPE
            self.child = await asyncio.create_subprocess_exec(
                *self.command, stdin=pipe, stdout=pipe, cwd=HERE, limit=1 << 26, env={**os.environ, "PYTHONPATH": ""}
            )
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        whole = {"url": url, "key": key, "model": model, "prompt": prompt, "stream": False, "tools": False,
                 "schema": None, "loop": False, "times": 1, **task}  # fmt: skip
        self.child.stdin.write(json.dumps(whole).encode() + b"\n")
        try:
            async with asyncio.timeout(PATIENCE_S):
                line = await self.child.stdout.readline()
        except TimeoutError:
            self.child.kill()  # or its late answer would stand for the next one
            await self.child.wait()
            self.child = None
            raise
        if not line:
            raise RuntimeError(f"{self.name}: its process has ended")
        said: list[dict[str, Any]] = json.loads(line)["said"]
        return said

    async def close(self) -> None:
        if self.child is not None and self.child.returncode is None:
            assert self.child.stdin is not None
            self.child.stdin.close()
            await self.child.wait()


@dataclass
class Bench:
    """What a scenario has to work with."""

    client: Client
    server: Server
    ibid: Ibid
    key: str
    notes: list[str] = field(default_factory=list)

    @property
    def talk(self) -> Talk:
        return self.server.talk

    def put(self, prompt: str) -> str:
        """A question as this client puts it."""
        return self.talk.phrasings.get(self.client.speaks, "{}").format(prompt)

    async def direct(self, prompt: str, **task: Any) -> dict[str, Any]:
        asked = self.put(prompt)
        return (await self.client.ask(self.server.url, self.key, self.talk.model, asked, **task))[0]

    async def through(self, prompt: str, *, calls: int, ibid: Ibid | None = None, **task: Any) -> list[dict[str, Any]]:
        """Ask through ibid; `calls` is how many requests must reach the provider for it."""
        ibid = ibid or self.ibid
        before = await self.server.count(ibid)
        said = await self.client.ask(ibid.url, self.key, self.talk.model, self.put(prompt), **task)
        await ibid.settled()
        if (made := await self.server.count(ibid) - before) != calls:
            self.notes.append(f"{made} calls instead of {calls}: {prompt[:30]!r}")
        return said

    def same(self, one: Any, other: Any, what: str) -> None:
        steady_ones = [steady(value, self.server.volatile) for value in (one, other)]
        self.notes += [f"{what}{where}" for where in islice(differences(*steady_ones), DIFFERENCES)]

    def claim(self, is_true: bool, what: str) -> None:
        if not is_true:
            self.notes.append(what)


def steady(value: Any, volatile: frozenset[str]) -> Any:
    """All that two answers to one question have in common."""
    if isinstance(value, dict):
        return {name: steady(inner, volatile) for name, inner in value.items() if name not in volatile}
    return [steady(inner, volatile) for inner in value] if isinstance(value, list) else value


def differences(one: Any, other: Any, at: str = "") -> Iterator[str]:
    """Where two values differ, and in what."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one.keys() | other.keys():
            yield from differences(one.get(name, "(absent)"), other.get(name, "(absent)"), f"{at}.{name}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{at}[{index}]")
    elif one != other:
        yield f"{at}: {json.dumps(one)[:400]} is not {json.dumps(other)[:400]}"


Found = dict[str, dict[str, list[str] | str]]
"""Client → scenario → what was wrong, or why it does not apply."""


def data_dir(folder: str) -> Path:
    """An empty data directory that finds the converted model."""
    data = Path(folder) / "data"
    data.mkdir(mode=0o700)
    (data / "models").symlink_to(converted_data_dir() / "models", target_is_directory=True)
    return data


Scenario = Callable[[Bench], Awaitable[None]]


def python_of(variable: str) -> str:
    """The interpreter that has some of the clients; "" where they are not installed."""
    return os.environ.get(variable, "")


async def compare(chosen: Sequence[Client], server: Server, ibid: Ibid, scenarios: Mapping[str, Scenario]) -> Found:
    found: Found = {}
    for number, client in enumerate(chosen):
        row = found[client.name] = {}
        lacks = {**client.lacks, **server.lacks(client)}
        try:
            for name, scenario in scenarios.items():
                if name in lacks:
                    row[name] = lacks[name]
                    continue
                bench = Bench(client, server, ibid, f"sk-conformance-{number}")
                try:
                    await scenario(bench)
                except (TimeoutError, RuntimeError, LookupError, ValueError) as fault:
                    bench.notes.append(f"{type(fault).__name__}: {fault}")
                row[name] = bench.notes
        finally:
            await client.close()
    return found


def table(found: Found) -> str:
    """The matrix, and below it how many cells there are of each kind, and why some do not apply."""
    scenarios = next(iter(found.values()), {})
    lines = ["| client | " + " | ".join(scenarios) + " |", "| --- |" + " --- |" * len(scenarios)]
    said: dict[str, int] = {"ok": 0, "n/a": 0, "FAILS": 0}
    reasons: dict[str, dict[str, list[str]]] = {}
    for client, row in found.items():
        cells = ["n/a" if isinstance(cell, str) else "FAILS" if cell else "ok" for cell in row.values()]
        lines.append(f"| {client} | " + " | ".join(cells) + " |")
        for name, cell, kind in zip(row, row.values(), cells, strict=True):
            said[kind] += 1
            if isinstance(cell, str):
                reasons.setdefault(cell, {}).setdefault(client, []).append(name)
    lines += ["", ", ".join(f"{count} {kind}" for kind, count in said.items())]
    for reason, where in reasons.items():
        cells = [
            f"{client} ({'all' if len(names) == len(scenarios) else ', '.join(names)})"
            for client, names in where.items()
        ]
        lines.append(f"n/a: {reason}: {'; '.join(cells)}")
    return "\n".join(lines)


def report(found: Found, took_s: float) -> int:
    """Print the matrix and what is wrong with it; the exit code."""
    sys.stdout.write(f"{table(found)}\n{took_s:.0f} s\n")
    wrong = [(c, name, note) for c, row in found.items() for name, cell in row.items()
             for note in (cell if isinstance(cell, list) else ())]  # fmt: skip
    for client, name, note in wrong:
        sys.stdout.write(f"\n{client}, {name}: {note}\n")
    return 1 if wrong else 0
