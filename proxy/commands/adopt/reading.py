"""A peer's file as a tree: YAML, JSON, lines of headers, or lines of an environment file."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Final

import yaml

from proxy.core.errors import ConfigError

LIMIT_BYTES: Final = 1024 * 1024
_HEADER: Final = re.compile(r"""["']?([!#$%&'*+.^_`|~0-9A-Za-z-]+)["']?\s*[:=]\s*(.*)""")
_VARIABLE: Final = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*)")
VARIABLE_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def text_of(name: str) -> str:
    """The text of a file, of standard input for "-". Raises ConfigError."""
    try:
        raw = sys.stdin.buffer.read(LIMIT_BYTES + 1) if name == "-" else _start_of(Path(name))
        if len(raw) > LIMIT_BYTES:
            raise ConfigError(f"{name}: is larger than {LIMIT_BYTES} bytes")
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: byte {error.start} is not UTF-8") from error


def _start_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(LIMIT_BYTES + 1)


def tree(text: str, name: str) -> dict[str, Any]:
    """A YAML or JSON object; an empty file is an empty one. Raises ConfigError, quoting nothing of the file."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(
            f"{name}{where}: is not YAML or JSON: {getattr(error, 'problem', None) or 'unreadable'}"
        ) from error
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{name}: is not YAML or JSON") from error
    return table(found, name)


def headers(text: str, name: str) -> dict[str, str]:
    """Headers by lower-case name: a JSON or YAML object, or lines "Name: value". Raises ConfigError."""
    if text.lstrip().startswith("{"):
        return {
            key.lower(): value if isinstance(value, str) else json.dumps(value)
            for key, value in tree(text, name).items()
        }
    found = {}
    for line in text.splitlines():
        said = _HEADER.match(line.strip().removeprefix("-H ").strip("'\","))
        if said is not None:
            found[said[1].lower()] = said[2].strip().strip("\"',")
    if not found:
        raise ConfigError(f"{name}: has no header: write them as lines, Name: value")
    return found


def variables(text: str, name: str) -> dict[str, str]:
    """An environment file: NAME=value. Raises ConfigError for a line that is none."""
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        said = line.strip()
        if not said or said.startswith("#"):
            continue
        match = _VARIABLE.fullmatch(said)
        if match is None:
            raise ConfigError(f"{name}, line {number}: is not NAME=value")
        value = match[2].strip()
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
        found[match[1]] = value[1:-1] if quoted else re.sub(r"\s+#.*$", "", value)
    return found


def table(value: object, where: str) -> dict[str, Any]:
    """A table, an empty one for nothing. Raises ConfigError."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: must be a table of names and values")
    return {str(key): inner for key, inner in value.items()}


def tables(value: object, where: str) -> list[dict[str, Any]]:
    """A list of tables. Raises ConfigError."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise ConfigError(f"{where}: must be a list")
    return [table(inner, f"{where}[{number}]") for number, inner in enumerate(value)]


def number(value: object) -> Decimal | None:
    """A finite number, however it is written; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return None
    try:
        found = Decimal(str(value).strip())
    except InvalidOperation:
        return None
    return found if found.is_finite() else None


def seconds(value: object) -> float | None:
    """A positive number of seconds; None for anything else."""
    found = number(value)
    return float(found) if found is not None and found > 0 else None


def truth(value: object) -> bool | None:
    """Yes or no, however it is written; None for anything else."""
    if isinstance(value, bool):
        return value
    said = str(value).strip().lower()
    if said in ("true", "1", "yes", "on"):
        return True
    return False if said in ("false", "0", "no", "off") else None
