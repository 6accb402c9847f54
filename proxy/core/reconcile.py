"""A provider's invoice against the ledger, line by line.

A counter is equal or it is not. An amount is equal when rounding explains the difference: half of the last digit of
every amount in the file, and half a nano-dollar of every call, which is what each side rounds by.

Models are compared by the names both sides give. Where one side has only the alias ("gpt-4o") and the other a dated
snapshot of it, the day's lines of that family and tier are compared as one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from proxy.core.invoice import COST, COUNTERS, Invoice, Key, Line, add, family
from proxy.core.units import NUSD_PER_USD

NOTES = ("estimated", "unpriced")
"""Counted of the ledger's calls alone: what to look at first where a line differs."""
EQUAL, DIFFERS, ONLY_INVOICE, ONLY_LEDGER = "equal", "differs", "only in invoice", "only in ledger"
_KEY_COLUMNS = ("line", "day", "model", "tier", "status")


class Billed(NamedTuple):
    """Calls of the ledger, summed. `estimated`: of usage the provider did not tell; `unpriced`: of no known price."""

    day: str
    model: str
    tier: str
    calls: int
    in_tok: int
    cache_read_tok: int
    cache_write_tok: int
    out_tok: int
    cost_nusd: int
    estimated: int = 0
    unpriced: int = 0


class Compared(NamedTuple):
    """One line of the result; the total has the model "" and no line."""

    key: Key
    status: str
    invoice: Line
    ledger: Line


@dataclass(frozen=True, slots=True)
class Reconciled:
    """`lines` by day, model and tier; `total` is their sum."""

    measures: tuple[str, ...]
    lines: Sequence[Compared]
    total: Compared

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what `rows` holds; a difference is the invoice less the ledger."""
        told = [part for name in self.measures if name != COST
                for part in (f"invoice_{name}", f"ledger_{name}", f"{name}_difference")]  # fmt: skip
        money = ("invoice_usd", "ledger_usd", "difference_nusd") if COST in self.measures else ()
        return (*_KEY_COLUMNS, *told, *money, *NOTES)

    def rows(self) -> list[tuple[object, ...]]:
        return [self._row(compared) for compared in (*self.lines, self.total)]

    def brief(self) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        """Columns and rows for a terminal: one cell a measure, "invoice - ledger = difference" where they differ."""
        names = tuple("usd" if name == COST else name for name in self.measures)
        rows: list[tuple[object, ...]] = []
        for key, status, invoice, ledger in (*self.lines, self.total):
            cells = [_cell(name, invoice, ledger) for name in self.measures]
            rows.append((invoice.number, *key, status, *cells, *_notes(ledger)))
        return (*_KEY_COLUMNS, *names, *NOTES), rows

    def _row(self, compared: Compared) -> tuple[object, ...]:
        key, status, invoice, ledger = compared
        row: list[object] = [invoice.number, *key, status]
        for name in self.measures:
            if name == COST:
                theirs, ours = invoice.cost_nusd, ledger.cost_nusd
                row += [round(theirs) / NUSD_PER_USD, round(ours) / NUSD_PER_USD, round(theirs - ours)]
            else:
                told, booked = invoice.counters.get(name, 0), ledger.counters.get(name, 0)
                row += [told, booked, told - booked]
        return (*row, *_notes(ledger))

    def unequal(self) -> dict[str, int]:
        """Status → lines, for all that are not equal."""
        counts: dict[str, int] = defaultdict(int)
        for compared in self.lines:
            if compared.status != EQUAL:
                counts[compared.status] += 1
        return dict(counts)


def reconcile(invoice: Invoice, billed: Iterable[Billed]) -> Reconciled:
    """Compare what the export tells with what was booked; `billed` is of the export's days alone."""
    told, booked = dict(invoice.lines), _lines_of(invoice, billed)
    one_line = _families(told, booked)
    told, booked = _renamed(told, one_line), _renamed(booked, one_line)
    lines, total = [], Compared(Key("total", "", ""), "", Line(), Line())
    for key in sorted(told.keys() | booked.keys()):
        theirs, ours = told.get(key, Line()), booked.get(key, Line())
        equal = _is_equal(theirs, ours, invoice.measures)
        if equal and key not in told:
            continue  # nothing billed and nothing told: an unpriced model in an export of costs
        status = EQUAL if equal else DIFFERS
        if not equal and (key not in told or key not in booked):
            status = ONLY_LEDGER if key not in told else ONLY_INVOICE
        lines.append(Compared(key, status, theirs, ours))
        add(total.invoice, theirs)
        add(total.ledger, ours)
    total.invoice.number = None
    status = EQUAL if all(compared.status == EQUAL for compared in lines) else DIFFERS
    return Reconciled(invoice.measures, lines, total._replace(status=status))


def _notes(ledger: Line) -> tuple[int, ...]:
    return tuple(ledger.counters.get(name, 0) for name in NOTES)


def _cell(name: str, invoice: Line, ledger: Line) -> str:
    if name == COST:
        theirs, ours = round(invoice.cost_nusd), round(ledger.cost_nusd)
        told, booked, difference = (_usd(nusd) for nusd in (theirs, ours, theirs - ours))
    else:
        theirs, ours = invoice.counters.get(name, 0), ledger.counters.get(name, 0)
        told, booked, difference = (str(count) for count in (theirs, ours, theirs - ours))
    return told if theirs == ours else f"{told} - {booked} = {difference}"


def _usd(nusd: int) -> str:
    text = f"{Decimal(nusd).scaleb(-9):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _lines_of(invoice: Invoice, billed: Iterable[Billed]) -> dict[Key, Line]:
    lines: dict[Key, Line] = {}
    for row in billed:
        counters = {name: getattr(row, name) for name in (*COUNTERS, *NOTES)}
        line = Line(None, counters, Fraction(row.cost_nusd), Fraction(row.calls, 2))
        add(lines.setdefault(invoice.ledger_key(row.day, row.model, row.tier), Line()), line)
    return lines


def _is_equal(theirs: Line, ours: Line, measures: Iterable[str]) -> bool:
    counters = [name for name in measures if name != COST]
    if any(theirs.counters.get(name, 0) != ours.counters.get(name, 0) for name in counters):
        return False
    slack = theirs.slack_nusd + ours.slack_nusd
    return COST not in measures or abs(theirs.cost_nusd - ours.cost_nusd) <= slack


def _families(told: Mapping[Key, Line], booked: Mapping[Key, Line]) -> frozenset[Key]:
    """Day, family and tier of the lines that only an alias can match."""
    names: dict[Key, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for side, keys in enumerate((told, booked)):
        for key in keys:
            names[key._replace(model=family(key.model))][side].add(key.model)
    return frozenset(
        one
        for one, (theirs, ours) in names.items()
        if theirs and ours and theirs != ours and one.model in theirs | ours
    )


def _renamed(lines: Mapping[Key, Line], one_line: frozenset[Key]) -> dict[Key, Line]:
    found: dict[Key, Line] = {}
    for key, line in lines.items():
        whole = key._replace(model=family(key.model))
        add(found.setdefault(whole if whole in one_line else key, Line()), line)
    return found
