"""A TOML file that knows its lines: fills frozen dataclasses from tables and refuses what it does not know.

`tomllib` gives values without positions, so the line of a key is found by reading the text once more; it is exact for
the layout people write (`[table]` headers, one key a line) and names the table's line for anything denser.

Values are read by hand. Tried on 30 November 2026: msgspec 0.23 lets NaN and infinity through where no bound stops
them, has no bounds for Decimal, passes over unknown names of a dataclass, and tells a mistake as one English sentence
that would have to be taken apart to say what is said here: 33 lines instead of 27, and 50 ms more at every start.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from proxy.core.errors import ConfigError

Kind = TypeVar("Kind")
Fail = Callable[[str], NoReturn]
Convert = Callable[[Any, Fail], Any]

_HEADER = re.compile(r"\s*\[\s*([^\[\]#]+?)\s*\]\s*(#.*)?$")
_ITEM = re.compile(r"\s*\[\[\s*([A-Za-z0-9_-]+)\s*\]\]\s*(#.*)?$")
_KEY = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'[^']*'|[A-Za-z0-9_-]+)\s*[.=]""")
FILE_LIMIT_BYTES = 1024 * 1024


class Document:
    """A parsed file, or an empty one. `values` is its tree; `path` is None when there is no file."""

    def __init__(self, values: dict[str, Any], text: str = "", path: Path | None = None) -> None:
        self.values = values
        self.path = path
        self.variables: dict[str, str] = {}  # setting → the environment variable that gave it
        self._lines = _line_numbers(text)

    @classmethod
    def read(cls, name: str | None) -> Document:
        """The file of that name. Raises ConfigError when it cannot be read or is not TOML."""
        if not name:
            return cls({})
        path = Path(name)
        try:
            with path.open("rb") as file:
                raw = file.read(FILE_LIMIT_BYTES + 1)
            text = raw.decode()
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: byte {error.start} is not UTF-8") from error
        if len(raw) > FILE_LIMIT_BYTES:
            raise ConfigError(f"{path}: is larger than {FILE_LIMIT_BYTES} bytes")
        try:
            return cls(tomllib.loads(text, parse_float=Decimal), text, path)
        except (tomllib.TOMLDecodeError, ArithmeticError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from error

    def fail(self, section: str, name: str, message: str) -> NoReturn:
        """Raises ConfigError with the file, the line and the setting's full name, or with the variable it came from."""
        label = ".".join(part for part in (section, name) if part)
        for setting, variable in self.variables.items():
            if setting == label:
                raise ConfigError(f"{variable} {message}", param=label)
            if label.startswith(f"{setting}.") or setting.startswith(f"{label}."):
                raise ConfigError(f"{variable}: {label} {message}", param=label)
        line = self._lines.get((section, name)) or self._lines.get((section, ""))
        place = f"{self.path or 'configuration'}{f', line {line}' if line else ''}"
        raise ConfigError(f"{place}: {label} {message}", param=label)

    def put(self, path: tuple[str, ...], value: Any, variable: str) -> None:
        """Set one value, which an environment variable gave."""
        table = self.values
        for depth, part in enumerate(path[:-1]):
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                self.fail(".".join(path[:depth]), part, "must be a table")
        table[path[-1]] = value
        self.variables[".".join(path)] = variable

    def table(self, section: str) -> Mapping[str, Any]:
        """The table of a dotted name, the whole file for ""; empty when absent."""
        found: Any = self.values
        parts = section.split(".") if section else []
        for depth, part in enumerate(parts):
            found = found.get(part, {})
            if not isinstance(found, dict):
                self.fail(".".join(parts[:depth]), part, "must be a table")
        return typing.cast("Mapping[str, Any]", found)

    def known(self, section: str, table: Mapping[str, Any], names: frozenset[str]) -> None:
        """Raises ConfigError for the first name of the table that is not one of these."""
        for name in table:
            if name not in names:
                close = _closest(name, names)
                self.fail(section, name, f"is unknown{f' (did you mean {close}?)' if close else ''}")

    def fill(
        self, section: str, table: Mapping[str, Any], base: Kind, convert: Convert | None = None, *others: type[Any]
    ) -> Kind:
        """`base` with what the table says, which may also hold settings of `others`. Raises ConfigError.

        `convert` is asked about types this module does not know.
        """
        kind = type(base)
        own = setting_names(kind)
        self.known(section, table, own.union(*map(setting_names, others)))
        changes = {
            name: converted(value, kind, name, partial(self.fail, section, name), convert)
            for name, value in table.items()
            if name in own
        }
        return dataclasses.replace(base, **changes)  # type: ignore[type-var]


def setting_names(kind: type[Any]) -> frozenset[str]:
    """Names a file may set: all fields but those marked `environment_only`."""
    return frozenset(spec.name for spec in dataclasses.fields(kind) if not spec.metadata.get("environment_only"))


def type_of(kind: type[Any], name: str) -> Any:
    """The type of a field; of "X | None" the X, for a file can give nothing else."""
    wanted = typing.get_type_hints(kind)[name]
    if isinstance(wanted, types.UnionType):
        (wanted,) = (option for option in wanted.__args__ if option is not types.NoneType)
    return wanted


def converted(value: Any, kind: type[Any], name: str, fail: Fail, convert: Convert | None = None) -> Any:
    """The value in the field's type and within its bounds; `fail` is called with what is wrong."""
    result = _of_type(value, type_of(kind, name), fail, convert)
    if isinstance(result, int | float | Decimal) and not isinstance(result, bool):
        (bounds,) = (spec.metadata for spec in dataclasses.fields(kind) if spec.name == name)
        _check_bounds(result, bounds, fail)
    return result


def _of_type(value: Any, wanted: Any, fail: Fail, convert: Convert | None) -> Any:
    if typing.get_origin(wanted) is typing.Literal:
        choices = typing.get_args(wanted)
        return value if value in choices else fail(f"must be one of {', '.join(choices)}")
    if wanted is bool:
        return value if isinstance(value, bool) else fail("must be true or false")
    if wanted is int:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return value if is_whole else fail("must be a whole number")
    if wanted in (float, Decimal):
        if not isinstance(value, int | float | Decimal) or isinstance(value, bool) or not math.isfinite(value):
            fail("must be a finite number")
        return wanted(value)
    if wanted is str:
        return value if isinstance(value, str) and value else fail("must be a string that is not empty")
    if wanted == tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            fail("must be a list of strings")
        return tuple(value)
    if convert is None:
        raise TypeError(f"no conversion for {wanted}")
    return convert(value, fail)


def _check_bounds(value: float | Decimal, bounds: Mapping[str, Any], fail: Fail) -> None:
    least, above, between, most = (bounds[name] for name in ("least", "above", "between", "most"))
    if value < least:
        fail(f"must be at least {least:g}")
    if above is not None and value <= above:
        fail(f"must be above {above:g}: nothing would ever be served")
    if between is not None and not between[0] <= value <= between[1]:
        fail(f"must be between {between[0]:g} and {between[1]:g}")
    if most is not None and value > most:
        fail(f"must be at most {most:g}")


def _closest(name: str, names: frozenset[str]) -> str | None:
    import difflib

    found = difflib.get_close_matches(name, sorted(names), n=1)
    return found[0] if found else None


def _line_numbers(text: str) -> dict[tuple[str, str], int]:
    """(table, key) → line, and (table, "") → the line of its header. The first of each counts."""
    lines: dict[tuple[str, str], int] = {}
    section = ""
    items: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if item := _ITEM.match(line):
            place = items[item[1]] = items.get(item[1], -1) + 1
            section = f"{item[1]}.{place}"
            lines.setdefault((section, ""), number)
        elif header := _HEADER.match(line):
            section = ".".join(_unquoted(part) for part in _parts(header[1]))
            lines.setdefault((section, ""), number)
            above, _, name = section.rpartition(".")
            lines.setdefault((above, name), number)
        elif key := _KEY.match(line):
            lines.setdefault((section, _unquoted(key[1])), number)
    return lines


def _parts(header: str) -> list[str]:
    return re.findall(r"""\s*("(?:[^"\\]|\\.)*"|'[^']*'|[^."']+?)\s*(?:\.|$)""", header)


def _unquoted(part: str) -> str:
    return part[1:-1] if part[:1] in "\"'" and part[-1:] == part[:1] and len(part) > 1 else part
