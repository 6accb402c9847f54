"""A provider's usage or cost export as lines to compare with the ledger.

The kind of export is told by its header, never by its file name. Rows that differ only in what the ledger does not
know (project, key, workspace, hour) become one line, so memory grows with days, models and tiers, not with the file.
Days are UTC. Numbers are exact: counters are integers, money is a Fraction of nano-dollars.

Shapes read from exports of 2025 and 2026: OpenAI's dashboard (usage of completions and of embeddings; costs), which
leaves a column empty that the export was not grouped by, and Anthropic's console (usage; costs, which name a model
"Claude Haiku 4.5" and round to cents).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import NamedTuple

from proxy.core.errors import ConfigError
from proxy.core.units import DAY_S, LAST_MS, NUSD_PER_USD

COUNTERS = ("calls", "in_tok", "cache_read_tok", "cache_write_tok", "out_tok")
COST = "cost_nusd"
ANY = "all"
"""A line's model or tier where the export does not tell them apart."""
NOT_BATCH = "not batch"
COARSEST_USD = Fraction(1, 100)  # no amount is taken for less exact than whole cents

_TIERS = {"standard": "default", "message": "default", "auto": "default"}
_WHOLE = re.compile(r"[0-9]{1,18}(\.0+)?")
_DATED = re.compile(r"-([0-9]{4}-[0-9]{2}-[0-9]{2}|[0-9]{8}|latest)$")


class Key(NamedTuple):
    """What a line is of."""

    day: str
    model: str
    tier: str


@dataclass(slots=True)
class Line:
    """Sums of one key. `number`: the first line of it in the file; `slack_nusd`: what rounding may explain."""

    number: int | None = None
    counters: dict[str, int] = field(default_factory=dict)
    cost_nusd: Fraction = Fraction(0)
    slack_nusd: Fraction = Fraction(0)


class Shape(NamedTuple):
    """One kind of export. `counters`: ours → the columns that sum to it; an absent optional column is not compared."""

    name: str
    needs: frozenset[str]
    counters: Mapping[str, tuple[str, ...]]
    cost: str | None
    provider: str | None  # as the price list calls it; None: any upstream
    operations: str  # "all", "embeddings", or "others" than those
    key: Callable[[Mapping[str, str]], Key]
    currency: str | None = None


@dataclass(frozen=True, slots=True)
class Invoice:
    """A read export. `measures`: what it tells, of COUNTERS and COST, in that order."""

    shape: Shape
    measures: tuple[str, ...]
    lines: Mapping[Key, Line]
    has_models: bool
    tiers: str  # "each", "batch" (or not) or "none" told apart

    def within(self, since_day: str | None, until_day: str | None) -> Invoice:
        """The lines of these days alone, both inclusive; None leaves an end open."""
        first, last = since_day or "", until_day or "9999"
        return replace(self, lines={key: line for key, line in self.lines.items() if first <= key.day <= last})

    def ledger_key(self, day: str, model: str, tier: str) -> Key:
        """Where a call of the ledger belongs in this export."""
        if self.tiers == "batch":
            tier = tier if tier == "batch" else NOT_BATCH
        return Key(day, model if self.has_models else ANY, ANY if self.tiers == "none" else tier)


def read(rows: Iterable[str], source: str) -> Invoice:
    """The export in these lines of CSV. Raises ConfigError naming `source`, the line, and what was expected there."""
    table = csv.reader(rows, strict=True)
    lines: dict[Key, Line] = {}
    try:
        header = [name.strip().lower() for name in next(table, [])]
        shape = _shape_of(header, source)
        told = {name: columns for name, columns in shape.counters.items() if _all_there(columns, header)}
        cost = shape.cost if shape.cost in header else None
        for cells in table:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise ValueError(f"has {len(cells)} columns, its header {len(header)}")
            _add(lines, shape, told, cost, dict(zip(header, map(str.strip, cells), strict=True)), table.line_num)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}, after line {table.line_num}: not UTF-8 text") from error
    except (ValueError, csv.Error) as error:
        raise ConfigError(f"{source}, line {max(table.line_num, 1)}: {error}") from error
    measures = tuple(name for name in COUNTERS if name in told) + ((COST,) if cost else ())
    return _resolved(shape, measures, lines)


def _shape_of(header: list[str], source: str) -> Shape:
    found = next((shape for shape in SHAPES if shape.needs <= set(header) and _tells_something(shape, header)), None)
    if found is None or len(set(header)) != len(header):
        known = "; ".join(f"{shape.name} ({', '.join(sorted(shape.needs))})" for shape in SHAPES)
        raise ConfigError(f"{source}: no header of a known export; expected one of: {known}, and a counter or cost_usd")
    return found


def _tells_something(shape: Shape, header: list[str]) -> bool:
    return shape.cost in header or any(_all_there(columns, header) for columns in shape.counters.values())


def _all_there(columns: tuple[str, ...], header: list[str]) -> bool:
    return all(column in header for column in columns)


def _add(
    lines: dict[Key, Line], shape: Shape, told: Mapping[str, tuple[str, ...]], cost: str | None,
    row: Mapping[str, str], number: int,
) -> None:  # fmt: skip
    counted = [column for columns in told.values() for column in columns]
    if not any(row[column] for column in [*counted, *([cost] if cost else [])]):
        return  # a day on which nothing was used
    if shape.currency and row.get(shape.currency, "").lower() not in ("", "usd"):
        raise ValueError(f"{shape.currency} is {row[shape.currency]!r}, and the ledger is in USD")
    line = lines.setdefault(shape.key(row), Line(number))
    for name, columns in told.items():
        line.counters[name] = line.counters.get(name, 0) + sum(_whole(column, row[column]) for column in columns)
    if cost:
        nusd, slack = _amount(cost, row[cost])
        line.cost_nusd += nusd
        line.slack_nusd += slack


def _resolved(shape: Shape, measures: tuple[str, ...], lines: Mapping[Key, Line]) -> Invoice:
    """Give the tiers that were left open the meaning that the whole file gives them."""
    has_models = any(key.model != ANY for key in lines)
    named = {key.tier for key in lines} - {ANY, NOT_BATCH}
    if named - {"batch"}:
        tiers, instead = "each", {ANY: "default", NOT_BATCH: "default"}
    elif named or any(key.tier == NOT_BATCH for key in lines):
        tiers, instead = "batch", {ANY: NOT_BATCH}
    else:
        tiers, instead = "none", {}
    found: dict[Key, Line] = {}
    for key, line in lines.items():
        key = key._replace(tier=instead.get(key.tier, key.tier))
        if key not in found:
            found[key] = line
            continue
        add(found[key], line)
    return Invoice(shape, measures, found, has_models, tiers)


def add(line: Line, other: Line) -> None:
    """Sum another line into the first."""
    line.number = other.number if line.number is None else line.number
    for name, count in other.counters.items():
        line.counters[name] = line.counters.get(name, 0) + count
    line.cost_nusd += other.cost_nusd
    line.slack_nusd += other.slack_nusd


def family(model: str) -> str:
    """The model without its date: exports name the snapshot, clients often the alias."""
    return _DATED.sub("", model)


def _whole(column: str, text: str) -> int:
    if text and not _WHOLE.fullmatch(text):
        raise ValueError(f"{column} is {text[:40]!r}, not a whole number")
    return int(text.partition(".")[0] or 0)


def _amount(column: str, text: str) -> tuple[Fraction, Fraction]:
    """An amount in nano-dollars, and half of its last digit's worth."""
    try:
        usd = Decimal(text or "0")
    except InvalidOperation:
        usd = Decimal("NaN")
    exponent = usd.as_tuple().exponent
    if not isinstance(exponent, int) or abs(usd) >= NUSD_PER_USD or not -60 <= exponent <= 9:
        raise ValueError(f"{column} is {text[:40]!r}, not an amount of USD")
    unit = min(Fraction(10) ** exponent, COARSEST_USD) if text else Fraction(0)
    return Fraction(usd) * NUSD_PER_USD, unit * NUSD_PER_USD / 2


def _day(column: str, text: str) -> str:
    try:
        return date.fromisoformat(text[:10]).isoformat()
    except ValueError as error:
        raise ValueError(f"{column} is {text[:40]!r}, not a day such as 2026-11-22") from error


def _bucket_day(row: Mapping[str, str]) -> str:
    """The UTC day of a bucket, which must not reach into the next."""
    begin_s = _whole("start_time", row["start_time"])
    end_s = _whole("end_time", row.get("end_time") or str(begin_s + 1))
    if not begin_s < end_s <= (begin_s // DAY_S + 1) * DAY_S or begin_s * 1000 > LAST_MS:
        raise ValueError("its start_time and end_time are not within one day of UTC: export days, hours or minutes")
    return datetime.fromtimestamp(begin_s, UTC).date().isoformat()


def _tier(text: str) -> str:
    return _TIERS.get(text.lower(), text.lower()) or ANY


def _openai_usage(row: Mapping[str, str]) -> Key:
    tier, batch = _tier(row.get("service_tier", "")), row.get("batch", "").lower()
    if batch == "true":
        tier = "batch"
    elif tier == ANY and batch == "false":
        tier = NOT_BATCH
    return Key(_bucket_day(row), row.get("model") or ANY, tier)


def _openai_costs(row: Mapping[str, str]) -> Key:
    return Key(_bucket_day(row), row["line_item"].partition(",")[0].strip() or ANY, ANY)


def _anthropic_usage(row: Mapping[str, str]) -> Key:
    tier = row.get("service_tier") or row.get("usage_type", "")
    return Key(_day("usage_date_utc", row["usage_date_utc"]), row["model_version"] or ANY, _tier(tier))


def _anthropic_costs(row: Mapping[str, str]) -> Key:
    """The display name in the form of an id: "Claude Haiku 4.5" → "claude-haiku-4-5"."""
    model = re.sub(r"[ .]+", "-", row["model"].lower())
    return Key(_day("usage_date_utc", row["usage_date_utc"]), model or ANY, _tier(row.get("usage_type", "")))


def _plain(row: Mapping[str, str]) -> Key:
    return Key(_day("day", row["day"]), row["model"] or ANY, _tier(row.get("tier", "")))


_OPENAI = {"calls": ("num_model_requests",), "in_tok": ("input_tokens",), "cache_read_tok": ("input_cached_tokens",)}
_ANTHROPIC = "usage_input_tokens_"
_WRITES = (f"{_ANTHROPIC}cache_write_5m", f"{_ANTHROPIC}cache_write_1h")

SHAPES = (
    Shape(
        "OpenAI completions usage",
        frozenset({"start_time", "end_time", "num_model_requests", "input_tokens", "output_tokens"}),
        {**_OPENAI, "out_tok": ("output_tokens",)}, None, "openai", "others", _openai_usage,
    ),
    Shape(
        "OpenAI embeddings usage",
        frozenset({"start_time", "end_time", "num_model_requests", "input_tokens"}),
        _OPENAI, None, "openai", "embeddings", _openai_usage,
    ),
    Shape(
        "OpenAI costs",
        frozenset({"start_time", "end_time", "amount_value", "line_item"}),
        {}, "amount_value", "openai", "all", _openai_costs, "amount_currency",
    ),
    Shape(
        "Anthropic usage",
        frozenset({"usage_date_utc", "model_version", f"{_ANTHROPIC}no_cache", f"{_ANTHROPIC}cache_read", *_WRITES,
                   "usage_output_tokens"}),
        {
            "in_tok": (f"{_ANTHROPIC}no_cache", f"{_ANTHROPIC}cache_read", *_WRITES),
            "cache_read_tok": (f"{_ANTHROPIC}cache_read",),
            "cache_write_tok": _WRITES,
            "out_tok": ("usage_output_tokens",),
        },
        "cost_usd", "anthropic", "all", _anthropic_usage,
    ),
    Shape(
        "Anthropic costs",
        frozenset({"usage_date_utc", "model", "token_type", "cost_usd"}),
        {}, "cost_usd", "anthropic", "all", _anthropic_costs,
    ),
    Shape(
        "plain",
        frozenset({"day", "model"}),
        {name: (name,) for name in COUNTERS}, "cost_usd", None, "all", _plain,
    ),
)  # fmt: skip
