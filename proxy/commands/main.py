"""The command `ibid`. Exit codes: 0 fine, 2 the operator must act, 75 it may heal by itself: try again later (one line
on standard error says what), 1 a bug.

`serve` runs the program. `savings` and `sql` read the database directly, whether a server runs or not; `stats`,
`entries`, `explain` and `purge` ask a running one over its admin listener; `keys` does either.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import logging
import os
import sys
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import orjson

from proxy.admin.routes import GROUPS
from proxy.admin.schema import read_time
from proxy.commands import printing
from proxy.core.errors import BadRequest, CacheFault, ConfigError, NotYet
from proxy.settings import config

if TYPE_CHECKING:
    from proxy.store.queries import Queries, Result

Found = TypeVar("Found")

FINE, BUG, ACT, TRY_AGAIN, INTERRUPTED = 0, 1, 2, 75, 130  # 75: EX_TEMPFAIL of sysexits.h
ADMIN_TIMEOUT_S = 60.0
ROWS = 10_000
ENTRY_COLUMNS = ("id", "model", "prompt", "namespace", "tags", "answer_bytes", "created", "expires", "quarantined")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    chosen = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.ERROR, format="ibid: %(message)s")  # `serve` sets up its own
    try:
        flags = {name: getattr(chosen, name, None) for name in config.Flags.__slots__}
        settings = config.load(config.Flags(**flags), os.environ)
        if not settings.is_data_dir_named and chosen.run in (_serve, _migrate, _keys, _evaluate):
            settings.data_dir.parent.mkdir(parents=True, exist_ok=True)
        code: int = chosen.run(settings, chosen)
        sys.stdout.flush()
        return code
    except (ConfigError, BadRequest, CacheFault) as error:
        print(f"ibid: {printing.printable(error.message)}", file=sys.stderr)
        return TRY_AGAIN if isinstance(error, NotYet) or error.code == "store_down" else ACT
    except BrokenPipeError:  # the reader of our output, a pager perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FINE
    except KeyboardInterrupt:
        return INTERRUPTED


class Unanswered(ConfigError):
    """No admin listener answers."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(ACT, f"ibid: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    places = _places()
    machine = _Parser(add_help=False)
    machine.add_argument("--json", action="store_true", help="JSON for machines")
    table = _Parser(add_help=False)
    table.add_argument("--format", choices=("table", "csv", "json"), default="table")
    table.add_argument("--json", dest="format", action="store_const", const="json", help="the same as --format json")
    table.add_argument("--limit", type=int, default=1000, metavar="N", help="rows at most (1000)")

    parser = _Parser(prog="ibid", description="A semantic caching proxy for LLM APIs.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Any, about: str, *parents: _Parser) -> argparse.ArgumentParser:
        made = commands.add_parser(name, parents=[places, *parents], help=about, description=about)
        made.set_defaults(run=run)
        return made

    serve = command("serve", _serve, "run the proxy")
    serve.add_argument("--listen", metavar="HOST:PORT", help="client listener (IBID_LISTEN)")
    serve.add_argument("--upstream", metavar="URL", help="one address for every dialect (IBID_UPSTREAM)")
    serve.add_argument("--workers", type=int, metavar="N", help="event loops sharing the port")
    command("migrate", _migrate, "bring the database to this program's schema")
    command("check", _check, "say what would keep `serve` from starting", machine).add_argument(
        "--listen", metavar="HOST:PORT", help="client listener (IBID_LISTEN)"
    )
    command("rebuild-index", _rebuild_index, "build the index from SQL and save it; no server may be running")
    command("stats", _stats, "what a running ibid holds and has done", machine)
    _add_selection(command("entries", _entries, "list stored answers", machine), listing=True)
    explain = command("explain", _explain, "how a request would be answered; nothing is served or stored", machine)
    explain.add_argument("file", nargs="?", default="-", help="JSON of a request (standard input)")
    explain.add_argument("--path", metavar="PATH", help="where it would be sent (/v1/chat/completions)")
    explain.add_argument("--tenant", metavar="HEX", help="look as this tenant")
    purge = command("purge", _purge, "remove stored answers; says which unless --yes", machine)
    _add_selection(purge, listing=False)
    savings = command("savings", _savings, "what was saved: a summary, or a named query", table)
    savings.add_argument("name", nargs="?", help="named query; `list` and `views` show them, `reconcile` compares")
    savings.add_argument("file", nargs="?", metavar="INVOICE", help="reconcile: CSV of a provider's usage or costs")
    savings.add_argument(
        "--upstream", dest="billed_by", metavar="NAME", help="reconcile: whose calls (those of the file's provider)"
    )
    savings.add_argument("--since", metavar="WHEN", help="30d, 2026-11-01 (30d; reconcile: the file's days)")
    savings.add_argument("--until", metavar="WHEN", help="up to this day, itself included")
    savings.add_argument("--group-by", default="day", metavar="COLUMNS", help=f"of {','.join(GROUPS)} (day)")
    evaluate = command(
        "evaluate", _evaluate, "hits and wrong hits of the shipped matching on labelled questions", machine
    )
    evaluate.add_argument("files", nargs="+", metavar="FILE", help="JSON lines, plain or .gz: streams or pairs")
    evaluate.add_argument(
        "--max-error", type=float, action="append", metavar="SHARE", help="budgets (.005 .01 .02 .05)"
    )
    evaluate.add_argument("--shuffles", type=int, default=0, metavar="K", help="K random orders instead of the file's")
    evaluate.add_argument(
        "--labels",
        choices=("perfect", "answers", "none"),
        default="perfect",
        help="what the judge is told: the truth, what comparing answers would find, nothing",
    )
    evaluate.add_argument("--readings", metavar="FILE", help="pairs that a person read: a, b, same")
    evaluate.add_argument("--plot", metavar="SVG", help="draw hit rate against error")  # fmt: skip
    simulate = command("simulate", _simulate, "stored questions once more, under other rules", machine)
    simulate.add_argument("--max-error", type=float, action="append", metavar="SHARE", help="a budget; again for more")
    simulate.add_argument("--model", metavar="NAME", help="another embedding model")
    simulate.add_argument("--without", action="append", default=[], metavar="GUARD", help="leave a guard out")
    simulate.add_argument("--namespace", metavar="NAME")
    simulate.add_argument("--limit", type=int, default=20_000, metavar="N", help="newest questions at most (20000)")
    _add_keys(command("keys", _keys, "virtual keys: make, list, show, revoke, rotate"), machine)
    command("sql", _sql, "any read-only query of the ledger", table).add_argument("statement", metavar="SELECT")
    return parser


def _places(default: str | None = None) -> _Parser:
    """Where the configuration, the files and the listeners are."""
    places = _Parser(add_help=False, argument_default=default)
    places.add_argument("--config", metavar="FILE", help="TOML configuration (IBID_CONFIG)")
    places.add_argument("--data-dir", metavar="DIR", help="where ibid keeps its files (IBID_DATA_DIR)")
    places.add_argument("--database", metavar="URL", help="sqlite:///FILE or postgresql://… (IBID_DATABASE_URL)")
    places.add_argument("--admin", metavar="HOST:PORT", help="admin listener (IBID_ADMIN)")
    return places


def _add_keys(parser: argparse.ArgumentParser, machine: _Parser) -> None:
    places = _places(argparse.SUPPRESS)  # what stands before the action holds
    actions = parser.add_subparsers(title="actions", dest="action", required=True, metavar="ACTION")

    def action(name: str, about: str) -> argparse.ArgumentParser:
        return actions.add_parser(name, parents=[places, machine], help=about, description=about)

    create = action("create", "make a key; its secret is told this once")
    create.add_argument("--project", required=True, metavar="NAME", help="keys of one project share its entries")
    create.add_argument("--name", metavar="TEXT", help="what the key is for")
    for kind, example in (("usd", "10/day"), ("requests", "100/minute"), ("tokens", "1000000/month")):
        create.add_argument(f"--limit-{kind}", action="append", metavar="N/WINDOW", help=f"{example}; again for others")
    create.add_argument("--models", action="append", metavar="PATTERN", help="'gpt-*'; may be given again")
    create.add_argument("--plan", metavar="LANES", help="exact,semantic or +route,-semantic")
    create.add_argument("--expires", metavar="WHEN", help="90d, 2027-01-01")
    action("list", "every key, the newest first")
    for name, about in (
        ("show", "what is spent and what remains of each limit"),
        ("revoke", "close it for good"),
        ("rotate", "give it a new secret; the old one is void"),
    ):
        action(name, about).add_argument("id", metavar="ID")


def _add_selection(parser: argparse.ArgumentParser, *, listing: bool) -> None:
    parser.add_argument("--namespace", metavar="NAME")
    parser.add_argument("--model", metavar="NAME")
    if listing:
        parser.add_argument("--tag", metavar="TAG")
        parser.add_argument("--q", metavar="TEXT", help="text in the prompt")
        parser.add_argument("--limit", metavar="N", default="50")
        parser.add_argument("--cursor", metavar="ID", help="next_cursor of the page before")
        return
    parser.add_argument("--id", dest="ids", action="append", metavar="ID", help="may be given again")
    parser.add_argument("--tag", dest="tags", action="append", metavar="TAG", help="may be given again")
    parser.add_argument("--older-than", metavar="WHEN", help="30d, 2026-11-01")
    parser.add_argument("--writer", metavar="ID", help="the request, or the tenant, that caused them")
    parser.add_argument("--everything", action="store_true")
    parser.add_argument("--yes", action="store_true", help="do it")


def _serve(settings: config.Settings, _chosen: argparse.Namespace) -> int:
    from proxy.doorstep import open_doorstep

    door = open_doorstep(settings)
    from proxy.commands import serve  # seconds: behind the open ports

    serve.serve(settings, door)
    return FINE


def _migrate(settings: config.Settings, _chosen: argparse.Namespace) -> int:
    from proxy.store.store import migrate_store

    done = asyncio.run(migrate_store(settings.store.database_url or None, settings.data_dir))
    if done.before == done.after:
        print(f"the schema is current: {done.after}")
    else:
        print(f"schema {done.before or 'empty'} → {done.after}")
    if done.backup:
        print(f"the older database is kept as {done.backup}")
    return FINE


def _check(settings: config.Settings, chosen: argparse.Namespace) -> int:
    from proxy.commands import checks

    found = checks.inspect(settings)
    if chosen.json:
        sys.stdout.write(printing.as_json([finding._asdict() for finding in found]))
    else:
        for finding in found:
            print(f"{finding.state:<5} {finding.part:<15} {printing.printable(finding.note)}")
    failed = [finding for finding in found if finding.state == "fail"]
    if failed:
        print(f"ibid: {printing.printable(failed[0].part)}: {printing.printable(failed[0].note)}", file=sys.stderr)
    return ACT if failed else FINE


def _rebuild_index(settings: config.Settings, _chosen: argparse.Namespace) -> int:
    from proxy.commands.rebuild import rebuild

    began_s = time.monotonic()
    count = asyncio.run(rebuild(settings))
    print(f"{count:,} vectors indexed in {time.monotonic() - began_s:.1f} s")
    return FINE


def _stats(settings: config.Settings, chosen: argparse.Namespace) -> int:
    stats = ask(settings, "GET", "/cache/stats")
    if chosen.json:
        sys.stdout.write(printing.as_json(stats))
    else:
        sys.stdout.write(printing.as_table(("what", "value"), printing.flat(stats)))
    return FINE


def _entries(settings: config.Settings, chosen: argparse.Namespace) -> int:
    names = ("namespace", "model", "tag", "q", "limit", "cursor")
    wanted = {name: value for name in names if (value := getattr(chosen, name)) is not None}
    page = ask(settings, "GET", f"/cache/entries?{urllib.parse.urlencode(wanted)}")
    if chosen.json:
        sys.stdout.write(printing.as_json(page))
        return FINE
    rows = [
        [
            _moment(entry.get(f"{name}_ms")) if name in ("created", "expires") else entry.get(name)
            for name in ENTRY_COLUMNS
        ]
        for entry in page["entries"]
    ]
    sys.stdout.write(printing.as_table(ENTRY_COLUMNS, rows))
    if page.get("next_cursor") is not None:
        print(f"more: --cursor {page['next_cursor']}")
    return FINE


def _moment(ms: int | None) -> str | None:
    return None if ms is None else datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _explain(settings: config.Settings, chosen: argparse.Namespace) -> int:
    try:
        with contextlib.ExitStack() as stack:
            file = sys.stdin.buffer if chosen.file == "-" else stack.enter_context(open(chosen.file, "rb"))
            body = file.read()
    except OSError as error:
        raise ConfigError(f"{chosen.file}: {error.strerror}") from error
    wanted = {name: value for name in ("tenant", "path") if (value := getattr(chosen, name))}
    path = "/cache/explain" + (f"?{urllib.parse.urlencode(wanted)}" if wanted else "")
    explained = ask(settings, "POST", path, body)
    if chosen.json:
        sys.stdout.write(printing.as_json(explained))
    else:
        sys.stdout.write(printing.as_table(("what", "value"), printing.flat(explained)))
    return FINE


def _purge(settings: config.Settings, chosen: argparse.Namespace) -> int:
    names = ("ids", "tags", "namespace", "model", "older_than", "writer")
    wanted = {name: value for name in names if (value := getattr(chosen, name)) is not None}
    if chosen.everything:
        if wanted or not chosen.yes:
            raise ConfigError("--everything goes with --yes and nothing else")
        done = ask(settings, "POST", "/cache/flush", orjson.dumps({"confirm": "flush"}))
    else:
        done = ask(settings, "POST", "/cache/invalidate", orjson.dumps({**wanted, "dry_run": not chosen.yes}))
    if chosen.json:
        sys.stdout.write(printing.as_json(done))
    elif done["dry_run"]:
        print(f"{done['count']:,} entries would be purged{_some(done['ids'])}; --yes does it")
    else:
        print(f"{done['count']:,} entries purged{_some(done['ids'])}")
    return FINE


def _keys(settings: config.Settings, chosen: argparse.Namespace) -> int:
    from proxy.commands import keys as keycommands

    def ask_running(method: str, path: str, body: bytes | None) -> dict[str, Any] | None:
        try:
            return ask(settings, method, path, body)
        except Unanswered:
            return None

    keycommands.run(settings, chosen, ask_running)
    return FINE


def _some(ids: Sequence[int]) -> str:
    return f" ({', '.join(map(str, ids[:10]))}{', …' if len(ids) > 10 else ''})" if ids else ""


def _savings(settings: config.Settings, chosen: argparse.Namespace) -> int:
    now_ms = int(time.time() * 1000)
    if chosen.name == "reconcile":
        return _reconcile(settings, chosen, now_ms)
    if chosen.file or chosen.billed_by:
        raise ConfigError("INVOICE and --upstream go with `ibid savings reconcile`")
    since = _day("since", chosen.since or "30d", now_ms)
    until = _day("until", chosen.until, now_ms) if chosen.until else "9999"
    described = _described(chosen.name.lower()) if chosen.name else None
    if described is not None:
        sys.stdout.write(printing.described(chosen.format, described))
        return FINE
    return _show(settings, chosen, chosen.name, None, since, until)


def _reconcile(settings: config.Settings, chosen: argparse.Namespace, now_ms: int) -> int:
    """An export against the ledger. Exit code 2 unless every line is equal: somebody must ask why."""
    from proxy.core import invoice, reconcile

    if not chosen.file:
        raise ConfigError("name the file: ibid savings reconcile INVOICE.csv")
    since, until = (
        _day(name, when, now_ms) if (when := getattr(chosen, name)) else None for name in ("since", "until")
    )
    try:
        with open(chosen.file, encoding="utf-8-sig", newline="") as file:
            told = invoice.read(file, chosen.file).within(since, until)
    except OSError as error:
        raise ConfigError(f"{chosen.file}: {error.strerror}") from error
    days = [key.day for key in told.lines] or [since or until or "1970-01-01"]
    if chosen.billed_by and chosen.billed_by not in settings.upstreams:
        raise ConfigError(f"--upstream: no upstream named {chosen.billed_by} is configured")
    upstreams: Sequence[str] | None = (chosen.billed_by,) if chosen.billed_by else None
    if upstreams is None and told.shape.provider is not None:
        served = settings.upstreams.items()
        upstreams = [name for name, one in served if (one.prices_as or name) == told.shape.provider]

    async def read(queries: Queries) -> Sequence[reconcile.Billed]:
        return await queries.billed(since or min(days), until or max(days), upstreams, told.shape.operations)

    found = reconcile.reconcile(told, _with_queries(settings, read))
    columns, rows = found.brief() if chosen.format == "table" else (found.columns, found.rows())
    sys.stdout.write(printing.render(chosen.format, columns, rows))
    if unequal := found.unequal():
        what = ", ".join(f"{count} {status}" for status, count in sorted(unequal.items()))
        print(f"ibid: {sum(unequal.values())} of {len(found.lines)} lines are not equal: {what}", file=sys.stderr)
    return ACT if unequal else FINE


def _described(name: str) -> list[tuple[str, str, Mapping[str, str]]] | None:
    """Name, question and columns of the named queries ("list") or of the views ("views"); None for another name."""
    from proxy.store.named_queries import NAMED
    from proxy.store.views import DESCRIBED

    if name == "list":
        return [(query.name, query.title, query.columns) for query in NAMED.values()]
    if name == "views":
        return [(view_name, view.title, view.columns) for view_name, view in DESCRIBED.items()]
    return None


def _evaluate(settings: config.Settings, chosen: argparse.Namespace) -> int:
    from proxy.commands import evaluate, plot
    from proxy.commands.labelled import read_readings

    wanted = settings.embedding
    if not settings.data_dir.parent.is_dir():
        raise ConfigError(f"data directory {settings.data_dir}: the folder {settings.data_dir.parent} does not exist")
    budgets = chosen.max_error or evaluate.BUDGETS
    if not all(0.0 < budget < 1.0 for budget in budgets):
        raise ConfigError("--max-error takes shares between 0 and 1")
    readings = read_readings(Path(chosen.readings)) if chosen.readings else None
    texts = asyncio.run(evaluate.open_texts(settings.data_dir, wanted.model, wanted.backend, os.cpu_count() or 1))
    results = []
    for file in chosen.files:
        found = evaluate.evaluate(
            Path(file), texts, settings.rules, budgets=budgets, labels=chosen.labels, shuffles=chosen.shuffles,
            readings=readings,
        )  # fmt: skip
        results.append(found)
        if not chosen.json:
            print(evaluate.report(found), flush=True)
    if chosen.json:
        sys.stdout.write(printing.as_json(results))
    if chosen.plot:
        try:
            Path(chosen.plot).write_text(plot.svg(results), "utf-8")
        except OSError as error:
            raise ConfigError(f"{chosen.plot}: {error.strerror}") from error
    return FINE


def _simulate(settings: config.Settings, chosen: argparse.Namespace) -> int:
    from proxy.commands import simulate

    budgets = chosen.max_error or [settings.rules.max_error_rate]
    if not all(0.0 < budget < 1.0 for budget in budgets):
        raise ConfigError("--max-error takes shares between 0 and 1")
    found = asyncio.run(
        simulate.simulate(
            settings,
            max_errors=budgets,
            model=chosen.model,
            without=chosen.without,
            namespace=chosen.namespace,
            limit=chosen.limit,
        )
    )
    if chosen.json:
        sys.stdout.write(printing.as_json(found))
        return FINE
    print(
        f"{found['questions']:,} stored questions with {found['model']}; of {found['requests']:,} requests so far "
        f"{found['exact_hits']:,} were exact and {found['semantic_hits']:,} semantic hits"
    )
    sys.stdout.write(printing.as_table(*simulate.table(found)))
    return FINE


def _sql(settings: config.Settings, chosen: argparse.Namespace) -> int:
    return _show(settings, chosen, None, chosen.statement)


def _day(name: str, text: str, now_ms: int) -> str:
    return datetime.fromtimestamp(read_time(name, text, now_ms) / 1000, UTC).date().isoformat()


def _show(
    settings: config.Settings,
    chosen: argparse.Namespace,
    name: str | None,
    sql: str | None,
    since: str = "",
    until: str = "9999",
) -> int:
    async def read(queries: Queries) -> Result:
        if sql is not None:
            return await queries.run_readonly(sql, row_limit=chosen.limit)
        if name is not None:
            return await queries.named(name, since_day=since, until_day=until, row_limit=chosen.limit)
        groups = tuple(part.strip() for part in chosen.group_by.split(","))
        return await queries.savings(groups, since_day=since, until_day=until, row_limit=chosen.limit)

    result = _with_queries(settings, read)
    sys.stdout.write(printing.render(chosen.format, result.columns, result.rows))
    if result.truncated:
        print("ibid: more rows exist; raise --limit", file=sys.stderr)
    return FINE


def _with_queries(settings: config.Settings, read: Callable[[Queries], Awaitable[Found]]) -> Found:
    """What `read` finds in the database, opened to be read only."""
    from proxy.money.prices import configured
    from proxy.store.queries import Queries
    from proxy.store.reading import open_reading

    async def run() -> Found:
        database = open_reading(settings.store.database_url or None, settings.data_dir)
        try:
            return await read(Queries(database, configured(settings).rates))
        finally:
            await database.close()

    return asyncio.run(run())


def ask(settings: config.Settings, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
    """What the running ibid's admin listener answers. Raises ConfigError when it cannot be reached or refuses."""
    from proxy.admin.auth import find_token

    server = settings.server
    token, _ = find_token(server.admin_token, settings.data_dir)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.admin.host, server.admin.host)
    headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
    if body is not None:
        headers["Content-Type"] = "application/json"
    connection = http.client.HTTPConnection(host, server.admin.port, timeout=ADMIN_TIMEOUT_S)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        answer = orjson.loads(response.read())
    except (OSError, http.client.HTTPException, orjson.JSONDecodeError) as error:
        raise Unanswered(f"no ibid answers on {server.admin}: start it with `ibid serve` ({error})") from error
    finally:
        connection.close()
    if response.status >= 400:
        raise ConfigError(f"ibid on {server.admin} refused: {answer['error']['message']} ({answer['error']['code']})")
    return dict(answer)
