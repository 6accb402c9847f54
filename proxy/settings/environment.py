"""Settings from the environment: IBID_SECTION__NAME, two underscores for every dot of the setting's name.

    IBID_CACHE__SEMANTIC=false   IBID_UPSTREAM__LAB__MODELS='["llama-*"]'   IBID_ALIAS='{ fast = { plan = "exact" } }'

Text stands as it is, everything else as TOML writes it. A name that is nobody's is an error: a setting that was
mistyped would silently stay at its default.
"""

from __future__ import annotations

import difflib
import re
import tomllib
import typing
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, Final, NoReturn

from proxy.core.errors import ConfigError
from proxy.settings.file import Document, setting_names, type_of
from proxy.settings.lanes import LANES
from proxy.settings.sections import DEFAULT_UPSTREAMS, NAMED, SECTIONS, options

PREFIX: Final = "IBID_"
SHORT: Final[Mapping[str, str]] = {
    "IBID_LISTEN": "SERVER__LISTEN",
    "IBID_ADMIN": "SERVER__ADMIN",
    "IBID_DATABASE_URL": "STORE__DATABASE_URL",
    "IBID_LOG_LEVEL": "LOG__LEVEL",
}
"""Short forms, and what they stand for, less the prefix."""
OWN: Final = frozenset({"IBID_CONFIG", "IBID_UPSTREAM", "IBID_ADMIN_TOKEN"})
"""Read by `config` itself."""
WHOLE: Final[Mapping[tuple[str, ...], type[Any]]] = {
    ("policy",): dict, ("alias",): dict, ("prices", "override"): dict, ("data_dir",): str,
}  # fmt: skip
"""What a variable gives whole: tables with names it could not spell, and the one setting outside all tables."""

_OF_DEVELOPMENT: Final = re.compile(
    r"IBID_(TEST_\w+|BIN|RUNNING|[A-Z0-9]+_PYTHON|SCHEMATHESIS|SCHEMA_EXAMPLES|WRITE_GOLDEN|BENCH_DATA)"
)
_OF_KUBERNETES: Final = re.compile(  # set in every pod beside a Service whose name begins with "ibid"
    r"IBID_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)


def overlay(document: Document, environ: Mapping[str, str]) -> None:
    """Put what the environment says over what the file says. Empty is unset. Raises ConfigError naming the variable."""
    unknown = []
    for variable, text in sorted(environ.items()):
        if not variable.startswith(PREFIX) or variable in OWN:
            continue
        if _OF_DEVELOPMENT.fullmatch(variable) or _OF_KUBERNETES.fullmatch(variable):
            continue
        path = tuple(SHORT.get(variable, variable.removeprefix(PREFIX)).lower().split("__"))
        found = _place(document, path) if variable == variable.upper() else None
        if found is None:
            unknown.append(variable)
        elif text:
            place, wanted = found
            said = text.upper() if variable == "IBID_LOG_LEVEL" else text
            document.put(place, said if _is_text(wanted) else _toml(variable, said), variable)
    keys = [
        table.get(name)
        for section, name in (("upstream", "key_env"), ("admin.token", "token_env"))
        for table in document.table(section).values()
        if isinstance(table, dict)
    ]
    for variable in unknown:
        if variable not in keys:
            _refuse(variable)
    for short, rest in SHORT.items():
        if environ.get(short) and environ.get(PREFIX + rest):
            raise ConfigError(f"{short} and {PREFIX}{rest} are one setting: set one of them", param=short)


def _place(document: Document, path: tuple[str, ...]) -> tuple[tuple[str, ...], Any] | None:
    """Where in the file a variable's setting stands, and its type; None for no setting."""
    if path in WHOLE:
        return path, WHOLE[path]
    *above, name = path
    kinds: tuple[type[Any], ...] = ()
    match above:
        case [section] if section in SECTIONS:
            kinds = SECTIONS[section]
        case ["lane", lane] if lane in LANES:
            kinds = (LANES[lane],)
        case [*sections, table] if (section := ".".join(sections)) in NAMED:
            known = {**document.table(section), **(DEFAULT_UPSTREAMS if section == "upstream" else {})}
            above = [*sections, next((one for one in known if _spelled(one) == table), table)]
            kinds = (NAMED[section],)
    for kind in kinds:
        if name in setting_names(kind):
            return (*above, name), type_of(kind, name)
    return None


def _spelled(name: str) -> str:
    """A name as a variable can spell it, in lower case."""
    return re.sub(r"[^a-z0-9]", "_", name.lower())


def _is_text(wanted: Any) -> bool:
    return wanted not in (bool, int, float, Decimal, dict) and typing.get_origin(wanted) is not tuple


def _toml(variable: str, text: str) -> Any:
    try:
        read = tomllib.loads(f"value = {text}", parse_float=Decimal)
    except (tomllib.TOMLDecodeError, ArithmeticError, RecursionError):
        read = {}
    if read.keys() != {"value"}:
        raise ConfigError(f'{variable} must be written as in TOML: true, 10, ["a", "b"]', param=variable)
    return read["value"]


def _refuse(variable: str) -> NoReturn:
    close = difflib.get_close_matches(variable.upper(), sorted(_names(variable.split("__"))), n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ConfigError(f"{variable} is unknown{hint}", param=variable)


def _names(typed: list[str]) -> Iterator[str]:
    """Every variable there is; where an operator names a table, as it was typed."""
    yield from (*OWN, *SHORT, "IBID_DATA_DIR")
    for option in options():
        if option.section in ("", "policy"):
            continue
        parts = f"{PREFIX}{option.section}.{option.name}".upper().split(".")
        at = parts.index("NAME") if "NAME" in parts else -1
        if 0 < at < len(typed):
            parts[at] = typed[at].upper()
        yield "__".join(parts)
