"""`make docs`: writes into the pages of deploy/docs what the code knows, between the marks that a page has for it.

    python -m deploy.pages

A page says `<!-- made: NAME -->` … `<!-- end: NAME -->`; NAME is one of `BLOCKS`. A test fails while a page is stale.
"""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from proxy.admin.routes import ROUTES, Route
from proxy.commands import main as cli
from proxy.core import reasons
from proxy.core.headers import ASKED, MEANT, PEERS, TOLD
from proxy.settings.lanes import LANES
from proxy.settings.sections import SECTIONS, Option, options
from proxy.store.named_queries import NAMED
from proxy.store.schema import metadata
from proxy.store.tables import TABLES
from proxy.store.views import DESCRIBED
from proxy.watch.health import REMEDIES
from proxy.watch.logs import Redactor
from proxy.watch.telemetry import Telemetry

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "deploy" / "docs"
_MARKS = re.compile(r"(<!-- made: ([a-z-]+) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = list(head)
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


# -- settings ----------------------------------------------------------------------------------------------------------

ABOUT = {
    "": "Where everything is kept",
    "cache": "What is stored and served",
    "limits": "Limits of the client listener",
    "lane.stale": "How long an expired answer may still be served",
    "lane.cascade": "When the local model's answer counts as proven: JSON was asked for, or one of these",
    "lane.route": "A cheaper model, chosen by how it did on the most similar questions",
    "upstream": "Model servers, a table each",
    "prices.override": 'Your own prices, by "upstream/model" or "upstream/*"',
    "admin.token": "More tokens of the admin listener, for those who may do less",
    "alias": "What `model@NAME` does to the plan",
    "policy": "Which requests take which lanes; the first that matches holds",
}
"""What the docstring of a section's class does not say to an operator."""


def settings() -> str:
    by_section: dict[str, list[Option]] = {}
    for option in options():
        by_section.setdefault(option.section, []).append(option)
    return "\n".join(f"### {_heading(section)}\n\n{_settings(found)}" for section, found in by_section.items())


def _heading(section: str) -> str:
    name = section.removesuffix(".NAME")
    if name in ABOUT:
        about = ABOUT[name]
    else:
        kinds = {**SECTIONS, **{f"lane.{one}": (kind,) for one, kind in LANES.items()}}[name]
        about = (kinds[0].__doc__ or "").split(". ")[0].partition("\n")[0].rstrip(".")
    return about if not section else f"`{'[[policy]]' if section == 'policy' else f'[{section}]'}`: {about}"


def _settings(found: Iterable[Option]) -> str:
    rows = ((f"`{_name(option)}`", f"`{_value(option)}`", option.why) for option in found)
    return table(("setting", "default", "what it does, and why"), rows)


def _name(option: Option) -> str:
    return f"{option.section}.{option.name}" if option.section else option.name


def _value(option: Option) -> str:
    value = option.default
    if value is None or value == "":
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    return "[]" if value == () else str(value)


# -- what is told of a request -----------------------------------------------------------------------------------------


def reason_tables() -> str:
    parts = []
    for group in reasons.GROUPS:
        rows = ((f"`{name}`", means) for name, means in group.reasons.items())
        parts.append(f"### {group.title}\n\n{group.about}\n\n{table(('reason', 'means'), rows)}")
    return "\n".join(parts)


def asked() -> str:
    rows = ((f"`{one.header}`", f"`{one.twin}`" if one.twin else "", one.does) for one in ASKED)
    return table(("request header", "in the body's `cache`", "does"), rows)


def told() -> str:
    return table(("response header", "says"), ((f"`{name}`", says) for name, says in TOLD.items()))


def peers() -> str:
    return table(("header", "is read as"), ((f"`{name}`", MEANT[meaning]) for name, meaning in PEERS.items()))


# -- commands and routes -----------------------------------------------------------------------------------------------

SHARED = ("--config", "--data-dir", "--database", "--admin")
"""Flags that every command takes, told of once."""


def parsers() -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """Words, summary and parser of every command; of one with actions, of each of those."""
    for name, about, parser in _choices(cli._parser()):
        inner = list(_choices(parser))
        yield from ((f"{name} {word}", help, one) for word, help, one in inner) if inner else ((name, about, parser),)


def _choices(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {one.dest: one.help or "" for one in action._choices_actions}
            yield from ((name, helps[name], one) for name, one in action.choices.items())


def commands() -> str:
    parts = [table(("command", "does"), ((f"`ibid {words}`", about) for words, about, _ in parsers()))]
    for words, _, parser in parsers():
        rows = [_flag(action) for action in parser._actions if not _is_shared(action)]
        if rows:
            parts.append(f"### `ibid {words}`\n\n{table(('argument', 'is'), rows)}")
    return "\n".join(parts)


def _is_shared(action: argparse.Action) -> bool:
    return any(one in (*SHARED, "--help") for one in action.option_strings)


def _flag(action: argparse.Action) -> tuple[str, str]:
    name = action.option_strings[-1] if action.option_strings else ""
    value = action.metavar or ("|".join(action.choices) if action.choices else "" if name else action.dest)
    said = " ".join(part for part in (name, "" if action.nargs == 0 else str(value)) if part)
    return f"`{said}`", (action.help or "").replace("%%", "%")


def routes() -> str:
    rows = ((f"`{route.method} {route.path}`", route.about, _takes(route), _may(route)) for route in ROUTES)
    return table(("route", "does", "takes (bold: required)", "least role"), rows)


def _may(route: Route) -> str:
    return "anybody" if route.is_open else f"{route.needs}{', written down' if route.is_act else ''}"


def _takes(route: Route) -> str:
    params = [*route.query, *(route.body or ())]
    named = ", ".join(f"**`{one.name}`**" if one.required else f"`{one.name}`" for one in params)
    return named if route.body is not None else f"a JSON body; {named}" if named else "a JSON body"


# -- metrics and health ------------------------------------------------------------------------------------------------


def gauges() -> dict[str, tuple[str, set[str]]]:
    """Text and labels of each gauge, read from the calls that make them."""
    found: dict[str, tuple[str, set[str]]] = {}
    for node in ast.walk(ast.parse((ROOT / "proxy/upkeep/gauges.py").read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "gauge":
            name, text = (ast.literal_eval(argument) for argument in node.args[:2])
            labels = {keyword.arg for keyword in node.keywords if keyword.arg}
            found.setdefault(name, (text, labels))[1].update(labels)
    return found


class _NoLog:
    """A log for a list of metrics: it has the one number that is read."""

    dropped = 0

    class form:
        redactor = Redactor()

        @staticmethod
        def key(name: str) -> str:
            return name


def metrics() -> str:
    families = list(Telemetry(_NoLog()).collect())  # type: ignore[arg-type]
    rows = [
        (
            f"`{one.name}{'_total' if one.type == 'counter' else ''}`",
            one.type,
            _labels(one._labelnames),
            one.documentation,
        )
        for one in families
    ]
    rows += [(f"`{name}`", "gauge", _labels(labels), text) for name, (text, labels) in gauges().items()]
    return table(("metric", "type", "labels", "counts or measures"), sorted(rows))


def _labels(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def remedies() -> str:
    return table(("reason", "what to do"), ((f"`{word}`", text) for word, text in REMEDIES.items()))


# -- SQL ---------------------------------------------------------------------------------------------------------------


def tables() -> str:
    described = {name: one for name, one in TABLES.items() if one.columns}
    parts = [table(("table", "holds"), ((f"`{name}`", one.about) for name, one in TABLES.items()))]
    for name, one in described.items():
        types = {column.name: column.type.compile() for column in metadata.tables[name].columns}
        rows = ((f"`{column}`", types[column].lower(), what) for column, what in one.columns.items())
        parts.append(f"### Table `{name}`\n\n{table(('column', 'type', 'is'), rows)}")
    return "\n".join(parts)


def views() -> str:
    return table(
        ("view", "question", "columns"),
        ((f"`{name}`", view.title, _columns(view.columns)) for name, view in DESCRIBED.items()),
    )


def queries() -> str:
    return table(
        ("`ibid savings …`", "question", "columns"),
        ((f"`{name}`", query.title, _columns(query.columns)) for name, query in NAMED.items()),
    )


def _columns(columns: Mapping[str, str]) -> str:
    return ", ".join(f"`{name}`" for name in columns)


BLOCKS: Mapping[str, Callable[[], str]] = {
    "settings": settings,
    "reasons": reason_tables,
    "asked": asked,
    "told": told,
    "peers": peers,
    "commands": commands,
    "routes": routes,
    "metrics": metrics,
    "remedies": remedies,
    "tables": tables,
    "views": views,
    "queries": queries,
}


def fresh(text: str) -> str:
    """A page with its made parts as the code has them now. Raises KeyError for a mark that is no block."""
    return _MARKS.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}{found[3]}", text)


def main() -> int:
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text()
        if (made := fresh(text)) != text:
            path.write_text(made)
            print(f"written: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
