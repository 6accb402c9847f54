"""What a command shows at a terminal: tables for people, JSON and CSV for machines, a bar for long work."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import orjson

CELL_CHARACTERS = 60
BAR_CHARACTERS = 30


def as_json(value: object) -> str:
    """Indented JSON with an end of line."""
    option = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS
    return orjson.dumps(value, option=option).decode()


def as_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned columns; numbers to the right, long cells cut, nothing that a terminal would obey."""
    shown = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(columns, *shown, strict=True)]
    to_right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        aligned = zip(cells, widths, to_right, strict=True)
        return "  ".join([cell.rjust(width) if right else cell.ljust(width) for cell, width, right in aligned]).rstrip()

    return "\n".join([line(columns), line(["-" * width for width in widths]), *(line(cells) for cells in shown)]) + "\n"


def as_csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """RFC 4180. Text a spreadsheet would run as a formula gets an apostrophe in front."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(columns)
    for row in rows:
        writer.writerow([f"'{v}" if isinstance(v, str) and v[:1] in ("=", "+", "-", "@", "\t") else v for v in row])
    return out.getvalue()


def render(form: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows as "table", "csv" or "json" (a list of objects)."""
    if form == "csv":
        return as_csv(columns, rows)
    if form == "json":
        return as_json([dict(zip(columns, row, strict=True)) for row in rows])
    return as_table(columns, rows)


def described(form: str, tables: Sequence[tuple[str, str, Mapping[str, str]]]) -> str:
    """What each table answers, and its columns with units: paragraphs, one CSV line a column, or a JSON list."""
    if form == "csv":
        rows = [(name, title, column, unit) for name, title, columns in tables for column, unit in columns.items()]
        return as_csv(("name", "title", "column", "unit"), rows)
    if form == "json":
        return as_json([{"name": name, "title": title, "columns": columns} for name, title, columns in tables])
    width = max(len(column) for _, _, columns in tables for column in columns)
    return "\n".join(
        f"{name}: {title}\n" + "".join(f"  {column:<{width}}  {unit}\n" for column, unit in columns.items())
        for name, title, columns in tables
    )


def flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """A nested object as (dotted name, value) rows."""
    rows: list[tuple[str, Any]] = []
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            rows += flat(inner, f"{prefix}{name}.")
        elif isinstance(inner, list) and any(isinstance(item, Mapping) for item in inner):
            for number, item in enumerate(inner):
                rows += flat(item if isinstance(item, Mapping) else {"": item}, f"{prefix}{name}[{number}].")
        else:
            rows.append((f"{prefix}{name}", inner))
    return rows


def printable(text: str) -> str:
    """The text with everything escaped that a terminal would obey."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode("ascii") for c in text)


def printable_lines(text: str) -> str:
    """As `printable`, line by line."""
    return "\n".join(printable(line) for line in text.split("\n"))


class Bar:
    """A progress bar on standard error; nothing when that is no terminal."""

    def __init__(self, what: str, total: int, stream: TextIO | None = None) -> None:
        self._what, self._total, self._done = what, total, 0
        self._stream = stream or sys.stderr
        self._shown = self._stream.isatty()

    def advance(self, count: int) -> None:
        self._done += count
        if self._shown:
            share = min(self._done / self._total, 1.0) if self._total else 1.0
            bar = ("#" * int(share * BAR_CHARACTERS)).ljust(BAR_CHARACTERS, ".")
            self._stream.write(f"\r{self._what} [{bar}] {self._done:,}/{self._total:,}")
            self._stream.flush()

    def close(self) -> None:
        if self._shown:
            self._stream.write("\n")


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.6f}".rstrip("0").rstrip(".") if abs(value) >= 1e-6 or value == 0 else f"{value:.3g}"
    if isinstance(value, list | tuple):
        value = ",".join(str(item) for item in value)
    text = printable(str(value))
    return text if len(text) <= CELL_CHARACTERS else text[: CELL_CHARACTERS - 1] + "…"
