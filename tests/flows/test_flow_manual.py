"""Every snippet of the manual that can be run is run: client code and `curl` against a whole ibid, SQL on its ledger;
commands of `ibid` go through the real parser, other shell through `bash -n`, configurations through `config.load`."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import yaml

from proxy.admin.routes import ROUTES
from proxy.commands import main as cli
from proxy.settings import config
from tests.docs.manual import ROOT, Snippet, pages, snippets
from tests.flows.running import TOKEN, Ibid, running
from tests.providers import provider
from tests.upstream import Json, Reply, ScriptedUpstream, Seen
from tests.waiting import PATIENCE_S

HOME = {"HOME": "/home/ann"}
KEYS = ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY")
CLIENT, ADMIN = "http://127.0.0.1:4141", "http://127.0.0.1:4142"
FOREIGN = frozenset("make python3 docker pip sqlite3 cp datasette curl ssh".split())
"""First words of lines that are not commands of ibid."""


def commands_in(snippet: Snippet) -> Iterator[list[str]]:
    """Words of each simple command, without the variables in front of it."""
    text = re.sub(r"\\\n\s*", " ", snippet.text)
    for line in text.splitlines():
        for command in re.split(r" && | \| ", re.sub(r"(?:^|\s)#.*", "", line)):
            words = shlex.split(command)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            if words:
                yield words


def shell() -> list[Snippet]:
    return snippets("sh")


# -- read alone --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("snippet", shell(), ids=str)
def test_shell_snippets_are_shell(snippet: Snippet) -> None:
    done = subprocess.run(["bash", "-n"], input=snippet.text, text=True, capture_output=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("snippet", shell(), ids=str)
def test_every_command_of_ibid_is_one(snippet: Snippet) -> None:
    for words in commands_in(snippet):
        if words[0].rpartition("/")[2] == "ibid":
            cli._parser().parse_args(words[1:])
        elif words[0].startswith("."):
            assert words[1:3] == ["-m", "pytest"]
            assert (ROOT / words[3]).exists()
        else:
            assert words[0].rpartition("/")[2] in FOREIGN, words


@pytest.mark.parametrize("snippet", shell(), ids=str)
def test_files_named_in_shell_snippets_exist(snippet: Snippet) -> None:
    for words in commands_in(snippet):
        for word in words:
            if word.startswith("deploy/"):
                assert (ROOT / word).exists(), word


def test_a_command_that_is_none_is_found() -> None:
    with pytest.raises(SystemExit):
        cli._parser().parse_args(["purge", "--all"])
    snippet = Snippet("x.md", 1, "sh", "A=1 ibid sql \\\n  'SELECT 1' # why\nls | wc -l\n", "")
    assert list(commands_in(snippet)) == [["ibid", "sql", "SELECT 1"], ["ls"], ["wc", "-l"]]


def loaded(text: str, path: Path) -> config.Settings:
    """As `ibid serve --config` reads it; each variable that holds a key or a token has one."""
    path.write_text(text)
    named = re.findall(r'(?:key|token)_env = "(\w+)"', text)
    secrets = {name: f"secret-of-{name}".ljust(40, ".") for name in named}
    return config.load(config.Flags(config=str(path)), {**HOME, **secrets})


@pytest.mark.parametrize("snippet", snippets("toml"), ids=str)
def test_configurations_load(snippet: Snippet, tmp_path: Path) -> None:
    loaded(snippet.text, tmp_path / "ibid.toml")


@pytest.mark.parametrize("snippet", snippets("yaml"), ids=str)
def test_yaml_snippets_parse(snippet: Snippet) -> None:
    assert yaml.safe_load(snippet.text)


# -- run on a whole ibid -----------------------------------------------------------------------------------------------


def answering(seen: Seen) -> Reply:
    """The provider in its own words; it has no batch API."""
    return provider(seen) if seen.body else Json(404, {"error": {"message": "no such path"}})


@pytest.fixture
async def served(data_dir: Path) -> AsyncIterator[tuple[Ibid, ScriptedUpstream]]:
    async with ScriptedUpstream(default=answering) as upstream, running(data_dir, upstream.url) as ibid:
        yield ibid, upstream


def moved(text: str, ibid: Ibid) -> str:
    """A snippet with the addresses of this ibid."""
    return text.replace(CLIENT, ibid.url).replace(ADMIN, ibid.admin_url)


async def test_client_snippets_run_and_print_what_the_page_says(served: tuple[Ibid, ScriptedUpstream]) -> None:
    ibid, _ = served
    found = snippets("python")
    assert len(found) >= 8
    for snippet in found:
        before = await asked(ibid)
        env = {**os.environ, **dict.fromkeys(KEYS, f"sk-{snippet.line}")}  # nobody has stored anything for it yet
        out = await run(moved(snippet.text, ibid), env, ibid)
        assert out.strip(), snippet
        if snippet.printed:
            assert out == snippet.printed, snippet
        await ibid.settled()
        assert await asked(ibid) > before, snippet


PAUSE, WAIT = "time.sleep(1)", "(print('pause', flush=True), input())"
"""A snippet's pause, and how it waits here: until all that was answered is stored."""


async def run(text: str, env: dict[str, str], ibid: Ibid) -> str:
    """What a snippet prints. It must end well."""
    pipe = asyncio.subprocess.PIPE
    command = [sys.executable, "-u", "-W", "error", "-c", text.replace(PAUSE, WAIT)]
    child = await asyncio.create_subprocess_exec(*command, env=env, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe)
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    printed = []
    async with asyncio.timeout(PATIENCE_S):
        while line := (await child.stdout.readline()).decode():
            if line == "pause\n":
                await ibid.settled()
                child.stdin.write(b"\n")
            else:
                printed.append(line)
        assert await child.wait() == 0, f"{text}\n{(await child.stderr.read()).decode()}"
    return "".join(printed)


async def asked(ibid: Ibid) -> int:
    (row,) = await ibid.sql("SELECT COUNT(*) AS n FROM request")
    return int(row["n"])


def curls() -> list[Snippet]:
    return [one for one in shell() if any(words[0] == "curl" for words in commands_in(one))]


async def test_curl_snippets_are_answered(served: tuple[Ibid, ScriptedUpstream]) -> None:
    ibid, _ = served
    assert len(curls()) >= 5
    first = await ibid.ask("Which entry is number one?")
    await ibid.settled()
    assert first.status == 200
    for snippet in curls():
        for words in commands_in(snippet):
            if words[0] == "curl":
                status = await curl(ibid, words[1:])
                assert status in (200, 202), (str(snippet), status)


async def curl(ibid: Ibid, words: list[str]) -> int:
    """The status of the request that `curl` with these arguments would send."""
    method, headers, data, address = "", {}, None, ""
    rest = iter(words)
    for word in rest:
        if word in ("-s", "-S"):
            continue
        if word in ("-D", "-o"):
            next(rest)
        elif word == "-X":
            method = next(rest)
        elif word == "-H":
            name, _, value = next(rest).partition(": ")
            headers[name] = value.replace("$OPENAI_API_KEY", "sk-a").replace("$IBID_ADMIN_TOKEN", TOKEN)
        elif word == "-d":
            data = next(rest)
        else:
            assert not address, f"what is {word}?"
            address = word
    assert address.startswith((CLIENT, ADMIN)), address
    url = moved(address, ibid)
    async with ibid.session.request(method or ("POST" if data else "GET"), url, data=data, headers=headers) as response:
        await response.read()
        return response.status


def statements() -> list[tuple[str, str]]:
    """Where, and what: of SQL snippets and of `ibid sql`."""
    found = [(str(one), one.text) for one in snippets("sql")]
    for one in shell():
        found += [(str(one), words[-1]) for words in commands_in(one) if words[:2] == ["ibid", "sql"]]
    for path in pages():
        found += [(path.name, text) for text in re.findall(r'`ibid sql "([^"`…]+)"`', path.read_text())]
    return found


async def test_sql_snippets_run_on_a_fresh_ledger(exact: Ibid) -> None:
    found = statements()
    assert len(found) >= 14
    for place, statement in found:
        assert isinstance(await exact.sql(statement), list), place


async def test_sql_snippets_run_on_a_ledger_with_rows(served: tuple[Ibid, ScriptedUpstream]) -> None:
    ibid, _ = served
    await ibid.fill("What is the capital of France?")
    assert (await ibid.ask("What is the capital of France?")).cache == "HIT"
    rows = {statement: await ibid.sql(statement) for _, statement in statements()}
    filled = [statement for statement, found in rows.items() if found]
    assert len(filled) >= 9, filled


def test_scrape_targets_and_routes_of_the_yaml_exist() -> None:
    (scrape,) = [one for one in snippets("yaml") if "scrape_configs" in one.text]
    (job,) = yaml.safe_load(scrape.text)["scrape_configs"]
    assert job["static_configs"] == [{"targets": [ADMIN.removeprefix("http://")]}]
    assert "/metrics" in {route.path for route in ROUTES}
