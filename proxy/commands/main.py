"""The command `ibid`. Exit codes: 0 fine, 2 the operator must act, 75 it may heal by itself: try again later (one line
on standard error says what), 1 a bug.

`serve` runs the program. `savings`, `report` and `sql` read the database directly, whether a server runs or not;
`stats`, `entries`, `explain` and `purge` ask a running one over its admin listener; `keys` does either.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from proxy.admin.routes import GROUPS
from proxy.commands import printing
from proxy.commands.codes import ACT, FINE, INTERRUPTED, TRY_AGAIN
from proxy.core.errors import BadRequest, CacheFault, ConfigError, NotYet
from proxy.settings import config

ADOPTED = ("litellm", "portkey", "helicone", "gptcache", "cachellm", "bifrost")
"""Gateways whose configuration is read."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    chosen = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.ERROR, format="ibid: %(message)s")  # `serve` sets up its own
    try:
        flags = {name: getattr(chosen, name, None) for name in config.Flags.__slots__}
        needs_none = chosen.run in (_docs, _adopt)  # the manual is read while a setting is wrong, too
        around = {"HOME": "/"} if needs_none else os.environ
        settings = config.load(config.Flags(**flags), around)
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(ACT, f"ibid: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    places = _places()
    machine = _Parser(add_help=False)
    machine.add_argument("--json", action="store_true", help="JSON for machines")
    table = _Parser(add_help=False)
    table.add_argument("--format", choices=("table", "csv", "json"), default="table", help="how (table)")
    table.add_argument("--json", dest="format", action="store_const", const="json", help="the same as --format json")
    table.add_argument("--limit", type=int, default=1000, metavar="N", help="rows at most (1000)")

    parser = _Parser(prog="ibid", description="A semantic caching proxy for LLM APIs.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Any, about: str, *parents: _Parser) -> argparse.ArgumentParser:
        made = commands.add_parser(name, parents=[places, *parents], help=about, description=about)
        made.set_defaults(run=run)
        return made

    _add_serve(command("serve", _serve, "run the proxy"))
    command("migrate", _migrate, "bring the database to this program's schema")
    command("check", _check, "say what would keep `serve` from starting", machine).add_argument(
        "--listen", metavar="HOST:PORT", help="client listener (IBID_LISTEN)"
    )
    command("rebuild-index", _rebuild_index, "build the index from SQL and save it; no server may be running")
    command("stats", _stats, "what a running ibid holds and has done", machine)
    _add_selection(command("entries", _entries, "list stored answers", machine), listing=True)
    _add_explain(
        command(
            "explain",
            _explain,
            "how a request would be answered, or why one was as it was",
            machine,
        )
    )
    _add_selection(command("purge", _purge, "remove stored answers; says which unless --yes", machine), listing=False)
    _add_export(command("export", _export, "stored answers as lines of JSON, from a running ibid"))
    _add_import(command("import", _import, "store the lines of an export in a running ibid", machine))
    _add_savings(command("savings", _savings, "what was saved: a summary, or a named query", table))
    _add_adopt(
        commands.add_parser(
            "adopt",
            help="another gateway's configuration as one of ibid's",
            description="Write an ibid configuration from another gateway's, and say what became of each setting.",
        )
    )
    _add_report(command("report", _report, "what shadow, or serving, showed: hits, money, wrong ones, and advice"))
    _add_evaluate(
        command("evaluate", _evaluate, "hits and wrong hits of the shipped matching on labelled questions", machine)
    )
    _add_simulate(command("simulate", _simulate, "stored questions once more, under other rules", machine))
    _add_keys(command("keys", _keys, "virtual keys: make, list, show, revoke, rotate"), machine)
    command("sql", _sql, "any read-only query of the ledger", table).add_argument(
        "statement", metavar="SELECT", help="one statement, in quotes"
    )
    docs = commands.add_parser("docs", help="read the manual", description="Print a page of the manual, or their list.")
    docs.add_argument("page", nargs="?", metavar="PAGE", help="quickstart, troubleshooting, …; without it, the list")
    docs.set_defaults(run=_docs)
    return parser


def _places(default: str | None = None) -> _Parser:
    """Where the configuration, the files and the listeners are."""
    places = _Parser(add_help=False, argument_default=default)
    places.add_argument("--config", metavar="FILE", help="TOML configuration (IBID_CONFIG)")
    places.add_argument("--data-dir", metavar="DIR", help="where ibid keeps its files (IBID_DATA_DIR)")
    places.add_argument("--database", metavar="URL", help="sqlite:///FILE or postgresql://… (IBID_DATABASE_URL)")
    places.add_argument("--admin", metavar="HOST:PORT", help="admin listener (IBID_ADMIN)")
    return places


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--listen", metavar="HOST:PORT", help="client listener (IBID_LISTEN)")
    parser.add_argument("--upstream", metavar="URL", help="one address for every dialect (IBID_UPSTREAM)")
    parser.add_argument("--workers", type=int, metavar="N", help="event loops sharing the port")
    parser.add_argument(
        "--shadow", action="store_true", default=None, help="look up and tell, but serve nothing; then `ibid report`"
    )


def _add_explain(parser: argparse.ArgumentParser) -> None:
    asked = "JSON of a request, a file or standard input; or the x-request-id of one that was answered"
    parser.add_argument("file", nargs="?", default="-", metavar="REQUEST", help=asked)
    parser.add_argument("--path", metavar="PATH", help="where it would be sent (/v1/chat/completions)")
    parser.add_argument("--tenant", metavar="HEX", help="look as this tenant")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", default="-", metavar="FILE", help="where to (standard output)")
    parser.add_argument("--after", metavar="ID", help="go on after this entry; a file is added to")
    parser.add_argument("--namespace", metavar="NAME", help="of this namespace")


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="an export; - for standard input")
    parser.add_argument("--dry-run", action="store_true", help="only say what would become of the lines")
    parser.add_argument("--purged", action="store_true", help="store again what a purge removed since")


def _add_savings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="named query; `list` and `views` show them, `reconcile` compares")
    parser.add_argument("file", nargs="?", metavar="INVOICE", help="reconcile: CSV of a provider's usage or costs")
    parser.add_argument(
        "--upstream", dest="billed_by", metavar="NAME", help="reconcile: whose calls (those of the file's provider)"
    )
    parser.add_argument("--since", metavar="WHEN", help="30d, 2026-11-01 (30d; reconcile: the file's days)")
    parser.add_argument("--until", metavar="WHEN", help="up to this day, itself included")
    parser.add_argument("--group-by", default="day", metavar="COLUMNS", help=f"of {','.join(GROUPS)} (day)")


def _add_adopt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("peer", choices=ADOPTED, metavar="PEER", help=", ".join(ADOPTED))
    parser.add_argument("file", metavar="FILE", help="its configuration, or headers of a client; - for standard input")
    parser.add_argument("--output", metavar="FILE", help="where to write it (standard output)")
    parser.add_argument("--force", action="store_true", help="overwrite that file if it exists")
    parser.set_defaults(run=_adopt)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--since", default="1d", metavar="WHEN", help="12h, 7d, 2026-11-01 (1d)")
    parser.add_argument("--format", choices=("text", "json", "html"), default="text", help="how (text)")
    parser.add_argument("--json", dest="format", action="store_const", const="json", help="the same as --format json")
    parser.add_argument("--text", action="store_true", help="show the repeated questions themselves")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSON lines, plain or .gz: streams or pairs")
    parser.add_argument("--max-error", type=float, action="append", metavar="SHARE", help="budgets (.005 .01 .02 .05)")
    parser.add_argument("--shuffles", type=int, default=0, metavar="K", help="K random orders instead of the file's")
    parser.add_argument(
        "--labels",
        choices=("perfect", "answers", "none"),
        default="perfect",
        help="what the judge is told: the truth, what comparing answers finds, nothing",
    )
    parser.add_argument("--readings", metavar="FILE", help="pairs that a person read: a, b, same")
    parser.add_argument("--plot", metavar="SVG", help="draw hit rate against error")  # fmt: skip


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-error", type=float, action="append", metavar="SHARE", help="a budget; again for more")
    parser.add_argument("--model", metavar="NAME", help="another embedding model")
    parser.add_argument("--without", action="append", default=[], metavar="GUARD", help="leave a guard out")
    parser.add_argument("--namespace", metavar="NAME", help="questions of this namespace")
    parser.add_argument("--limit", type=int, default=20_000, metavar="N", help="newest questions at most (20000)")


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
        action(name, about).add_argument("id", metavar="ID", help="of the key, as `list` shows it")


def _add_selection(parser: argparse.ArgumentParser, *, listing: bool) -> None:
    parser.add_argument("--namespace", metavar="NAME", help="of this namespace")
    parser.add_argument("--model", metavar="NAME", help="of this model")
    if listing:
        parser.add_argument("--tag", metavar="TAG", help="with this tag")
        parser.add_argument("--q", metavar="TEXT", help="text in the prompt")
        parser.add_argument("--limit", metavar="N", default="50", help="entries at most (50)")
        parser.add_argument("--cursor", metavar="ID", help="next_cursor of the page before")
        return
    parser.add_argument("--id", dest="ids", action="append", metavar="ID", help="may be given again")
    parser.add_argument("--tag", dest="tags", action="append", metavar="TAG", help="may be given again")
    parser.add_argument("--older-than", metavar="WHEN", help="30d, 2026-11-01")
    parser.add_argument("--writer", metavar="ID", help="the request, or the tenant, that caused them")
    parser.add_argument("--similar-to", metavar="TEXT", help="whose question means about this")
    parser.add_argument("--above", type=float, metavar="SHARE", help="how similar at least (.9)")
    parser.add_argument("--everything", action="store_true", help="all of them; with --yes alone")
    parser.add_argument("--yes", action="store_true", help="do it")


# --- each command; what it needs is imported when it is run ---------------------------------------------------------


def _docs(_settings: config.Settings, chosen: argparse.Namespace) -> int:
    from proxy.commands import docs

    sys.stdout.write(docs.page(chosen.page))
    return FINE


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

    return checks.run(settings, chosen)


def _rebuild_index(settings: config.Settings, chosen: argparse.Namespace) -> int:
    from proxy.commands import rebuild

    return rebuild.run(settings, chosen)


def _stats(settings: config.Settings, chosen: argparse.Namespace) -> int:
    from proxy.commands import running

    return running.stats(settings, chosen)


def _entries(settings: config.Settings, chosen: argparse.Namespace) -> int:
    from proxy.commands import running

    return running.entries(settings, chosen)


def _explain(settings: config.Settings, chosen: argparse.Namespace) -> int:
    from proxy.commands import running

    return running.explain(settings, chosen)


def _export(settings: config.Settings, chosen: argparse.Namespace) -> int:
    from proxy.commands import transfer

    return transfer.export(settings, chosen)


def _import(settings: config.Settings, chosen: argparse.Namespace) -> int:
    from proxy.commands import transfer

    return transfer.take_in(settings, chosen)


def _purge(settings: config.Settings, chosen: argparse.Namespace) -> int:
    from proxy.commands import running

    return running.purge(settings, chosen)


def _savings(settings: config.Settings, chosen: argparse.Namespace) -> int:
    from proxy.commands import savings

    return savings.savings(settings, chosen)


def _sql(settings: config.Settings, chosen: argparse.Namespace) -> int:
    from proxy.commands import savings

    return savings.sql(settings, chosen)


def _adopt(_settings: config.Settings, chosen: argparse.Namespace) -> int:
    from proxy.commands.adopt import command

    return command.run(chosen.peer, chosen.file, chosen.output, force=chosen.force)


def _report(settings: config.Settings, chosen: argparse.Namespace) -> int:
    from proxy.commands import report

    return report.run(settings, chosen.since, chosen.format, with_text=chosen.text)


def _evaluate(settings: config.Settings, chosen: argparse.Namespace) -> int:
    from proxy.commands import evaluate

    return evaluate.run(settings, chosen)


def _simulate(settings: config.Settings, chosen: argparse.Namespace) -> int:
    from proxy.commands import simulate

    return simulate.run(settings, chosen)


def _keys(settings: config.Settings, chosen: argparse.Namespace) -> int:
    from proxy.commands import keys

    return keys.run(settings, chosen)
