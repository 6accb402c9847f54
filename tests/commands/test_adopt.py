"""`ibid adopt`: what other gateways are told, said in ibid's words. Each file in `peers/` has a canary for a secret."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.commands import main as cli
from proxy.commands.adopt import command, reading
from proxy.commands.adopt.draft import Draft, Fate, literal
from proxy.core.errors import ConfigError
from proxy.core.identity import BUILT_IN
from proxy.settings import config
from proxy.settings.file import setting_names
from proxy.settings.lanes import LANES
from proxy.settings.sections import NAMED, SECTIONS

PEERS = Path(__file__).parent / "peers"
SAMPLES = sorted(PEERS.iterdir())
CANARY = "canary"
SECTION_NAMES = "|".join([*SECTIONS, "lane.edge"])
SETTINGS = {
    f"{section}.{name}" for section, kinds in SECTIONS.items() for kind in kinds for name in setting_names(kind)
}
SETTINGS |= {f"lane.{lane}" for lane in LANES} | {"prices.override", "upstream.NAME"}


def adopted(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = cli.main(["adopt", *arguments])
    except SystemExit as left:
        code = int(left.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def sample(capsys: pytest.CaptureFixture[str], name: str) -> tuple[dict[str, Any], str]:
    """The TOML of a sample as a tree, and what was said."""
    code, out, err = adopted(capsys, name.split(".")[0], str(PEERS / name))
    assert code == 0, err
    return tomllib.loads(out), err


def load(text: str, tmp_path: Path) -> config.Settings:
    """With a key in every variable that the file names."""
    path = tmp_path / "ibid.toml"
    path.write_text(text)
    keys = {table["key_env"] for table in tomllib.loads(text).get("upstream", {}).values() if "key_env" in table}
    return config.load(config.Flags(config=str(path)), {"HOME": str(tmp_path), **dict.fromkeys(keys, "sk-x")})


def test_every_gateway_has_a_sample() -> None:
    assert {path.stem for path in SAMPLES} == set(command.PEERS) == set(cli.ADOPTED)


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_what_is_written_is_a_configuration_without_a_secret(
    capsys: pytest.CaptureFixture[str], path: Path, tmp_path: Path
) -> None:
    code, out, err = adopted(capsys, path.stem, str(path))
    assert code == 0
    load(out, tmp_path)
    assert CANARY not in out + err
    assert "next: ibid check" in err


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_every_word_of_the_peer_is_told_of(path: Path) -> None:
    """Nothing is passed over in silence: each setting of the file is in a note."""
    draft = command.PEERS[path.stem].adopt(path.read_text(), path.name)
    told = " ".join(note.what for note in draft.notes).lower()
    text = path.read_text()
    if path.suffix == ".env":
        words = re.findall(r"^CACHELLM_(\w+)=", text, re.M)
    elif path.suffix == ".headers":
        words = [word for word in re.findall(r'^"?([\w-]+)"?:', text, re.M) if word.lower() != "authorization"]
    else:
        words = [*_top_words(path)]
    missing = [word for word in words if word.lower() not in told]
    assert not missing


def _top_words(path: Path) -> list[str]:
    """Names that stand on the first two levels and hold something."""
    words = []
    for name, value in reading.tree(path.read_text(), path.name).items():
        inner = (
            value if isinstance(value, dict) and name not in ("environment_variables", "client", "vector_store") else {}
        )
        words += [word for word, held in inner.items() if held] or ([name] if value else [])
    renamed = {"requestTimeout": "request_timeout", "attempts": "retry", "$schema": "", "targets": "targets["}
    return [renamed.get(word, word) for word in words if word != "api_version"]


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_the_settings_it_speaks_of_exist(path: Path) -> None:
    draft = command.PEERS[path.stem].adopt(path.read_text(), path.name)
    for note in draft.notes:
        for name in re.findall(rf"\b((?:{SECTION_NAMES})\.[a-z_]+)\b", note.here):
            assert name in SETTINGS, note


def test_every_instead_names_settings_that_exist() -> None:
    """Those of the tables of words too, which no sample has."""
    source = "\n".join(path.read_text() for path in Path(command.__file__).parent.glob("*.py"))
    named = set(re.findall(rf"[\"` ]((?:{SECTION_NAMES})\.[a-z][a-z_]+)[\"`:; ,]", source))
    peers_own = {"cache.mode", "cache.max_age", "cache.init"}
    assert named - SETTINGS - peers_own == set()
    assert {"cache.max_error_rate", "forward.drop_headers", "server.keys_only"} <= named
    assert NAMED.keys() >= {"upstream"}


def test_litellm_is_taken_over(capsys: pytest.CaptureFixture[str]) -> None:
    made, said = sample(capsys, "litellm.yaml")
    assert made["server"] == {"keys_only": True}
    assert made["cache"] == {"ttl_s": 600.0}
    assert made["forward"] == {"first_byte_timeout_s": 30.0}
    assert {name: table.get("models") for name, table in made["upstream"].items()} == {
        "openai": ["gpt-4o-mini"], "azure": ["gpt-4o-eu"], "anthropic": ["claude-sonnet-4-5"],
        "local-8000": ["meta-llama/Llama-3-8B"], "gemini": ["none"], "ollama": ["none"],
    }  # fmt: skip
    assert made["upstream"]["openai"]["key_env"] == "OPENAI_API_KEY"
    assert made["lane"]["edge"] == {"upstream": "local-8000", "model": "meta-llama/Llama-3-8B"}
    assert made["policy"] == [
        {"name": "gpt-4o-mini falls back", "match": {"model": "gpt-4o-mini"}, "on_error": ["edge"]}
    ]
    prices = made["prices"]["override"]["local-8000/meta-llama/Llama-3-8B"]
    assert prices == {"input_usd_per_mtok": 0.05, "output_usd_per_mtok": 0.1}
    for told in (
        "clients ask for gpt-4o-eu", "a second deployment", "keep LiteLLM and put ibid in front", "no threshold here",
        "ANTHROPIC_API_KEY: a key as text is not copied",
    ):  # fmt: skip
        assert told in said


def test_litellms_other_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        """
model_list:
  - {model_name: "*", litellm_params: {model: "openai/*", api_key: os.environ/MY_KEY}}
  - {model_name: eu, litellm_params: {model: azure/eu, api_base: os.environ/AZURE_API_BASE, api_key: os.environ/K}}
litellm_settings: {cache: true, cache_params: {type: redis, ttl: 5184000}, request_timeout: 20, made_up: 1}
include: [more.yaml]
"""
    )
    code, out, said = adopted(capsys, "litellm", str(path))
    made = tomllib.loads(out)
    assert code == 0
    assert made["cache"] == {"semantic": False, "ttl_s": 5184000.0, "max_ttl_s": 5184000.0}
    assert "models" not in made["upstream"]["openai"]
    assert "key_env" not in made["upstream"]["azure"]  # whose clients send api-key
    assert "IBID_UPSTREAM__AZURE__BASE_URL=$AZURE_API_BASE" in said
    assert "litellm_settings.made_up: nothing here" in said
    assert "include: other files are not followed" in said


def test_a_servers_address_decides_whose_prices_hold(capsys: pytest.CaptureFixture[str]) -> None:
    made, _ = sample(capsys, "cachellm.env")
    assert made["upstream"]["groq"]["key_env"] == "CACHELLM_OPENAI_API_KEY"
    assert made["upstream"]["openai"] == {"models": ["none"]}  # else it would take every model first
    assert made["server"]["listen"] == "127.0.0.1:8080"
    assert made["cache"]["shadow"] is True


def test_headers_of_a_gateway_that_would_keep_requests_apart_are_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("portkey.headers", "helicone.headers"):
        made, said = sample(capsys, name)
        dropped = set(made["forward"]["drop_headers"])
        sent = [line.split(":")[0].strip('"').lower() for line in (PEERS / name).read_text().splitlines()]
        for header in sent:
            raw = header.encode()
            is_told_apart = BUILT_IN.travels(raw) and not BUILT_IN.is_delivery(raw)
            if header not in ("authorization", "cache-control"):
                assert (header in dropped) == is_told_apart, header
        assert "Headers that clients may go on sending:" in said


def test_it_overwrites_nothing_without_being_told_to(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "ibid.toml"
    asked = ("litellm", str(PEERS / "litellm.yaml"), "--output", str(path))
    code, out, err = adopted(capsys, *asked)
    assert (code, out) == (0, "")
    assert f"{path} was written" in err
    assert path.stat().st_mode & 0o077 == 0
    path.write_text("mine")
    code, _, err = adopted(capsys, *asked)
    assert (code, path.read_text()) == (2, "mine")
    assert "--force" in err
    code, _, err = adopted(capsys, *asked, "--force")
    assert code == 0
    assert f"{path} was overwritten" in err
    assert tomllib.loads(path.read_text())["server"] == {"keys_only": True}


@pytest.mark.parametrize(
    ("peer", "text"),
    [
        ("litellm", "model_list: [canary"), ("litellm", "- canary"), ("litellm", "model_list: canary"),
        ("portkey", '{"targets": "canary"}'), ("helicone", ""), ("gptcache", "storage_config: canary"),
        ("cachellm", "canary"), ("bifrost", "[canary]"), ("litellm", "&a [*a]"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_one_line_without_its_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, peer: str, text: str
) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    code, out, err = adopted(capsys, peer, str(path))
    assert (code, out) == (2, "")
    assert err.startswith("ibid: ")
    assert err.count("\n") == 1
    assert CANARY not in err
    assert adopted(capsys, peer, str(tmp_path / "nowhere"))[0] == 2


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just({}), st.just([]), st.just([1]),
    st.sampled_from(["openai/gpt-4o", "azure/x", "*", "os.environ/A KEY", "os.environ/KEY", "env.X", "semantic_cache"]),
    st.sampled_from(["http://127.0.0.1:99999", "http://[::1", "https://u:p@h/v1?x=1#y", "redis-semantic", "5m"]),
    st.sampled_from(["1e999", "ollama/x", "gemini/y", "http://h\nx", "a\x00b", "\x7f", "ä" * 40, "http://ä.example"]),
)  # fmt: skip


def changed(tree: Any, data: st.DataObject) -> Any:
    """The same with something else in one place."""
    places = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []
    if not places or data.draw(st.integers(0, 5)) == 0:
        return data.draw(LEAVES)
    place = data.draw(st.sampled_from(places))
    inner = changed(tree[place], data)
    if isinstance(tree, dict):
        return {**tree, place: inner}
    return [inner if number == place else one for number, one in enumerate(tree)]


@pytest.mark.parametrize("path", [path for path in SAMPLES if path.suffix != ".env"], ids=lambda path: path.name)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_a_file_says_it_is_a_configuration_or_one_line_of_advice(path: Path, data: st.DataObject) -> None:
    text = path.read_text()
    tree: Any = reading.headers(text, "") if path.suffix == ".headers" else reading.tree(text, "")
    for _ in range(data.draw(st.integers(1, 4))):
        tree = changed(tree, data)
    said = ""
    try:
        draft = command.PEERS[path.stem].adopt(json.dumps(tree), "file")
        draft.part_models()
        command.prove(draft.toml("file"), draft)
    except ConfigError as error:
        said = error.message
    assert "\n" not in said


@given(
    st.recursive(
        st.text() | st.booleans() | st.integers(-(2**63), 2**63 - 1),
        lambda s: st.lists(s) | st.dictionaries(st.text(), s),
    )
)
def test_what_is_written_reads_as_what_was_meant(value: Any) -> None:
    assert tomllib.loads(f"value = {literal(value)}") == {"value": value}


def test_a_draft_says_each_fate() -> None:
    draft = Draft()
    draft.take("a", "cache", "ttl_s", 1.0)
    draft.rename("b", "c")
    draft.leave("d", "e")
    assert [note.fate for note in draft.notes] == list(Fate)
    assert "Taken over:\n  a: cache.ttl_s = 1.0" in command.story(draft, "", "")
