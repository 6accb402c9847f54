"""The manual is held to the code: what is made of it is fresh, and what is told by hand exists."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from deploy import pages as maker
from index.tokens import GUARDS
from proxy.admin.routes import ROUTES
from proxy.core.directives import MODES, WOULD
from proxy.core.headers import ASKED, MEANT, PEERS, TOLD
from proxy.core.plan import Lane
from proxy.core.reasons import GROUPS as REASONS
from proxy.core.reasons import MEANINGS
from proxy.meaning import LOADING
from proxy.money.books import MECHANISMS
from proxy.settings.sections import options
from proxy.store.named_queries import NAMED
from proxy.store.schema import VIEWS, metadata
from proxy.store.tables import TABLES
from proxy.watch.health import REMEDIES
from tests.docs.manual import DOCS, README, ROOT, pages, prose, quoted, snippets, table

ALL = "\n".join(path.read_text() for path in pages())
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


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


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


def test_the_reasons_are_found_in_the_code() -> None:
    """Guards the next test: a reading that finds nothing would hold the list to nothing."""
    some = {"no_store", "time_words", "below_bound", "nothing_alike", "collapsed", "finish_length", "data_after_done"}
    some |= {"set_cookie", "invisible", "embedder_busy", "index_down", "store_full", "pass_through", "finish_other"}
    assert some <= reasons_in_code()


def reasons_of_heads() -> set[str]:
    """Reasons that only a head of a response says, in `directives`."""
    source = (ROOT / "proxy/core/directives.py").read_text()
    return set(re.findall(r'\("x-cache-reason", "([a-z-]+)"\)', source))


def test_every_reason_is_explained_and_no_other() -> None:
    assert reasons_of_heads() == {"held", "stale-if-error"}
    in_shadow = {f"{WOULD}{tier}" for tier in MECHANISMS}
    assert set(MEANINGS) - {"hit", "stale", "timeout"} - reasons_of_heads() - in_shadow == reasons_in_code()
    assert in_shadow < set(MEANINGS)
    assert sum(len(group.reasons) for group in REASONS) == len(MEANINGS)


def test_every_page_is_fresh() -> None:
    stale = [path.name for path in pages() if maker.fresh(path.read_text()) != path.read_text()]
    assert stale == [], "run `make docs`"


def test_every_part_that_is_made_has_its_place_and_only_one() -> None:
    assert sorted(re.findall(r"<!-- made: ([a-z-]+) -->", ALL)) == sorted(maker.BLOCKS)
    assert sorted(re.findall(r"<!-- end: ([a-z-]+) -->", ALL)) == sorted(maker.BLOCKS)


def test_a_stale_page_is_found() -> None:
    text = "before\n<!-- made: told -->\n| long ago |\n<!-- end: told -->\nbehind\n"
    made = maker.fresh(text)
    assert made.startswith("before\n<!-- made: told -->\n| response header |")
    assert made.endswith("<!-- end: told -->\nbehind\n")
    assert "long ago" not in made
    assert maker.fresh(made) == made
    with pytest.raises(KeyError):
        maker.fresh("<!-- made: nothing -->\n<!-- end: nothing -->\n")


def test_every_setting_has_one_row_with_its_default_and_reason() -> None:
    rows = re.findall(r"(?m)^\| `([\w.]+)` \| `([^`]*)` \| (.+) \|$", page("configuration"))
    wanted = {".".join(filter(None, (option.section, option.name))): option for option in options()}
    assert [name for name, _, _ in rows] == list(wanted)
    for name, default, why in rows:
        option = wanted[name]
        assert why == option.why
        if isinstance(option.default, bool):
            assert default == str(option.default).lower()
        elif isinstance(option.default, int | float):
            assert float(default) == option.default


def test_every_command_and_flag_is_on_its_page() -> None:
    text, names = page("commands"), [words for words, _, _ in maker.parsers()]
    assert {"serve", "docs", "keys create", "savings", "sql"} <= set(names)
    for words, _, parser in maker.parsers():
        assert f"| `ibid {words}` |" in text
        own = text.partition(f"### `ibid {words}`\n")[2].partition("\n### ")[0]
        flags = {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
        told = set(re.findall(r"--[a-z-]+", own)) | {"--help", *maker.SHARED}
        assert {flag for flag in flags if flag not in told} - {"--json"} == set(), words
        assert [action.dest for action in parser._actions if not action.help] == [], words


def test_no_command_is_told_of_that_does_not_exist() -> None:
    known = {words.partition(" ")[0] for words, _, _ in maker.parsers()}
    told = {name for text in pages() for name in re.findall(r"`ibid ([a-z][a-z-]*)", text.read_text())}
    told |= {
        name for one in snippets("sh") for name in re.findall(r"(?:^|bin/)ibid ([a-z][a-z-]*)", one.text, re.MULTILINE)
    }
    assert len(told) > 10
    assert told <= known


def test_every_metric_is_on_its_page_and_no_other() -> None:
    told = set(re.findall(r"(?m)^\| `(ibid_\w+)` \|", page("metrics")))
    source = "".join(path.read_text() for path in (ROOT / "proxy").rglob("*.py"))
    made = set(re.findall(r'(?:_counter|_histogram|gauge)\(\s*"(ibid_\w+)"', source))
    assert {name.removesuffix("_total") for name in told} == made
    assert set(re.findall(r"\b(ibid_(?!proxy)[a-z_]+)\b(?!\.)", prose(ALL))) <= told


def test_every_request_header_and_mode_is_told() -> None:
    source = (ROOT / "proxy/core/directives.py").read_text()
    read = set(re.findall(r'case "(x-[a-z-]+)"', source)) | {"cache-control", "x-cache-explain", "x-plan"}
    assert len(read) >= 9
    assert read <= {one.name for one in ASKED}
    assert {one.header.partition(": ")[2] for one in ASKED if one.name == "x-cache-mode"} == set(MODES)


def test_every_member_of_the_bodys_twin_is_told() -> None:
    source = (ROOT / "proxy/core/directives.py").read_text()
    twin = source[source.index("def _read_twin") : source.index("def _text")]
    names = {name for case in re.findall(r"case (.+):", twin) for name in re.findall(r'"([\w-]+)"', case)}
    assert len(names) >= 8
    text = page("headers")
    assert {name for name in names if not re.search(rf'["`]{name}(?:"|: false)', text)} == set()


def test_every_response_header_of_a_verdict_is_told() -> None:
    source = (ROOT / "proxy/core/directives.py").read_text()
    headers = set(re.findall(r'\("((?:x-|Cache-|Age)[A-Za-z-]*)"', source))
    assert len(headers) >= 10
    assert headers == set(TOLD)


def test_every_meaning_of_a_peers_header_is_told() -> None:
    assert set(PEERS.values()) == set(MEANT)


def test_every_table_view_and_named_query_is_described() -> None:
    assert set(TABLES) == set(metadata.tables)
    for name, described in TABLES.items():
        if described.columns:
            assert list(described.columns) == [column.name for column in metadata.tables[name].columns]
    assert {"request", "upstream_call", "saving", "lookup", "feedback", "act"} == {
        name for name, one in TABLES.items() if one.columns
    }
    assert {name for name in [*VIEWS, *NAMED] if f"`{name}`" not in page("schema")} == set()


def test_every_degraded_reason_has_its_remedy_on_the_page() -> None:
    assert [word for word in REMEDIES if f"| `{word}` |" not in page("troubleshooting")] == []


def test_every_error_code_told_of_exists() -> None:
    rows = table(page("troubleshooting"), "| status | code | means |")
    codes = {code for row in rows for code in quoted(row.split("|")[2])}
    source = "".join(path.read_text() for path in (ROOT / "proxy").rglob("*.py"))
    assert len(codes) > 20
    assert {code for code in codes if f'"{code}"' not in source} == set()


def test_every_lane_is_told_of_in_the_order_in_which_it_acts() -> None:
    rows = table(page("lanes"), "| strategy | lane | acts when | needs |")
    told = [lane for row in rows for lane in re.findall(r"`([a-z-]+)`", row.split("|")[2])]
    assert told == [lane.value for lane in Lane]


def test_every_setting_that_is_named_exists() -> None:
    sections = {option.section.partition(".")[0] for option in options()} - {""}
    known = {".".join(filter(None, (option.section, option.name))) for option in options()}
    named = set(re.findall(rf"`((?:{'|'.join(sorted(sections))})\.[a-z_.A-Z]+)(?: = [^`]*)?`", prose(ALL)))
    named = {re.sub(r"^(upstream|alias)\.[a-z]+\.", r"\1.NAME.", name) for name in named}
    source = "".join(path.read_text() for path in (ROOT / "proxy").rglob("*.py"))
    mechanisms_and_files = set(re.findall(r'"([a-z]+\.[a-z-]+)"', source))
    assert len(named & known) > 40
    assert named - known - mechanisms_and_files - {option.section for option in options()} == set()


def test_every_admin_route_told_of_exists() -> None:
    paths = {route.path for route in ROUTES}
    told = set(
        re.findall(
            r"`(?:GET |POST )?(/(?:cache|savings|requests|healthz|readyz|metrics|openapi)[a-z/.-]*)`", prose(ALL)
        )
    )
    assert len(told) > 15
    assert told <= paths | {"/cache/keys", "/requests"}


def test_every_environment_variable_is_told() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "proxy").rglob("*.py"))
    assert set(re.findall(r"\bIBID_[A-Z_]+", sources)) - {"IBID_SECTION__NAME"} <= set(
        re.findall(r"\bIBID_[A-Z_]+", ALL)
    )


def test_the_floors_are_those_of_the_import_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    rows = table(page("internals"), "| floor | rooms |")
    told = [re.findall(r"\[[^]]+\]\(\.\./\.\./proxy/(\w+)(?:\.py)?\)", row) for row in rows]
    assert told == [layer.split(" | ") for layer in layers]


def test_each_everyday_change_has_its_one_or_two_places() -> None:
    rows = table(page("internals"), "| where would I change")
    places = [re.findall(r"\]\((\S+)\)", row) for row in rows]
    assert len(places) >= 10
    assert all(1 <= len(named) <= 2 for named in places)


def test_every_make_target_told_of_exists_and_the_other_way_round() -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text())) - {"help"}
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", ALL, re.MULTILINE)) == targets


def test_the_benchmark_tables_have_their_places() -> None:
    for name in ("http", "streams", "index"):
        assert re.search(rf"<!-- bench:{name} -->\n.+?\n<!-- /bench:{name} -->", page("benchmarks"), re.DOTALL)


def test_the_readmes_figures_are_those_of_the_benchmarks() -> None:
    """Each number of its tables that has three digits or more, or a fraction, stands on the page of the benchmarks."""
    text = README.read_text()
    rows = [*table(text, "| | ibid | floor |"), *table(text, "| questions | served |")]
    numbers = {number for row in rows for number in re.findall(r"\d[\d,]*\.\d+|\d[\d,]{2,}", row)}
    measured = [float(one.replace(",", "")) for one in re.findall(r"\d[\d,]*(?:\.\d+)?|\.\d+", page("benchmarks"))]
    assert len(numbers) >= 8
    for number in numbers:
        digits = len(number.partition(".")[2])
        assert any(round(one, digits) == float(number.replace(",", "")) for one in measured), number
