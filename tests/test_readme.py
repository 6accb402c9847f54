"""The README is held to the code: commands, reasons, guards, settings, metrics, headers, routes, tables, links."""

from __future__ import annotations

import argparse
import ast
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from index.tokens import GUARDS
from proxy.admin.routes import ROUTES
from proxy.commands import main as cli
from proxy.core.directives import MODES
from proxy.meaning import LOADING
from proxy.settings.sections import options
from proxy.store.named_queries import NAMED
from proxy.store.schema import VIEWS, metadata
from proxy.watch.telemetry import Telemetry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
WORD = re.compile(r"[a-z][a-z0-9_]*")
ROOMS = sorted(path for path in (ROOT / "proxy").rglob("*.py") if not {"core", "store"} & set(path.parts))
POLICY = ROOT / "proxy/core/policy.py"
DIALECTS = ROOT / "proxy/core/dialects"
RECORDS = (
    DIALECTS / "openai_record.py",
    DIALECTS / "anthropic_record.py",
    DIALECTS / "gemini_answer.py",
    DIALECTS / "ollama_answer.py",
    DIALECTS / "completions_answer.py",
    DIALECTS / "responses_record.py",
)
REASONED = {"unstored", "Miss", "Bypass", "_refuse"}


def table(heading: str) -> str:
    """The rows of the first table whose first line begins with `heading`."""
    start = README.index(heading)
    return README[start : README.index("\n\n", start)]


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", text))


def words(nodes: Iterable[ast.AST | None]) -> set[str]:
    """The constants among some expressions, either branch of `a if b else c` included, that can be a reason."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.IfExp):
            found |= words([node.body, node.orelse])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and WORD.fullmatch(node.value):
            found.add(node.value)
    return found


def nodes_of(*paths: Path) -> Iterator[ast.AST]:
    for path in paths:
        yield from ast.walk(ast.parse(path.read_text()))


def reasons_in_code() -> set[str]:
    """Every word the program says as a reason, read from its syntax tree."""
    found: set[str] = set()
    for node in nodes_of(POLICY, *RECORDS):
        if isinstance(node, ast.Yield | ast.Return):
            found |= words([node.value])
        elif isinstance(node, ast.Assign) and words(node.targets) == set() and isinstance(node.value, ast.Dict):
            if any(isinstance(name, ast.Name) and name.id == "_FINISHES" for name in node.targets):
                found |= words(node.value.values)
        elif isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "known" for t in node.targets):
            found |= words([node.value])
    for node in nodes_of(POLICY, *RECORDS, *ROOMS):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in REASONED:
                found |= words(node.args)
    for node in nodes_of(ROOT / "proxy/judging/judge.py"):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "reason" for t in node.targets):
            found |= words([node.value])
    for node in nodes_of(ROOT / "proxy/judging/judge.py"):
        if isinstance(node, ast.FunctionDef) and node.name == "objection":
            found |= words(part.value for part in ast.walk(node) if isinstance(part, ast.Return))
    for node in nodes_of(ROOT / "proxy/judging/audits.py"):
        if isinstance(node, ast.FunctionDef) and node.name == "hold":
            found |= words(part.value for part in ast.walk(node) if isinstance(part, ast.Return))
    for node in nodes_of(
        *[ROOT / f"proxy/{name}.py" for name in ("request/lookup", "request/landing", "admin/explain")]
    ):
        if isinstance(node, ast.AsyncFunctionDef | ast.FunctionDef) and node.name in ("_pass_gate", "_why_unstored"):
            found |= words(part.value for part in ast.walk(node) if isinstance(part, ast.Return))
    for node in nodes_of(ROOT / "proxy/core/words.py"):
        if isinstance(node, ast.FunctionDef) and node.name == "odd_characters":
            found |= words(part.value for part in ast.walk(node) if isinstance(part, ast.Return))
    for node in nodes_of(*sorted((ROOT / "index").glob("*.py"))):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "reason" for t in node.targets):
            found |= words([node.value])
    for node in nodes_of(*sorted((ROOT / "proxy/store").glob("*.py"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "CacheFault":
            found |= words(keyword.value for keyword in node.keywords if keyword.arg == "code")
    return found | {LOADING} | set(GUARDS)


def commands() -> dict[str, argparse.ArgumentParser]:
    for action in cli._parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    pytest.fail("the parser has no commands")


def test_the_reasons_are_found_in_the_code() -> None:
    """Guards the next test: a reading that finds nothing would hold the README to nothing."""
    some = {"no_store", "time_words", "below_bound", "nothing_alike", "collapsed", "finish_length", "data_after_done"}
    some |= {"set_cookie", "invisible", "embedder_busy", "index_down", "store_full", "pass_through", "finish_other"}
    assert some <= reasons_in_code()


def test_the_reasons_table_has_every_reason_and_no_other() -> None:
    rows = table("| verdict | reason | means |").splitlines()[2:]
    told = [reason for row in rows for reason in re.findall(r"`([^`]+)`", row.split("|")[2])]
    assert len(told) == len(set(told))
    assert set(told) - {"hit", "stale", "timeout"} == reasons_in_code()


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_is_in_the_readme(name: str) -> None:
    assert f"`ibid {name}" in table("| command | does |")


@pytest.mark.parametrize("name", ["serve", "purge", "entries"])
def test_every_flag_of_these_commands_is_in_the_readme(name: str) -> None:
    said = {flag for action in commands()[name]._actions for flag in action.option_strings if flag.startswith("--")}
    shared = {"--help", "--json", "--config", "--data-dir", "--database", "--admin", "--limit", "--cursor"}
    row = next(row for row in table("| command | does |").splitlines() if f"`ibid {name}`" in row)
    assert {flag for flag in said - shared if flag not in row} == set()


def test_no_command_is_told_of_that_does_not_exist() -> None:
    assert set(re.findall(r"[`$] ?ibid ([a-z][a-z-]*)", README)) <= set(commands())


def test_every_setting_has_its_row_with_its_reason() -> None:
    rows = table("| setting | default | why |").splitlines()[2:]
    assert [re.sub(r"^\| `([^`]+)`.*", r"\1", row) for row in rows] == [
        ".".join(filter(None, (option.section, option.name))) for option in options()
    ]
    for row, option in zip(rows, options(), strict=True):
        assert row.endswith(f"| {option.why} |"), option


def test_every_metric_is_in_the_readme_and_no_other() -> None:
    names = {
        family.name + ("_total" if family.type == "counter" else "") for family in Telemetry().collect()
    }  # without a log: its one counter is named below
    gauges = set(re.findall(r'gauge\("(ibid_[a-z_]+)"', (ROOT / "proxy/upkeep/gauges.py").read_text()))
    assert gauges
    told = {name for name in quoted(table("| says | metric | labels |")) if name.startswith("ibid_")}
    assert told == names | gauges | {"ibid_log_lines_dropped_total"}


def test_every_request_header_and_mode_is_in_the_readme() -> None:
    text = table("| request header | body twin `cache` | does |")
    source = (ROOT / "proxy/core/directives.py").read_text()
    headers = set(re.findall(r'b"((?:x-)?cache-[a-z-]+|x-cache-[a-z-]+)"', source)) - {"cache-control"}
    assert len(headers) >= 7
    assert {name for name in headers if f"`{name}" not in text} == set()
    assert {mode for mode in MODES if not re.search(rf"\b{mode}`", text)} == set()


def test_every_response_header_of_a_verdict_is_in_the_readme() -> None:
    text = table("| response header | says |")
    source = (ROOT / "proxy/core/directives.py").read_text()
    headers = set(re.findall(r'\("((?:x-|Cache-|Age)[A-Za-z-]*)"', source))
    assert len(headers) >= 10
    assert {name for name in headers if f"`{name}" not in text} == set()


def test_every_table_view_and_named_query_is_in_the_readme() -> None:
    section = README[README.index("## Savings") : README.index("## Measured")]
    assert {name for name in metadata.tables if f"**{name}**" not in section} == set()
    assert {name for name in [*VIEWS, *NAMED] if f"`{name}`" not in section} == set()


def test_every_admin_route_told_of_exists() -> None:
    paths = {route.path for route in ROUTES}
    told = set(re.findall(r"(?<![\w.`/])/(?:cache|savings|requests|healthz|readyz|metrics|openapi)[a-z/.-]*", README))
    assert told
    assert told <= paths | {f"{path}." for path in paths}


def test_every_environment_variable_is_in_the_readme() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "proxy").rglob("*.py"))
    assert set(re.findall(r"\bIBID_[A-Z_]+", sources)) <= set(re.findall(r"\bIBID_[A-Z_]+", README))


def test_every_link_leads_to_a_file() -> None:
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", README) if "://" not in link]
    assert "deploy/life-of-a-request.svg" in links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_floors_are_those_of_the_import_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    rows = table("| floor | rooms |").splitlines()[2:]
    told = [re.findall(r"\[[^]]+\]\(proxy/(\w+)(?:\.py)?\)", row) for row in rows]
    assert told == [layer.split(" | ") for layer in layers]


def test_each_everyday_change_has_its_one_or_two_places() -> None:
    rows = table("| where would I change").splitlines()[2:]
    places = [re.findall(r"\]\((\S+)\)", row) for row in rows]
    assert len(places) >= 10
    assert all(1 <= len(named) <= 2 for named in places)
    assert [path for named in places for path in named if not (ROOT / path).exists()] == []


def test_every_make_target_told_of_exists() -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE)) <= targets


def test_the_benchmark_tables_have_their_places() -> None:
    for name in ("http", "streams", "index"):
        assert re.search(rf"<!-- bench:{name} -->\n.+?\n<!-- /bench:{name} -->", README, re.DOTALL)
