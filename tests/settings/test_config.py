"""Settings: where they come from, what beats what, and what is refused, by line."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from decimal import Decimal
from pathlib import Path

import pytest

from proxy.core.errors import ConfigError
from proxy.core.model import Limits, Rules
from proxy.settings import sections as nouns
from proxy.settings.config import Address, Flags, load, options

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "deploy" / "config.example.toml"
HOME = {"HOME": "/home/ann"}
LINE = re.compile(r"^(# )?([a-z_]+) = (.+?) +# (\S.*)$")

LIMITS = [spec.name for spec in dataclasses.fields(Limits)]


def written(folder: Path, text: str) -> Flags:
    path = folder / "ibid.toml"
    path.write_text(text)
    return Flags(config=str(path))


def refusal(folder: Path, text: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(written(folder, text), {**HOME, **(environ or {})})
    assert "\n" not in caught.value.message
    return caught.value.message


def test_without_anything_the_defaults_are_the_documented_ones() -> None:
    settings = load(Flags(), HOME)
    assert settings.server.listen == Address("127.0.0.1", 4141)
    assert settings.server.admin == Address("127.0.0.1", 4142)
    assert settings.server.admin_token is None
    assert settings.rules == Rules()
    assert settings.limits == Limits()
    assert settings.data_dir == Path("/home/ann/.local/share/ibid")
    assert list(settings.upstreams) == ["openai", "anthropic", "gemini", "ollama"]
    assert all(name == upstream.dialect for name, upstream in settings.upstreams.items())
    assert settings.source is None


def test_flags_beat_environment_beats_file(tmp_path: Path) -> None:
    flags = written(tmp_path, 'data_dir = "/file"\n[server]\nlisten = "127.0.0.1:1"\nadmin = "127.0.0.1:2"\n')
    environ = {**HOME, "IBID_LISTEN": "127.0.0.1:11", "IBID_DATA_DIR": "/env", "IBID_DATABASE_URL": "sqlite:///env.db"}
    from_file = load(flags, HOME)
    assert (from_file.server.listen.port, from_file.server.admin.port) == (1, 2)
    assert from_file.data_dir == Path("/file")
    from_environment = load(flags, environ)
    assert (from_environment.server.listen.port, from_environment.server.admin.port) == (11, 2)
    assert from_environment.data_dir == Path("/env")
    assert from_environment.store.database_url == "sqlite:///env.db"
    chosen = dataclasses.replace(flags, listen="[::1]:21", data_dir="/flag", database="postgresql://h/d")
    from_flags = load(chosen, environ)
    assert from_flags.server.listen == Address("::1", 21)
    assert from_flags.data_dir == Path("/flag")
    assert from_flags.store.database_url == "postgresql://h/d"


def test_every_variable_of_the_contract_is_read(tmp_path: Path) -> None:
    path = tmp_path / "named.toml"
    path.write_text("[cache]\nttl_s = 7\n")
    environ = {
        "IBID_CONFIG": str(path),
        "IBID_ADMIN": "127.0.0.1:9",
        "IBID_UPSTREAM": "http://127.0.0.1:8080/v1",
        "IBID_ADMIN_TOKEN": "t" * 32,
        "IBID_LOG_LEVEL": "debug",
        "XDG_DATA_HOME": "/xdg",
    }
    settings = load(Flags(), environ)
    assert settings.source == path
    assert settings.rules.ttl_s == 7.0
    assert settings.server.admin.port == 9
    assert settings.server.admin_token == "t" * 32
    assert settings.log.level == "DEBUG"
    assert settings.data_dir == Path("/xdg/ibid")
    assert set(settings.upstreams) == {"openai", "anthropic", "gemini", "ollama"}
    assert {upstream.base_url for upstream in settings.upstreams.values()} == {"http://127.0.0.1:8080/v1"}


def test_a_file_changes_a_built_in_upstream_and_adds_others(tmp_path: Path) -> None:
    text = (
        '[upstream.openai]\nbase_url = "https://gate.example"\n[upstream.lab]\nbase_url = "http://10.0.0.1:8000/v1"\n'
    )
    upstreams = load(written(tmp_path, text), HOME).upstreams
    assert list(upstreams) == ["openai", "anthropic", "gemini", "ollama", "lab"]
    assert upstreams["openai"].base_url == "https://gate.example"
    assert upstreams["openai"].dialect == "openai"
    assert upstreams["lab"].base_url == "http://10.0.0.1:8000/v1"


def test_prices_stay_exact_to_the_digit(tmp_path: Path) -> None:
    text = '[prices.override."openai/gpt-x"]\ninput_usd_per_mtok = 0.1\noutput_usd_per_mtok = 3\n'
    override = load(written(tmp_path, text), HOME).prices["openai/gpt-x"]
    assert override.input_usd_per_mtok == Decimal("0.1")
    assert override.rates() == {"input": "0.1", "output": "3"}


def test_secrets_are_not_shown_by_repr() -> None:
    environ = {**HOME, "IBID_ADMIN_TOKEN": "s3cret" * 8, "IBID_DATABASE_URL": "postgresql://u:hunter2@h/d"}
    shown = repr(load(Flags(), environ))
    assert "s3cret" not in shown
    assert "hunter2" not in shown


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[server]\n\nlisen = '127.0.0.1:1'\n", 3, "server.lisen is unknown (did you mean listen?)"),
        ("\n[sever]\n", 2, "sever is unknown (did you mean server?)"),
        ("[upstream.lab]\nbase_url = 'http://h'\nkey = 'sk-1'\n", 3, "upstream.lab.key is unknown"),
        ("[upstream.lab]\nbase_url = 'http://h'\nkey_env = ['A']\n", 3, "upstream.lab.key_env must be a string that"),
        ("[upstream.lab]\nbase_ulr = 'http://h'\n", 2, "upstream.lab.base_ulr is unknown (did you mean base_url?)"),
        ("[[policy]]\nname = 'a'\nttl = 3\n", 3, "policy.0.ttl is unknown (did you mean ttl_s?)"),
        ("[limits]\n" + "".join(f"{name} = true\n" for name in LIMITS), 2, f"limits.{LIMITS[0]} must be a"),
        ("[cache]\nttl_s = '1d'\n", 2, "cache.ttl_s must be a finite number"),
        ("[cache]\nttl_s = nan\n", 2, "cache.ttl_s must be a finite number"),
        ("[cache]\nsemantic = 1\n", 2, "cache.semantic must be true or false"),
        ("[limits]\nmessages = true\n", 2, "limits.messages must be a whole number"),
        ("[limits]\nmessages = 1.5\n", 2, "limits.messages must be a whole number"),
        ("[limits]\nbody_bytes = -1\n", 2, "limits.body_bytes must be at least 0"),
        ("[limits]\nin_flight = 0\n", 2, "limits.in_flight must be above 0"),
        ("[cache]\nmax_error_rate = 0.6\n", 2, "cache.max_error_rate must be between 0 and 0.5"),
        ("[cache]\nmin_words = 3\nmax_ttl_s = 5\nttl_s = 6\n", 4, "cache.ttl_s is above max_ttl_s, 5"),
        ("[embedding]\nbackend = 'tpu'\n", 2, "embedding.backend must be one of onnx, onnx-int8, torch"),
        ("[server]\nlisten = 'localhost'\n", 2, 'server.listen must be "HOST:PORT"'),
        ("[server]\nlisten = '127.0.0.1:65536'\n", 2, 'server.listen must be "HOST:PORT"'),
        ("[server]\nworkers = 2\n", 2, "server.workers (--workers) above 1 is not supported yet"),
        ("[server]\nadmin_token = 'x'\n", 2, "server.admin_token is a secret: set IBID_ADMIN_TOKEN instead"),
        ("[server]\nlisten = '0.0.0.0:1'\nanonymous = true\n", 3, "server.anonymous needs a loopback listener"),
        (
            "[server]\nanonymous = true\nkeys_only = true\n",
            3,
            "server.keys_only and server.anonymous exclude each other",
        ),
        ("[server]\nadmin = '127.0.0.1:4141'\n", 2, "server.admin is the client listener's address"),
        ("[upstream.Lab]\nbase_url = 'http://h'\n", 1, "upstream.Lab must be 1-32 of"),
        ("[upstream.lab]\ndialect = 'openai'\n", 1, "upstream.lab.base_url must be http://HOST"),
        ("[store]\ndatabase_url = 'mysql://h/d'\n", 2, "store.database_url must begin with"),
        ("[prices.override.gpt]\ninput_usd_per_mtok = 1\n", 1, "prices.override.gpt must be named"),
        ('[prices.override."a/b"]\ninput_usd_per_mtok = 1\n', 1, "needs input_usd_per_mtok and output_usd_per_mtok"),
        ("data_dir = 5\n", 1, "data_dir must be the path of a folder"),
        ("server = 3\n", 1, "server must be a table"),
        ("[upstream]\nlab = 3\n", 2, "upstream.lab must be a table"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    assert f"ibid.toml, line {line}: " in (message := refusal(tmp_path, text)), message
    assert words in message


def test_a_file_that_is_not_toml_names_the_line(tmp_path: Path) -> None:
    assert "not valid TOML" in (message := refusal(tmp_path, "[server]\nlisten = \n"))
    assert "line 2" in message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: No such file"):
        load(Flags(config=str(tmp_path / "absent.toml")), HOME)
    (tmp_path / "binary.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match="byte 5 is not UTF-8"):
        load(Flags(config=str(tmp_path / "binary.toml")), HOME)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://h", "must be http://HOST"),
        ("h:80", "must be http://HOST"),
        ("http://", "must be http://HOST"),
        ("http://h:99999", "is not a URL"),
        ("http://h ost", "must be http://HOST"),
        ("https://user:hunter2@h", "must not hold a credential"),
        ("https://h/v1?key=hunter2", "must not have a query"),
        ("https://h/#hunter2", "must not have a query"),
    ],
)
def test_an_unusable_upstream_address_is_refused_without_being_quoted(url: str, words: str) -> None:
    for flags, environ, source in (
        (Flags(upstream=url), HOME, "--upstream"),
        (Flags(), {**HOME, "IBID_UPSTREAM": url}, "IBID_UPSTREAM"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(flags, environ)
        assert caught.value.message.startswith(f"{source} {words}")
        assert "hunter2" not in caught.value.message


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("listen", "nonsense", '--listen must be "HOST:PORT"'),
        ("admin", "127.0.0.1:4141", "--admin is the client listener's address"),
        ("database", "mysql://u:canary@h/d", "--database must begin with"),
        ("data_dir", "a\0b", "--data-dir must be the path of a folder"),
        ("workers", 0, "--workers must be at least 1"),
    ],
)
def test_a_mistake_in_a_flag_names_it_and_not_the_file(tmp_path: Path, name: str, value: str, words: str) -> None:
    flags = written(tmp_path, "data_dir = '/file'\n[server]\nadmin = '127.0.0.1:1'\n")
    with pytest.raises(ConfigError) as caught:
        load(dataclasses.replace(flags, **{name: value}), HOME)
    assert caught.value.message.startswith(words)
    assert "canary" not in caught.value.message


@pytest.mark.parametrize("token", ["short", "ä" * 40, "with space " * 4])
def test_a_weak_admin_token_is_refused_and_not_quoted(token: str) -> None:
    with pytest.raises(ConfigError, match="IBID_ADMIN_TOKEN must be at least 32") as caught:
        load(Flags(), {**HOME, "IBID_ADMIN_TOKEN": token})
    assert token not in caught.value.message


def test_a_further_admin_token_needs_a_name_and_a_secret_of_its_own(tmp_path: Path) -> None:
    text = '[admin.token.anna]\nrole = "auditor"\ntoken_env = "ANNA"\n'
    anna = load(written(tmp_path, text), {**HOME, "ANNA": "a" * 32}).admin_tokens["anna"]
    assert (anna.role, anna.token) == ("auditor", "a" * 32)
    assert "a" * 32 not in repr(anna)
    for environ in ({}, {"ANNA": "short-canary"}):
        said = refusal(tmp_path, text, environ)
        assert "line 3: admin.token.anna.token_env must name a variable" in said
        assert "canary" not in said
    shared = {"ANNA": "a" * 32, "IBID_ADMIN_TOKEN": "a" * 32}
    assert "holds the token of another name" in refusal(tmp_path, text, shared)
    assert "admin.token.admin must be" in refusal(tmp_path, text.replace("anna", "admin"), {"ANNA": "a" * 32})
    assert "role must be one of stats" in refusal(tmp_path, text.replace("auditor", "boss"), {"ANNA": "a" * 32})


@pytest.mark.parametrize("workers", [0, 2])
def test_other_than_one_worker_is_refused(workers: int) -> None:
    with pytest.raises(ConfigError, match="workers"):
        load(Flags(workers=workers), HOME)


@pytest.mark.parametrize("section", sorted(nouns.SECTIONS))
def test_every_section_refuses_what_it_does_not_know(tmp_path: Path, section: str) -> None:
    other = "backend" if section != "embedding" else "listen"  # known, but elsewhere
    for name in ("x", '"quoted name"', other):
        assert f"line 2: {section}.{name.strip(chr(34))} is unknown" in refusal(tmp_path, f"[{section}]\n{name} = 1\n")


def documented(text: str) -> dict[tuple[str, str], tuple[str, str]]:
    """(section, name) → (value as written, why) of an example file, commented settings included."""
    found, section = {}, ""
    for line in text.splitlines():
        if header := re.match(r"^(?:# )?\[\[?(.+?)\]?\]$", line):
            section = re.sub(r"^(upstream|alias|prices\.override|admin\.token)\..+", r"\1.NAME", header[1])
        elif setting := LINE.match(line):
            found[section, setting[2]] = (setting[3], setting[4])
    return found


def test_the_example_file_shows_every_setting_with_its_default_and_why() -> None:
    text = EXAMPLE.read_text()
    shown = documented(text)
    assert list(shown) == [(option.section, option.name) for option in options()]
    for option in options():
        value, why = shown[option.section, option.name]
        assert why == option.why
        if option.default not in (None, "") and not option.section.endswith(("NAME", "policy")):
            written_value = tomllib.loads(f"x = {value}")["x"]
            default = str(option.default) if isinstance(option.default, Address) else option.default
            assert (list(default) if isinstance(default, tuple) else default) == written_value, option


def test_the_example_file_gives_the_defaults() -> None:
    with_file = load(Flags(config=str(EXAMPLE)), HOME)
    assert dataclasses.replace(with_file, source=None) == load(Flags(), HOME)


def test_the_example_file_is_valid_with_every_comment_opened(tmp_path: Path) -> None:
    opened = re.sub(r"(?m)^# (\[\[?[a-z].*\]|[a-z_]+ = .*)$", r"\1", EXAMPLE.read_text())
    settings = load(written(tmp_path, opened), {**HOME, "EXAMPLE_API_KEY": "sk-example", "EXAMPLE_TOKEN": "t" * 32})
    assert settings.admin_tokens["grafana"].token == "t" * 32
    assert settings.upstreams["example"].base_url == "https://models.example/v1"
    assert settings.upstreams["example"].key == "sk-example"
    assert "sk-example" not in repr(settings)
    assert settings.prices["openai/gpt-example"].output_usd_per_mtok == Decimal("8.00")
    assert settings.data_dir == Path("/var/lib/ibid")


EDGE = "[upstream.lab]\nbase_url = 'http://h'\n[lane.edge]\nupstream = 'lab'\nmodel = 'm'\n"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[[policy]]\nplan = ['exact']\n\n[[policy]]\nplan = ['warp']\n", 5, "'warp' is no lane"),
        ("[[policy]]\nplan = ['exact', 'edge']\n", 2, "has the lane 'edge', which [lane.*] does not make ready"),
        ("[[policy]]\non_error = ['cloud']\n", 2, "on_error knows retry, stale, upstream:NAME, edge, not 'cloud'"),
        (
            "[[policy]]\non_rate_limit = ['upstream']\n",
            2,
            "on_rate_limit knows retry, stale, upstream:NAME, edge, not 'upstream'",
        ),
        ("[[policy]]\non_error = ['upstream:lab']\n", 2, "on_error 'upstream:lab' is no upstream: openai, anthropic"),
        ("[[policy]]\non_rate_limit = ['retry', 'upstream:']\n", 2, "on_rate_limit 'upstream:' is no upstream: openai"),
        ("[upstream.openai]\nstands_in_for = ['gpt-4o']\n", 2, "stands_in_for 'gpt-4o' must be asked=own"),
        ("[[policy]]\non_error = ['stale']\n", 1, "has the lane 'stale-if-error'"),
        ("[[policy]]\nmatch = { modle = 'x' }\n", 2, "policy.0.match knows model"),
        ("[[policy]]\nmatch = { stream = 'yes' }\n", 2, "stream must be true or false"),
        ("[[policy]]\nmatch = { model = 3 }\n", 2, "model must be a string"),
        ("[[policy]]\nmatch = 'x'\n", 2, "policy.0.match must be a table"),
        ("[[policy]]\nttl = 3\n", 2, "policy.0.ttl is unknown"),
        ("[policy]\nplan = ['exact']\n", 1, "policy must be tables of the form [[policy]]"),
        ("[alias.Fast]\nplan = 'exact'\n", 1, "alias.Fast must be 1-32"),
        ("[alias.fast]\nplan = '+warp'\n", 2, "alias.fast.plan is not a plan: 'warp' is no lane"),
        ("[lane.warp]\n", 1, "lane.warp is unknown"),
        ("[lane.hedge]\nquantile = 1.5\n", 2, "lane.hedge.quantile must be at most 1"),
        ("[lane.edge]\nmodel = 'm'\n", 2, "lane.edge.model needs the other"),
        ("[lane.edge]\nupstream = 'lab'\nmodel = 'm'\n", 2, "lane.edge.upstream is not an upstream: openai"),
        ("[lane.edge]\nupstream = 'ollama'\nmodel = 'm'\n", 2, "lane.edge.upstream must be of the OpenAI dialect"),
        ("[lane.route]\ncandidates = ['m']\n", 2, "'m' is not \"upstream/model\""),
        (
            EDGE
            + "[upstream.far]\nbase_url = 'http://h'\nmodels = ['a']\n[lane.route]\ncandidates = ['far/b', 'far/a']\n",
            10,
            "'far/b' is left out by upstream.far.models: a",
        ),
        (EDGE.replace("[lane", "models = ['a', 'b-*']\n[lane"), 6, "'m' is left out by upstream.lab.models: a, b-*"),
        ("[lane.cascade]\npattern = '('\n", 2, "lane.cascade.pattern is not a regular expression"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    message = refusal(tmp_path, text)
    assert f"line {line}: " in message
    assert words in message


def test_policies_keep_their_order_and_what_they_say(tmp_path: Path) -> None:
    text = EDGE + (
        "[lane.stale]\nif_error_s = 60\n"
        "[[policy]]\nname = 'evaluations'\nmatch = { tag = 'eval', stream = false }\nplan = ['exact']\nttl_s = 5\n"
        "[[policy]]\non_error = ['stale', 'upstream:lab', 'edge']\non_rate_limit = ['retry']\n"
        "[alias.local]\nplan = '+edge'\n"
    )
    settings = load(written(tmp_path, text), HOME)
    first, second = settings.policies
    assert (first.name, first.match.tag, first.match.stream) == ("evaluations", "eval", False)
    assert (first.plan.text, first.plan.ttl_s) == ("exact", 5.0)
    assert second.name == "policy 2"
    assert second.plan.text == "exact,semantic,collapse,retry,stale-if-error,upstream-if-error,edge-if-error"
    assert second.plan.standing_in(is_limit=False) == ("stale", "upstream:lab", "edge")
    assert second.plan.standing_in(is_limit=True) == ("retry",)
    assert settings.aliases["local"] == "+edge"
    assert settings.aliases["exact"] == "-semantic"


def test_upstream_on_the_command_line_leaves_the_local_model_where_it_is(tmp_path: Path) -> None:
    flags = dataclasses.replace(written(tmp_path, EDGE), upstream="http://127.0.0.1:9")
    upstreams = load(flags, HOME).upstreams
    assert upstreams["lab"].base_url == "http://h"
    assert upstreams["openai"].base_url == "http://127.0.0.1:9"


# --- the environment ------------------------------------------------------------------------------------------------


def spelled(value: object) -> str:
    """A value as a variable spells it: text plainly, the rest as TOML."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(in_toml(one) for one in value)}]"
    return in_toml(value) if isinstance(value, dict) else str(value)


def in_toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f'"{name}" = {in_toml(one)}' for name, one in value.items()) + " }"
    return f"'{value}'" if isinstance(value, str) else spelled(value)


def variables(tree: dict[str, object], path: tuple[str, ...] = ()) -> dict[str, str]:
    """The environment that says what a file says."""
    found: dict[str, str] = {}
    for name, value in tree.items():
        at = (*path, name)
        if isinstance(value, dict) and at != ("prices", "override"):
            found |= variables(value, at)
        else:
            found["IBID_" + "__".join(at).upper()] = spelled(value)
    return found


def test_every_setting_can_be_given_by_a_variable_and_means_what_the_file_means(tmp_path: Path) -> None:
    """The example file with every comment opened has every setting there is (see above)."""
    opened = re.sub(r"(?m)^# (\[\[?[a-z].*\]|[a-z_]+ = .*)$", r"\1", EXAMPLE.read_text())
    environ = {**HOME, "EXAMPLE_API_KEY": "sk-example", "EXAMPLE_TOKEN": "t" * 32}
    from_file = load(written(tmp_path, opened), environ)
    from_environment = load(Flags(), {**environ, **variables(tomllib.loads(opened, parse_float=Decimal))})
    assert dataclasses.replace(from_file, source=None) == from_environment


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("IBID_LISTN", "IBID_LISTN is unknown (did you mean IBID_LISTEN?)"),
        ("IBID_CACHE_SEMANTIC", "IBID_CACHE_SEMANTIC is unknown (did you mean IBID_CACHE__SEMANTIC?)"),
        ("IBID_CACHE__SEMANTICS", "is unknown (did you mean IBID_CACHE__SEMANTIC?)"),
        ("IBID_cache__semantic", "is unknown (did you mean IBID_CACHE__SEMANTIC?)"),
        ("IBID_UPSTREAM__OPENAI__BASEURL", "is unknown (did you mean IBID_UPSTREAM__OPENAI__BASE_URL?)"),
        ("IBID_UPSTREAM__OPENAI__KEY", "is unknown (did you mean IBID_UPSTREAM__OPENAI__KEY_ENV?)"),
        ("IBID_SERVER__ADMIN_TOKEN", "IBID_SERVER__ADMIN_TOKEN is unknown (did you mean IBID_"),
        ("IBID_LANE__EDGE__MODLE", "is unknown (did you mean IBID_LANE__EDGE__MODEL?)"),
        ("IBID_XYZZY", "IBID_XYZZY is unknown"),
        ("IBID_", "IBID_ is unknown"),
    ],
)
def test_a_variable_that_is_no_setting_is_an_error_even_when_empty(variable: str, words: str) -> None:
    for value in ("canary", ""):
        with pytest.raises(ConfigError) as caught:
            load(Flags(), {**HOME, variable: value})
        assert words in caught.value.message
        assert "canary" not in caught.value.message


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("IBID_CACHE__SEMANTIC", "maybe", "IBID_CACHE__SEMANTIC must be written as in TOML"),
        ("IBID_CACHE__SEMANTIC", "1", "IBID_CACHE__SEMANTIC must be true or false"),
        ("IBID_CACHE__TTL_S", "nan", "IBID_CACHE__TTL_S must be a finite number"),
        ("IBID_CACHE__TTL_S", "1\nx = 2", "IBID_CACHE__TTL_S must be written as in TOML"),
        ("IBID_CACHE__MAX_ERROR_RATE", "0.9", "IBID_CACHE__MAX_ERROR_RATE must be between 0 and 0.5"),
        ("IBID_SERVER__LISTEN", "nonsense", 'IBID_SERVER__LISTEN must be "HOST:PORT"'),
        ("IBID_SERVER__WORKERS", "2", "IBID_SERVER__WORKERS (--workers) above 1 is not supported yet"),
        ("IBID_UPSTREAM__LAB__MODELS", "my-*", "IBID_UPSTREAM__LAB__MODELS must be written as in TOML"),
        ("IBID_UPSTREAM__LAB__DIALECT", "openai", "upstream.lab.base_url must be http://HOST"),
        ("IBID_UPSTREAM__LAB__KEY_ENV", "NO_KEY", "upstream.lab"),
        ("IBID_POLICY", "[{ plan = ['warp'] }]", "IBID_POLICY: policy.0.plan is not a plan"),
        ("IBID_STORE__DATABASE_URL", "mysql://u:canary@h/d", "IBID_STORE__DATABASE_URL must begin with"),
        ("IBID_DATABASE_URL", "mysql://u:canary@h/d", "IBID_DATABASE_URL must begin with"),
        ("IBID_LISTEN", "nonsense", 'IBID_LISTEN must be "HOST:PORT"'),
        ("IBID_ADMIN", "127.0.0.1:4141", "IBID_ADMIN is the client listener's address"),
        ("IBID_DATA_DIR", "a\0b", "IBID_DATA_DIR must be the path of a folder"),
        ("IBID_LOG_LEVEL", "loud", "IBID_LOG_LEVEL must be one of DEBUG, INFO"),
    ],
)
def test_a_mistake_in_a_variable_names_it(variable: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(Flags(), {**HOME, variable: value})
    assert words in caught.value.message
    assert "\n" not in caught.value.message
    assert "canary" not in caught.value.message


def test_a_variable_beats_the_file_and_a_flag_beats_both(tmp_path: Path) -> None:
    flags = written(tmp_path, "[upstream.my-lab]\nbase_url = 'http://file'\n[server]\nlisten = '127.0.0.1:1'\n")
    environ = {
        **HOME, "IBID_SERVER__LISTEN": "127.0.0.1:2", "IBID_UPSTREAM__MY_LAB__BASE_URL": "http://variable",
        "IBID_UPSTREAM": "http://all", "IBID_UPSTREAM__GEMINI__BASE_URL": "http://own",
    }  # fmt: skip
    settings = load(flags, environ)
    assert settings.server.listen.port == 2
    urls = {name: upstream.base_url for name, upstream in settings.upstreams.items()}
    assert urls == {"my-lab": "http://variable", "gemini": "http://own"} | dict.fromkeys(
        ("openai", "anthropic", "ollama"), "http://all"
    )
    chosen = load(dataclasses.replace(flags, listen="127.0.0.1:3", upstream="http://flag"), environ)
    assert (chosen.server.listen.port, chosen.upstreams["gemini"].base_url) == (3, "http://flag")
    with pytest.raises(ConfigError, match="IBID_LISTEN and IBID_SERVER__LISTEN are one setting"):
        load(flags, {**environ, "IBID_LISTEN": "127.0.0.1:4"})
    assert load(flags, {**HOME, "IBID_SERVER__LISTEN": ""}).server.listen.port == 1


@pytest.mark.parametrize(
    "variable",
    ["IBID_TEST_MODELS", "IBID_TEST_LLM", "IBID_BIN", "IBID_RUNNING", "IBID_OPENAI2_PYTHON", "IBID_SCHEMATHESIS",
     "IBID_SERVICE_HOST", "IBID_SERVICE_PORT", "IBID_SERVICE_PORT_HTTP", "IBID_PORT", "IBID_PORT_4141_TCP",
     "IBID_PORT_4141_TCP_ADDR", "IBID_ADMIN_SERVICE_HOST", "IBID_ADMIN_PORT_4142_TCP_PROTO"],
)  # fmt: skip
def test_what_others_set_beside_us_is_no_setting(variable: str) -> None:
    assert load(Flags(), {**HOME, variable: "tcp://10.0.0.1:4141"}) == load(Flags(), HOME)


def test_what_make_gives_the_tests_is_no_setting() -> None:
    exported = re.findall(r"(?m)^export (IBID_\w+)", (Path(__file__).parents[2] / "Makefile").read_text())
    assert len(exported) > 5
    assert load(Flags(), {**HOME, **dict.fromkeys(exported, "/tmp/x")}) == load(Flags(), HOME)


def test_the_variable_of_an_upstreams_key_may_be_called_what_it_likes() -> None:
    environ = {**HOME, "IBID_UPSTREAM__OPENAI__KEY_ENV": "IBID_OPENAI_KEY", "IBID_OPENAI_KEY": "sk-1"}
    assert load(Flags(), environ).upstreams["openai"].key == "sk-1"
